// Between tensors of fp32, bf16 or fp16 and the kernels' floats.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtype.h"
#include "scalar.h"

namespace tp {
namespace {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kBFloat16: return Dtype::kBfloat16;
    case at::kHalf: return Dtype::kFloat16;
    default: TORCH_CHECK(false, "fp32, bf16 or fp16 is needed, not ", type);
  }
}
inline Dtype dtype_of(const at::Tensor& x) { return dtype_of(x.scalar_type()); }

// out[i] = x[from + i] * factor, in elements of x's storage.
inline void read_floats(const at::Tensor& x, int64_t from, int64_t count, float factor, float* out) {
  switch (dtype_of(x)) {
    case Dtype::kFloat32:
      for (int64_t i = 0; i < count; ++i) out[i] = x.const_data_ptr<float>()[from + i] * factor;
      return;
    case Dtype::kBfloat16: {
      const auto* bits = static_cast<const uint16_t*>(x.const_data_ptr()) + from;
      for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(bits[i]) * factor;
      return;
    }
    case Dtype::kFloat16: {
      const auto* halves = x.const_data_ptr<at::Half>() + from;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(halves[i]) * factor;
    }
  }
}

inline void write_floats(const at::Tensor& y, int64_t to, int64_t count, const float* from) {
  switch (dtype_of(y)) {
    case Dtype::kFloat32:
      std::memcpy(y.data_ptr<float>() + to, from, count * sizeof(float));
      return;
    case Dtype::kBfloat16: {
      auto* bits = static_cast<uint16_t*>(y.data_ptr()) + to;
      for (int64_t i = 0; i < count; ++i) bits[i] = to_bf16(from[i]);
      return;
    }
    case Dtype::kFloat16: {
      auto* halves = y.data_ptr<at::Half>() + to;
      for (int64_t i = 0; i < count; ++i) halves[i] = static_cast<at::Half>(from[i]);
    }
  }
}

}  // namespace
}  // namespace tp
