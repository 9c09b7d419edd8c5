// Ops for measuring: kernels in a loop with nothing but the loop between them, as the step runs them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <chrono>
#include <optional>
#include <tuple>

#include "ops.h"

namespace tp {
namespace {

using at::Tensor;

// tp_cpu::linear over each of `packed`, alike in shape. Returns the last one's result, and the seconds of all.
std::tuple<Tensor, double> linear_seconds(const Tensor& x, at::TensorList packed,
                                          const std::optional<Tensor>& channel_scale, int64_t n, int64_t k,
                                          int64_t bits, int64_t group_size, int64_t head, bool asymmetric, bool gated,
                                          bool round_activations) {
  TORCH_CHECK(!packed.empty(), "there is no weight to time");
  Tensor y;
  const auto before = std::chrono::steady_clock::now();
  for (const Tensor& weight : packed) {
    y = linear(x, weight, channel_scale, n, k, bits, group_size, head, asymmetric, gated, round_activations);
  }
  return {y, std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "linear_seconds(Tensor x, Tensor[] packed, Tensor? channel_scale, int n, int k, int bits, int group_size, "
      "int head, bool asymmetric, bool gated, bool round_activations) -> (Tensor, float)");
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) { m.impl("linear_seconds", &linear_seconds); }

}  // namespace tp
