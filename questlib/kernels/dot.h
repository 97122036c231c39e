// Sums of products of four bytes, unsigned times signed, into int32, several outputs side by side.
//
// `Dot` is one vector of outputs. `splat` gives four unsigned bytes to all of them; `add` takes four
// signed bytes of each from memory; `floats` rounds the sums to float32. All forms are exact: the
// AVX2 one goes through 16-bit halves, because its own instruction for bytes saturates.

#pragma once

#include "common.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__)

using Floats = __m512;

struct Dot {
  using Splat = __m512i;
  static constexpr int LANES = 16, ROWS = 8, WIDTH = 3;
  __m512i sum;

  static Splat splat(const uint8_t* four) {
    int32_t x;
    std::memcpy(&x, four, 4);
    return _mm512_set1_epi32(x);
  }
  void floats(Floats& to) const { to = _mm512_cvtepi32_ps(sum); }
  void load(const int32_t* from) { sum = _mm512_loadu_si512(from); }
  void store(int32_t* to) const { _mm512_storeu_si512(to, sum); }
  void add(const Splat& x, const int8_t* w) {
    sum = _mm512_dpbusd_epi32(sum, x, _mm512_loadu_si512(w));
  }
};

#elif defined(__AVX2__)

using Floats = __m256;

struct Dot {
  static constexpr int LANES = 8, ROWS = 2, WIDTH = 2;
  __m256i sum;

#if defined(__AVXVNNI__)
  using Splat = __m256i;
#else
  struct Splat {
    __m256i even, odd;
  };
#endif

  static Splat splat(const uint8_t* four) {
    int32_t x;
    std::memcpy(&x, four, 4);
    const __m256i all = _mm256_set1_epi32(x);
#if defined(__AVXVNNI__)
    return all;
#else
    return {_mm256_and_si256(all, _mm256_set1_epi16(255)), _mm256_srli_epi16(all, 8)};
#endif
  }
  void floats(Floats& to) const { to = _mm256_cvtepi32_ps(sum); }
  void load(const int32_t* from) { sum = _mm256_loadu_si256((const __m256i*)from); }
  void store(int32_t* to) const { _mm256_storeu_si256((__m256i*)to, sum); }
  void add(const Splat& x, const int8_t* w) {
    const __m256i b = _mm256_loadu_si256((const __m256i*)w);
#if defined(__AVXVNNI__)
    sum = _mm256_dpbusd_avx_epi32(sum, x, b);
#else
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
    const __m256i odd = _mm256_srai_epi16(b, 8);
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(x.even, even),
                                          _mm256_madd_epi16(x.odd, odd));
    sum = _mm256_add_epi32(sum, both);
#endif
  }
};

#else

typedef float Floats __attribute__((vector_size(32)));

struct Dot {
  using Splat = const uint8_t*;
  static constexpr int LANES = 8, ROWS = 2, WIDTH = 2;
  int32_t sum[LANES];

  static Splat splat(const uint8_t* four) { return four; }
  void floats(Floats& to) const {
    for (int i = 0; i < LANES; ++i) to[i] = float(sum[i]);
  }
  void load(const int32_t* from) { std::copy(from, from + LANES, sum); }
  void store(int32_t* to) const { std::copy(sum, sum + LANES, to); }
  void add(const Splat& x, const int8_t* w) {
    for (int i = 0; i < LANES; ++i)
      for (int j = 0; j < 4; ++j) sum[i] += int32_t(x[j]) * w[4 * i + j];
  }
};

#endif
