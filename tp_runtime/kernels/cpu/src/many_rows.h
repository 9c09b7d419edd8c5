// Linears of many rows (prefill) on AMX tiles, straight from the packed weight: compute-bound.
//
// A panel of 64 output columns by kPanelSlices slices of the weight is turned into bf16 tiles in cache, once,
// and then multiplied by all rows; there is no bf16 copy of the weight. Per-channel int8 is exact in bf16 and
// scaled afterwards; grouped weights are scaled first and rounded to bf16 once. Sums are fp32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace tp {

constexpr int kPanelBlocks = 4;   // of 16 output columns
constexpr int kPanelSlices = 8;  // of 32 input columns: the panel and two tiles of rows stay in the first-level cache

struct ManyRowsKernels {
  // Rows of x (bf16, or fp32 rounded to it) as tiles [rows / 16][slices][16][32], zero beyond the rows and
  // columns; tiles [begin, end) of 16 rows.
  void (*pack)(const WeightShape& shape, const Input& x, uint16_t* tiles, int64_t begin, int64_t end);
  // Output columns of blocks [begin, end), gated: of the first half's. y is bf16 or fp32. sums: scratch of 64 floats
  // a row, for rows rounded up to 32.
  void (*run)(const WeightShape& shape, const uint8_t* weight, const uint16_t* tiles, const Output& out, int64_t begin,
              int64_t end, float* sums);
};

extern const ManyRowsKernels many_rows_amx;

}  // namespace tp
