// What makes a byte of an activation: round(x * inverse), clamped, times the channel's multiplier,
// plus an offset.

#pragma once

#include "common.h"

// An activation [batch, pixels, channels]; neighbours lie along pixels or along channels.
struct View {
  int64_t batch;
  int64_t pixels;
  int64_t channels;
  int64_t batch_stride;
  int64_t pixel_stride;
  int64_t channel_stride;
};

// A grid of each channel, or one for all.
struct Table {
  const float* inverse;
  const float* low;
  const float* high;
  const float* multiplier;
};

inline uint8_t byte_of(float x, float inverse, float low, float high, float multiplier,
                       int32_t offset) {
  const float q = std::min(std::max(low, std::rint(x * inverse)), high) * multiplier;
  return uint8_t(int32_t(q) + offset);
}

inline uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffff; }

// n neighbours of one grid. Returns the bits of the largest |x|.
template <class T>
uint32_t one_grid(const T* __restrict x, uint8_t* __restrict out, int64_t n, Table grid,
                  int32_t offset) {
  const float inverse = *grid.inverse, low = *grid.low, high = *grid.high, m = *grid.multiplier;
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = value_of(x[i]);
    out[i] = byte_of(v, inverse, low, high, m, offset);
    largest = std::max(largest, size_bits(v));
  }
  return largest;
}

// n neighbours, each with a grid of its own.
template <class T>
uint32_t own_grids(const T* __restrict x, uint8_t* __restrict out, int64_t n, Table grid,
                   int32_t offset) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = value_of(x[i]);
    out[i] = byte_of(v, grid.inverse[i], grid.low[i], grid.high[i], grid.multiplier[i], offset);
    largest = std::max(largest, size_bits(v));
  }
  return largest;
}

// The grid of one token (questlib/quantization/token_grid.py, operation by operation).
struct Token {
  float inverse;
  float zero;
  float scale;
};

template <class T>
Token token_of(const T* x, int64_t n, Table grid, bool uniform, float inverse_clip, float unit_clip,
               float levels, float least, uint32_t* largest) {
  // Sixteen side by side: the compiler does not reorder one maximum by itself.
  constexpr int64_t LANES = 16;
  float lows[LANES] = {0}, highs[LANES] = {0};
  uint32_t sizes[LANES] = {0};
  const auto take = [&](int64_t i, int64_t lane) {
    const float v = value_of(x[i]);
    const float u = v * grid.inverse[uniform ? 0 : i];
    lows[lane] = u < lows[lane] ? u : lows[lane];
    highs[lane] = u > highs[lane] ? u : highs[lane];
    sizes[lane] = std::max(sizes[lane], size_bits(v));
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane) take(i + lane, lane);
  for (; i < n; ++i) take(i, 0);
  const float low = *std::min_element(lows, lows + LANES);
  const float high = *std::max_element(highs, highs + LANES);
  *largest = std::max(*largest, *std::max_element(sizes, sizes + LANES));
  const bool middle = levels == 255.0f;
  const float span = std::max(middle ? 2.0f * std::max(-low, high) : high - low, least);
  const float unit = (1.0f / span) * levels;
  const float zero = std::rint(std::min(std::max(-low * unit, 0.0f), levels));
  return {unit * inverse_clip, middle ? 128.0f : zero, span * unit_clip};
}

// n channels of one token on the grid of their own range; its scale is written to `scale`.
template <class T>
void one_token(const T* x, uint8_t* __restrict out, float* scale, int64_t n, Table grid,
               bool uniform, float inverse_clip, float unit_clip, float levels, float least,
               int32_t offset, uint32_t* largest) {
  const Token own =
      token_of(x, n, grid, uniform, inverse_clip, unit_clip, levels, least, largest);
  const float low = -own.zero, high = levels - own.zero;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = uniform ? 0 : i;
    out[i] = byte_of(value_of(x[i]), own.inverse * grid.inverse[p], low, high, grid.multiplier[p],
                     offset);
  }
  *scale = own.scale;
}
