#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace tp {
namespace {

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

unsigned long long enabled_state() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::atomic<int>& highest_allowed() {
  static std::atomic<int> level{static_cast<int>(Isa::kAmx)};
  return level;
}

}  // namespace

Isa detect_isa() {
  static const Isa found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kNone;
    const bool fma = bit(c, 12), f16c = bit(c, 29), osxsave = bit(c, 27);
    if (!osxsave || !fma || !f16c) return Isa::kNone;
    const unsigned long long state = enabled_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kNone;
    const bool avx2 = bit(b, 5) && (state & 0x6) == 0x6;
    if (!avx2) return Isa::kNone;
    const bool base = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
    const bool tiles = bit(d, 22) && bit(d, 24) && (state & 0x60000) == 0x60000;
    unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;
    const bool bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && bit(a1, 5);
    if (!base || !bf16 || (state & 0xe6) != 0xe6) return Isa::kAvx2;
    return tiles && request_tiles() ? Isa::kAmx : Isa::kAvx512;
  }();
  return found;
}

Isa active_isa() {
  const int detected = static_cast<int>(detect_isa()), allowed = highest_allowed().load();
  return static_cast<Isa>(detected < allowed ? detected : allowed);
}

void limit_isa(Isa highest) { highest_allowed().store(static_cast<int>(highest)); }

}  // namespace tp
