// Sums of an activation's bytes under a product's window, and what they add to its output.

#include "common.h"

namespace {

// A window on [batch, height, width, channels]. A linear layer's rows are images of one pixel.
struct Window {
  int64_t batch, height, width, channels;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
};

// Of one output pixel, from the sums of the image's pixels; what lies outside counts nothing.
inline int32_t under(const int32_t* pixels, const Window& of, int64_t row, int64_t column) {
  int32_t sum = 0;
  for (int64_t i = 0; i < of.kernel_height; ++i) {
    const int64_t y = row * of.stride_height - of.padding_height + i * of.dilation_height;
    if (y < 0 || y >= of.height) continue;
    for (int64_t j = 0; j < of.kernel_width; ++j) {
      const int64_t x = column * of.stride_width - of.padding_width + j * of.dilation_width;
      if (x >= 0 && x < of.width) sum += pixels[y * of.width + x];
    }
  }
  return sum;
}

inline uint16_t half_of(float x) {  // to the nearest bfloat16, to even from halfway
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > INFINITE) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = half_of(x); }

template <class T>
void add(T* y, const int32_t* sums, float base, const float* factor, int64_t rows,
         int64_t channels, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * channels >= PARALLEL)
  for (int64_t row = 0; row < rows; ++row) {
    T* __restrict own = y + row * channels;
    const float sum = float(sums[row]) * base;
    for (int64_t c = 0; c < channels; ++c) put(own + c, value_of(own[c]) + sum * factor[c]);
  }
}

}  // namespace

extern "C" {

// out [batch, out_height, out_width] = sums of x - zero. `pixels` has room for one sum a pixel of x.
int window_sums(const uint8_t* x, Window of, int zero, int32_t* pixels, int32_t* out, int threads) {
  const int64_t all = of.batch * of.height * of.width;
  const bool parallel = all * of.channels >= PARALLEL;
#pragma omp parallel num_threads(threads) if (parallel)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < all; ++p) {
      const uint8_t* from = x + p * of.channels;
      pixels[p] = std::accumulate(from, from + of.channels, -int32_t(of.channels) * zero);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < of.batch * of.out_height; ++row) {
      const int32_t* image = pixels + row / of.out_height * of.height * of.width;
      for (int64_t column = 0; column < of.out_width; ++column)
        out[row * of.out_width + column] = under(image, of, row % of.out_height, column);
    }
  }
  return 1;
}

// y [rows, channels] += float(sums) * base * factor, each operation rounded.
int add_products(void* y, int half, const int32_t* sums, float base, const float* factor,
                 int64_t rows, int64_t channels, int threads) {
  if (half)
    add(static_cast<uint16_t*>(y), sums, base, factor, rows, channels, threads);
  else
    add(static_cast<float*>(y), sums, base, factor, rows, channels, threads);
  return 1;
}

}  // extern "C"
