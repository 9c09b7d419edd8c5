// Writing one token's key or value of one head into the cache.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>

#include "scalar.h"
#include "torch_dtype.h"

namespace tp {
namespace {

constexpr float kMostInt8 = 127.0f;

// An int8 cache has fp32 scales, one a token and head; no other has.
inline void check_scales(const at::Tensor& cache, const std::optional<at::Tensor>& scales) {
  TORCH_CHECK(scales.has_value() == (cache.scalar_type() == at::kChar), "an int8 cache has scales, and no other");
  TORCH_CHECK(!scales || (scales->scalar_type() == at::kFloat && scales->is_contiguous() &&
                          scales->sizes() == cache.sizes().slice(0, 3)),
              "scales are fp32 [blocks, heads, block_size], contiguous");
}

// x[i] ~ out[i] * scale, which is returned: the largest magnitude is 127. NaN where some x is not finite.
inline float quantise_int8(const float* x, int64_t count, int8_t* out) {
  uint32_t largest = 0;  // magnitudes are in the order of their bits, and what is not finite comes last
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000u;
  const float scale = finite ? from_bits(largest) / kMostInt8 : std::numeric_limits<float>::quiet_NaN();
  if (!finite || scale == 0.0f) {
    std::memset(out, 0, count);
    return scale;
  }
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: its neighbours are whole numbers, ties go to even
  for (int64_t i = 0; i < count; ++i) {
    float whole = x[i] / scale;
    whole = whole > kMostInt8 ? kMostInt8 : (whole < -kMostInt8 ? -kMostInt8 : whole);
    out[i] = static_cast<int8_t>(static_cast<int32_t>(bits_of(whole + kShift)) - static_cast<int32_t>(bits_of(kShift)));
  }
  return scale;
}

// cache: [blocks, heads, block_size, D]; slot: block * block_size + place.
inline void write_cached(const at::Tensor& cache, const std::optional<at::Tensor>& scales, int64_t head, int64_t slot,
                         const float* x) {
  const int64_t block_size = cache.size(2), dim = cache.size(3);
  const int64_t vector = (slot / block_size * cache.size(1) + head) * block_size + slot % block_size;
  if (scales) {
    scales->data_ptr<float>()[vector] = quantise_int8(x, dim, cache.data_ptr<int8_t>() + vector * dim);
  } else {
    write_floats(cache, vector * dim, dim, x);
  }
}

}  // namespace
}  // namespace tp
