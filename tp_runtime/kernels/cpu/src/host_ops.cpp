// Ops about the host: which instruction set is in use, and how fast memory can be read.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <string>
#include <string_view>

#include "isa.h"
#include "memory.h"
#include "read.h"

namespace tp {
namespace {

std::string isa_name() {
  switch (active_isa()) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "none";
  }
}

void limit_isa_by_name(std::string_view name) {
  TORCH_CHECK(name == "amx" || name == "avx512" || name == "avx2", "unknown instruction set ", name);
  limit_isa(name == "amx" ? Isa::kAmx : (name == "avx512" ? Isa::kAvx512 : Isa::kAvx2));
}

// Seconds that all threads together take to read the whole of `memory` once, each its own part.
double read_seconds(const at::Tensor& memory, int64_t streams) {
  TORCH_CHECK(streams >= 1 && streams <= 64, streams, " streams a thread; 1 to 64 are possible");
  const auto* start = static_cast<const uint8_t*>(memory.const_data_ptr());
  const int64_t pages = static_cast<int64_t>(memory.nbytes()) / 4096;
  static std::atomic<uint64_t> sink{0};
  const auto before = std::chrono::steady_clock::now();
  at::parallel_for(0, pages, 1, [&](int64_t begin, int64_t end) {
    sink += read_streams(start + begin * 4096, static_cast<size_t>(end - begin) * 4096, static_cast<int>(streams));
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def("isa() -> str", &isa_name);
  m.def("limit_isa(str name) -> ()", &limit_isa_by_name);
  m.def("empty_weight(int bytes, bool placed=True) -> Tensor", &empty_weight);
  m.def("read_seconds(Tensor memory, int streams) -> float", &read_seconds);
}

}  // namespace tp
