#include "read.h"

#include <immintrin.h>

#include "isa.h"

namespace tp {
namespace {

constexpr size_t kStep = 256;            // bytes of one stream before the next one's turn
constexpr size_t kPrefetchBytes = 2048;  // ahead in each stream

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t* start, size_t stream_bytes, int streams) {
  __m512i sums[4] = {};
  for (size_t at = 0; at < stream_bytes; at += kStep) {
    for (int stream = 0; stream < streams; ++stream) {
      const uint8_t* p = start + stream * stream_bytes + at;
      for (int i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + 64 * i), _MM_HINT_T0);
        sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(p + 64 * i));
      }
    }
  }
  return _mm512_reduce_add_epi64(
      _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])));
}

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* start, size_t stream_bytes, int streams) {
  __m256i sums[8] = {};
  for (size_t at = 0; at < stream_bytes; at += kStep) {
    for (int stream = 0; stream < streams; ++stream) {
      const uint8_t* p = start + stream * stream_bytes + at;
      for (int i = 0; i < 8; ++i) {
        if (i % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + 32 * i), _MM_HINT_T0);
        sums[i] = _mm256_add_epi64(sums[i], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
      }
    }
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm256_add_epi64(sums[0], sums[i]);
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

uint64_t read_streams(const uint8_t* start, size_t bytes, int streams) {
  const size_t stream_bytes = bytes / streams / kStep * kStep;
  return active_isa() >= Isa::kAvx512 ? read_avx512(start, stream_bytes, streams)
                                      : read_avx2(start, stream_bytes, streams);
}

}  // namespace tp
