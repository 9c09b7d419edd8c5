// The linear ops as torch sees them: argument checks, scratch, and the split over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "many_rows.h"
#include "memory.h"
#include "ops.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;

constexpr int64_t kFewRows = 16;        // rows that one pass over the weight serves
constexpr int64_t kGrainBytes = 64 << 10; // weight bytes below which a second thread costs more than it brings
constexpr int64_t kPanelBytes = 1 << 20;  // of unpacked weight at a time, so that it stays in cache

const LinearKernels& kernels() {
  const Isa isa = active_isa();
  TORCH_CHECK(isa >= Isa::kAvx2, "this CPU has no AVX2, FMA and F16C; use --kernels reference");
  return isa >= Isa::kAvx512 ? linear_avx512 : linear_avx2;
}

Activations allocate(const WeightShape& shape, int64_t rows, int terms) {
  Activations x;
  x.terms = terms;
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

// The part of [0, count) that thread `thread` of `threads` begins with: what at::parallel_for gave it when
// the weight was packed, so that it reads the memory it first touched.
std::pair<int64_t, int64_t> part_of(int64_t count, int64_t thread, int64_t threads) {
  const int64_t each = (count + threads - 1) / threads;
  return {std::min(thread * each, count), std::min((thread + 1) * each, count)};
}

// A thread's share of the output, and how many of its passes have been taken.
struct alignas(64) Claims {
  Share share;
  std::atomic<int64_t> taken{0};
};

// `blocks` shared out among threads in multiples of `each`; passes of `runs` blocks.
Claims* share_out(int64_t blocks, int64_t each, int runs, int threads) {
  static thread_local std::vector<Claims> kept;
  if (static_cast<int>(kept.size()) < threads) kept = std::vector<Claims>(threads);
  for (int t = 0; t < threads; ++t) {
    const auto [begin, end] = part_of((blocks + each - 1) / each, t, threads);
    kept[t].share = Share{std::min(begin * each, blocks), std::min(end * each, blocks), runs};
    kept[t].taken.store(0, std::memory_order_relaxed);
  }
  return kept.data();
}

// A thread's own passes, and then what others have left (cores differ in speed when something else uses them).
template <typename Run>
void take_passes(Claims* claims, int thread, int threads, const Run& run) {
  for (int i = 0; i < threads; ++i) {
    Claims& from = claims[(thread + i) % threads];
    for (;;) {
      const int64_t pass = from.taken.fetch_add(1, std::memory_order_relaxed);
      if (pass >= from.share.passes()) break;
      run(from.share, pass);
    }
  }
}

// Few rows: all threads prepare the activations, wait for each other, and run.
void few_rows(const WeightShape& shape, const Input& input, const uint8_t* packed, const Output& out, int terms) {
  const LinearKernels& kernel = kernels();
  const Activations activations = allocate(shape, out.rows, terms);
  const int64_t blocks = out.gated ? shape.blocks() / 2 : shape.blocks();
  const int runs = out.gated ? kMaxStreams / 2 : kMaxStreams;
  const bool small = static_cast<int64_t>(shape.blocks() * shape.block_bytes()) < 2 * kGrainBytes;
  const int threads = small || at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1) {
    kernel.prepare(shape, input, activations, 0, units_of(shape));
    const Share all{0, blocks, runs};
    for (int64_t pass = 0; pass < all.passes(); ++pass) kernel.run(shape, packed, activations, out, all, pass);
    return;
  }
  Claims* claims = share_out(blocks, 1, runs, threads);
  // GNU's OpenMP makes new threads when teams change size, so this is always the team of all threads.
#pragma omp parallel
  {
    const int thread = omp_get_thread_num();
    const auto [first_unit, last_unit] = part_of(units_of(shape), thread, omp_get_num_threads());
    kernel.prepare(shape, input, activations, first_unit, last_unit);
#pragma omp barrier
    take_passes(claims, thread, threads, [&](const Share& share, int64_t pass) {
      kernel.run(shape, packed, activations, out, share, pass);
    });
  }
}

// Many rows on AMX: bf16 activations, or fp32 ones that may be rounded to it, against anything but fp32 weights.
bool takes_tiles(const WeightShape& shape, const Tensor& x, bool round_activations) {
  const bool takes = x.scalar_type() == at::kBFloat16 || (round_activations && x.scalar_type() == at::kFloat);
  return active_isa() == Isa::kAmx && takes && shape.bits <= 16 && shape.k > 0;
}

void many_rows_tiled(const WeightShape& shape, const Tensor& x, const uint8_t* packed, const float* channel_scale,
                     bool gated, Tensor& y) {
  const int64_t rows = x.size(0), row_tiles = (rows + 31) / 32 * 2;
  const Input input{x.const_data_ptr(), dtype_of(x), rows, x.stride(0)};
  const Tensor tiles = at::empty({row_tiles * 16, shape.slices() * kSliceCols}, x.options().dtype(at::kBFloat16));
  auto* tile_data = static_cast<uint16_t*>(tiles.data_ptr());
  const Output out{y.data_ptr(), dtype_of(y), rows, y.stride(0), channel_scale, gated};
  const int64_t blocks = gated ? shape.blocks() / 2 : shape.blocks();
  const int each = gated ? kPanelBlocks / 2 : kPanelBlocks;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  Claims* claims = share_out(blocks, each, each, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const auto [first_tile, last_tile] = part_of(row_tiles, thread, omp_get_num_threads());
    many_rows_amx.pack(shape, input, tile_data, first_tile, last_tile);
    Scratch& scratch = Scratch::of_thread();
    const size_t floats = row_tiles * 16 * kPanelBlocks * kBlockRows;
    scratch.reserve(floats * sizeof(float));
    auto* sums = scratch.take<float>(floats);
#pragma omp barrier
    take_passes(claims, thread, threads, [&](const Share& share, int64_t pass) {
      const int64_t begin = share.begin + pass * each;
      many_rows_amx.run(shape, packed, tile_data, out, begin, std::min(begin + each, share.end), sums);
    });
  }
}

// Many rows elsewhere: unpack a panel of the weight into cache, then multiply it by all rows.
void many_rows(const WeightShape& shape, const Tensor& x, const uint8_t* packed, const float* channel_scale,
               Tensor& y) {
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

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& channel_scale, int64_t n, int64_t k,
              int64_t bits, int64_t group_size, int64_t head, bool asymmetric, bool gated, bool round_activations) {
  const WeightShape shape{n, k, static_cast<int>(bits), static_cast<int>(group_size), static_cast<int>(head),
                          asymmetric};
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == k, "x ends in ", x.size(-1), " columns, the weight has ", k);
  TORCH_CHECK(bits != 8 || !asymmetric, "8-bit weights are symmetric");
  TORCH_CHECK(packed.numel() == static_cast<int64_t>(shape.blocks() * shape.block_bytes()), "the packed weight is cut");
  TORCH_CHECK(!gated || n % (2 * kBlockRows) == 0, "a gated weight has ", n, " rows; whole pairs of 16 are needed");
  const int64_t width = gated ? n / 2 : n, rows = k > 0 ? x.numel() / k : 0;
  auto sizes = x.sizes().vec();
  sizes.back() = width;
  Tensor y = at::empty(sizes, x.options());
  if (k == 0) y.zero_();
  if (y.numel() == 0 || k == 0) return y;
  const auto* weight = packed.const_data_ptr<uint8_t>();
  const float* scale = channel_scale.has_value() ? channel_scale->const_data_ptr<float>() : nullptr;
  const Tensor from = x.is_contiguous() ? x : x.contiguous();
  if (rows <= kFewRows) {
    const Input input{from.const_data_ptr(), dtype_of(x), rows, k};
    few_rows(shape, input, weight, Output{y.data_ptr(), dtype_of(x), rows, width, scale, gated},
             terms_of(dtype_of(x), shape, round_activations));
    return y;
  }
  const Tensor x_2d = from.view({rows, k});
  Tensor y_2d = y.view({rows, width});
  if (takes_tiles(shape, x_2d, round_activations)) {
    many_rows_tiled(shape, x_2d, weight, scale, gated, y_2d);
    return y;
  }
  Tensor full = gated ? at::empty({rows, n}, x.options()) : y_2d;
  many_rows(shape, x_2d, weight, scale, full);
  if (gated) at::mul_out(y_2d, at::silu(full.narrow(1, 0, width)), full.narrow(1, width, width));
  return y;
}

namespace {

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

// Packed weights of whole blocks, one over the other: the blocks of all, in order. gated: the two halves are read
// side by side.
Tensor join_packed(at::TensorList parts, int64_t block_bytes, bool gated) {
  int64_t blocks = 0;
  std::vector<std::pair<int64_t, const uint8_t*>> starts;
  for (const Tensor& part : parts) {
    TORCH_CHECK(part.is_contiguous() && part.numel() % block_bytes == 0, "a part is no whole number of blocks");
    starts.emplace_back(blocks, part.const_data_ptr<uint8_t>());
    blocks += part.numel() / block_bytes;
  }
  Tensor joined = empty_weight(blocks * block_bytes);
  auto* out = joined.data_ptr<uint8_t>();
  const auto copy = [&](int64_t begin, int64_t end) {
    size_t part = 0;
    for (int64_t block = begin; block < end; ++block) {
      while (part + 1 < starts.size() && starts[part + 1].first <= block) ++part;
      std::memcpy(out + block * block_bytes, starts[part].second + (block - starts[part].first) * block_bytes,
                  block_bytes);
    }
  };
  // The threads that will read the blocks touch them first.
  const int64_t half = gated ? blocks / 2 : 0;
  at::parallel_for(0, blocks - half, 1, [&](int64_t begin, int64_t end) {
    copy(begin, end);
    if (gated) copy(half + begin, half + end);
  });
  return joined;
}

// Rows `ids` of a packed weight in fp32, [ids, k]: an embedding that shares its table with the head.
Tensor packed_rows(const Tensor& ids, const Tensor& packed, const std::optional<Tensor>& channel_scale, int64_t n,
                   int64_t k, int64_t bits, int64_t group_size, int64_t head, bool asymmetric) {
  const WeightShape shape{n, k, static_cast<int>(bits), static_cast<int>(group_size), static_cast<int>(head),
                          asymmetric};
  TORCH_CHECK(ids.dim() == 1 && ids.is_contiguous() && ids.scalar_type() == at::kLong, "ids are int64 [T]");
  TORCH_CHECK(packed.numel() == static_cast<int64_t>(shape.blocks() * shape.block_bytes()), "the packed weight is cut");
  Tensor rows = at::empty({ids.size(0), k}, packed.options().dtype(at::kFloat));
  const auto* id = ids.const_data_ptr<int64_t>();
  const auto* weight = packed.const_data_ptr<uint8_t>();
  const float* scale = channel_scale.has_value() ? channel_scale->const_data_ptr<float>() : nullptr;
  auto* out = rows.data_ptr<float>();
  for (int64_t i = 0; i < ids.size(0); ++i) TORCH_CHECK(id[i] >= 0 && id[i] < n, "row ", id[i], " of ", n);
  at::parallel_for(0, ids.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) unpack_row(shape, weight, scale, out + i * k, id[i]);
  });
  return rows;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? channel_scale, int n, int k, int bits, int group_size, int head, "
      "bool asymmetric, bool gated, bool round_activations) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "pack_quantized(Tensor q, Tensor scale, Tensor? offset, int n, int k, int bits, int group_size, int head) -> "
      "Tensor");
  m.def("pack_plain(Tensor w) -> Tensor");
  m.def("join_packed(Tensor[] parts, int block_bytes, bool gated) -> Tensor");
  m.def(
      "packed_rows(Tensor ids, Tensor packed, Tensor? channel_scale, int n, int k, int bits, int group_size, int head, "
      "bool asymmetric) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) {
  m.impl("linear", &linear);
  m.impl("pack_quantized", &pack_quantized_op);
  m.impl("pack_plain", &pack_plain_op);
  m.impl("join_packed", &join_packed);
  m.impl("packed_rows", &packed_rows);
}

}  // namespace tp
