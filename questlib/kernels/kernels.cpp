// Kernels that go over memory once where a chain of torch's operations goes over it many times.
//
// Compiled on the user's machine for its own processor (compiler.py), called through ctypes
// (library.py). Every sum is taken in blocks whose order does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// A quantizer's parameters over an activation that lies in memory as [outer, repeat, channels,
// inner]. They vary along outer and channels, and are the same along repeat and inner:
// parameter [o, c] applies to x[o, :, c, :].
struct Layout {
  int64_t outer;
  int64_t repeat;
  int64_t channels;
  int64_t inner;
};

constexpr int64_t PARALLEL = 1 << 15;  // values from which threads pay
constexpr int64_t BLOCK = 1 << 14;     // values of one partial sum of a scale for the whole tensor
constexpr int64_t CHUNKS = 64;         // partial sums of scales along the last dimension

inline float quantized(float x, float inverse, float low, float high) {
  return std::min(std::max(std::rint(x * inverse), low), high);
}

// LSQ's gradient (Esser et al. 2020, Eq. 3) of one value: with respect to x, and to the scale.
struct Slope {
  float x;
  float scale;
};

inline Slope slope(float x, float grad, float inverse, float low, float high) {
  const float u = x * inverse;
  const float q = std::min(std::max(std::rint(u), low), high);
  const float d = q - u;
  const bool inside = std::fabs(d) <= 0.5f;
  return {inside ? grad : 0.0f, grad * (inside ? d : q)};
}

}  // namespace

extern "C" {

// x_hat = clamp(round(x * inverse), low, high) * scale
void fake_quant(const float* x, const float* scale, const float* inverse, const float* low,
                const float* high, float* out, Layout at, int threads) {
  const int64_t rows = at.outer * at.repeat;
  const bool parallel = rows * at.channels * at.inner >= PARALLEL;
  if (at.inner == 1) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t p = row / at.repeat * at.channels;
      const int64_t start = row * at.channels;
      for (int64_t c = 0; c < at.channels; ++c)
        out[start + c] =
            quantized(x[start + c], inverse[p + c], low[p + c], high[p + c]) * scale[p + c];
    }
    return;
  }
  // A row of inner values has one set of parameters. Long rows are divided among the threads.
  const int64_t blocks = (at.inner + BLOCK - 1) / BLOCK;
  const int64_t work = rows * at.channels * blocks;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t i = 0; i < work; ++i) {
    const int64_t row = i / blocks;
    const int64_t p = row / at.channels / at.repeat * at.channels + row % at.channels;
    const int64_t begin = row * at.inner + i % blocks * BLOCK;
    const int64_t end = std::min(begin + BLOCK, (row + 1) * at.inner);
    const float s = scale[p], r = inverse[p], lo = low[p], hi = high[p];
    for (int64_t j = begin; j < end; ++j) out[j] = quantized(x[j], r, lo, hi) * s;
  }
}

// The gradients of fake_quant: grad_x like x, grad_scale [outer, channels].
void fake_quant_gradient(const float* x, const float* grad, const float* inverse, const float* low,
                         const float* high, float* grad_x, float* grad_scale, Layout at,
                         int threads) {
  const int64_t rows = at.outer * at.repeat;
  const bool parallel = rows * at.channels * at.inner >= PARALLEL;
  std::fill(grad_scale, grad_scale + at.outer * at.channels, 0.0f);
  if (at.inner == 1) {
    // Rows in chunks, each with sums of its own.
    const int64_t chunks = std::min(CHUNKS, at.repeat);
    std::vector<float> sums(at.outer * chunks * at.channels, 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t i = 0; i < at.outer * chunks; ++i) {
      const int64_t outer = i / chunks, chunk = i % chunks;
      const int64_t p = outer * at.channels;
      float* sum = sums.data() + i * at.channels;
      const int64_t end = (chunk + 1) * at.repeat / chunks;
      for (int64_t r = chunk * at.repeat / chunks; r < end; ++r) {
        const int64_t start = (outer * at.repeat + r) * at.channels;
        for (int64_t c = 0; c < at.channels; ++c) {
          const Slope found =
              slope(x[start + c], grad[start + c], inverse[p + c], low[p + c], high[p + c]);
          grad_x[start + c] = found.x;
          sum[c] += found.scale;
        }
      }
    }
    for (int64_t i = 0; i < at.outer * chunks; ++i)
      for (int64_t c = 0; c < at.channels; ++c)
        grad_scale[i / chunks * at.channels + c] += sums[i * at.channels + c];
    return;
  }
  const int64_t blocks = (at.inner + BLOCK - 1) / BLOCK;
  const int64_t work = rows * at.channels * blocks;
  std::vector<float> sums(work);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t i = 0; i < work; ++i) {
    const int64_t row = i / blocks;
    const int64_t p = row / at.channels / at.repeat * at.channels + row % at.channels;
    const int64_t begin = row * at.inner + i % blocks * BLOCK;
    const int64_t end = std::min(begin + BLOCK, (row + 1) * at.inner);
    const float r = inverse[p], lo = low[p], hi = high[p];
    // Sixteen sums side by side: the compiler may not reorder one sum by itself.
    float lanes[16] = {0};
    int64_t j = begin;
    for (; j + 16 <= end; j += 16)
      for (int64_t k = 0; k < 16; ++k) {
        const Slope found = slope(x[j + k], grad[j + k], r, lo, hi);
        grad_x[j + k] = found.x;
        lanes[k] += found.scale;
      }
    float sum = 0.0f;
    for (; j < end; ++j) {
      const Slope found = slope(x[j], grad[j], r, lo, hi);
      grad_x[j] = found.x;
      sum += found.scale;
    }
    for (int64_t k = 0; k < 16; ++k) sum += lanes[k];
    sums[i] = sum;
  }
  for (int64_t i = 0; i < work; ++i) {
    const int64_t row = i / blocks;
    grad_scale[row / at.channels / at.repeat * at.channels + row % at.channels] += sums[i];
  }
}

}  // extern "C"
