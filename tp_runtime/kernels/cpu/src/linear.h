// Linears of few rows: y = x W^T read at memory speed. One implementation (linear_kernel.h), compiled once
// for AVX-512 and once for AVX2; both give the same bits, for any number of rows and threads.
//
// Quantised weights meet the activations as integers. Each row's slice of 32 activations becomes 15-bit
// fixed point under a power-of-two scale (a bf16 value is exact unless it is under 1/64 of its slice's
// largest; the error is below 2^-14 of that largest), fp32 and fp16 take two such terms (28 bits), or one where
// bf16's precision is all that is asked for. Products
// and the sums over a slice are then exact, and slices are added in fp32 in order.
// Plain weights (bf16, fp32) are multiplied and added in fp32, even and odd columns apart.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "weight.h"

namespace tp {

constexpr int kMaxTermRows = 32;     // rows times fixed-point terms one call takes
constexpr int kMaxStreams = 6;       // blocks a thread walks at once
constexpr int kFixedSliceBytes = 64; // one row's slice of fixed-point activations

// Fixed-point terms a row of activations takes against this weight.
inline int terms_of(Dtype dtype, const WeightShape& shape, bool round_activations) {
  return shape.bits <= 8 && dtype != Dtype::kBfloat16 && !round_activations ? 2 : 1;
}

// Rows of activations as a kernel wants them; row m's terms are term rows m * terms, m * terms + 1.
struct Activations {
  int term_rows = 0, terms = 1;
  int8_t* fixed = nullptr;        // [slices][term_rows][64], the ISA's own order
  float* scale = nullptr;         // [slices][term_rows]
  int32_t* correction = nullptr;  // [slices][term_rows]: minus zero point times the slice's sum
  float* slice_sum = nullptr;     // [slices][term_rows], asymmetric weights
  float* group_sum = nullptr;     // [groups][term_rows], asymmetric weights
  float* plain = nullptr;         // [slices][term_rows][32], plain weights
};

struct Input {
  const void* x = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, stride = 0;  // stride in elements
};

struct Output {
  void* y = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, stride = 0;
  const float* channel_scale = nullptr;  // fp32 [blocks * 16], or null
  bool gated = false;  // the weight is gate over up: write silu(gate) * up, n / 2 columns
};

// The blocks [begin, end) of the output (gated: of its first half) that one thread does. They are cut into as
// many runs of neighbours as there are streams, and a pass takes one block of each run, so that each stream is
// sequential from the first pass to the last; what is left over goes in one more pass of fewer streams.
// Gated: half as many runs, each with its gate and its up stream.
struct Share {
  int64_t begin = 0, end = 0;
  int runs = kMaxStreams;

  int64_t whole_passes() const { return (end - begin) / runs; }
  int64_t passes() const { return (end - begin + runs - 1) / runs; }
};

// How finely activations can be prepared: by groups of columns, or by slices where there are none.
inline int64_t units_of(const WeightShape& shape) { return shape.grouped() ? shape.groups() : shape.slices(); }

struct LinearKernels {
  // Units [begin, end) of the activations.
  void (*prepare)(const WeightShape& shape, const Input& input, const Activations& out, int64_t begin, int64_t end);
  // Pass `pass` of a thread's share.
  void (*run)(const WeightShape& shape, const uint8_t* weight, const Activations& x, const Output& out,
              const Share& share, int64_t pass);
};

extern const LinearKernels linear_avx512, linear_avx2;

}  // namespace tp
