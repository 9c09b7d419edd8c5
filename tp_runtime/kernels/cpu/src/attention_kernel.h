// The attention of attention.h over the vectors of vector_avx512.h or vector_avx2.h, whichever came before.
#include "attention.h"
#include "vector_math.h"

namespace tp {
namespace {

constexpr int kTile = 4;     // query vectors, and tokens, multiplied at once
constexpr int kStreams = 4;  // stretches of a chunk that are fetched side by side
constexpr float kMinusInfinity = -__builtin_inff();

// How a number is stored. kScaled: it is to be multiplied by its token's scale.
struct StoredFloat {
  using Type = float;
  static constexpr bool kScaled = false;
  static Floats lanes(const float* p) { return load(p); }
};
struct StoredBfloat16 {
  using Type = uint16_t;
  static constexpr bool kScaled = false;
  static Floats lanes(const uint16_t* p) { return load_bf16(p); }
};
struct StoredHalf {
  using Type = uint16_t;
  static constexpr bool kScaled = false;
  static Floats lanes(const uint16_t* p) { return load_half(reinterpret_cast<const uint8_t*>(p)); }
};
struct StoredInt8 {
  using Type = int8_t;
  static constexpr bool kScaled = true;
  static Floats lanes(const int8_t* p) { return load_int8(p); }
};

// Calls `each` with the type that says how the cache's numbers are stored.
template <typename Each>
void with_stored(const PagedCache& cache, const Each& each) {
  if (cache.key_scales != nullptr) return each(StoredInt8{});
  switch (cache.dtype) {
    case Dtype::kFloat32: return each(StoredFloat{});
    case Dtype::kBfloat16: return each(StoredBfloat16{});
    case Dtype::kFloat16: return each(StoredHalf{});
  }
}

inline void store_as(Dtype dtype, void* out, int64_t at, Floats x) {
  switch (dtype) {
    case Dtype::kFloat32: return store(static_cast<float*>(out) + at, x);
    case Dtype::kBfloat16: return store_bf16(static_cast<uint16_t*>(out) + at, x);
    case Dtype::kFloat16: return store_half(static_cast<uint16_t*>(out) + at, x);
  }
}

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

// Calls each(i, count, vector) for the wanted tokens of one head, as far as they lie in a row.
template <typename Each>
void in_blocks(const PagedCache& cache, const AttentionItem& item, const Chunk& chunk, const Each& each) {
  const int64_t position = chunk.start + chunk.first;
  int64_t index = position / cache.block_size, place = position % cache.block_size;
  for (int i = chunk.first; i < chunk.last; ++index, place = 0) {
    const int64_t left = cache.block_size - place, wanted = chunk.last - i;
    const int count = static_cast<int>(left < wanted ? left : wanted);
    each(i, count, cache.vector(item.blocks[index], item.head, place));
    i += count;
  }
}

// Where the wanted tokens of one head lie.
template <typename T>
void find_rows(const PagedCache& cache, const AttentionItem& item, const void* base, const Chunk& chunk,
               const T** rows) {
  in_blocks(cache, item, chunk, [&](int i, int count, int64_t vector) {
    const T* row = static_cast<const T*>(base) + vector * cache.head_dim;
    for (int j = 0; j < count; ++j, row += cache.head_dim) rows[i + j] = row;
  });
}

// The wanted tokens' scales times `factor`; zero beside them.
inline void find_scales(const PagedCache& cache, const AttentionItem& item, const float* base, const Chunk& chunk,
                        float factor, float* scales) {
  for (int i = 0; i < kChunkTokens; ++i) scales[i] = 0.0f;
  in_blocks(cache, item, chunk, [&](int i, int count, int64_t vector) {
    for (int j = 0; j < count; ++j) scales[i + j] = base[vector + j] * factor;
  });
}

inline void fetch_scales(const PagedCache& cache, const AttentionItem& item, const Chunk& chunk) {
  in_blocks(cache, item, chunk, [&](int, int count, int64_t vector) {
    for (int j = 0; j < count; j += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(cache.key_scales + vector + j), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(cache.value_scales + vector + j), _MM_HINT_T0);
    }
  });
}

// x[i] *= factors[i] for the 16 lanes around each of [first, last).
inline void multiply(float* x, const float* factors, const Chunk& chunk) {
  for (int i = chunk.first / 16 * 16; i < chunk.last; i += 16) store(x + i, mul(load(x + i), load(factors + i)));
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

// The wanted ones of `rows`, in the order in which to fetch them: a thread that fetches one block after the other
// waits for the beginning of each. Returns how many.
template <typename T>
int in_streams(const T* const* rows, const Chunk& chunk, const T** ordered) {
  const int count = chunk.last - chunk.first, stretch = (count + kStreams - 1) / kStreams;
  int n = 0;
  for (int i = 0; i < stretch; ++i) {
    for (int at = i; at < count; at += stretch) ordered[n++] = rows[chunk.first + at];
  }
  return n;
}

// scores[v][i] = queries[v] . rows[i] for the chunk's wanted tokens (and, beside them, some to overwrite).
template <typename Storage, int kVectors>
void score(const float* const* queries, const typename Storage::Type* const* rows,
           const typename Storage::Type* const* fetched, int num_fetched, const Chunk& chunk, int64_t head_dim,
           float (*scores)[kChunkTokens]) {
  int fetch = 0;
  for (int i = chunk.first / kTile * kTile; i < chunk.last; i += kTile) {
    const typename Storage::Type* tokens[kTile];
#pragma GCC unroll 4
    for (int t = 0; t < kTile; ++t) {
      const int wanted = i + t < chunk.first ? chunk.first : (i + t < chunk.last ? i + t : chunk.last - 1);
      tokens[t] = rows[wanted];
      if (fetch < num_fetched) fetch_row(fetched[fetch++], head_dim);
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
      for (int t = 0; t < kTile; ++t) key[t] = Storage::lanes(tokens[t] + d);
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
template <typename Storage, int kVectors>
void add_values(const float (*weights)[kChunkTokens], const float* keep,
                const typename Storage::Type* const* rows, const Chunk& chunk,
                const typename Storage::Type* const* fetched, int num_fetched, int64_t head_dim,
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
        const Floats value = Storage::lanes(rows[i] + d + 16 * j);
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

template <typename Storage, int kVectors>
void attend(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next, int first_vector) {
  using Type = typename Storage::Type;
  const int64_t head_dim = cache.head_dim;
  const float* queries[kVectors];
  float* sums[kVectors];
  Seen seen[kVectors];
  float top[kVectors], weight[kVectors], keep[kVectors];
  int64_t begin = item.end, end = item.begin;
  for (int v = 0; v < kVectors; ++v) {
    const int vector = first_vector + v, query = vector / item.group, head = vector % item.group;
    queries[v] = item.queries + query * item.query_stride + head * item.query_head_stride;
    sums[v] = item.out + query * item.out_query_stride + head * item.out_head_stride;
    seen[v] = seen_by(item, vector);
    begin = seen[v].begin < begin ? seen[v].begin : begin;
    end = seen[v].end > end ? seen[v].end : end;
    top[v] = kMinusInfinity, weight[v] = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) sums[v][d] = 0.0f;
  }
  alignas(64) float scores[kVectors][kChunkTokens];
  alignas(64) float key_scales[kChunkTokens], value_scales[kChunkTokens];
  for (float& scale : key_scales) scale = item.scale;
  const Type *keys[kChunkTokens], *values[kChunkTokens], *later[kChunkTokens], *fetched[kChunkTokens];
  for (int64_t start = begin / kChunkTokens * kChunkTokens; start < end; start += kChunkTokens) {
    const Chunk chunk = chunk_at(start, begin, end);
    find_rows(cache, item, cache.keys, chunk, keys);
    find_rows(cache, item, cache.values, chunk, values);
    if constexpr (Storage::kScaled) {
      find_scales(cache, item, cache.key_scales, chunk, item.scale, key_scales);
      find_scales(cache, item, cache.value_scales, chunk, 1.0f, value_scales);
    }
    int num_fetched = in_streams(values, chunk, fetched);
    score<Storage, kVectors>(queries, keys, fetched, num_fetched, chunk, head_dim, scores);
    for (int v = 0; v < kVectors; ++v) {
      const Chunk mine = chunk_at(start, seen[v].begin, seen[v].end);
      keep[v] = 1.0f;
      if (mine.first < mine.last) {
        multiply(scores[v], key_scales, mine);
        keep[v] = soften(scores[v], mine.first, mine.last, top[v], weight[v]);
        if constexpr (Storage::kScaled) multiply(scores[v], value_scales, mine);
      } else {
        for (float& unseen : scores[v]) unseen = 0.0f;
      }
    }
    const bool more = start + kChunkTokens < end;
    const AttentionItem* then = more ? &item : next;
    num_fetched = 0;
    if (then != nullptr) {
      const Chunk ahead =
          more ? chunk_at(start + kChunkTokens, begin, end) : chunk_at(then->begin, then->begin, then->end);
      find_rows(cache, *then, cache.keys, ahead, later);
      num_fetched = in_streams(later, ahead, fetched);
      if constexpr (Storage::kScaled) fetch_scales(cache, *then, ahead);
    }
    add_values<Storage, kVectors>(scores, keep, values, chunk, fetched, num_fetched, head_dim, sums);
  }
  for (int v = 0; v < kVectors; ++v) {
    sums[v][head_dim] = top[v];
    sums[v][head_dim + 1] = weight[v];
  }
}

template <typename Storage>
void attend_all(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next) {
  const int vectors = item.num_queries * item.group;
  for (int v = 0; v < vectors; v += kTile) {
    const AttentionItem* after = v + kTile < vectors ? nullptr : next;
    switch (vectors - v) {
      case 1: attend<Storage, 1>(cache, item, after, v); break;
      case 2: attend<Storage, 2>(cache, item, after, v); break;
      case 3: attend<Storage, 3>(cache, item, after, v); break;
      default: attend<Storage, 4>(cache, item, after, v);
    }
  }
}

void run_attention(const PagedCache& cache, const AttentionItem& item, const AttentionItem* next) {
  with_stored(cache, [&]<typename Storage>(Storage) { attend_all<Storage>(cache, item, next); });
}

void combine(const AttentionSums& sums) {
  const int64_t top_at = sums.head_dim, weight_at = sums.head_dim + 1;
  float top = sums.parts[top_at], weight = 0;
  for (int64_t i = 1; i < sums.count; ++i) {
    const float other = sums.parts[i * sums.stride + top_at];
    top = other > top ? other : top;
  }
  for (int64_t i = 0; i < sums.count; ++i) {
    float* part = sums.parts + i * sums.stride;
    const bool unseen = part[weight_at] == 0.0f;
    part[top_at] = unseen ? 0.0f : __builtin_expf(part[top_at] - top);  // from here on the split's factor
    weight += part[top_at] * part[weight_at];
  }
  for (int64_t d = 0; d < sums.head_dim; d += 16) {
    Floats sum = zeros();
    for (int64_t i = 0; i < sums.count; ++i) {
      const float* part = sums.parts + i * sums.stride;
      sum = fma(spread(part[top_at]), load(part + d), sum);
    }
    store_as(sums.dtype, sums.out, d, div(sum, spread(weight)));
  }
}

void read_vectors(const PagedCache& cache, bool values, int64_t first, int64_t count, Dtype to, void* out) {
  const void* base = values ? cache.values : cache.keys;
  with_stored(cache, [&]<typename Storage>(Storage) {
    const auto* from = static_cast<const typename Storage::Type*>(base) + first * cache.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      const float scale = Storage::kScaled ? (values ? cache.value_scales : cache.key_scales)[first + i] : 1.0f;
      for (int64_t d = i * cache.head_dim; d < (i + 1) * cache.head_dim; d += 16) {
        const Floats x = Storage::lanes(from + d);
        store_as(to, out, d, Storage::kScaled ? mul(x, spread(scale)) : x);
      }
    }
  });
}

}  // namespace
}  // namespace tp
