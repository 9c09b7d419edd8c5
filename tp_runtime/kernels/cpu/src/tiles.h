// AMX tiles: eight registers of up to 16 rows x 64 bytes, and instructions that multiply two of them into a
// third. A thread configures the shapes before use and releases them after.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tp {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_bytes);
  }
};

class Tiles {
 public:
  // Not _tile_loadconfig: gcc 12 drops stores to the configuration it is given.
  explicit Tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace tp
