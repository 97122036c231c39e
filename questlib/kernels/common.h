// What the kernels share.
//
// They are compiled on the user's machine for its own processor (compiler.py) and called through
// ctypes (library.py). Plain loops are left to the compiler. Its flags forbid what changes a result:
// no operation is contracted, no sum is taken in another order than the one that is written.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>

constexpr int64_t PARALLEL = 1 << 15;  // values from which threads pay
constexpr int64_t BLOCK = 1 << 14;     // values that one thread takes at a time
constexpr uint32_t INFINITE = 0x7f800000;  // the bits of infinity; those of NaN are larger

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) { return float_of(uint32_t(x) << 16); }  // bfloat16

// 1.5 * 2^23. Adding it rounds a small number to a whole one, to even from halfway, and leaves that
// in the lowest bits of the sum.
constexpr float ROUND = 12582912.0f;

// 2^y for y <= 0, by the operations of softmax.py
inline float power(float y) {
  y = std::max(y, -126.0f);
  const float rounded = y + ROUND;
  const float r = y - (rounded - ROUND);
  float p = r * 1.326472731e-03f;
  p = (p + 9.671512991e-03f) * r;
  p = (p + 5.550733581e-02f) * r;
  p = (p + 2.402224243e-01f) * r;
  p = (p + 6.931470037e-01f) * r;
  p = p + 1.0f;
  return p * float_of((bits_of(rounded) + 127) << 23);
}

// Memory on a cache line's boundary, of no value yet.
struct Free {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
std::unique_ptr<T[], Free> aligned(int64_t n) {
  return std::unique_ptr<T[], Free>(
      static_cast<T*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t(64))));
}
