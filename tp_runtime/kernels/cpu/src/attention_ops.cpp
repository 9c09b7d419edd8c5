// Attention over the block table and writing into the cache, as torch sees them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "memory.h"
#include "ops.h"
#include "scalar.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;

constexpr int64_t kFewQueries = 16;        // rows with more go through ATen's flash attention
constexpr int64_t kGrainBytes = 64 << 10;  // cache bytes below which a second thread costs more than it brings

// One row of the step that brings queries.
struct Row {
  int64_t index, first_query, num_queries, context;
};

struct Step {
  Tensor q;  // [T, H, D], head_dim contiguous
  const Tensor& keys;
  const Tensor& values;
  const Tensor& block_table;
  double scale;
  int64_t window;
  int64_t group() const { return q.size(1) / keys.size(1); }
};

// A prompt, or a long chunk of one: compute-bound, so the row's blocks are gathered and multiplied by ATen.
void attend_many(const Step& step, const Row& row, Tensor& out) {
  const int64_t block_size = step.keys.size(2), num_blocks = (row.context + block_size - 1) / block_size;
  const Tensor blocks = step.block_table.select(0, row.index).narrow(0, 0, num_blocks).to(at::kLong);
  // Against a bf16 cache, queries are rounded to bf16 too: the matrix units multiply nothing finer.
  const bool bf16 = step.keys.scalar_type() == at::kBFloat16 && step.q.scalar_type() == at::kFloat;
  const auto dtype = bf16 ? at::kBFloat16 : step.q.scalar_type();
  const auto gathered = [&](const Tensor& cache) {
    const Tensor rows = cache.index_select(0, blocks).permute({1, 0, 2, 3}).reshape({cache.size(1), -1, cache.size(3)});
    return rows.narrow(1, 0, row.context).to(dtype).unsqueeze(0);
  };
  std::optional<Tensor> mask;
  const bool whole = row.num_queries == row.context && (step.window == 0 || row.context <= step.window);
  if (!whole) {
    const Tensor query = at::arange(row.context - row.num_queries, row.context, at::kLong).unsqueeze(1);
    const Tensor age = query.sub(at::arange(row.context, at::kLong).unsqueeze(0));
    mask = step.window == 0 ? age.ge(0) : age.ge(0).logical_and(age.lt(step.window));
  }
  const Tensor q = step.q.narrow(0, row.first_query, row.num_queries).to(dtype).transpose(0, 1).unsqueeze(0);
  const Tensor y = at::scaled_dot_product_attention(q, gathered(step.keys), gathered(step.values), mask, 0.0, whole,
                                                    step.scale, /*enable_gqa=*/true);
  out.narrow(0, row.first_query, row.num_queries).copy_(y.squeeze(0).transpose(0, 1));
}

// Splits that a row's queries can see.
struct Splits {
  int64_t first, count;
};

Splits splits_of(const Step& step, const Row& row) {
  const int64_t oldest = step.window > 0 ? row.context - row.num_queries + 1 - step.window : 0;
  const int64_t first = oldest > 0 ? oldest / kSplitTokens : 0;
  return {first, (row.context + kSplitTokens - 1) / kSplitTokens - first};
}

// Sums of all splits of one query head -> its output.
void combine(const float* parts, int64_t count, int64_t stride, int64_t head_dim, float* out) {
  float top = parts[head_dim];
  for (int64_t i = 1; i < count; ++i) top = std::max(top, parts[i * stride + head_dim]);
  float weight = 0;
  for (int64_t d = 0; d < head_dim; ++d) out[d] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* part = parts + i * stride;
    if (part[head_dim + 1] == 0.0f) continue;  // saw nothing here
    const float factor = std::exp(part[head_dim] - top);
    weight += factor * part[head_dim + 1];
    for (int64_t d = 0; d < head_dim; ++d) out[d] += factor * part[d];
  }
  for (int64_t d = 0; d < head_dim; ++d) out[d] /= weight;
}

// Rows of few queries: memory-bound, straight from the blocks.
void attend_few(const Step& step, const std::vector<Row>& rows, Tensor& out) {
  const int64_t heads = step.q.size(1), head_dim = step.q.size(2), kv_heads = step.keys.size(1), group = step.group();
  const int64_t part_floats = (head_dim + 2 + 15) / 16 * 16;
  const PagedCache cache{step.keys.const_data_ptr(), step.values.const_data_ptr(), dtype_of(step.keys), kv_heads,
                         step.keys.size(2), head_dim};
  const AttentionKernels& kernel = active_isa() >= Isa::kAvx512 ? attention_avx512 : attention_avx2;
  std::vector<AttentionItem> items;
  std::vector<int64_t> part_starts;
  int64_t queries = 0, parts = 0, visible = 0;
  for (const Row& row : rows) {
    part_starts.push_back(parts);
    queries += row.num_queries;
    parts += splits_of(step, row).count * row.num_queries * heads;
    visible += splits_of(step, row).count * kSplitTokens;
  }
  Scratch& scratch = Scratch::of_thread();
  scratch.reserve((queries * heads * head_dim + parts * part_floats) * sizeof(float) + 128);
  float* scaled = scratch.take<float>(queries * heads * head_dim);
  float* sums = scratch.take<float>(parts * part_floats);
  int64_t done = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    float* row_queries = scaled + done * heads * head_dim;
    done += row.num_queries;
    for (int64_t i = 0; i < row.num_queries; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t from = (row.first_query + i) * step.q.stride(0) + h * step.q.stride(1);
        read_floats(step.q, from, head_dim, static_cast<float>(step.scale), row_queries + (i * heads + h) * head_dim);
      }
    }
    const Splits splits = splits_of(step, row);
    for (int64_t split = 0; split < splits.count; ++split) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        AttentionItem item;
        item.queries = row_queries + head * group * head_dim;
        item.query_stride = heads * head_dim;
        item.num_queries = static_cast<int>(row.num_queries);
        item.group = static_cast<int>(group);
        item.first_position = row.context - row.num_queries;
        item.window = step.window;
        item.blocks = step.block_table.const_data_ptr<int32_t>() + row.index * step.block_table.stride(0);
        item.head = head;
        item.begin = (splits.first + split) * kSplitTokens;
        item.end = std::min(item.begin + kSplitTokens, row.context);
        // [split][query][head][part]
        item.out = sums + (part_starts[r] + split * row.num_queries * heads + head * group) * part_floats;
        item.out_query_stride = heads * part_floats;
        item.out_head_stride = part_floats;
        items.push_back(item);
      }
    }
  }
  const int64_t bytes = visible * head_dim * 2 * step.keys.element_size() / static_cast<int64_t>(rows.size());
  const int64_t per_item = std::min<int64_t>(bytes, kSplitTokens * head_dim * 2 * step.keys.element_size());
  at::parallel_for(0, items.size(), std::max<int64_t>(1, kGrainBytes / per_item), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.run(cache, items[i], i + 1 < end ? &items[i + 1] : nullptr);
  });
  std::vector<float> result(head_dim);
  for (size_t r = 0; r < rows.size(); ++r) {
    const Row& row = rows[r];
    const int64_t stride = row.num_queries * heads * part_floats, count = splits_of(step, row).count;
    for (int64_t i = 0; i < row.num_queries * heads; ++i) {
      combine(sums + (part_starts[r] + i) * part_floats, count, stride, head_dim, result.data());
      write_floats(out, (row.first_query * heads + i) * head_dim, head_dim, result.data());
    }
  }
}

}  // namespace

Tensor paged_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& block_table,
                       const Tensor& query_start, const Tensor& context_lens, double scale, int64_t window) {
  TORCH_CHECK(q.dim() == 3 && keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() &&
                  keys.sizes() == values.sizes() && keys.scalar_type() == values.scalar_type(),
              "q is [T, H, D] and the caches are alike and contiguous");
  TORCH_CHECK(q.size(2) == keys.size(3) && q.size(1) % keys.size(1) == 0, "q ", q.sizes(), ", cache ", keys.sizes());
  TORCH_CHECK(block_table.scalar_type() == at::kInt && query_start.scalar_type() == at::kInt &&
                  context_lens.scalar_type() == at::kInt && block_table.stride(1) == 1,
              "the block table, query_start and context_lens are int32");
  const int64_t num_rows = context_lens.size(0);
  TORCH_CHECK(query_start.size(0) == num_rows + 1 && block_table.size(0) >= num_rows, num_rows, " rows have ",
              query_start.size(0), " query_start and ", block_table.size(0), " lines of the block table");
  const int32_t* starts = query_start.const_data_ptr<int32_t>();
  const int32_t* contexts = context_lens.const_data_ptr<int32_t>();
  Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  const Step step{q.stride(2) == 1 ? q : q.contiguous(), keys, values, block_table, scale, window};
  std::vector<Row> few, many;
  for (int64_t r = 0; r < num_rows; ++r) {
    const Row row{r, starts[r], starts[r + 1] - starts[r], contexts[r]};
    if (row.num_queries <= 0) continue;
    TORCH_CHECK(row.context >= row.num_queries && row.context <= block_table.size(1) * keys.size(2) &&
                    starts[r + 1] <= q.size(0),
                "row ", r, " has ", row.num_queries, " queries and a context of ", row.context);
    (row.num_queries <= kFewQueries ? few : many).push_back(row);
  }
  const int64_t used = num_rows > 0 ? starts[num_rows] : 0;
  if (used < q.size(0)) out.narrow(0, used, q.size(0) - used).zero_();
  for (const Row& row : many) attend_many(step, row, out);
  if (!few.empty()) attend_few(step, few, out);
  return out;
}

namespace {

void cache_write(const Tensor& k, const Tensor& v, Tensor& keys, Tensor& values, const Tensor& slots) {
  TORCH_CHECK(k.dim() == 3 && k.sizes() == v.sizes() && keys.dim() == 4 && keys.sizes() == values.sizes() &&
                  keys.is_contiguous() && values.is_contiguous() && k.size(1) == keys.size(1) &&
                  k.size(2) == keys.size(3) && slots.size(0) == k.size(0),
              "k ", k.sizes(), ", cache ", keys.sizes(), ", slots ", slots.sizes());
  const int64_t heads = keys.size(1), block_size = keys.size(2), head_dim = keys.size(3);
  const Tensor slots_long = slots.to(at::kLong).contiguous();
  const int64_t* slot = slots_long.const_data_ptr<int64_t>();
  for (const auto& [from, to] : {std::pair<const Tensor&, Tensor&>{k, keys}, {v, values}}) {
    const Tensor rows = from.stride(2) == 1 ? from : from.contiguous();
    std::vector<float> buffer(head_dim);
    for (int64_t t = 0; t < rows.size(0); ++t) {
      TORCH_CHECK(slot[t] >= 0 && slot[t] < to.size(0) * block_size, "slot ", slot[t], " lies outside the cache");
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t source = t * rows.stride(0) + h * rows.stride(1);
        const int64_t target = ((slot[t] / block_size * heads + h) * block_size + slot[t] % block_size) * head_dim;
        if (rows.scalar_type() == to.scalar_type()) {
          const int64_t bytes = rows.element_size();
          std::memcpy(static_cast<uint8_t*>(to.data_ptr()) + target * bytes,
                      static_cast<const uint8_t*>(rows.const_data_ptr()) + source * bytes, head_dim * bytes);
        } else {
          read_floats(rows, source, head_dim, 1.0f, buffer.data());
          write_floats(to, target, head_dim, buffer.data());
        }
      }
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start, "
      "Tensor context_lens, float scale, int window) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) {
  m.impl("paged_attention", &paged_attention);
  m.impl("cache_write", &cache_write);
}

}  // namespace tp
