// Fake quantization and LSQ's gradient, in one pass each, by the operations of
// questlib/quantization/primitives.py: the same values.

#include "common.h"

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

struct Limits {
  float inverse, low, high;
};

// NaN stays NaN.
inline float rounded(float x, float low, float high) {
  float q = std::rint(x);
  q = q <= low ? low : q;
  return q >= high ? high : q;
}

// fn(start, n, p, step): n neighbours from `start`, whose parameters are p, p + step, ...
template <class F>
void each_run(Layout at, int threads, F fn) {
  const int64_t rows = at.outer * at.repeat;
  const bool parallel = rows * at.channels * at.inner >= PARALLEL;
  if (at.inner == 1) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t row = 0; row < rows; ++row)
      fn(row * at.channels, at.channels, row / at.repeat * at.channels, 1);
    return;
  }
  // A row of inner values has one set of parameters. Long rows are divided among the threads.
  const int64_t blocks = (at.inner + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t i = 0; i < rows * at.channels * blocks; ++i) {
    const int64_t row = i / blocks;
    const int64_t p = row / at.channels / at.repeat * at.channels + row % at.channels;
    const int64_t start = i % blocks * BLOCK;
    fn(row * at.inner + start, std::min(BLOCK, at.inner - start), p, 0);
  }
}

}  // namespace

extern "C" {

// x_hat = clamp(round(x * inverse), low, high) * scale
void fake_quant(const float* x, const float* scale, const float* inverse, const float* low,
                const float* high, float* out, Layout at, int threads) {
  each_run(at, threads, [=](int64_t start, int64_t n, int64_t p, int64_t step) {
    const float* __restrict from = x + start;
    float* __restrict to = out + start;
    if (step) {
      for (int64_t i = 0; i < n; ++i)
        to[i] = rounded(from[i] * inverse[p + i], low[p + i], high[p + i]) * scale[p + i];
    } else {
      const float s = scale[p], r = inverse[p], lo = low[p], hi = high[p];
      for (int64_t i = 0; i < n; ++i) to[i] = rounded(from[i] * r, lo, hi) * s;
    }
  });
}

// LSQ's gradients (Esser et al. 2020, Eq. 3) of fake_quant: with respect to x, and, for each value,
// to its scale. `slope` may be null.
void fake_quant_gradient(const float* x, const float* grad, const float* inverse, const float* low,
                         const float* high, float* grad_x, float* slope, Layout at, int threads) {
  each_run(at, threads, [=](int64_t start, int64_t n, int64_t p, int64_t step) {
    const float* __restrict from = x + start;
    const float* __restrict g = grad + start;
    float* __restrict to = grad_x + start;
    float* __restrict by_scale = slope ? slope + start : nullptr;
    // Loops of one kind each, which the compiler can vectorize.
    const auto run = [=](auto own, auto learned) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const Limits at = own(i);
        const float u = from[i] * at.inverse;
        const float q = rounded(u, at.low, at.high);
        const float d = q - u;
        const float inside = std::fabs(d) <= 0.5f ? g[i] : 0.0f;
        to[i] = inside;
        if (learned.value) by_scale[i] = (g[i] - inside) * q + inside * d;
      }
    };
    const auto either = [=](auto own) {
      by_scale ? run(own, std::true_type()) : run(own, std::false_type());
    };
    const Limits first = {inverse[p], low[p], high[p]};
    if (step)
      either([=](int64_t i) { return Limits{inverse[p + i], low[p + i], high[p + i]}; });
    else
      either([=](int64_t) { return first; });
  });
}

}  // extern "C"
