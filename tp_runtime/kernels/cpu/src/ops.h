// The ops that others in this library are made of.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tp {

// tp_cpu::linear. x: [..., k] of fp32, bf16 or fp16; returns [..., n], gated: [..., n / 2], in x's dtype.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& channel_scale,
                  int64_t n, int64_t k, int64_t bits, int64_t group_size, int64_t head, bool asymmetric, bool gated,
                  bool round_activations);

// tp_cpu::paged_attention. q: [T, H, D], head_dim contiguous or not; returns [T, H, D], contiguous. scales: of an
// int8 cache, fp32 [blocks, heads, block_size].
at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& block_table, const at::Tensor& query_start,
                           const at::Tensor& context_lens, double scale, int64_t window,
                           const std::optional<at::Tensor>& key_scales, const std::optional<at::Tensor>& value_scales);

}  // namespace tp
