// Attention over the block table and writing into the cache, as torch sees them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "attention_step.h"
#include "cache_write.h"
#include "memory.h"
#include "ops.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Rows = std::vector<AttentionRow>;

constexpr int64_t kFewQueries = 16;        // rows with more go through ATen's flash attention
constexpr int64_t kGrainBytes = 64 << 10;  // bytes below which a second thread costs more than it brings

// Splits that a row's queries can see.
struct Splits {
  int64_t first, count;
};

Splits splits_of(const AttentionStep& step, const AttentionRow& row) {
  const int64_t first = step.oldest(row) / kSplitTokens;
  return {first, (row.context + kSplitTokens - 1) / kSplitTokens - first};
}

// Floats of one query head's sums over one split.
int64_t part_floats(const AttentionStep& step) { return (step.cache.head_dim + 2 + 15) / 16 * 16; }

// The row's work, split by split. sums: [split][query][head][part].
void add_items(const AttentionStep& step, const AttentionRow& row, float* sums, std::vector<AttentionItem>& items) {
  const Splits splits = splits_of(step, row);
  const int64_t heads = step.heads(), group = step.group(), part = part_floats(step);
  const float* queries = step.q.const_data_ptr<float>() + row.first_query * step.q.stride(0);
  for (int64_t split = 0; split < splits.count; ++split) {
    for (int64_t head = 0; head < step.cache.heads; ++head) {
      AttentionItem item;
      item.queries = queries + head * group * step.q.stride(1);
      item.query_stride = step.q.stride(0);
      item.query_head_stride = step.q.stride(1);
      item.scale = static_cast<float>(step.scale);
      item.num_queries = static_cast<int>(row.num_queries);
      item.group = static_cast<int>(group);
      item.first_position = row.context - row.num_queries;
      item.window = step.window;
      item.blocks = step.blocks(row);
      item.head = head;
      item.begin = (splits.first + split) * kSplitTokens;
      item.end = std::min(item.begin + kSplitTokens, row.context);
      item.out = sums + (split * row.num_queries * heads + head * group) * part;
      item.out_query_stride = heads * part;
      item.out_head_stride = part;
      items.push_back(item);
    }
  }
}

// What is left of the row once its items are done: one piece a query and head.
void add_sums(const AttentionStep& step, const AttentionRow& row, float* sums, const Tensor& out,
              std::vector<AttentionSums>& left) {
  const int64_t heads = step.heads(), dim = step.cache.head_dim, part = part_floats(step);
  auto* to = static_cast<uint8_t*>(out.data_ptr()) + row.first_query * heads * dim * out.element_size();
  for (int64_t i = 0; i < row.num_queries * heads; ++i) {
    left.push_back({sums + i * part, splits_of(step, row).count, row.num_queries * heads * part, dim, dtype_of(out),
                    to + i * dim * out.element_size()});
  }
}

// Rows of few queries, fp32: memory-bound, straight from the blocks.
void attend_few(const AttentionStep& step, const Rows& rows, Tensor& out) {
  const int64_t token_bytes = step.cache.head_dim * 2 * step.cache.element_bytes();
  int64_t parts = 0, bytes = 0;
  for (const AttentionRow& row : rows) {
    parts += splits_of(step, row).count * row.num_queries * step.heads();
    bytes += (row.context - step.oldest(row)) * step.cache.heads * token_bytes;
  }
  Scratch& scratch = Scratch::of_thread();
  scratch.reserve(parts * part_floats(step) * sizeof(float) + 64);
  float* sums = scratch.take<float>(parts * part_floats(step));
  std::vector<AttentionItem> items;
  std::vector<AttentionSums> left;
  for (const AttentionRow& row : rows) {
    add_items(step, row, sums, items);
    add_sums(step, row, sums, out, left);
    sums += splits_of(step, row).count * row.num_queries * step.heads() * part_floats(step);
  }
  const AttentionKernels& kernels = attention_kernels();
  const auto grain = [](int64_t all_bytes, size_t pieces) {
    return std::max<int64_t>(1, kGrainBytes * static_cast<int64_t>(pieces) / std::max<int64_t>(all_bytes, 1));
  };
  at::parallel_for(0, items.size(), grain(bytes, items.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.run(step.cache, items[i], i + 1 < end ? &items[i + 1] : nullptr);
  });
  const int64_t sum_bytes = parts * part_floats(step) * static_cast<int64_t>(sizeof(float));
  at::parallel_for(0, left.size(), grain(sum_bytes, left.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels.combine(left[i]);
  });
}

PagedCache paged_cache(const Tensor& keys, const Tensor& values, const OptionalTensor& key_scales,
                       const OptionalTensor& value_scales) {
  TORCH_CHECK(keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() && keys.sizes() == values.sizes() &&
                  keys.scalar_type() == values.scalar_type(),
              "the caches are alike, [blocks, heads, block_size, D] and contiguous");
  check_scales(keys, key_scales);
  check_scales(values, value_scales);
  PagedCache cache;
  cache.keys = keys.const_data_ptr(), cache.values = values.const_data_ptr();
  cache.heads = keys.size(1), cache.block_size = keys.size(2), cache.head_dim = keys.size(3);
  if (key_scales) {
    cache.key_scales = key_scales->const_data_ptr<float>(), cache.value_scales = value_scales->const_data_ptr<float>();
  } else {
    cache.dtype = dtype_of(keys);
  }
  return cache;
}

}  // namespace

Tensor paged_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& block_table,
                       const Tensor& query_start, const Tensor& context_lens, double scale, int64_t window,
                       const OptionalTensor& key_scales, const OptionalTensor& value_scales) {
  const PagedCache cache = paged_cache(keys, values, key_scales, value_scales);
  TORCH_CHECK(q.dim() == 3 && q.size(2) == keys.size(3) && q.size(1) % keys.size(1) == 0 && q.size(2) % 16 == 0, "q ",
              q.sizes(), ", cache ", keys.sizes());
  TORCH_CHECK(block_table.scalar_type() == at::kInt && query_start.scalar_type() == at::kInt &&
                  context_lens.scalar_type() == at::kInt && block_table.stride(1) == 1,
              "the block table, query_start and context_lens are int32");
  const int64_t num_rows = context_lens.size(0);
  TORCH_CHECK(query_start.size(0) == num_rows + 1 && block_table.size(0) >= num_rows, num_rows, " rows have ",
              query_start.size(0), " query_start and ", block_table.size(0), " lines of the block table");
  const int32_t* starts = query_start.const_data_ptr<int32_t>();
  const int32_t* contexts = context_lens.const_data_ptr<int32_t>();
  Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  AttentionStep step{q.stride(2) == 1 ? q : q.contiguous(), cache, block_table, scale, window};
  Rows few, many;
  for (int64_t r = 0; r < num_rows; ++r) {
    const AttentionRow row{r, starts[r], starts[r + 1] - starts[r], contexts[r]};
    if (row.num_queries <= 0) continue;
    TORCH_CHECK(row.context >= row.num_queries && row.context <= block_table.size(1) * keys.size(2) &&
                    starts[r + 1] <= q.size(0),
                "row ", r, " has ", row.num_queries, " queries and a context of ", row.context);
    (row.num_queries <= kFewQueries ? few : many).push_back(row);
  }
  const int64_t used = num_rows > 0 ? starts[num_rows] : 0;
  if (used < q.size(0)) out.narrow(0, used, q.size(0) - used).zero_();
  for (const AttentionRow& row : many) attend_prompt(step, row, out);
  if (few.empty()) return out;
  step.q = step.q.to(at::kFloat);
  attend_few(step, few, out);
  return out;
}

namespace {

void cache_write(const Tensor& k, const Tensor& v, Tensor& keys, Tensor& values, const Tensor& slots,
                 const OptionalTensor& key_scales, const OptionalTensor& value_scales) {
  TORCH_CHECK(k.dim() == 3 && k.sizes() == v.sizes() && keys.dim() == 4 && keys.sizes() == values.sizes() &&
                  keys.is_contiguous() && values.is_contiguous() && k.size(1) == keys.size(1) &&
                  k.size(2) == keys.size(3) && slots.size(0) == k.size(0),
              "k ", k.sizes(), ", cache ", keys.sizes(), ", slots ", slots.sizes());
  check_scales(keys, key_scales);
  check_scales(values, value_scales);
  const int64_t heads = keys.size(1), block_size = keys.size(2), head_dim = keys.size(3);
  const Tensor slots_long = slots.to(at::kLong).contiguous();
  const int64_t* slot = slots_long.const_data_ptr<int64_t>();
  std::vector<float> buffer(head_dim);
  const auto write = [&](const Tensor& from, Tensor& to, const OptionalTensor& scales) {
    const Tensor rows = from.stride(2) == 1 ? from : from.contiguous();
    for (int64_t t = 0; t < rows.size(0); ++t) {
      TORCH_CHECK(slot[t] >= 0 && slot[t] < to.size(0) * block_size, "slot ", slot[t], " lies outside the cache");
      for (int64_t h = 0; h < heads; ++h) {
        read_floats(rows, t * rows.stride(0) + h * rows.stride(1), head_dim, 1.0f, buffer.data());
        write_cached(to, scales, h, slot[t], buffer.data());
      }
    }
  };
  write(k, keys, key_scales);
  write(v, values, value_scales);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start, "
      "Tensor context_lens, float scale, int window, Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
      "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) {
  m.impl("paged_attention", &paged_attention);
  m.impl("cache_write", &cache_write);
}

}  // namespace tp
