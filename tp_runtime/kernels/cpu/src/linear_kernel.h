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

// Elements [col, col + 32) of a row as fp32, zero outside [0, k).
void read_slice(const Input& input, int64_t row, int64_t col, int64_t k, float* out) {
  const int64_t first = col < 0 ? -col : 0, last = k - col < kSliceCols ? k - col : kSliceCols;
  const int64_t base = row * input.stride + col;
  if (first > 0 || last < kSliceCols) std::memset(out, 0, kSliceCols * sizeof(float));
  if (input.dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(input.x) + base;
    for (int64_t i = first; i < last; ++i) out[i] = x[i];
  } else if (input.dtype == Dtype::kBfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(input.x) + base;
    for (int64_t i = first; i < last; ++i) out[i] = from_bf16(x[i]);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(input.x) + base;
    for (int64_t i = first; i < last; ++i) out[i] = _cvtsh_ss(x[i]);
  }
}

constexpr int32_t kFixedMax = 16383;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits

inline int32_t nearest_fixed(float x) {
  const int32_t whole = static_cast<int32_t>(bits_of(x + kRounder)) - static_cast<int32_t>(bits_of(kRounder));
  return whole > kFixedMax ? kFixedMax : (whole < -kFixedMax ? -kFixedMax : whole);
}

// One slice of fp32 -> `terms` slices of fixed point. Infinities and NaN make the scale NaN.
void to_fixed(const float* x, int terms, int zero_point, const Activations& out, int64_t at) {
  uint32_t top = 0;
  for (int i = 0; i < kSliceCols; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  uint32_t exponent = top >> 23;
  const bool finite = exponent < 255;
  exponent = exponent < 40 ? 40 : (exponent > 254 ? 254 : exponent);
  const float up = from_bits((267 - exponent) << 23);  // |x| * up < 2^14
  float rest[kSliceCols];
  for (int i = 0; i < kSliceCols; ++i) rest[i] = finite ? x[i] * up : 0.0f;
  float scale = finite ? from_bits((exponent - 13) << 23) : from_bits(0x7fc00000u);
  for (int term = 0; term < terms; ++term, ++at) {
    int32_t fixed[kSliceCols], sum = 0;
    for (int i = 0; i < kSliceCols; ++i) {
      fixed[i] = nearest_fixed(rest[i]);
      sum += fixed[i];
      rest[i] = (rest[i] - static_cast<float>(fixed[i])) * 16384.0f;
    }
    store_fixed(fixed, out.fixed + at * kFixedSliceBytes);
    out.scale[at] = scale;
    out.correction[at] = -zero_point * sum;
    if (out.slice_sum != nullptr) out.slice_sum[at] = static_cast<float>(sum) * scale;
    scale *= 1.0f / 16384.0f;
  }
}

void prepare(const WeightShape& shape, const Input& input, Activations& out) {
  const int zero_point = shape.bits == 8 ? 128 : (shape.asymmetric ? 0 : 8);
  alignas(64) float slice_x[kSliceCols];
  for (int64_t slice = 0; slice < shape.slices(); ++slice) {
    for (int64_t row = 0; row < input.rows; ++row) {
      const int64_t at = slice * out.term_rows + row * out.terms;
      const int64_t col = slice * kSliceCols - shape.shift();
      if (shape.bits > 8) {
        read_slice(input, row, col, shape.k, out.plain + at * kSliceCols);
      } else {
        read_slice(input, row, col, shape.k, slice_x);
        to_fixed(slice_x, out.terms, zero_point, out, at);
      }
    }
  }
  if (out.slice_sum == nullptr) return;
  const float* slice_sum = out.slice_sum;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const int64_t count = shape.group_slices(group);
    for (int m = 0; m < out.term_rows; ++m) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += slice_sum[i * out.term_rows + m];
      out.group_sum[group * out.term_rows + m] = sum;
    }
    slice_sum += count * out.term_rows;
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
      prefetch<kSliceBytes>(w[r] + kPrefetchBytes);
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

void store_row(const Output& out, int64_t row, int64_t col, int64_t count, const float* x) {
  const int64_t at = row * out.stride + col;
  if (out.dtype == Dtype::kFloat32) {
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(out.y)[at + i] = x[i];
  } else if (out.dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out.y)[at + i] = to_bf16(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out.y)[at + i] = _cvtss_sh(x[i], 0);
  }
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
  alignas(64) float y[kBlockRows];
  const int64_t col = block * kBlockRows, left = shape.n - col;
  for (int64_t row = 0; row < out.rows; ++row) {
    store(y, finished(out, block, sums, row, x.terms));
    store_row(out, row, col, left < kBlockRows ? left : kBlockRows, y);
  }
}

void finish_gated(const WeightShape& shape, const Activations& x, const Output& out, int64_t block, const Sums& gate,
                  const Sums& up) {
  alignas(64) float y[kBlockRows];
  const int64_t col = block * kBlockRows;
  for (int64_t row = 0; row < out.rows; ++row) {
    const Floats g = finished(out, block, gate, row, x.terms);
    store(y, mul(silu(g), finished(out, block + shape.blocks() / 2, up, row, x.terms)));
    store_row(out, row, col, kBlockRows, y);
  }
}

// The range is cut into as many runs of neighbouring blocks as there are streams, so that each stream is
// sequential from the first block to the last; what is left over goes in one pass of fewer streams.
// Gated: half as many runs, each with its gate and its up stream.
void run_with(Pass pass, const WeightShape& shape, const uint8_t* weight, const Activations& x, const Output& out,
              int64_t begin, int64_t end) {
  static thread_local struct alignas(64) { Sums sums[kMaxStreams]; } scratch;
  const int runs = out.gated ? kMaxStreams / 2 : kMaxStreams;
  const int64_t step = (end - begin) / runs, rest = begin + step * runs;
  const auto one_pass = [&](int64_t first, int64_t stride, int count) {
    const uint8_t* starts[kMaxStreams];
    for (int r = 0; r < count; ++r) {
      starts[r] = weight + (first + r * stride) * shape.block_bytes();
      if (out.gated) starts[r + count] = starts[r] + shape.blocks() / 2 * shape.block_bytes();
    }
    pass(shape, x, starts, out.gated ? 2 * count : count, scratch.sums);
    for (int r = 0; r < count; ++r) {
      const int64_t block = first + r * stride;
      if (out.gated) {
        finish_gated(shape, x, out, block, scratch.sums[r], scratch.sums[r + count]);
      } else {
        finish_plain(shape, x, out, block, scratch.sums[r]);
      }
    }
  };
  for (int64_t i = 0; i < step; ++i) one_pass(begin + i, step, runs);
  if (rest < end) one_pass(rest, 1, static_cast<int>(end - rest));
}

void run(const WeightShape& shape, const uint8_t* weight, const Activations& x, const Output& out, int64_t begin,
         int64_t end) {
  run_with(choose_pass(shape, x.term_rows), shape, weight, x, out, begin, end);
}

}  // namespace
}  // namespace tp
