#include <cstring>

#include "scalar.h"
#include "weight.h"

namespace tp {
namespace {

// The stored value of one element: 8 bits q + 128, 4 bits the nibble.
inline uint8_t element(const WeightShape& shape, const uint8_t* q, int64_t row, int64_t col) {
  if (shape.bits == 8) return static_cast<uint8_t>(q[row * shape.k + col] + 128);
  const uint8_t byte = q[row * ((shape.k + 1) / 2) + col / 2];
  return col % 2 ? byte >> 4 : byte & 15;
}

// The value that stands for zero, which padding holds.
inline uint8_t zero_point(const WeightShape& shape) {
  return shape.bits == 8 ? 128 : (shape.asymmetric ? 0 : 8);
}

// Any slice, element by element: those at the edges of the weight or of a shard.
void pack_edge_slice(const WeightShape& shape, const uint8_t* q, int64_t block, int64_t slice, uint8_t* out) {
  const uint8_t zero = zero_point(shape);
  if (shape.bits == 4) std::memset(out, 0, shape.slice_bytes());
  for (int quad = 0; quad < kSliceCols / 4; ++quad) {
    for (int lane = 0; lane < kBlockRows; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int64_t row = block * kBlockRows + lane;
        const int64_t col = slice * kSliceCols + quad * 4 + i - shape.shift();
        const bool inside = row < shape.n && col >= 0 && col < shape.k;
        const uint8_t value = inside ? element(shape, q, row, col) : zero;
        if (shape.bits == 8) {
          out[quad * 64 + lane * 4 + i] = value;
        } else {
          out[quad / 2 * 64 + lane * 4 + i] |= static_cast<uint8_t>(value << (quad % 2 * 4));
        }
      }
    }
  }
}

// Four nibbles in the low 16 bits -> one a byte.
inline uint32_t spread_nibbles(uint32_t x) {
  x = (x | (x << 8)) & 0x00ff00ffu;
  return (x | (x << 4)) & 0x0f0f0f0fu;
}

void pack_slice(const WeightShape& shape, const uint8_t* q, int64_t block, int64_t slice, uint8_t* out) {
  const int64_t first_col = slice * kSliceCols - shape.shift();
  const bool inside = first_col >= 0 && first_col + kSliceCols <= shape.k && (block + 1) * kBlockRows <= shape.n;
  if (!inside || (shape.bits == 4 && first_col % 2)) return pack_edge_slice(shape, q, block, slice, out);
  const int64_t row_bytes = shape.bits == 8 ? shape.k : (shape.k + 1) / 2;
  const uint8_t* from = q + block * kBlockRows * row_bytes + first_col * shape.bits / 8;
  const int words = kSliceCols * shape.bits / 32;
  for (int lane = 0; lane < kBlockRows; ++lane, from += row_bytes) {
    for (int word = 0; word < words; ++word) {
      uint32_t value;
      std::memcpy(&value, from + word * 4, 4);
      value = shape.bits == 8 ? value ^ 0x80808080u
                              : spread_nibbles(value & 0xffff) | (spread_nibbles(value >> 16) << 4);
      std::memcpy(out + word * 64 + lane * 4, &value, 4);
    }
  }
}

void pack_scales(const WeightShape& shape, const uint16_t* from, int64_t block, int64_t group, uint8_t* out) {
  uint16_t lanes[kBlockRows] = {};
  for (int lane = 0; lane < kBlockRows && block * kBlockRows + lane < shape.n; ++lane) {
    lanes[lane] = from[(block * kBlockRows + lane) * shape.groups() + group];
  }
  std::memcpy(out, lanes, sizeof lanes);
}

// kRun: columns of a row that lie together.
template <typename T, int kRun>
void pack_plain_as(const WeightShape& shape, const T* from, int64_t row_stride, uint8_t* out, int64_t begin,
                   int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    T* at = reinterpret_cast<T*>(out + block * shape.block_bytes());
    const int64_t rows = shape.n - block * kBlockRows;
    for (int lane = 0; lane < kBlockRows; ++lane) {
      const T* row = from + (block * kBlockRows + lane) * row_stride;
      const int64_t cols = lane < rows ? shape.k : 0;
      for (int64_t col = 0; col < shape.slices() * kSliceCols; ++col) {
        at[(col / kRun) * kBlockRows * kRun + lane * kRun + col % kRun] = col < cols ? row[col] : T{0};
      }
    }
  }
}

// One value of a slice: an integer less the zero point, or a float.
inline float slice_value(const WeightShape& shape, const uint8_t* from, int col, int64_t lane) {
  switch (shape.bits) {
    case 8: return static_cast<float>(from[col / 4 * 64 + lane * 4 + col % 4] - 128);
    case 4: {
      const int nibble = (from[col / 8 * 64 + lane * 4 + col % 4] >> (col / 4 % 2 * 4)) & 15;
      return static_cast<float>(nibble - zero_point(shape));
    }
    case 16: return from_bf16(reinterpret_cast<const uint16_t*>(from)[col / 2 * 32 + lane * 2 + col % 2]);
    default: return reinterpret_cast<const float*>(from)[col * kBlockRows + lane];
  }
}

inline void assign(float* to, float x) { *to = x; }
inline void assign(uint16_t* to, float x) { *to = to_bf16(x); }

// fp16 -> fp32 without the F16C instructions, which this file may not use.
float from_half(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal halves normal.
  const float scaled = from_bits(magnitude << 13) * 5.192296858534828e33f;
  return from_bits(bits_of(scaled) | sign);
}

// Lanes [first_lane, last_lane) of the blocks, one row of `out` each.
template <typename T>
void unpack_as(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, T* out, int64_t begin,
               int64_t end, int64_t first_lane, int64_t last_lane) {
  const int64_t groups = shape.grouped() ? shape.groups() : 1;
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* at = packed + block * shape.block_bytes();
    const int64_t left = shape.n - block * kBlockRows, lanes = left < last_lane ? left : last_lane;
    int64_t slice = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t count = shape.grouped() ? shape.group_slices(group) : shape.slices();
      float scale[kBlockRows], offset[kBlockRows];
      for (int lane = 0; lane < kBlockRows; ++lane) {
        const auto* halves = reinterpret_cast<const uint16_t*>(at + count * shape.slice_bytes());
        scale[lane] = shape.grouped() ? from_half(halves[lane])
                                      : (channel_scale != nullptr ? channel_scale[block * kBlockRows + lane] : 1.0f);
        offset[lane] = shape.asymmetric ? from_half(halves[kBlockRows + lane]) : 0.0f;
      }
      for (int64_t i = 0; i < count; ++i, ++slice, at += shape.slice_bytes()) {
        const int64_t first = slice * kSliceCols - shape.shift();
        for (int64_t lane = first_lane; lane < lanes; ++lane) {
          T* row = out + ((block - begin) * kBlockRows + lane - first_lane) * shape.k;
          for (int64_t col = first < 0 ? 0 : first; col < first + kSliceCols && col < shape.k; ++col) {
            const float value = slice_value(shape, at, static_cast<int>(col - first), lane);
            assign(row + col, value * scale[lane] + offset[lane]);
          }
        }
      }
      at += shape.scale_bytes();
    }
  }
}

}  // namespace

void unpack(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, float* out, int64_t begin,
            int64_t end) {
  unpack_as(shape, packed, channel_scale, out, begin, end, 0, kBlockRows);
}

void unpack(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, uint16_t* out, int64_t begin,
            int64_t end) {
  unpack_as(shape, packed, channel_scale, out, begin, end, 0, kBlockRows);
}

void unpack_row(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, float* out, int64_t row) {
  const int64_t block = row / kBlockRows, lane = row % kBlockRows;
  unpack_as(shape, packed, channel_scale, out, block, block + 1, lane, lane + 1);
}

void pack_quantized(const WeightShape& shape, const CanonicalWeight& from, uint8_t* out, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* at = out + block * shape.block_bytes();
    int64_t slice = 0;
    const int64_t groups = shape.grouped() ? shape.groups() : 1;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t stop = shape.grouped() ? slice + shape.group_slices(group) : shape.slices();
      for (; slice < stop; ++slice, at += shape.slice_bytes()) pack_slice(shape, from.q, block, slice, at);
      if (!shape.grouped()) continue;
      pack_scales(shape, from.scale, block, group, at);
      if (shape.asymmetric) pack_scales(shape, from.offset, block, group, at + 32);
      at += shape.scale_bytes();
    }
  }
}

void pack_plain(const WeightShape& shape, const void* from, int64_t row_stride, uint8_t* out, int64_t begin,
                int64_t end) {
  if (shape.bits == 16) {
    pack_plain_as<uint16_t, 2>(shape, static_cast<const uint16_t*>(from), row_stride, out, begin, end);
  } else {
    pack_plain_as<uint32_t, 1>(shape, static_cast<const uint32_t*>(from), row_stride, out, begin, end);
  }
}

}  // namespace tp
