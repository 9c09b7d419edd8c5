// 16 lanes, one an output row, in AVX-512. Same names and same results as vector_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tp {
namespace {

constexpr int kRowChunk = 8;  // rows whose sums stay in registers

using Floats = __m512;
using Bytes = __m512i;  // 64 bytes: [row 0..15][4]

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats spread(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats smallest(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats load_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// [row 0..15][2] bf16 -> the first and the second of each row.
inline void load_pairs(const uint16_t* p, Floats& even, Floats& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// 2^n for whole n in [-126, 127].
inline Floats power_of_two(Floats n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline Floats round_to_whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
// The lane sums of four vectors.
inline void store_sums(float* out, Floats a, Floats b, Floats c, Floats d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}
inline bool all_finite(Floats x) {
  constexpr int kNanOrInfinite = 0x99;
  return _mm512_fpclass_ps_mask(x, kNanOrInfinite) == 0;
}
inline float largest_lane(Floats x) { return _mm512_reduce_max_ps(x); }

// To nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* out, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline void store_half(uint16_t* out, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }

// Sum over a slice of weight bytes times one row's fixed-point activations, x = 128 * high + low, plus a
// start value. A row's 64 bytes: 32 high parts, 32 low parts (0..127).
struct Dot {
  __m512i high, low;

  inline void reset(int32_t start) {
    high = _mm512_setzero_si512();
    low = _mm512_set1_epi32(start);
  }
  inline void add_quad(Bytes w, const int8_t* x, int quad) {
    add(high, w, x + quad * 4);
    add(low, w, x + quad * 4 + 32);
  }
  // The broadcast belongs inside the instruction; compilers load it apart, which costs twice the decoding.
  static inline void add(__m512i& sum, Bytes w, const int8_t* x) {
    struct Quad {
      int8_t x[4];
    };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Quad*>(x)));
  }
  inline Floats value() const { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low)); }
};

// 32 whole numbers of 15 bits and a sign -> a row's 64 bytes.
inline void store_fixed(Floats a, Floats b, int8_t* out) {
  const __m512i whole[2] = {_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)};
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_and_si512(whole[i], _mm512_set1_epi32(127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i),
                     _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole[i], 7)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32 + 16 * i), _mm512_cvtepi32_epi8(low));
  }
}

}  // namespace
}  // namespace tp
