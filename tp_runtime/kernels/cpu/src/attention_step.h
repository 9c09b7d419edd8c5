// What one call of the attention op is about, for rows of few queries and of many.
#pragma once

#include <ATen/core/Tensor.h>

#include "attention.h"
#include "isa.h"

namespace tp {

// One row of the step that brings queries.
struct AttentionRow {
  int64_t index, first_query, num_queries, context;
};

struct AttentionStep {
  at::Tensor q;  // [T, H, D], head_dim contiguous
  PagedCache cache;
  const at::Tensor& block_table;
  double scale;
  int64_t window;

  int64_t heads() const { return q.size(1); }
  int64_t group() const { return q.size(1) / cache.heads; }
  const int32_t* blocks(const AttentionRow& row) const {
    return block_table.const_data_ptr<int32_t>() + row.index * block_table.stride(0);
  }
  // The oldest position that some query of the row sees.
  int64_t oldest(const AttentionRow& row) const {
    const int64_t first = row.context - row.num_queries + 1 - window;
    return window > 0 && first > 0 ? first : 0;
  }
};

inline const AttentionKernels& attention_kernels() {
  return active_isa() >= Isa::kAvx512 ? attention_avx512 : attention_avx2;
}

// A prompt, or a long chunk of one: compute-bound. Writes the row's part of out, [T, H, D].
void attend_prompt(const AttentionStep& step, const AttentionRow& row, at::Tensor& out);

}  // namespace tp
