#include "reduce.h"

#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

// The loops below are compiled once per instruction set and chosen when the library is loaded, by what the CPU
// has (TP_CPU_ISA is for the kernels). GCC 11 knows no x86-64-v4 here, and its avx512f loops are no faster than AVX2's.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#if __GNUC__ >= 12
#define TP_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TP_EACH_ISA __attribute__((target_clones("avx2", "default")))
#endif
#else
#define TP_EACH_ISA
#endif

namespace tp {
namespace {

constexpr size_t kTile = 512;  // elements whose fp32 sums stay in the first-level cache

template <typename T>
inline T chosen(Reduction reduction, T a, T b) {
  if (reduction == Reduction::kSum) return static_cast<T>(a + b);
  // NaN wins, as in torch.
  if (reduction == Reduction::kMax) return a > b || a != a ? a : b;
  return a < b || a != a ? a : b;
}

template <typename T, Reduction kReduction>
inline void fold(T* __restrict sums, const T* __restrict x, size_t count) {
  for (size_t i = 0; i < count; ++i) sums[i] = chosen<T>(kReduction, sums[i], x[i]);
}

template <typename T>
TP_EACH_ISA void fold_any(Reduction reduction, T* sums, const T* x, size_t count) {
  if (reduction == Reduction::kSum) return fold<T, Reduction::kSum>(sums, x, count);
  if (reduction == Reduction::kMax) return fold<T, Reduction::kMax>(sums, x, count);
  return fold<T, Reduction::kMin>(sums, x, count);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

TP_EACH_ISA void widen_bf16(const uint16_t* __restrict x, size_t count, float* __restrict out) {
  for (size_t i = 0; i < count; ++i) out[i] = from_bf16(x[i]);
}

TP_EACH_ISA void narrow_bf16(const float* __restrict x, size_t count, uint16_t* __restrict out) {
  for (size_t i = 0; i < count; ++i) out[i] = to_bf16(x[i]);
}

// Sums of two and of four ranks without a detour through memory: the same additions in the same order as
// below. `out` may be one of the sources, element on element, which is no dependence between elements.
TP_EACH_ISA void sum_2_bf16(const uint16_t* a, const uint16_t* b, size_t count, uint16_t* out) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) out[i] = to_bf16(from_bf16(a[i]) + from_bf16(b[i]));
}

TP_EACH_ISA void sum_4_bf16(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d, size_t count,
                            uint16_t* out) {
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) {
    out[i] = to_bf16(from_bf16(a[i]) + from_bf16(b[i]) + from_bf16(c[i]) + from_bf16(d[i]));
  }
}

void widen_half(const uint16_t* x, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
}

void narrow_half(const float* x, size_t count, uint16_t* out) {
  for (size_t i = 0; i < count; ++i) out[i] = c10::detail::fp16_ieee_from_fp32_value(x[i]);
}

template <auto kWiden, auto kNarrow>
void reduce_16_bits(Reduction reduction, const void* const* sources, int num_sources, size_t count, void* out) {
  alignas(64) float sums[kTile], x[kTile];
  for (size_t at = 0; at < count; at += kTile) {
    const size_t n = count - at < kTile ? count - at : kTile;
    kWiden(static_cast<const uint16_t*>(sources[0]) + at, n, sums);
    for (int r = 1; r < num_sources; ++r) {
      kWiden(static_cast<const uint16_t*>(sources[r]) + at, n, x);
      fold_any<float>(reduction, sums, x, n);
    }
    kNarrow(sums, n, static_cast<uint16_t*>(out) + at);
  }
}

void reduce_bf16(Reduction reduction, const void* const* sources, int num_sources, size_t count, void* out) {
  const auto x = [&](int r) { return static_cast<const uint16_t*>(sources[r]); };
  auto* y = static_cast<uint16_t*>(out);
  if (reduction == Reduction::kSum && num_sources == 2) return sum_2_bf16(x(0), x(1), count, y);
  if (reduction == Reduction::kSum && num_sources == 4) return sum_4_bf16(x(0), x(1), x(2), x(3), count, y);
  reduce_16_bits<widen_bf16, narrow_bf16>(reduction, sources, num_sources, count, out);
}

template <typename T>
void reduce_as(Reduction reduction, const void* const* sources, int num_sources, size_t count, void* out) {
  alignas(64) T sums[kTile];
  for (size_t at = 0; at < count; at += kTile) {
    const size_t n = count - at < kTile ? count - at : kTile;
    std::memcpy(sums, static_cast<const T*>(sources[0]) + at, n * sizeof(T));
    for (int r = 1; r < num_sources; ++r) fold_any<T>(reduction, sums, static_cast<const T*>(sources[r]) + at, n);
    std::memcpy(static_cast<T*>(out) + at, sums, n * sizeof(T));
  }
}

}  // namespace

size_t element_bytes(Element element) {
  switch (element) {
    case Element::kBfloat16:
    case Element::kFloat16: return 2;
    case Element::kInt64: return 8;
    default: return 4;
  }
}

void reduce(Element element, Reduction reduction, const void* const* sources, int num_sources, size_t count,
            void* out) {
  switch (element) {
    case Element::kFloat32: return reduce_as<float>(reduction, sources, num_sources, count, out);
    case Element::kInt32: return reduce_as<int32_t>(reduction, sources, num_sources, count, out);
    case Element::kInt64: return reduce_as<int64_t>(reduction, sources, num_sources, count, out);
    case Element::kBfloat16: return reduce_bf16(reduction, sources, num_sources, count, out);
    case Element::kFloat16:
      return reduce_16_bits<widen_half, narrow_half>(reduction, sources, num_sources, count, out);
  }
}

}  // namespace tp
