#include "memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>

namespace tp {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{16} << 20;  // of small weights that share huge pages

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the process interleaves its memory, gives these pages to the node of the thread that writes them first:
// weights are packed by the threads that will read them. Other policies are what the user asked for, and hold.
void place_where_touched(void* start, size_t bytes) {
  constexpr int kWeightedInterleave = 6;  // since Linux 6.9
  int mode = MPOL_DEFAULT;
  // Containers may forbid either call and small kernels lack them; pages then follow the process's policy.
  const auto done = [](long result) {
    TORCH_CHECK(result == 0 || errno == EPERM || errno == ENOSYS, "weights cannot be placed on their node: ",
                std::strerror(errno));
    return result == 0;
  };
  if (!done(syscall(SYS_get_mempolicy, &mode, nullptr, 0UL, nullptr, 0UL))) return;
  mode &= ~MPOL_MODE_FLAGS;
  if (mode != MPOL_INTERLEAVE && mode != kWeightedInterleave) return;
  done(syscall(SYS_mbind, start, bytes, MPOL_LOCAL, nullptr, 0UL, 0U));
}

// Untouched memory that begins on a huge page, unmapped with its last owner.
class Pages {
 public:
  Pages(size_t bytes, bool placed) : mapped_(bytes + kHugePage) {
    raw_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(raw_ != MAP_FAILED, "no address space for weights of ", bytes, " bytes");
    if (placed) place_where_touched(raw_, mapped_);
    auto* start = static_cast<uint8_t*>(raw_);
    begin = start + (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    madvise(begin, bytes, MADV_HUGEPAGE);  // a wish: hosts without huge pages serve small ones
  }
  ~Pages() { munmap(raw_, mapped_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* begin;

 private:
  void* raw_;
  size_t mapped_;
};

at::Tensor tensor_in(std::shared_ptr<Pages> pages, size_t at, int64_t bytes) {
  uint8_t* start = pages->begin + at;
  return at::from_blob(start, {bytes}, [pages = std::move(pages)](void*) {}, at::kByte);
}

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

at::Tensor empty_weight(int64_t bytes, bool placed) {
  const size_t size = static_cast<size_t>(bytes);
  if (size == 0) return at::empty({0}, at::kByte);
  if (size >= kHugePage) return tensor_in(std::make_shared<Pages>(size, placed), 0, bytes);
  static std::mutex mutex;
  static std::shared_ptr<Pages> chunk;
  static size_t used = kChunk;
  const std::lock_guard<std::mutex> lock(mutex);
  if (used + size > kChunk) chunk = std::make_shared<Pages>(kChunk, true), used = 0;
  const size_t at = used;
  used += rounded(size);
  return tensor_in(chunk, at, bytes);
}

}  // namespace tp
