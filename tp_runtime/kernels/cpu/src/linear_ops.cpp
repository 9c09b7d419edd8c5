// The linear ops as torch sees them: argument checks, scratch, and the split over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <optional>

#include "isa.h"
#include "linear.h"
#include "memory.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;

constexpr int64_t kSmallRows = 16;        // rows that one pass over the weight serves
constexpr int64_t kGrainBytes = 64 << 10; // weight bytes below which a second thread costs more than it brings
constexpr int64_t kPanelBytes = 1 << 20;  // of unpacked weight at a time, so that it stays in cache

const LinearKernels& kernels() {
  const Isa isa = active_isa();
  TORCH_CHECK(isa >= Isa::kAvx2, "this CPU has no AVX2, FMA and F16C; use --kernels reference");
  return isa >= Isa::kAvx512 ? linear_avx512 : linear_avx2;
}

Activations allocate(const WeightShape& shape, int64_t rows, Dtype dtype) {
  Activations x;
  x.terms = terms_of(dtype, shape);
  x.term_rows = static_cast<int>(rows) * x.terms;
  const size_t cells = shape.slices() * x.term_rows, groups = shape.groups() * x.term_rows;
  Scratch& scratch = Scratch::of_thread();
  if (shape.bits > 8) {
    scratch.reserve(cells * kSliceCols * sizeof(float) + 64);
    x.plain = scratch.take<float>(cells * kSliceCols);
    return x;
  }
  scratch.reserve(cells * (kFixedSliceBytes + 16) + groups * 4 + 5 * 64);
  x.fixed = scratch.take<int8_t>(cells * kFixedSliceBytes);
  x.scale = scratch.take<float>(cells);
  x.correction = scratch.take<int32_t>(cells);
  if (shape.asymmetric) {
    x.slice_sum = scratch.take<float>(cells);
    x.group_sum = scratch.take<float>(groups);
  }
  return x;
}

void small_rows(const WeightShape& shape, const Tensor& x, const uint8_t* packed, Output out, int64_t first_row,
                int64_t rows) {
  const LinearKernels& kernel = kernels();
  Activations activations = allocate(shape, rows, dtype_of(x));
  const int64_t row_bytes = x.stride(0) * x.element_size();
  const auto* data = static_cast<const uint8_t*>(x.const_data_ptr()) + first_row * row_bytes;
  kernel.prepare(shape, Input{data, dtype_of(x), rows, x.stride(0)}, activations);
  out.rows = rows;
  const int64_t blocks = out.gated ? shape.blocks() / 2 : shape.blocks();
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, shape.block_bytes()));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    kernel.run(shape, packed, activations, out, begin, end);
  });
}

// Many rows: unpack a panel of the weight into cache, then multiply it by all rows.
void many_rows(const WeightShape& shape, const Tensor& x, const uint8_t* packed, const float* channel_scale, Tensor y) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  const Tensor x_used = bf16 || x.scalar_type() == at::kFloat ? x : x.to(at::kFloat);
  const int64_t panel_blocks =
      std::max<int64_t>(1, kPanelBytes / std::max<int64_t>(1, shape.k * kBlockRows * x_used.element_size()));
  Tensor panel = at::empty({panel_blocks * kBlockRows, shape.k}, x_used.options());
  for (int64_t first = 0; first < shape.blocks(); first += panel_blocks) {
    const int64_t last = std::min(shape.blocks(), first + panel_blocks);
    const int64_t row = first * kBlockRows, rows = std::min(shape.n, last * kBlockRows) - row;
    at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      const int64_t at = (begin - first) * kBlockRows * shape.k;
      if (bf16) {
        unpack(shape, packed, channel_scale, reinterpret_cast<uint16_t*>(panel.data_ptr()) + at, begin, end);
      } else {
        unpack(shape, packed, channel_scale, panel.data_ptr<float>() + at, begin, end);
      }
    });
    y.narrow(1, row, rows).copy_(at::mm(x_used, panel.narrow(0, 0, rows).t()));
  }
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& channel_scale, int64_t n, int64_t k,
              int64_t bits, int64_t group_size, int64_t head, bool asymmetric, bool gated) {
  const WeightShape shape{n, k, static_cast<int>(bits), static_cast<int>(group_size), static_cast<int>(head),
                          asymmetric};
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, "x ends in ", x.size(-1), " columns, the weight has ", k);
  TORCH_CHECK(bits != 8 || !asymmetric, "8-bit weights are symmetric");
  TORCH_CHECK(packed.numel() == static_cast<int64_t>(shape.blocks() * shape.block_bytes()), "the packed weight is cut");
  TORCH_CHECK(!gated || n % (2 * kBlockRows) == 0, "a gated weight has ", n, " rows; whole pairs of 16 are needed");
  const int64_t width = gated ? n / 2 : n;
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const Tensor x_2d = x.reshape({-1, k}), y_2d = y.view({-1, width});
  const Tensor rows_x = x_2d.stride(1) == 1 || k == 1 ? x_2d : x_2d.contiguous();
  const auto* weight = packed.const_data_ptr<uint8_t>();
  const float* scale = channel_scale.has_value() ? channel_scale->const_data_ptr<float>() : nullptr;
  if (rows_x.size(0) > kSmallRows) {
    Tensor full = gated ? at::empty({rows_x.size(0), n}, x.options()) : y_2d;
    many_rows(shape, rows_x, weight, scale, full);
    if (gated) at::mul_out(const_cast<Tensor&>(y_2d), at::silu(full.narrow(1, 0, width)), full.narrow(1, width, width));
    return y;
  }
  small_rows(shape, rows_x, weight, Output{y.data_ptr(), dtype_of(x), rows_x.size(0), width, scale, gated}, 0,
             rows_x.size(0));
  return y;
}

Tensor pack_quantized_op(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& offset, int64_t n,
                         int64_t k, int64_t bits, int64_t group_size, int64_t head) {
  const WeightShape shape{n, k, static_cast<int>(bits), static_cast<int>(group_size), static_cast<int>(head),
                          offset.has_value()};
  TORCH_CHECK(q.is_contiguous() && scale.is_contiguous() && (!offset || offset->is_contiguous()),
              "canonical weights are contiguous");
  TORCH_CHECK(!shape.grouped() || (scale.dim() == 2 && scale.size(1) == shape.groups() && scale.size(0) == n &&
                                   scale.scalar_type() == at::kHalf),
              "scales are ", scale.sizes(), ", ", n, " rows of ", shape.groups(), " fp16 are needed");
  const auto halves = [](const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); };
  CanonicalWeight from;
  from.q = static_cast<const uint8_t*>(q.const_data_ptr());
  if (shape.grouped()) from.scale = halves(scale);
  if (offset) from.offset = halves(*offset);
  Tensor packed = empty_weight(static_cast<int64_t>(shape.blocks() * shape.block_bytes()));
  auto* out = packed.data_ptr<uint8_t>();
  at::parallel_for(0, shape.blocks(), 1,
                   [&](int64_t begin, int64_t end) { pack_quantized(shape, from, out, begin, end); });
  return packed;
}

Tensor pack_plain_op(const Tensor& w) {
  const bool bf16 = w.scalar_type() == at::kBFloat16;
  TORCH_CHECK(w.dim() == 2 && (bf16 || w.scalar_type() == at::kFloat), "a plain weight is bf16 or fp32 [n, k]");
  const Tensor rows = w.stride(1) == 1 ? w : w.contiguous();
  const WeightShape shape{w.size(0), w.size(1), bf16 ? 16 : 32, 0, 0, false};
  Tensor packed = empty_weight(static_cast<int64_t>(shape.blocks() * shape.block_bytes()));
  auto* out = packed.data_ptr<uint8_t>();
  at::parallel_for(0, shape.blocks(), 1, [&](int64_t begin, int64_t end) {
    pack_plain(shape, rows.const_data_ptr(), rows.stride(0), out, begin, end);
  });
  return packed;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? channel_scale, int n, int k, int bits, int group_size, int head, "
      "bool asymmetric, bool gated) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pack_quantized(Tensor q, Tensor scale, Tensor? offset, int n, int k, int bits, int group_size, int head) -> "
      "Tensor");
  m.def("pack_plain(Tensor w) -> Tensor");
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) {
  m.impl("linear", &linear);
  m.impl("pack_quantized", &pack_quantized_op);
  m.impl("pack_plain", &pack_plain_op);
}

}  // namespace tp
