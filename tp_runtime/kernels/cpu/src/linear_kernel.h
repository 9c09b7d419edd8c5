// The linears of linear.h over the vectors of vector_avx512.h or vector_avx2.h, whichever came before.
#include <cstring>

#include "linear.h"
#include "scalar.h"
#include "vector_math.h"

namespace tp {
namespace {

constexpr int kPrefetchBytes = 2560;  // ahead in each stream
constexpr int kRowChunk = 4;          // rows whose sums stay in registers

using Sums = float[kMaxTermRows][kBlockRows];

template <size_t kBytes>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 32
  for (size_t at = 0; at < kBytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T0);
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

// kRows rows against one slice of one block: sums = dot * scale (+ sums).
template <int kBits, int kRows>
inline void add_fixed(const uint8_t* w, const int8_t* x, const float* scale, const int32_t* correction, bool first,
                      float (*sums)[kBlockRows]) {
  Dot dot[kRows];
  for (int m = 0; m < kRows; ++m) dot[m].reset(correction[m]);
  if constexpr (kBits == 8) {
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad) {
      const Bytes bytes = load_bytes(w + quad * 64);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) dot[m].add_quad(bytes, x + m * kFixedSliceBytes, quad);
    }
  } else {
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const Bytes bytes = load_bytes(w + pair * 64), low = low_nibbles(bytes), high = high_nibbles(bytes);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        dot[m].add_quad(low, x + m * kFixedSliceBytes, pair * 2);
        dot[m].add_quad(high, x + m * kFixedSliceBytes, pair * 2 + 1);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const Floats value = dot[m].value(), s = spread(scale[m]);
    store(sums[m], first ? mul(value, s) : fma(value, s, load(sums[m])));
  }
}

// kRows: the number of term rows where it is one of 1 to 4, else 0.
template <int kBits, int kRows>
inline void add_fixed_rows(const uint8_t* w, const Activations& x, int64_t slice, bool first, Sums& sums) {
  const int64_t at = slice * (kRows ? kRows : x.term_rows);
  const auto rows = [&]<int kCount>(int m) {
    add_fixed<kBits, kCount>(w, x.fixed + (at + m) * kFixedSliceBytes, x.scale + at + m, x.correction + at + m, first,
                             sums + m);
  };
  if constexpr (kRows > 0) {
    rows.template operator()<kRows>(0);
  } else {
    int m = 0;
    for (; m + kRowChunk <= x.term_rows; m += kRowChunk) rows.template operator()<kRowChunk>(m);
    switch (x.term_rows - m) {
      case 3: rows.template operator()<3>(m); break;
      case 2: rows.template operator()<2>(m); break;
      case 1: rows.template operator()<1>(m); break;
    }
  }
}

// A group's sums, scaled (and offset) into the block's.
template <bool kAsymmetric, int kRows>
inline void add_group(const uint8_t* scales, const Activations& x, int64_t group, const Sums& group_sums, Sums& sums) {
  const Floats scale = load_half(scales), offset = kAsymmetric ? load_half(scales + 32) : zeros();
  const int rows = kRows ? kRows : x.term_rows;
  for (int m = 0; m < rows; ++m) {
    const Floats part = load(group_sums[m]);
    Floats sum = group == 0 ? mul(part, scale) : fma(part, scale, load(sums[m]));
    if (kAsymmetric) sum = fma(offset, spread(x.group_sum[group * rows + m]), sum);
    store(sums[m], sum);
  }
}

// Up to kMaxStreams blocks at once, over all of K. Where columns share scales in groups, a group is summed
// apart and then scaled into `sums`.
template <int kBits, bool kGrouped, bool kAsymmetric, int kRows>
void quantised_pass(const WeightShape& shape, const Activations& x, const uint8_t* const* blocks, int streams,
                    Sums* sums) {
  constexpr size_t kSliceBytes = size_t{kBlockRows} * kSliceCols * kBits / 8;
  alignas(64) Sums group_sums[kGrouped ? kMaxStreams : 1];
  const uint8_t* w[kMaxStreams];
  for (int r = 0; r < streams; ++r) w[r] = blocks[r];
  const int64_t slices = shape.slices(), per_group = kGrouped ? shape.slices_per_group() : slices;
  int64_t group = 0, left = kGrouped ? shape.group_slices(0) : slices;
  bool first = true;
  for (int64_t slice = 0; slice < slices; ++slice) {
    for (int r = 0; r < streams; ++r) {
      prefetch<kSliceBytes + (kGrouped ? 64 : 0)>(w[r] + kPrefetchBytes);  // scales lie between slices
      add_fixed_rows<kBits, kRows>(w[r], x, slice, first, kGrouped ? group_sums[r] : sums[r]);
      w[r] += kSliceBytes;
    }
    first = false;
    if (kGrouped && --left == 0) {
      for (int r = 0; r < streams; ++r) {
        add_group<kAsymmetric, kRows>(w[r], x, group, group_sums[r], sums[r]);
        w[r] += kAsymmetric ? 64 : 32;
      }
      ++group;
      left = slices - slice - 1 < per_group ? slices - slice - 1 : per_group;
      first = true;
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
#pragma GCC unroll 4
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
      for (int m = 0; m < rows; m += kRowChunk) {
        const float* from = x.plain + (slice * rows + m) * kSliceCols;
        switch (rows - m) {
          case 1: add_plain<kBits, 1>(w, from, sums[r] + m, odd[r] + m); break;
          case 2: add_plain<kBits, 2>(w, from, sums[r] + m, odd[r] + m); break;
          case 3: add_plain<kBits, 3>(w, from, sums[r] + m, odd[r] + m); break;
          default: add_plain<kBits, 4>(w, from, sums[r] + m, odd[r] + m);
        }
      }
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

template <int kBits, bool kGrouped, bool kAsymmetric>
Pass choose_rows(int term_rows) {
  switch (term_rows) {
    case 1: return quantised_pass<kBits, kGrouped, kAsymmetric, 1>;
    case 2: return quantised_pass<kBits, kGrouped, kAsymmetric, 2>;
    case 3: return quantised_pass<kBits, kGrouped, kAsymmetric, 3>;
    case 4: return quantised_pass<kBits, kGrouped, kAsymmetric, 4>;
    default: return quantised_pass<kBits, kGrouped, kAsymmetric, 0>;
  }
}

Pass choose_pass(const WeightShape& shape, int term_rows) {
  switch (shape.bits) {
    case 32: return plain_pass<32>;
    case 16: return plain_pass<16>;
    case 8: return shape.grouped() ? choose_rows<8, true, false>(term_rows) : choose_rows<8, false, false>(term_rows);
    default: return shape.asymmetric ? choose_rows<4, true, true>(term_rows) : choose_rows<4, true, false>(term_rows);
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
