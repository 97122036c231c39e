// Activations as bytes: round(x * inverse), clamped, times the channel's multiplier, plus an offset.
//
// One pass, which also finds out whether every value is finite.

#include "bytes.h"

namespace {

constexpr int64_t TILE = 64;

// Channels are neighbours already.
template <class T>
uint32_t in_rows(const T* x, uint8_t* out, View at, Table grid, bool uniform, int32_t offset,
                 int threads) {
  const int64_t all = at.batch * at.pixels * at.channels;
  const bool dense = at.pixel_stride == at.channels &&
                     (at.batch == 1 || at.batch_stride == at.pixels * at.channels);
  if (uniform && dense) at = {1, (all + BLOCK - 1) / BLOCK, BLOCK, 0, BLOCK, 1};
  const int64_t rows = at.batch * at.pixels;
  uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (all >= PARALLEL) \
    reduction(max : largest)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row / at.pixels * at.batch_stride + row % at.pixels * at.pixel_stride;
    uint8_t* to = out + row * at.channels;
    const int64_t n = std::min(at.channels, all - row * at.channels);
    largest = std::max(largest, uniform ? one_grid(from, to, n, grid, offset)
                                        : own_grids(from, to, n, grid, offset));
  }
  return largest;
}

// Pixels are neighbours: they change places with channels, tile by tile.
template <class T>
uint32_t in_planes(const T* x, uint8_t* out, View at, Table grid, bool uniform, int32_t offset,
                   int threads) {
  const int64_t blocks = (at.pixels + TILE - 1) / TILE;
  const bool parallel = at.batch * at.pixels * at.channels >= PARALLEL;
  uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel) \
    reduction(max : largest)
  for (int64_t i = 0; i < at.batch * blocks; ++i) {
    const int64_t image = i / blocks, start = i % blocks * TILE;
    const int64_t n = std::min(TILE, at.pixels - start);
    uint8_t tile[TILE][TILE];
    for (int64_t c0 = 0; c0 < at.channels; c0 += TILE) {
      const int64_t width = std::min(TILE, at.channels - c0);
      for (int64_t c = 0; c < width; ++c) {
        const int64_t p = uniform ? 0 : c0 + c;
        const Table own = {grid.inverse + p, grid.low + p, grid.high + p, grid.multiplier + p};
        const T* from = x + image * at.batch_stride + start + (c0 + c) * at.channel_stride;
        largest = std::max(largest, one_grid(from, tile[c], n, own, offset));
      }
      uint8_t* to = out + (image * at.pixels + start) * at.channels + c0;
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < width; ++c) to[j * at.channels + c] = tile[c][j];
    }
  }
  return largest;
}

template <class T>
int bytes(const void* data, uint8_t* out, View at, Table grid, bool uniform, int32_t offset,
          int threads) {
  const T* x = static_cast<const T*>(data);
  const uint32_t largest = at.channel_stride == 1
                               ? in_rows(x, out, at, grid, uniform, offset, threads)
                               : in_planes(x, out, at, grid, uniform, offset, threads);
  return largest < INFINITE;
}

template <class T>
int token_bytes(const void* data, uint8_t* out, float* scales, View at, Table grid, bool uniform,
                float inverse_clip, float unit_clip, float levels, float least, int32_t offset,
                int threads) {
  const T* x = static_cast<const T*>(data);
  const int64_t rows = at.batch * at.pixels;
  uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (rows * at.channels >= PARALLEL) reduction(max : largest)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row / at.pixels * at.batch_stride + row % at.pixels * at.pixel_stride;
    one_token(from, out + row * at.channels, scales + row, at.channels, grid, uniform, inverse_clip,
              unit_clip, levels, least, offset, &largest);
  }
  return largest < INFINITE;
}

}  // namespace

extern "C" {

// out [batch, pixels, channels]. Returns whether every value is finite.
int quantize(const void* x, int half, uint8_t* out, View at, Table grid, int uniform, int offset,
             int threads) {
  return (half ? bytes<uint16_t> : bytes<float>)(x, out, at, grid, uniform, offset, threads);
}

// Likewise, each token on the grid of its own range, whose scale is written to `scales`. Channels
// are neighbours.
int quantize_tokens(const void* x, int half, uint8_t* out, float* scales, View at, Table grid,
                    int uniform, float inverse_clip, float unit_clip, float levels, float least,
                    int offset, int threads) {
  return (half ? token_bytes<uint16_t> : token_bytes<float>)(
      x, out, scales, at, grid, uniform, inverse_clip, unit_clip, levels, least, offset, threads);
}

}  // extern "C"
