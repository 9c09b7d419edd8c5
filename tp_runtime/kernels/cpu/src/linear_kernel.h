// The linears of linear.h over the vectors of vector_avx512.h or vector_avx2.h, whichever came before.
#include <cstring>

#include "linear.h"
#include "scalar.h"
#include "vector_math.h"

namespace tp {
namespace {

constexpr int kPrefetchBytes = 2560;  // ahead in each stream

// One row more than needed: streams 4 KiB apart would make stores look like those of other streams.
using Sums = float[kMaxTermRows + 1][kBlockRows];

template <size_t kBytes>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 32
  for (size_t at = 0; at < kBytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
}

// f<count>(first row) for all of `rows`, kRowChunk at a time. (The recursion ends at the count that is left.)
template <int kCount = kRowChunk, typename F>
inline void in_chunks(int rows, const F& f, int first = 0) {
  for (; rows - first >= kCount; first += kCount) f.template operator()<kCount>(first);
  if constexpr (kCount > 1) {
    if (first < rows) in_chunks<kCount - 1>(rows, f, first);
  }
}

// ---- activations ----------------------------------------------------------------------------------

// 32 columns of one row.
struct SliceValues {
  Floats a, b;
};

// Elements [col, col + 32) of a row at the edge of the input, zero outside [0, k).
SliceValues read_edge(const Input& input, int64_t base, int64_t col, int64_t k) {
  alignas(64) float values[kSliceCols] = {};
  const int64_t first = col < 0 ? -col : 0, last = k - col < kSliceCols ? k - col : kSliceCols;
  for (int64_t i = first; i < last; ++i) {
    switch (input.dtype) {
      case Dtype::kFloat32: values[i] = static_cast<const float*>(input.x)[base + i]; break;
      case Dtype::kBfloat16: values[i] = from_bf16(static_cast<const uint16_t*>(input.x)[base + i]); break;
      case Dtype::kFloat16: values[i] = _cvtsh_ss(static_cast<const uint16_t*>(input.x)[base + i]); break;
    }
  }
  return {load(values), load(values + 16)};
}

inline SliceValues read_slice(const Input& input, int64_t row, int64_t col, int64_t k) {
  const int64_t base = row * input.stride + col;
  if (col < 0 || col + kSliceCols > k) return read_edge(input, base, col, k);
  if (input.dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(input.x) + base;
    return {load(x), load(x + 16)};
  }
  const uint16_t* x = static_cast<const uint16_t*>(input.x) + base;
  if (input.dtype == Dtype::kBfloat16) return {load_bf16(x), load_bf16(x + 16)};
  const auto* halves = reinterpret_cast<const uint8_t*>(x);
  return {load_half(halves), load_half(halves + 32)};
}

constexpr float kFixedMax = 16383.0f;

inline Floats nearest_fixed(Floats x) {
  return largest(smallest(round_to_whole(x), spread(kFixedMax)), spread(-kFixedMax));
}

// One slice -> `terms` slices of fixed point. Infinities and NaN make the scale NaN.
inline void to_fixed(SliceValues x, int terms, int zero_point, const Activations& out, int64_t at) {
  const Floats minus = spread(-1.0f);
  const bool finite = all_finite(x.a) && all_finite(x.b);
  const Floats top = largest(largest(x.a, mul(x.a, minus)), largest(x.b, mul(x.b, minus)));
  uint32_t exponent = finite ? bits_of(largest_lane(top)) >> 23 : 127;
  exponent = exponent < 28 ? 28 : exponent;
  const Floats up = spread(from_bits((267 - exponent) << 23));  // |x| * up < 2^14
  SliceValues rest{mul(x.a, up), mul(x.b, up)};
  float scale = finite ? from_bits((exponent - 13) << 23) : from_bits(0x7fc00000u);
  for (int term = 0; term < terms; ++term, ++at) {
    const SliceValues fixed{nearest_fixed(rest.a), nearest_fixed(rest.b)};
    store_fixed(fixed.a, fixed.b, out.fixed + at * kFixedSliceBytes);
    const float sum = sum_lanes(add(fixed.a, fixed.b));  // exact: below 2^20
    out.scale[at] = scale;
    out.correction[at] = -zero_point * static_cast<int32_t>(sum);
    if (out.slice_sum != nullptr) out.slice_sum[at] = sum * scale;
    const Floats finer = spread(16384.0f);
    rest = {mul(add(rest.a, mul(fixed.a, minus)), finer), mul(add(rest.b, mul(fixed.b, minus)), finer)};
    scale *= 1.0f / 16384.0f;
  }
}

void prepare_slice(const WeightShape& shape, const Input& input, const Activations& out, int64_t slice) {
  const int zero_point = shape.bits == 8 ? 128 : (shape.asymmetric ? 0 : 8);
  for (int64_t row = 0; row < input.rows; ++row) {
    const int64_t at = slice * out.term_rows + row * out.terms;
    const SliceValues x = read_slice(input, row, slice * kSliceCols - shape.shift(), shape.k);
    if (shape.bits > 8) {
      store(out.plain + at * kSliceCols, x.a);
      store(out.plain + at * kSliceCols + 16, x.b);
    } else {
      to_fixed(x, out.terms, zero_point, out, at);
    }
  }
}

void prepare(const WeightShape& shape, const Input& input, const Activations& out, int64_t begin, int64_t end) {
  if (!shape.grouped()) {
    for (int64_t slice = begin; slice < end; ++slice) prepare_slice(shape, input, out, slice);
    return;
  }
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = shape.first_slice(group), count = shape.group_slices(group);
    for (int64_t i = 0; i < count; ++i) prepare_slice(shape, input, out, first + i);
    for (int m = 0; out.group_sum != nullptr && m < out.term_rows; ++m) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += out.slice_sum[(first + i) * out.term_rows + m];
      out.group_sum[group * out.term_rows + m] = sum;
    }
  }
}

// ---- quantised weights ----------------------------------------------------------------------------

// kRows rows against one slice of one block: finish(row, dot) for each.
template <int kBits, int kRows, typename Finish>
inline void multiply_slice(const uint8_t* w, const int8_t* x, const int32_t* correction, const Finish& finish) {
  Dot dot[kRows];
  for (int m = 0; m < kRows; ++m) dot[m].reset(correction[m]);
  if constexpr (kBits == 8) {
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad) {
      const Bytes bytes = load_bytes(w + quad * 64);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) dot[m].add_quad(bytes, x + m * kFixedSliceBytes, quad);
    }
  } else {
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const Bytes bytes = load_bytes(w + pair * 64), low = low_nibbles(bytes), high = high_nibbles(bytes);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        dot[m].add_quad(low, x + m * kFixedSliceBytes, pair * 2);
        dot[m].add_quad(high, x + m * kFixedSliceBytes, pair * 2 + 1);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) finish(m, dot[m].value());
}

// multiply_slice for all rows. kRows: the number of term rows where it is one of 1 to 4, else 0.
template <int kBits, int kRows, typename Finish>
inline void multiply_rows(const uint8_t* w, const Activations& x, int64_t slice, const Finish& finish) {
  const int64_t at = slice * (kRows ? kRows : x.term_rows);
  const auto rows = [&]<int kCount>(int m) {
    multiply_slice<kBits, kCount>(w, x.fixed + (at + m) * kFixedSliceBytes, x.correction + at + m,
                                  [&](int i, Floats dot) { finish(m + i, dot); });
  };
  if constexpr (kRows > 0) {
    rows.template operator()<kRows>(0);
  } else {
    in_chunks(x.term_rows, rows);
  }
}

// One slice: sums = dot * scale (+ sums).
template <int kBits, int kRows>
inline void add_slice(const uint8_t* w, const Activations& x, int64_t slice, bool first, Sums& sums) {
  const float* scale = x.scale + slice * (kRows ? kRows : x.term_rows);
  multiply_rows<kBits, kRows>(w, x, slice, [&](int m, Floats dot) {
    const Floats s = spread(scale[m]);
    store(sums[m], first ? mul(dot, s) : fma(dot, s, load(sums[m])));
  });
}

// One group's scale, and offset, of the block's 16 rows: sums = part * scale + offset * activations (+ sums).
template <bool kAsymmetric>
struct GroupScale {
  Floats scale, offset;

  explicit GroupScale(const uint8_t* from)
      : scale(load_half(from)), offset(kAsymmetric ? load_half(from + 32) : zeros()) {}
  inline void add(Floats part, const float* group_sum, bool first, float* sums) const {
    Floats sum = first ? mul(part, scale) : fma(part, scale, load(sums));
    if (kAsymmetric) sum = fma(offset, spread(*group_sum), sum);
    store(sums, sum);
  }
};

// Up to kMaxStreams blocks at once, over all of K, with a scale a row.
template <int kBits, int kRows>
void channel_pass(const WeightShape& shape, const Activations& x, const uint8_t* const* blocks, int streams,
                  Sums* sums) {
  constexpr size_t kSliceBytes = size_t{kBlockRows} * kSliceCols * kBits / 8;
  for (int64_t slice = 0; slice < shape.slices(); ++slice) {
    for (int r = 0; r < streams; ++r) {
      const uint8_t* w = blocks[r] + slice * kSliceBytes;
      prefetch<kSliceBytes>(w + kPrefetchBytes);
      add_slice<kBits, kRows>(w, x, slice, slice == 0, sums[r]);
    }
  }
}

// The same where columns share scales in groups: a group is summed apart and then scaled into `sums`. A group of
// one slice is scaled as it is made, with the same bits.
template <int kBits, bool kAsymmetric, int kRows, bool kOneSlice>
void group_pass(const WeightShape& shape, const Activations& x, const uint8_t* const* blocks, int streams,
                Sums* sums) {
  constexpr size_t kSliceBytes = size_t{kBlockRows} * kSliceCols * kBits / 8, kScaleBytes = kAsymmetric ? 64 : 32;
  alignas(64) Sums group_sums[kOneSlice ? 1 : kMaxStreams];
  const int rows = kRows ? kRows : x.term_rows;
  const uint8_t* w[kMaxStreams];
  for (int r = 0; r < streams; ++r) w[r] = blocks[r];
  const int64_t slices = shape.slices(), per_group = shape.slices_per_group();
  int64_t group = 0, left = shape.group_slices(0);
  bool first = true;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const float* group_sum = kAsymmetric ? x.group_sum + group * rows : nullptr;
    for (int r = 0; r < streams; ++r) {
      prefetch<kSliceBytes + 64>(w[r] + kPrefetchBytes);  // scales lie between slices
      if constexpr (kOneSlice) {
        const GroupScale<kAsymmetric> scale(w[r] + kSliceBytes);
        const float* s = x.scale + slice * rows;
        multiply_rows<kBits, kRows>(w[r], x, slice, [&](int m, Floats dot) {
          scale.add(mul(dot, spread(s[m])), group_sum + m, slice == 0, sums[r][m]);
        });
        w[r] += kScaleBytes;
      } else {
        add_slice<kBits, kRows>(w[r], x, slice, first, group_sums[r]);
      }
      w[r] += kSliceBytes;
    }
    first = false;
    if (kOneSlice) {
      ++group;
    } else if (--left == 0) {
      for (int r = 0; r < streams; ++r, first = true) {
        const GroupScale<kAsymmetric> scale(w[r]);
        for (int m = 0; m < rows; ++m) scale.add(load(group_sums[r][m]), group_sum + m, group == 0, sums[r][m]);
        w[r] += kScaleBytes;
      }
      ++group;
      left = slices - slice - 1 < per_group ? slices - slice - 1 : per_group;
    }
  }
}

// ---- plain weights --------------------------------------------------------------------------------

// kRows rows against one slice of one block. Even and odd columns have sums of their own.
template <int kBits, int kRows>
inline void add_plain(const uint8_t* w, const float* x, float (*even_sums)[kBlockRows], float (*odd_sums)[kBlockRows]) {
  Floats even[kRows], odd[kRows];
  for (int m = 0; m < kRows; ++m) even[m] = load(even_sums[m]), odd[m] = load(odd_sums[m]);
#pragma GCC unroll 4
  for (int pair = 0; pair < kSliceCols / 2; ++pair) {
    Floats first, second;
    if constexpr (kBits == 16) {
      load_pairs(reinterpret_cast<const uint16_t*>(w) + pair * 32, first, second);
    } else {
      first = load(reinterpret_cast<const float*>(w) + pair * 32);
      second = load(reinterpret_cast<const float*>(w) + pair * 32 + 16);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      even[m] = fma(first, spread(x[m * kSliceCols + pair * 2]), even[m]);
      odd[m] = fma(second, spread(x[m * kSliceCols + pair * 2 + 1]), odd[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) store(even_sums[m], even[m]), store(odd_sums[m], odd[m]);
}

template <int kBits>
void plain_pass(const WeightShape& shape, const Activations& x, const uint8_t* const* blocks, int streams,
                Sums* sums) {
  constexpr size_t kSliceBytes = size_t{kBlockRows} * kSliceCols * kBits / 8;
  alignas(64) Sums odd[kMaxStreams];
  const int rows = x.term_rows;
  const size_t row_bytes = rows * sizeof sums[0][0];
  for (int r = 0; r < streams; ++r) std::memset(sums[r], 0, row_bytes), std::memset(odd[r], 0, row_bytes);
  for (int64_t slice = 0; slice < shape.slices(); ++slice) {
    for (int r = 0; r < streams; ++r) {
      const uint8_t* w = blocks[r] + slice * kSliceBytes;
      prefetch<kSliceBytes>(w + kPrefetchBytes);
      in_chunks(rows, [&]<int kCount>(int m) {
        add_plain<kBits, kCount>(w, x.plain + (slice * rows + m) * kSliceCols, sums[r] + m, odd[r] + m);
      });
    }
  }
  for (int r = 0; r < streams; ++r) {
    for (int m = 0; m < rows; ++m) store(sums[r][m], add(load(sums[r][m]), load(odd[r][m])));
  }
}

// ---- outputs --------------------------------------------------------------------------------------

// Lanes [0, count) to the output's columns from `col` on.
inline void store_row(const Output& out, int64_t row, int64_t col, int64_t count, Floats y) {
  const int64_t width = out.dtype == Dtype::kFloat32 ? 4 : 2;
  auto* to = static_cast<uint8_t*>(out.y) + (row * out.stride + col) * width;
  alignas(64) uint8_t edge[kBlockRows * 4];
  uint8_t* target = count == kBlockRows ? to : edge;
  switch (out.dtype) {
    case Dtype::kFloat32: store(reinterpret_cast<float*>(target), y); break;
    case Dtype::kBfloat16: store_bf16(reinterpret_cast<uint16_t*>(target), y); break;
    case Dtype::kFloat16: store_half(reinterpret_cast<uint16_t*>(target), y); break;
  }
  if (target == edge) std::memcpy(to, edge, count * width);
}

// Output row `row` of one block: terms added, channel scale applied.
inline Floats finished(const Output& out, int64_t block, const Sums& sums, int64_t row, int terms) {
  Floats y = load(sums[row * terms]);
  for (int term = 1; term < terms; ++term) y = add(y, load(sums[row * terms + term]));
  return out.channel_scale == nullptr ? y : mul(y, load(out.channel_scale + block * kBlockRows));
}

// ---- a thread's share -----------------------------------------------------------------------------

using Pass = void (*)(const WeightShape&, const Activations&, const uint8_t* const*, int, Sums*);

// f<rows>() for the number of term rows, 0 for more than 4.
template <typename F>
Pass for_rows(int term_rows, const F& f) {
  switch (term_rows) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    default: return f.template operator()<0>();
  }
}

template <int kBits, bool kAsymmetric>
Pass choose_group_pass(const WeightShape& shape, int term_rows) {
  return for_rows(term_rows, [&]<int kRows>() -> Pass {
    if (shape.slices_per_group() == 1) return group_pass<kBits, kAsymmetric, kRows, true>;
    return group_pass<kBits, kAsymmetric, kRows, false>;
  });
}

Pass choose_pass(const WeightShape& shape, int term_rows) {
  switch (shape.bits) {
    case 32: return plain_pass<32>;
    case 16: return plain_pass<16>;
    case 8:
      if (shape.grouped()) return choose_group_pass<8, false>(shape, term_rows);
      return for_rows(term_rows, []<int kRows>() -> Pass { return channel_pass<8, kRows>; });
    default:
      return shape.asymmetric ? choose_group_pass<4, true>(shape, term_rows)
                              : choose_group_pass<4, false>(shape, term_rows);
  }
}

void finish_plain(const WeightShape& shape, const Activations& x, const Output& out, int64_t block, const Sums& sums) {
  const int64_t col = block * kBlockRows, left = shape.n - col;
  for (int64_t row = 0; row < out.rows; ++row) {
    store_row(out, row, col, left < kBlockRows ? left : kBlockRows, finished(out, block, sums, row, x.terms));
  }
}

void finish_gated(const WeightShape& shape, const Activations& x, const Output& out, int64_t block, const Sums& gate,
                  const Sums& up) {
  const int64_t col = block * kBlockRows;
  for (int64_t row = 0; row < out.rows; ++row) {
    const Floats g = finished(out, block, gate, row, x.terms);
    store_row(out, row, col, kBlockRows, mul(silu(g), finished(out, block + shape.blocks() / 2, up, row, x.terms)));
  }
}

void run(const WeightShape& shape, const uint8_t* weight, const Activations& x, const Output& out, const Share& share,
         int64_t pass) {
  static thread_local struct alignas(64) { Sums sums[kMaxStreams]; } scratch;
  const int64_t whole = share.whole_passes(), half = shape.blocks() / 2;
  const int64_t first = pass < whole ? share.begin + pass : share.begin + whole * share.runs;
  const int64_t stride = pass < whole ? whole : 1;
  const int count = pass < whole ? share.runs : static_cast<int>(share.end - first);
  const uint8_t* starts[kMaxStreams];
  for (int r = 0; r < count; ++r) {
    starts[r] = weight + (first + r * stride) * shape.block_bytes();
    if (out.gated) starts[r + count] = starts[r] + half * shape.block_bytes();
  }
  choose_pass(shape, x.term_rows)(shape, x, starts, out.gated ? 2 * count : count, scratch.sums);
  for (int r = 0; r < count; ++r) {
    const int64_t block = first + r * stride;
    if (out.gated) {
      finish_gated(shape, x, out, block, scratch.sums[r], scratch.sums[r + count]);
    } else {
      finish_plain(shape, x, out, block, scratch.sums[r]);
    }
  }
}

}  // namespace
}  // namespace tp
