// Buffers: scratch that grows and stays, and large allocations on huge pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>

namespace tp {

// A thread's scratch memory, handed out in 64-byte aligned pieces; reset() takes them all back. Nothing
// is allocated once the largest request has been seen.
class Scratch {
 public:
  static Scratch& of_thread();
  void reset() { used_ = 0; }
  // Call with the sum of what will be taken (each piece rounded up by 64 bytes) before taking.
  void reserve(size_t bytes);
  template <typename T>
  T* take(size_t count) {
    return reinterpret_cast<T*>(take_bytes(count * sizeof(T)));
  }

 private:
  uint8_t* take_bytes(size_t bytes);
  at::Tensor memory_;
  uint8_t* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// An untouched uint8 tensor on huge pages where the host allows it (madvise), which saves the page walks that
// streams of weights otherwise pay for, and lets hardware prefetchers run on. Small weights share pages.
// placed: each page lies on the node of the thread that first writes it, also where the process interleaves; a cache,
// which one thread writes and all read, follows the process's policy.
at::Tensor empty_weight(int64_t bytes, bool placed = true);

}  // namespace tp
