// The attention of attention.h over the vectors of vector_avx512.h or vector_avx2.h, whichever came before.
#include "attention.h"
#include "vector_math.h"

namespace tp {
namespace {

constexpr int kTile = 4;  // query vectors, and tokens, multiplied at once
constexpr float kMinusInfinity = -__builtin_inff();

template <Dtype kDtype>
struct Stored;
template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
  static Floats lanes(const float* p) { return load(p); }
};
template <>
struct Stored<Dtype::kBfloat16> {
  using Type = uint16_t;
  static Floats lanes(const uint16_t* p) { return load_bf16(p); }
};
template <>
struct Stored<Dtype::kFloat16> {
  using Type = uint16_t;
  static Floats lanes(const uint16_t* p) { return load_half(reinterpret_cast<const uint8_t*>(p)); }
};

// The positions a query vector sees within [begin, end).
struct Seen {
  int64_t begin, end;
};

inline Seen seen_by(const AttentionItem& item, int vector) {
  const int64_t position = item.first_position + vector / item.group;
  const int64_t oldest = item.window > 0 ? position + 1 - item.window : 0;
  return {oldest > item.begin ? oldest : item.begin, position + 1 < item.end ? position + 1 : item.end};
}

// A stretch of kChunkTokens positions at a fixed place, so that sums over it have a fixed order; tokens
// [first, last) of it are wanted, and no others may be read.
struct Chunk {
  int64_t start;
  int first, last;
};

// Where the wanted tokens of one head lie.
template <typename T>
void find_rows(const PagedCache& cache, const AttentionItem& item, const void* base, const Chunk& chunk,
               const T** rows) {
  const int64_t position = chunk.start + chunk.first;
  int64_t index = position / cache.block_size, place = position % cache.block_size;
  for (int i = chunk.first; i < chunk.last; ++index, place = 0) {
    const T* row = static_cast<const T*>(base) + cache.at(item.blocks[index], item.head, place);
    for (; i < chunk.last && place < cache.block_size; ++i, ++place, row += cache.head_dim) rows[i] = row;
  }
}

// Blocks lie anywhere in memory, where no hardware prefetcher follows: while keys are scored the values of
// the same tokens are fetched, and while those are summed, the keys of the tokens after them.
template <typename T>
inline void fetch_row(const T* row, int64_t head_dim) {
  const auto* bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < head_dim * static_cast<int64_t>(sizeof(T)); at += 64) {
    _mm_prefetch(bytes + at, _MM_HINT_T0);
  }
}

// scores[v][i] = queries[v] . rows[i] for the chunk's wanted tokens (and, beside them, some to overwrite).
template <Dtype kDtype, int kVectors>
void score(const float* const* queries, const typename Stored<kDtype>::Type* const* rows,
           const typename Stored<kDtype>::Type* const* fetched, const Chunk& chunk, int64_t head_dim,
           float (*scores)[kChunkTokens]) {
  for (int i = chunk.first / kTile * kTile; i < chunk.last; i += kTile) {
    const typename Stored<kDtype>::Type* tokens[kTile];
#pragma GCC unroll 4
    for (int t = 0; t < kTile; ++t) {
      const int wanted = i + t < chunk.first ? chunk.first : (i + t < chunk.last ? i + t : chunk.last - 1);
      tokens[t] = rows[wanted];
      fetch_row(fetched[wanted], head_dim);
    }
    Floats sums[kVectors][kTile];
#pragma GCC unroll 4
    for (auto& vector : sums) {
#pragma GCC unroll 4
      for (auto& sum : vector) sum = zeros();
    }
    for (int64_t d = 0; d < head_dim; d += 16) {
      Floats key[kTile];
#pragma GCC unroll 4
      for (int t = 0; t < kTile; ++t) key[t] = Stored<kDtype>::lanes(tokens[t] + d);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats query = load(queries[v] + d);
#pragma GCC unroll 4
        for (int t = 0; t < kTile; ++t) sums[v][t] = fma(query, key[t], sums[v][t]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store_sums(scores[v] + i, sums[v][0], sums[v][1], sums[v][2], sums[v][3]);
    }
  }
}

// sums[v] = sums[v] * keep[v] + weights[v] . rows, [head_dim] each.
template <Dtype kDtype, int kVectors>
void add_values(const float (*weights)[kChunkTokens], const float* keep,
                const typename Stored<kDtype>::Type* const* rows, const Chunk& chunk,
                const typename Stored<kDtype>::Type* const* fetched, int num_fetched, int64_t head_dim,
                float* const* sums) {
  int fetch = 0;
  const auto columns = [&]<int kLanes>(int64_t d) {
    Floats acc[kVectors][kLanes];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int j = 0; j < kLanes; ++j) acc[v][j] = mul(load(sums[v] + d + 16 * j), spread(keep[v]));
    }
    for (int i = chunk.first; i < chunk.last; ++i) {
      if (fetch < num_fetched) fetch_row(fetched[fetch++], head_dim);
#pragma GCC unroll 4
      for (int j = 0; j < kLanes; ++j) {
        const Floats value = Stored<kDtype>::lanes(rows[i] + d + 16 * j);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[v][j] = fma(spread(weights[v][i]), value, acc[v][j]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int j = 0; j < kLanes; ++j) store(sums[v] + d + 16 * j, acc[v][j]);
    }
  };
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) columns.template operator()<2>(d);
  if (d < head_dim) columns.template operator()<1>(d);
}

// Scores -> weights e^(score - largest), zero outside [first, last); returns the factor for what was
// summed before, and updates the running largest score and sum of weights.
inline float soften(float* scores, int first, int last, float& largest_score, float& weight_sum) {
  const int padded = (last + 15) / 16 * 16;
  for (int i = 0; i < first; ++i) scores[i] = kMinusInfinity;
  for (int i = last; i < padded; ++i) scores[i] = kMinusInfinity;
  Floats top = spread(largest_score);
  for (int i = 0; i < padded; i += 16) top = largest(top, load(scores + i));
  const float now = largest_lane(top);
  const float keep = largest_score == now ? 1.0f : __builtin_expf(largest_score - now);
  for (int i = 0; i < padded; i += 16) store(scores + i, exponential(add(load(scores + i), spread(-now))));
  for (int i = 0; i < first; ++i) scores[i] = 0.0f;
  for (int i = last; i < kChunkTokens; ++i) scores[i] = 0.0f;
  Floats sum = zeros();
  for (int i = 0; i < padded; i += 16) sum = add(sum, load(scores + i));
  largest_score = now;
  weight_sum = weight_sum * keep + sum_lanes(sum);
  return keep;
}

// The stretch at `start`, as far as it lies in [begin, end).
inline Chunk chunk_at(int64_t start, int64_t begin, int64_t end) {
  const auto within = [start](int64_t position) {
    const int64_t i = position - start;
    return static_cast<int>(i < 0 ? 0 : (i < kChunkTokens ? i : kChunkTokens));
  };
  return {start, within(begin), within(end)};
}

template <Dtype kDtype, int kVectors>
void attend(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next, int first_vector) {
  using Type = typename Stored<kDtype>::Type;
  const int64_t head_dim = cache.head_dim;
  const float* queries[kVectors];
  float* sums[kVectors];
  Seen seen[kVectors];
  float top[kVectors], weight[kVectors], keep[kVectors];
  int64_t begin = item.end, end = item.begin;
  for (int v = 0; v < kVectors; ++v) {
    const int vector = first_vector + v, query = vector / item.group, head = vector % item.group;
    queries[v] = item.queries + query * item.query_stride + head * head_dim;
    sums[v] = item.out + query * item.out_query_stride + head * item.out_head_stride;
    seen[v] = seen_by(item, vector);
    begin = seen[v].begin < begin ? seen[v].begin : begin;
    end = seen[v].end > end ? seen[v].end : end;
    top[v] = kMinusInfinity, weight[v] = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) sums[v][d] = 0.0f;
  }
  alignas(64) float scores[kVectors][kChunkTokens];
  const Type *keys[kChunkTokens], *values[kChunkTokens], *fetched[kChunkTokens];
  for (int64_t start = begin / kChunkTokens * kChunkTokens; start < end; start += kChunkTokens) {
    const Chunk chunk = chunk_at(start, begin, end);
    find_rows(cache, item, cache.keys, chunk, keys);
    find_rows(cache, item, cache.values, chunk, values);
    score<kDtype, kVectors>(queries, keys, values, chunk, head_dim, scores);
    for (int v = 0; v < kVectors; ++v) {
      const Chunk mine = chunk_at(start, seen[v].begin, seen[v].end);
      keep[v] = 1.0f;
      if (mine.first < mine.last) {
        keep[v] = soften(scores[v], mine.first, mine.last, top[v], weight[v]);
      } else {
        for (float& unseen : scores[v]) unseen = 0.0f;
      }
    }
    const bool more = start + kChunkTokens < end;
    const AttentionItem* then = more ? &item : next;
    Chunk ahead{0, 0, 0};
    if (then != nullptr) {
      ahead = more ? chunk_at(start + kChunkTokens, begin, end) : chunk_at(then->begin, then->begin, then->end);
      find_rows(cache, *then, cache.keys, ahead, fetched);
    }
    add_values<kDtype, kVectors>(scores, keep, values, chunk, fetched + ahead.first, ahead.last - ahead.first,
                                 head_dim, sums);
  }
  for (int v = 0; v < kVectors; ++v) {
    sums[v][head_dim] = top[v];
    sums[v][head_dim + 1] = weight[v];
  }
}

template <Dtype kDtype>
void attend_all(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next) {
  const int vectors = item.num_queries * item.group;
  for (int v = 0; v < vectors; v += kTile) {
    const AttentionItem* after = v + kTile < vectors ? nullptr : next;
    switch (vectors - v) {
      case 1: attend<kDtype, 1>(cache, item, after, v); break;
      case 2: attend<kDtype, 2>(cache, item, after, v); break;
      case 3: attend<kDtype, 3>(cache, item, after, v); break;
      default: attend<kDtype, 4>(cache, item, after, v);
    }
  }
}

void run_attention(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next) {
  switch (cache.dtype) {
    case Dtype::kFloat32: return attend_all<Dtype::kFloat32>(cache, item, next);
    case Dtype::kBfloat16: return attend_all<Dtype::kBfloat16>(cache, item, next);
    case Dtype::kFloat16: return attend_all<Dtype::kFloat16>(cache, item, next);
  }
}

}  // namespace
}  // namespace tp
