// Reading memory as fast as this machine can: the ceiling that bandwidth-bound kernels are measured by.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp {

// Reads `bytes` from `start` as `streams` sequential streams at once and returns a sum that depends on all.
uint64_t read_streams(const uint8_t* start, size_t bytes, int streams);

}  // namespace tp
