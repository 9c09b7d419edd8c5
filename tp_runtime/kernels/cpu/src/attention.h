// Attention over a cache of blocks for rows that bring few queries (decode, verification, short chunks).
// It reads each cached key and value once for all query heads that share it, and runs at memory speed.
//
// The context of a row is cut into splits of kSplitTokens at fixed positions; a split's sums are combined
// with the others' afterwards in order. So no bit depends on the number of threads, rows or queries.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace tp {

constexpr int kSplitTokens = 256;
constexpr int kChunkTokens = 128;  // whose scores are held at a time; divides kSplitTokens

// Keys and values are of `dtype`, or int8 where there are scales: one a token and head, by which its numbers
// are multiplied. A key's goes into its score, a value's into its weight, so no number is multiplied by them.
struct PagedCache {
  const void* keys = nullptr;
  const void* values = nullptr;
  const float* key_scales = nullptr;  // [block][head][place]
  const float* value_scales = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t heads = 0, block_size = 0, head_dim = 0;  // head_dim is a multiple of 16

  int64_t element_bytes() const { return key_scales != nullptr ? 1 : (dtype == Dtype::kFloat32 ? 4 : 2); }
  // Vectors before token `place` of `block` in head `head`.
  int64_t vector(int64_t block, int64_t head, int64_t place) const {
    return (block * heads + head) * block_size + place;
  }
};

// One row's queries of one key-value head, over one split of its context.
struct AttentionItem {
  const float* queries = nullptr;  // of the group's first head; the others' lie `query_head_stride` floats on
  int64_t query_stride = 0, query_head_stride = 0;
  float scale = 1;                  // of the scores
  int num_queries = 0, group = 0;   // queries of the row; query heads that share the key-value head
  int64_t first_position = 0;       // of the first query
  int64_t window = 0;               // positions a query sees, 0: all
  const int32_t* blocks = nullptr;  // the row's line of the block table
  int64_t head = 0, begin = 0, end = 0;  // key-value head; the split's positions
  // Per query and head: sums of weighted values [head_dim], then the largest score and the sum of weights.
  float* out = nullptr;
  int64_t out_query_stride = 0, out_head_stride = 0;
};

// One query head's sums over its splits, and where its output goes: [head_dim] of `dtype`.
struct AttentionSums {
  float* parts = nullptr;  // as AttentionItem::out, `stride` floats a split; overwritten
  int64_t count = 0, stride = 0, head_dim = 0;
  Dtype dtype = Dtype::kFloat32;
  void* out = nullptr;
};

struct AttentionKernels {
  // next: what this thread will be given after `item`, whose first keys are fetched ahead; null if nothing.
  void (*run)(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next);
  void (*combine)(const AttentionSums& sums);
  // `count` keys (or values) from vector `first` on, as numbers of type `to`.
  void (*read)(const PagedCache& cache, bool values, int64_t first, int64_t count, Dtype to, void* out);
};

extern const AttentionKernels attention_avx512, attention_avx2;

}  // namespace tp
