// Rows of channels that are computed in the cache and leave as bytes: a norm's affine map with SiLU,
// a LayerNorm, a GEGLU. One row may leave on several grids: q, k and v see the same LayerNorm, the
// halves of a split input have a grid each.

#include "bytes.h"

namespace {

constexpr int64_t MANY = 64;  // pixels whose mean and deviations are taken together
constexpr int64_t LANES = 16;

// One grid on which rows leave, and the channels that do.
struct Target {
  uint8_t* out;  // [rows, count]
  float* scales;  // [rows], of tokens; null: the grid is the same for all rows
  Table grid;
  int64_t start, count, uniform, offset;
  float inverse_clip, unit_clip, levels, least;  // of tokens
};

enum Kind { AFFINE, AFFINE_SILU, LAYER_NORM, GEGLU };

// What makes the rows.
struct Source {
  const void* x;       // [batch, pixels, channels, or twice as many of a GEGLU]
  const float* scale;  // [batch, channels] of an affine map, [channels] of a LayerNorm; else null
  const float* shift;
  View at;             // of x; `channels` are a row's
  int64_t kind;
  float eps;
};

// x / (1 + e^-x), from exponentials of what is not positive
inline float silu(float x) {
  const float e = power(-std::fabs(x) * 1.442695041f);
  return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// x / 2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, to 1.5e-7
inline float gelu(float x) {
  const float z = std::fabs(x) * 0.7071067812f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = t * 1.061405429f;
  p = (p - 1.453152027f) * t;
  p = (p + 1.421413741f) * t;
  p = (p - 0.284496736f) * t;
  p = (p + 0.254829592f) * t;
  const float rest = p * power(-z * z * 1.442695041f);  // 1 - erf z
  return 0.5f * x * (x < 0.0f ? rest : 2.0f - rest);
}

inline float sum_of(const float* x, int64_t n) {
  float lanes[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += x[i + j];
  for (; i < n; ++i) lanes[0] += x[i];
  return std::accumulate(lanes, lanes + LANES, 0.0f);
}

inline float squares_of(const float* x, int64_t n, float mean) {
  float lanes[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += (x[i + j] - mean) * (x[i + j] - mean);
  for (; i < n; ++i) lanes[0] += (x[i] - mean) * (x[i] - mean);
  return std::accumulate(lanes, lanes + LANES, 0.0f);
}

// One row of n channels, into y.
template <class T>
void fill(const T* __restrict x, const float* __restrict scale, const float* __restrict shift,
          int64_t n, int64_t kind, float eps, float* __restrict y) {
  if (kind == AFFINE) {
    for (int64_t i = 0; i < n; ++i) y[i] = value_of(x[i]) * scale[i] + shift[i];
  } else if (kind == AFFINE_SILU) {
    for (int64_t i = 0; i < n; ++i) y[i] = silu(value_of(x[i]) * scale[i] + shift[i]);
  } else if (kind == GEGLU) {
    for (int64_t i = 0; i < n; ++i) y[i] = value_of(x[i]) * gelu(value_of(x[n + i]));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = value_of(x[i]);
    const float mean = sum_of(y, n) / float(n);
    const float deviation = 1.0f / std::sqrt(squares_of(y, n, mean) / float(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[i] = (y[i] - mean) * deviation * scale[i] + shift[i];
  }
}

// A row's channels on a target's grid. Returns the bits of the largest |y|.
inline uint32_t leave(const float* y, int64_t row, const Target& to) {
  uint8_t* __restrict out = to.out + row * to.count;
  if (!to.scales)
    return (to.uniform ? one_grid<float> : own_grids<float>)(y, out, to.count, to.grid,
                                                             int32_t(to.offset));
  uint32_t largest = 0;
  one_token(y, out, to.scales + row, to.count, to.grid, to.uniform, to.inverse_clip, to.unit_clip,
            to.levels, to.least, int32_t(to.offset), &largest);
  return largest;
}

template <class T>
int rows(const Source& of, const Target* targets, int count, int threads) {
  const T* x = static_cast<const T*>(of.x);
  const View at = of.at;
  const int64_t all = at.batch * at.pixels;
  const bool own = of.kind == AFFINE || of.kind == AFFINE_SILU;  // a map of each image
  uint32_t largest = 0;
#pragma omp parallel num_threads(threads) if (all * at.channels >= PARALLEL) \
    reduction(max : largest)
  {
    const auto y = aligned<float>(at.channels);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < all; ++row) {
      const int64_t image = row / at.pixels, pixel = row % at.pixels;
      const int64_t map = own ? image * at.channels : 0;
      fill(x + image * at.batch_stride + pixel * at.pixel_stride, of.scale + map, of.shift + map,
           at.channels, of.kind, of.eps, y.get());
      for (int i = 0; i < count; ++i)
        largest = std::max(largest, leave(y.get() + targets[i].start, row, targets[i]));
    }
  }
  return largest < INFINITE;
}

// A GroupNorm, and what is added to each channel before it.
struct Group {
  const void* x;
  const float* weight;  // [channels]
  const float* bias;
  const float* added;  // [batch, channels], or null
  float* scale;        // [batch, channels]: the norm is x * scale + shift
  float* shift;
  View at;
  int64_t groups;
  double eps;
};

// The mean, and the sum of squared deviations from it, of each channel over a few pixels.
template <class T>
void moments(const T* x, int64_t pixels, int64_t channels, int64_t stride, float* __restrict mean,
             float* __restrict squares) {
  std::fill(mean, mean + channels, 0.0f);
  std::fill(squares, squares + channels, 0.0f);
  for (int64_t p = 0; p < pixels; ++p) {
    const T* __restrict row = x + p * stride;
    for (int64_t c = 0; c < channels; ++c) mean[c] += value_of(row[c]);
  }
  const float n = float(pixels);
  for (int64_t c = 0; c < channels; ++c) mean[c] /= n;
  for (int64_t p = 0; p < pixels; ++p) {
    const T* __restrict row = x + p * stride;
    for (int64_t c = 0; c < channels; ++c) {
      const float d = value_of(row[c]) - mean[c];
      squares[c] += d * d;
    }
  }
}

// Moments of few pixels are joined in double, always in the same order: the result does not depend
// on the number of threads.
template <class T>
void affine(const Group& of, int threads) {
  const T* x = static_cast<const T*>(of.x);
  const View at = of.at;
  const int64_t blocks = (at.pixels + MANY - 1) / MANY, width = at.channels / of.groups;
  const auto parts = aligned<float>(at.batch * blocks * 2 * at.channels);
  const bool parallel = at.batch * at.pixels * at.channels >= PARALLEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t i = 0; i < at.batch * blocks; ++i) {
    const int64_t image = i / blocks, start = i % blocks * MANY;
    float* mean = parts.get() + 2 * i * at.channels;
    moments(x + image * at.batch_stride + start * at.pixel_stride,
            std::min(MANY, at.pixels - start), at.channels, at.pixel_stride, mean,
            mean + at.channels);
  }
  for (int64_t i = 0; i < at.batch * of.groups; ++i) {
    const int64_t image = i / of.groups, first = i % of.groups * width;
    const float* all = parts.get() + 2 * image * blocks * at.channels;
    const float* added = of.added ? of.added + image * at.channels : nullptr;
    const auto each = [&](auto take) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t c = first; c < first + width; ++c) {
          const float* mean = all + 2 * b * at.channels + c;
          take(double(std::min(MANY, at.pixels - b * MANY)),
               double(*mean) + (added ? added[c] : 0.0f), double(mean[at.channels]));
        }
    };
    const double n = double(at.pixels * width);
    double mean = 0.0, squares = 0.0;
    each([&](double count, double own, double) { mean += count / n * own; });
    each([&](double count, double own, double inner) {
      squares += inner + count * (own - mean) * (own - mean);
    });
    const double deviation = 1.0 / std::sqrt(squares / n + of.eps);
    for (int64_t c = first; c < first + width; ++c) {
      const double scale = deviation * of.weight[c];
      of.scale[image * at.channels + c] = float(scale);
      of.shift[image * at.channels + c] =
          float(of.bias[c] + ((added ? added[c] : 0.0f) - mean) * scale);
    }
  }
}

}  // namespace

extern "C" {

// Rows on their targets' grids. Returns whether every value is finite.
int quantize_rows(Source of, const Target* targets, int count, int half, int threads) {
  return (half ? rows<uint16_t> : rows<float>)(of, targets, count, threads);
}

// A GroupNorm of x as a scale and a shift of each image's channels.
int group_affine(Group of, int half, int threads) {
  (half ? affine<uint16_t> : affine<float>)(of, threads);
  return 1;
}

}  // extern "C"
