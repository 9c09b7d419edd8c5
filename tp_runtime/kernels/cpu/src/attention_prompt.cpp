// Rows of many queries: their keys and values are laid side by side, once, in the type that is multiplied,
// and ATen's flash attention does the rest. What all queries see (the past) needs no mask, what they bring is
// causal; the two are joined by their weights. Under a window, queries are taken in blocks, each over the
// keys that it can see, so that mask and work are as wide as the window and not as the context.
#include <ATen/Parallel.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attention_step.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;

constexpr int64_t kWindowQueries = 128;  // queries that share a mask

// A row's keys and values from position `first` on, [1, kv_heads, tokens, D], and its queries, [1, H, n, D].
struct Prompt {
  Tensor q, keys, values;
  int64_t first;
};

struct Attended {
  Tensor y, log_weight;  // [1, H, n, D], fp32 [1, H, n]
};

// Against a cache in bf16 or int8, queries are bf16 too where the CPU multiplies that: its matrix units
// multiply nothing finer.
at::ScalarType multiplied_type(const AttentionStep& step) {
  const bool narrow = step.cache.key_scales != nullptr || step.cache.dtype == Dtype::kBfloat16;
  const bool bf16 = narrow && step.q.scalar_type() == at::kFloat && active_isa() >= Isa::kAvx512;
  return bf16 ? at::kBFloat16 : step.q.scalar_type();
}

Tensor gathered(const AttentionStep& step, const AttentionRow& row, bool values, int64_t first, at::ScalarType type) {
  const PagedCache& cache = step.cache;
  const int64_t size = cache.block_size, tokens = row.context - first, first_block = first / size;
  const int64_t num_blocks = (row.context + size - 1) / size - first_block;
  Tensor out = at::empty({1, cache.heads, tokens, cache.head_dim}, type);
  auto* start = static_cast<uint8_t*>(out.data_ptr());
  const int64_t token_bytes = cache.head_dim * out.element_size();
  const AttentionKernels& kernels = attention_kernels();
  const int32_t* blocks = step.blocks(row);
  at::parallel_for(0, cache.heads * num_blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / num_blocks, block = first_block + i % num_blocks;
      const int64_t from = std::max(block * size, first), to = std::min((block + 1) * size, row.context);
      const int64_t vector = cache.vector(blocks[block], head, from - block * size);
      uint8_t* target = start + (head * tokens + from - first) * token_bytes;
      kernels.read(cache, values, vector, to - from, dtype_of(type), target);
    }
  });
  return out;
}

Attended flash(const AttentionStep& step, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
               const std::optional<Tensor>& mask) {
  auto [y, log_weight] =
      at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, /*dropout_p=*/0.0, causal, mask, step.scale);
  return {y, log_weight};
}

// out[i] = y of the row's i-th query from `first_query` on.
void put(const Attended& a, const AttentionRow& row, int64_t first_query, Tensor& out) {
  const Tensor y = a.y.squeeze(0).transpose(0, 1);
  out.narrow(0, row.first_query + first_query, y.size(0)).copy_(y);
}

// The same for what was attended to in two parts.
void put_joined(const Attended& a, const Attended& b, const AttentionRow& row, Tensor& out) {
  const int64_t heads = out.size(1), dim = out.size(2);
  const Tensor a_weight = a.log_weight.squeeze(0), b_weight = b.log_weight.squeeze(0);
  const auto weights_a = a_weight.accessor<float, 2>(), weights_b = b_weight.accessor<float, 2>();
  at::parallel_for(0, row.num_queries, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> left(dim), right(dim);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const float share = 1.0f / (1.0f + std::exp(weights_b[h][i] - weights_a[h][i]));
        read_floats(a.y, h * a.y.stride(1) + i * a.y.stride(2), dim, share, left.data());
        read_floats(b.y, h * b.y.stride(1) + i * b.y.stride(2), dim, 1.0f - share, right.data());
        for (int64_t d = 0; d < dim; ++d) left[d] += right[d];
        write_floats(out, ((row.first_query + i) * heads + h) * dim, dim, left.data());
      }
    }
  });
}

// 0 where query i, at position `first_position` + i, sees key j, at position `first_key` + j; else -infinity.
Tensor window_mask(int64_t queries, int64_t keys, int64_t first_position, int64_t first_key, int64_t window) {
  Tensor mask = at::full({queries, keys}, -std::numeric_limits<float>::infinity(), at::kFloat);
  float* line = mask.data_ptr<float>();
  for (int64_t i = 0; i < queries; ++i, line += keys) {
    const int64_t own = first_position + i - first_key;
    std::fill(line + std::max<int64_t>(own + 1 - window, 0), line + own + 1, 0.0f);
  }
  return mask;
}

void attend_window(const AttentionStep& step, const AttentionRow& row, const Prompt& prompt, Tensor& out) {
  const int64_t past = row.context - row.num_queries;
  Tensor mask;
  int64_t ahead = -1;  // of the mask's first query: keys before it
  for (int64_t i = 0; i < row.num_queries; i += kWindowQueries) {
    const int64_t queries = std::min(kWindowQueries, row.num_queries - i), position = past + i;
    const int64_t first_key = std::max<int64_t>(position + 1 - step.window, 0);
    const int64_t keys = position + queries - first_key;
    if (position - first_key != ahead || mask.size(0) != queries) {
      mask = window_mask(queries, keys, position, first_key, step.window);
      ahead = position - first_key;
    }
    const auto seen = [&](const Tensor& x) { return x.narrow(2, first_key - prompt.first, keys); };
    put(flash(step, prompt.q.narrow(2, i, queries), seen(prompt.keys), seen(prompt.values), false, mask), row, i, out);
  }
}

}  // namespace

void attend_prompt(const AttentionStep& step, const AttentionRow& row, Tensor& out) {
  const at::ScalarType type = multiplied_type(step);
  const int64_t first = step.oldest(row), past = row.context - row.num_queries;
  const Prompt prompt{
      step.q.narrow(0, row.first_query, row.num_queries).to(type).transpose(0, 1).unsqueeze(0),
      gathered(step, row, false, first, type), gathered(step, row, true, first, type), first};
  if (step.window > 0 && row.context > step.window) return attend_window(step, row, prompt, out);
  const auto part = [&](int64_t begin, int64_t end, bool causal) {
    return flash(step, prompt.q, prompt.keys.narrow(2, begin, end - begin), prompt.values.narrow(2, begin, end - begin),
                 causal, std::nullopt);
  };
  const Attended own = part(past, row.context, true);
  if (past == 0) return put(own, row, 0, out);
  put_joined(part(0, past, false), own, row, out);
}

}  // namespace tp
