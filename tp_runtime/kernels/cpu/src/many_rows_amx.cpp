#include "many_rows.h"

#include <cstring>

#include "vector_avx512.h"
// The vectors come first: what follows is written in their terms.
#include "scalar.h"
#include "tiles.h"
#include "vector_math.h"

namespace tp {
namespace {

constexpr int kTileElements = kBlockRows * kSliceCols;  // of a bf16 tile: 16 rows x 32

// ---- weight slices -> bf16 tiles [pair of columns][row][2] ------------------------------------------

// Four columns of 16 rows, one byte each, as floats less 128. 2^23 + byte is exact in fp32.
inline void quad_values(Bytes quad, Floats* values) {
  const __m512i byte = _mm512_set1_epi32(0xff), magic = _mm512_set1_epi32(0x4b000000);
  const Floats offset = spread(8388608.0f + 128.0f);
  for (int i = 0; i < 4; ++i) {
    const __m512i shifted = i == 0 ? quad : _mm512_srli_epi32(quad, 8 * i);
    const __m512i bits = _mm512_ternarylogic_epi32(shifted, byte, magic, 0xea);  // (a & b) | c
    values[i] = _mm512_sub_ps(_mm512_castsi512_ps(bits), offset);
  }
}

// Two columns as bf16 pairs. Exact: their low halves are zero (small whole numbers).
inline __m512i exact_pairs(Floats first, Floats second) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
}

// Two columns as bf16 pairs, rounded to nearest even.
inline __m512i rounded_pairs(Floats first, Floats second) {
  const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// One slice of one block of bytes -> one tile.
template <bool kScaled>
inline void unpack_bytes(const uint8_t* w, Floats scale, uint16_t* tile) {
  for (int quad = 0; quad < 8; ++quad, tile += 4 * kBlockRows) {
    Floats values[4];
    quad_values(load_bytes(w + quad * 64), values);
    for (int i = 0; i < 4; i += 2) {
      const __m512i pairs = kScaled ? rounded_pairs(mul(values[i], scale), mul(values[i + 1], scale))
                                    : exact_pairs(values[i], values[i + 1]);
      _mm512_store_si512(tile + i * kBlockRows, pairs);
    }
  }
}

// A nibble of each lane that begins at bit kFrom, in the upper mantissa of 1: 1 + n / 16.
template <int kFrom>
inline Floats sixteenths(Bytes bytes) {
  constexpr int kAt = 19;
  const __m512i nibble = _mm512_set1_epi32(0xf << kAt), one = _mm512_set1_epi32(0x3f800000);
  __m512i shifted;
  if constexpr (kFrom <= kAt) {
    shifted = _mm512_slli_epi32(bytes, kAt - kFrom);
  } else {
    shifted = _mm512_srli_epi32(bytes, kFrom - kAt);
  }
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(shifted, nibble, one, 0xea));  // (a & b) | c
}

// The nibbles that begin at bits kFrom, + 8, + 16 and + 24 of each lane: four columns. Exact until it rounds: a scale
// is fp16, so 24 of them is an fp32, and a nibble less its zero point, 8, times it too.
template <int kFrom, bool kAsymmetric>
inline void store_columns(Bytes bytes, Floats scale16, Floats offset, uint16_t* tile) {
  Floats values[4] = {sixteenths<kFrom>(bytes), sixteenths<kFrom + 8>(bytes), sixteenths<kFrom + 16>(bytes),
                      sixteenths<kFrom + 24>(bytes)};
  for (Floats& value : values) {
    if constexpr (kAsymmetric) value = _mm512_sub_ps(value, spread(1.0f));
    value = fma(value, scale16, offset);
  }
  _mm512_store_si512(tile, rounded_pairs(values[0], values[1]));
  _mm512_store_si512(tile + 2 * kBlockRows, rounded_pairs(values[2], values[3]));
}

// One slice of one block of nibbles -> one tile. scales: of its group's rows, then their offsets where kAsymmetric.
template <bool kAsymmetric>
inline void unpack_nibbles(const uint8_t* w, const uint8_t* scales, uint16_t* tile) {
  const Floats scale = load_half(scales), scale16 = mul(scale, spread(16.0f));
  const Floats offset = kAsymmetric ? load_half(scales + 32) : mul(scale, spread(-24.0f));
  for (int quad = 0; quad < 8; quad += 2, w += 64, tile += 8 * kBlockRows) {
    const Bytes bytes = load_bytes(w);
    store_columns<0, kAsymmetric>(bytes, scale16, offset, tile);
    store_columns<4, kAsymmetric>(bytes, scale16, offset, tile + 4 * kBlockRows);
  }
}

// Slices [first, last) of one block -> tiles. For plain bf16 the weight already is such tiles.
void unpack_block(const WeightShape& shape, const uint8_t* block, int64_t first, int64_t last, uint16_t* tiles) {
  const size_t slice_bytes = shape.slice_bytes();
  if (!shape.grouped()) {
    for (int64_t slice = first; slice < last; ++slice, tiles += kTileElements) {
      unpack_bytes<false>(block + slice * slice_bytes, zeros(), tiles);
    }
    return;
  }
  const int64_t per_group = shape.slices_per_group(), skipped = shape.skipped_slices();
  for (int64_t slice = first; slice < last; ++slice, tiles += kTileElements) {
    const int64_t group = (slice + skipped) / per_group;
    const uint8_t* w = block + slice * slice_bytes + group * shape.scale_bytes();
    int64_t group_end = (group + 1) * per_group - skipped;
    group_end = group_end < shape.slices() ? group_end : shape.slices();
    const uint8_t* scales = block + group_end * slice_bytes + group * shape.scale_bytes();
    if (shape.bits == 8) {
      unpack_bytes<true>(w, load_half(scales), tiles);
    } else if (shape.asymmetric) {
      unpack_nibbles<true>(w, scales, tiles);
    } else {
      unpack_nibbles<false>(w, scales, tiles);
    }
  }
}

// ---- multiplication ---------------------------------------------------------------------------------

// Sums of 32 rows x 32 columns over `slices`: two tiles of rows (`x`, `x_stride` elements apart), two
// blocks of columns. `sums` points at [32 rows][64 columns] of fp32.
inline void multiply(const uint16_t* x, int64_t x_stride, const uint16_t* w0, const uint16_t* w1, int64_t slices,
                     bool first, float* sums) {
  constexpr int kStride = kPanelBlocks * kBlockRows * sizeof(float);
  float* lower = sums + 16 * kPanelBlocks * kBlockRows;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + 16, kStride);
    _tile_loadd(2, lower, kStride);
    _tile_loadd(3, lower + 16, kStride);
  }
  for (int64_t slice = 0; slice < slices; ++slice, x += kTileElements, w0 += kTileElements, w1 += kTileElements) {
    // Loads and products hardly overlap; alternating them costs a tenth.
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w0, 64);
    _tile_loadd(7, w1, 64);
    _tile_loadd(5, x + x_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  _tile_stored(2, lower, kStride);
  _tile_stored(3, lower + 16, kStride);
}

// The blocks of one panel. Gated: half of them of the gate, half of as many columns of the up part.
struct PanelBlocks {
  int64_t first, count, half;  // half: blocks of the gate, 0: not gated

  int64_t outputs() const { return half ? count / 2 : count; }
  int64_t at(int64_t b) const { return half && b >= count / 2 ? first + half + b - count / 2 : first + b; }
};

void store_panel(const WeightShape& shape, const Output& out, const PanelBlocks& blocks, const float* sums) {
  const auto value = [&](int64_t row, int64_t b) {
    const Floats y = load(sums + (row * kPanelBlocks + b) * kBlockRows);
    return out.channel_scale == nullptr ? y : mul(y, load(out.channel_scale + blocks.at(b) * kBlockRows));
  };
  const int64_t width = blocks.half ? shape.n / 2 : shape.n;
  for (int64_t row = 0; row < out.rows; ++row) {
    for (int64_t b = 0; b < blocks.outputs(); ++b) {
      const int64_t col = (blocks.first + b) * kBlockRows, left = width - col;
      Floats y = value(row, b);
      if (blocks.half) y = mul(silu(y), value(row, b + blocks.outputs()));
      const __mmask16 wanted = left >= kBlockRows ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
      const int64_t at = row * out.stride + col;
      if (out.dtype == Dtype::kFloat32) {
        _mm512_mask_storeu_ps(static_cast<float*>(out.y) + at, wanted, y);
      } else {
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.y) + at, wanted, (__m256i)_mm512_cvtneps_pbh(y));
      }
    }
  }
}

// A thread's buffers.
struct alignas(64) Panel {
  uint16_t tiles[kPanelBlocks][kPanelSlices][kTileElements];
};

// Lines [share, share + 1) of `shares` of the weight bytes that will be unpacked next.
inline void fetch_share(const uint8_t* from, size_t bytes, int64_t share, int64_t shares) {
  const size_t lines = (bytes + 63) / 64, begin = lines * share / shares, end = lines * (share + 1) / shares;
  for (size_t line = begin; line < end; ++line) {
    _mm_prefetch(reinterpret_cast<const char*>(from + line * 64), _MM_HINT_T1);
  }
}

void run_panel(const WeightShape& shape, const uint8_t* weight, const uint16_t* x, const Output& out,
               const PanelBlocks& blocks, float* sums) {
  static thread_local Panel panel;
  const int64_t slices = shape.slices(), row_pairs = (out.rows + 31) / 32, x_stride = slices * kTileElements;
  const uint16_t* tiles[kPanelBlocks];
  for (int64_t slice = 0; slice < slices; slice += kPanelSlices) {
    const int64_t last = slice + kPanelSlices < slices ? slice + kPanelSlices : slices;
    for (int64_t b = 0; b < kPanelBlocks; ++b) {
      const uint8_t* block = weight + blocks.at(b < blocks.count ? b : 0) * shape.block_bytes();
      if (shape.bits == 16) {
        tiles[b] = reinterpret_cast<const uint16_t*>(block) + slice * kTileElements;
      } else {
        if (b < blocks.count) unpack_block(shape, block, slice, last, panel.tiles[b][0]);
        tiles[b] = panel.tiles[b < blocks.count ? b : 0][0];
      }
    }
    for (int64_t pair = 0; pair < row_pairs; ++pair) {
      const uint16_t* rows = x + pair * 2 * x_stride + slice * kTileElements;
      for (int64_t b = 0; b < blocks.count; ++b) {
        const size_t bytes = (last - slice) * (shape.slice_bytes() + shape.scale_bytes());
        const uint8_t* block = weight + blocks.at(b) * shape.block_bytes();
        const size_t ahead = slice * shape.slice_bytes() + bytes;
        fetch_share(block + ahead, bytes, pair, row_pairs);
      }
      float* to = sums + pair * 32 * kPanelBlocks * kBlockRows;
      for (int64_t b = 0; b < blocks.count; b += 2) {
        multiply(rows, x_stride, tiles[b], tiles[b + 1], last - slice, slice == 0, to + b * kBlockRows);
      }
    }
  }
  store_panel(shape, out, blocks, sums);
}

void run(const WeightShape& shape, const uint8_t* weight, const uint16_t* x, const Output& out, int64_t begin,
         int64_t end, float* sums) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  const Tiles configured(config);
  const int64_t half = out.gated ? shape.blocks() / 2 : 0, step = out.gated ? kPanelBlocks / 2 : kPanelBlocks;
  for (int64_t block = begin; block < end; block += step) {
    const int64_t count = end - block < step ? end - block : step;
    run_panel(shape, weight, x, out, PanelBlocks{block, out.gated ? 2 * count : count, half}, sums);
  }
}

inline void copy_bf16(const uint16_t* from, int64_t count, uint16_t* to) { std::memcpy(to, from, count * 2); }
inline void copy_bf16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 wanted = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count - i)) - 1);
    const Floats x = _mm512_maskz_loadu_ps(wanted, from + i);
    _mm256_mask_storeu_epi16(to + i, wanted, (__m256i)_mm512_cvtneps_pbh(x));
  }
}

template <typename T>
void pack_as(const WeightShape& shape, const Input& input, uint16_t* tiles, int64_t begin, int64_t end) {
  const auto* x = static_cast<const T*>(input.x);
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t slice = 0; slice < shape.slices(); ++slice) {
      uint16_t* to = tiles + (tile * shape.slices() + slice) * kTileElements;
      const int64_t col = slice * kSliceCols - shape.shift();
      const int64_t first = col < 0 ? -col : 0, last = shape.k - col < kSliceCols ? shape.k - col : kSliceCols;
      for (int row = 0; row < 16; ++row, to += kSliceCols) {
        const int64_t from = tile * 16 + row;
        if (from >= input.rows || first > 0 || last < kSliceCols) std::memset(to, 0, kSliceCols * 2);
        if (from < input.rows) copy_bf16(x + from * input.stride + col + first, last - first, to + first);
      }
    }
  }
}

void pack(const WeightShape& shape, const Input& input, uint16_t* tiles, int64_t begin, int64_t end) {
  if (input.dtype == Dtype::kFloat32) {
    pack_as<float>(shape, input, tiles, begin, end);
  } else {
    pack_as<uint16_t>(shape, input, tiles, begin, end);
  }
}

}  // namespace

const ManyRowsKernels many_rows_amx = {pack, run};

}  // namespace tp
