// 16 lanes, one an output row, in pairs of AVX2 registers. Same names and results as vector_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tp {
namespace {

constexpr int kRowChunk = 4;  // rows whose sums stay in registers

struct Floats {
  __m256 a, b;  // lanes 0..7, 8..15
};
struct Bytes {
  __m256i a, b;  // 64 bytes: [row 0..15][4]
};

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats smallest(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats largest(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats load_half(const uint8_t* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256 widen_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline __m256 widen_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats load_int8(const int8_t* p) { return {widen_int8(p), widen_int8(p + 8)}; }
inline void load_pairs(const uint16_t* p, Floats& even, Floats& odd) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
}
inline Floats power_of_two(Floats n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.a), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.b), bias), 23))};
}
inline Floats round_to_whole(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
// In the order of _mm512_reduce_add_ps: halves, quarters, pairs.
inline float sum_lanes(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline void store_sums(float* out, Floats a, Floats b, Floats c, Floats d) {
  const auto halves = [](Floats x) { return _mm256_add_ps(x.a, x.b); };
  const __m256 ab = _mm256_hadd_ps(halves(a), halves(b)), cd = _mm256_hadd_ps(halves(c), halves(d));
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
inline bool all_finite(Floats x) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), limit = _mm256_set1_ps(__builtin_inff());
  const __m256 a = _mm256_cmp_ps(_mm256_and_ps(x.a, magnitude), limit, _CMP_LT_OQ);
  const __m256 b = _mm256_cmp_ps(_mm256_and_ps(x.b, magnitude), limit, _CMP_LT_OQ);
  return _mm256_movemask_ps(_mm256_and_ps(a, b)) == 0xff;
}
inline float largest_lane(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m256i rounded_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan);
  return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
}
inline void store_bf16(uint16_t* out, Floats x) {
  const __m256i mixed = _mm256_packus_epi32(rounded_bf16(x.a), rounded_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0)));
}
inline void store_half(uint16_t* out, Floats x) {
  auto* halves = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline Bytes load_bytes(const uint8_t* p) {
  const auto* halves = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}

// As in vector_avx512.h; here a row's 64 bytes are 32 int16, and byte products would overflow AVX2's
// 16-bit sums, so that bytes are widened first. Part i holds rows 4i .. 4i+3, two sums each.
struct Dot {
  __m256i part[4];
  int32_t start;

  inline void reset(int32_t start_value) {
    start = start_value;
    for (auto& p : part) p = _mm256_setzero_si256();
  }
  inline void add_quad(Bytes w, const int8_t* x, int quad) {
    int64_t words;
    std::memcpy(&words, x + quad * 8, 8);
    const __m256i four = _mm256_set1_epi64x(words);
    const __m128i rows[4] = {_mm256_castsi256_si128(w.a), _mm256_extracti128_si256(w.a, 1),
                             _mm256_castsi256_si128(w.b), _mm256_extracti128_si256(w.b, 1)};
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm256_add_epi32(part[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(rows[i]), four));
    }
  }
  static inline __m256i pair_sums(__m256i x, __m256i y) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(x, y), _MM_SHUFFLE(3, 1, 2, 0));
  }
  inline Floats value() const {
    const __m256i s = _mm256_set1_epi32(start);
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(pair_sums(part[0], part[1]), s)),
            _mm256_cvtepi32_ps(_mm256_add_epi32(pair_sums(part[2], part[3]), s))};
  }
};

inline void store_fixed(Floats a, Floats b, int8_t* out) {
  const auto halves = [](Floats x) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    return _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0));
  };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), halves(b));
}

}  // namespace
}  // namespace tp
