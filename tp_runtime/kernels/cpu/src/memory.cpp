#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

namespace tp {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

Scratch& Scratch::of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

void Scratch::reserve(size_t bytes) {
  used_ = 0;
  if (bytes <= size_) return;
  memory_ = at::empty({static_cast<int64_t>(bytes + 64)}, at::kByte);
  auto* raw = memory_.data_ptr<uint8_t>();
  base_ = raw + (64 - reinterpret_cast<uintptr_t>(raw) % 64) % 64;
  size_ = bytes;
}

uint8_t* Scratch::take_bytes(size_t bytes) {
  uint8_t* piece = base_ + used_;
  used_ += rounded(bytes);
  TORCH_INTERNAL_ASSERT(used_ <= size_, "scratch: ", used_, " bytes taken of ", size_, " reserved");
  return piece;
}

at::Tensor empty_weight(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes);
  if (size < kHugePage) return at::empty({bytes}, at::kByte);
  const size_t mapped = size + kHugePage;
  void* raw = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(raw != MAP_FAILED, "no address space for a weight of ", bytes, " bytes");
  auto* start = static_cast<uint8_t*>(raw);
  uint8_t* aligned = start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  madvise(aligned, size, MADV_HUGEPAGE);  // a wish: hosts without huge pages serve small ones
  return at::from_blob(aligned, {bytes}, [raw, mapped](void*) { munmap(raw, mapped); }, at::kByte);
}

}  // namespace tp
