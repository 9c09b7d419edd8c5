// How a packed weight lies in memory.
//
// Logical [n, k]. Rows go in blocks of 16 and columns in slices of 32; a block's slices lie one after the
// other, so that a thread that walks four blocks at once reads four sequential streams. Zeros pad the last
// rows, the last slice, and the columns that a shard's first slice holds left of the shard (`shift`).
//
// Quantised slice (16 rows x 32 columns), in the order of a dot product of byte quads:
//   8 bits: byte [quad 0..7][row 0..15][4], unsigned, q + 128.
//   4 bits: byte [pair 0..3][row 0..15][4]: quad 2*pair in the low nibbles, 2*pair+1 in the high ones.
// Where columns share scales in groups, a group's slices are followed by 16 fp16 scales (and 16 fp16
// offsets, asymmetric), one a row. Per-channel scales lie apart, fp32 [blocks * 16].
//
// Plain slice: bf16 [pair 0..15][row 0..15][2], or fp32 [column 0..31][row 0..15].
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp {

constexpr int kBlockRows = 16;
constexpr int kSliceCols = 32;

struct WeightShape {
  int64_t n = 0, k = 0;
  int bits = 0;             // 4, 8, 16 (bf16) or 32 (fp32)
  int group_size = 0;       // columns that share a scale; 0: one scale a row, or none
  int head = 0;             // columns of the first group left of column 0
  bool asymmetric = false;  // groups have offsets

  bool grouped() const { return group_size != 0; }
  int shift() const { return head % kSliceCols; }
  int skipped_slices() const { return head / kSliceCols; }
  int slices_per_group() const { return group_size / kSliceCols; }
  int64_t blocks() const { return (n + kBlockRows - 1) / kBlockRows; }
  int64_t slices() const { return (shift() + k + kSliceCols - 1) / kSliceCols; }
  int64_t groups() const {
    return grouped() ? (skipped_slices() + slices() + slices_per_group() - 1) / slices_per_group() : 0;
  }
  size_t slice_bytes() const { return static_cast<size_t>(kBlockRows) * kSliceCols * bits / 8; }
  size_t scale_bytes() const { return grouped() ? (asymmetric ? 64 : 32) : 0; }
  size_t block_bytes() const { return slices() * slice_bytes() + groups() * scale_bytes(); }
  // The first held slice of group `group`, and how many there are (the first and last group may be short).
  int64_t first_slice(int64_t group) const {
    const int64_t first = group * slices_per_group() - skipped_slices();
    return first < 0 ? 0 : first;
  }
  int64_t group_slices(int64_t group) const {
    const int64_t stop = (group + 1) * slices_per_group() - skipped_slices();
    return (stop > slices() ? slices() : stop) - first_slice(group);
  }
};

// What a canonical quantised weight holds (quant.QuantizedTensor), row-major.
struct CanonicalWeight {
  const uint8_t* q = nullptr;        // int8 [n, k] or nibbles [n, ceil(k/2)]
  const uint16_t* scale = nullptr;   // fp16 [n, groups]
  const uint16_t* offset = nullptr;  // fp16 [n, groups]
};

// Writes blocks [begin, end). `out` is the whole packed weight.
void pack_quantized(const WeightShape& shape, const CanonicalWeight& from, uint8_t* out, int64_t begin, int64_t end);
// from: bf16 or fp32 [n, k] with `row_stride` elements a row.
void pack_plain(const WeightShape& shape, const void* from, int64_t row_stride, uint8_t* out, int64_t begin,
                int64_t end);
// Rows [16 * begin, min(16 * end, n)) as floating point: out, fp32 or bf16, is [rows, k], its first row being
// 16 * begin. Weight times scale (plus offset) is rounded once to bf16.
void unpack(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, float* out, int64_t begin,
            int64_t end);
void unpack(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, uint16_t* out, int64_t begin,
            int64_t end);
// One row, in fp32.
void unpack_row(const WeightShape& shape, const uint8_t* packed, const float* channel_scale, float* out, int64_t row);

}  // namespace tp
