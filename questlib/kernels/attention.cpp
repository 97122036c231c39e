// Attention on bytes: scores, softmax, its codes, and their product with v, a few queries at a time.
// No score leaves the cache.
//
// The arithmetic is that of questlib/integer/softmax.py and questlib/integer/cpu/attention.py,
// operation by operation, so that both give the same bits.

#include "dot.h"

namespace {

constexpr int ROWS = Dot::ROWS, LANES = Dot::LANES, WIDTH = Dot::WIDTH;
constexpr int64_t PAIR = 2 * LANES;  // keys whose scores are computed side by side

// q [batch, queries, heads * dim], k and v likewise with keys; out like q.
struct Problem {
  const uint8_t* q;
  const int8_t* k;
  const int8_t* v;
  const float* mask;       // null, or added to the scores
  const float* factor;     // [heads * dim]: of the output
  const float* codes_add;  // [heads * dim], or null: times the sum of a query's codes
  float* out;
  int64_t batch, heads, queries, keys, dim;
  int64_t mask_head, mask_query;  // strides of the mask; 0 where it is the same for all
  int32_t zero;                   // q's zero point
  float scale;                    // of the scores
  float inverse, high;            // of the softmax's grid
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline float largest(const float* x, int64_t n) {
  // Sixteen side by side: the compiler does not reorder one maximum by itself.
  float lanes[16];
  std::fill(lanes, lanes + 16, -INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; ++j) lanes[j] = lanes[j] < x[i + j] ? x[i + j] : lanes[j];
  for (; i < n; ++i) lanes[0] = lanes[0] < x[i] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + 16);
}

// The sum of e [n], by halves. `half` has room for them.
inline float sum_by_halves(const float* __restrict e, int64_t n, float* __restrict half) {
  if (n <= 1) return n ? e[0] : 0.0f;
  int64_t width = 1;
  while (2 * width < n) width *= 2;
  for (int64_t i = 0; i < n - width; ++i) half[i] = e[i] + e[width + i];
  for (int64_t i = n - width; i < width; ++i) half[i] = e[i];
  for (width /= 2; width >= 1; width /= 2)
    for (int64_t i = 0; i < width; ++i) half[i] += half[width + i];
  return half[0];
}

// What one thread works in.
struct Room {
  int64_t keys, depth, blocks;  // keys and head width, padded; vectors of output channels
  std::unique_ptr<int8_t[], Free> k, v;
  std::unique_ptr<int32_t[], Free> start;
  std::unique_ptr<uint8_t[], Free> q, codes;
  std::unique_ptr<float[], Free> scores, half;

  explicit Room(const Problem& of)
      : keys(up(of.keys, PAIR)),
        depth(up(of.dim, 4)),
        blocks(up(of.dim, LANES) / LANES),
        k(aligned<int8_t>(keys * depth)),
        v(aligned<int8_t>(keys * blocks * LANES)),
        start(aligned<int32_t>(keys)),
        q(aligned<uint8_t>(ROWS * depth)),
        codes(aligned<uint8_t>(ROWS * keys)),
        scores(aligned<float>(ROWS * keys)),
        half(aligned<float>(keys)) {}

  // One head's k as [keys / PAIR][dim / 4][PAIR][4], v as [blocks][keys / 4][LANES][4].
  void pack(const Problem& of, int64_t b, int64_t h) {
    const int64_t width = of.heads * of.dim;
    const int8_t* own_k = of.k + b * of.keys * width + h * of.dim;
    const int8_t* own_v = of.v + b * of.keys * width + h * of.dim;
    std::fill(k.get(), k.get() + keys * depth, int8_t(0));
    std::fill(v.get(), v.get() + keys * blocks * LANES, int8_t(0));
    std::fill(start.get(), start.get() + keys, 0);
    for (int64_t m = 0; m < of.keys; ++m) {
      int8_t* to_k = k.get() + m / PAIR * depth * PAIR + m % PAIR * 4;
      int8_t* to_v = v.get() + m / 4 * LANES * 4 + m % 4;
      int32_t sum = 0;
      for (int64_t d = 0; d < of.dim; ++d) {
        const int8_t key = own_k[m * width + d];
        to_k[d / 4 * PAIR * 4 + d % 4] = key;
        sum += key;
        to_v[d / LANES * keys * LANES + d % LANES * 4] = own_v[m * width + d];
      }
      start[m] = -of.zero * sum;
    }
  }
};

// scores [R, keys] of R queries
template <int R>
void score(const Room& room, float scale) {
  for (int64_t m = 0; m < room.keys; m += PAIR) {
    Dot a[R], b[R];
    for (int r = 0; r < R; ++r) {
      a[r].load(room.start.get() + m);
      b[r].load(room.start.get() + m + LANES);
    }
    const int8_t* k = room.k.get() + m * room.depth;
    for (int64_t d = 0; d < room.depth; d += 4, k += PAIR * 4)
      for (int r = 0; r < R; ++r) {
        const auto x = Dot::splat(room.q.get() + r * room.depth + d);
        a[r].add(x, k);
        b[r].add(x, k + LANES * 4);
      }
    for (int r = 0; r < R; ++r) {
      int32_t sums[PAIR];
      a[r].store(sums);
      b[r].store(sums + LANES);
      float* to = room.scores.get() + r * room.keys + m;
      for (int64_t i = 0; i < PAIR; ++i) to[i] = float(sums[i]) * scale;
    }
  }
}

// Scores -> codes of the softmax, of one query. Returns whether its scores have a softmax.
bool softmax(const Problem& of, const float* mask, float* __restrict s, uint8_t* __restrict codes,
             float* half) {
  if (mask)
    for (int64_t m = 0; m < of.keys; ++m) s[m] += mask[m];
  const float top = largest(s, of.keys);
  for (int64_t m = 0; m < of.keys; ++m) s[m] = power((s[m] - top) * 1.442695041f);
  const float sum = sum_by_halves(s, of.keys, half);
  // NaN where a score is, or where the largest is infinite
  if (!(sum < INFINITY)) return false;
  const float weight = of.inverse / sum;
  for (int64_t m = 0; m < of.keys; ++m)
    codes[m] = uint8_t(int32_t(std::min(std::rint(s[m] * weight), of.high)));
  return true;
}

// N vectors of output channels from `block` on, for R queries
template <int R, int N>
void output(const Problem& of, const Room& room, int64_t block, int64_t head, const float* code_sum,
            float* out) {
  const int32_t zeros[LANES] = {0};
  Dot sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) sum[r][j].load(zeros);
  const int8_t* v = room.v.get() + block * room.keys * LANES;
  for (int64_t m = 0; m < up(of.keys, 4); m += 4)
    for (int r = 0; r < R; ++r) {
      const auto x = Dot::splat(room.codes.get() + r * room.keys + m);
      for (int j = 0; j < N; ++j) sum[r][j].add(x, v + (j * room.keys + m) * LANES);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) {
      int32_t sums[LANES];
      sum[r][j].store(sums);
      const int64_t first = (block + j) * LANES;
      for (int64_t i = 0; i < LANES && first + i < of.dim; ++i) {
        const int64_t c = head * of.dim + first + i;
        float y = float(sums[i]) * of.factor[c];
        if (of.codes_add) y += code_sum[r] * of.codes_add[c];
        out[r * of.heads * of.dim + first + i] = y;
      }
    }
}

template <int R>
bool rows(const Problem& of, Room& room, int64_t b, int64_t h, int64_t n) {
  const int64_t width = of.heads * of.dim;
  for (int r = 0; r < R; ++r) {
    const uint8_t* from = of.q + (b * of.queries + n + r) * width + h * of.dim;
    uint8_t* to = room.q.get() + r * room.depth;
    std::copy(from, from + of.dim, to);
    std::fill(to + of.dim, to + room.depth, uint8_t(0));
  }
  score<R>(room, of.scale);
  float code_sum[R] = {0};
  for (int r = 0; r < R; ++r) {
    const float* mask = of.mask;
    if (mask) mask += (b * of.heads + h) * of.mask_head + (n + r) * of.mask_query;
    uint8_t* codes = room.codes.get() + r * room.keys;
    if (!softmax(of, mask, room.scores.get() + r * room.keys, codes, room.half.get())) return false;
    std::fill(codes + of.keys, codes + room.keys, uint8_t(0));
    if (of.codes_add) code_sum[r] = float(std::accumulate(codes, codes + of.keys, int32_t(0)));
  }
  float* out = of.out + (b * of.queries + n) * width + h * of.dim;
  for (int64_t block = 0; block < room.blocks;) {
    const int64_t left = room.blocks - block;
    float* to = out;
    if (WIDTH >= 3 && left >= 3) {
      output<R, WIDTH>(of, room, block, h, code_sum, to);
      block += WIDTH;
    } else if (left >= 2) {
      output<R, 2>(of, room, block, h, code_sum, to);
      block += 2;
    } else {
      output<R, 1>(of, room, block, h, code_sum, to);
      block += 1;
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Returns whether every query has a finite largest score; if not, `out` is not filled.
int attention(Problem of, int threads) {
  const int64_t all = of.batch * of.heads;
  // Few heads are divided among the threads, each part with its own copy of k and v.
  const int64_t groups = (of.queries + ROWS - 1) / ROWS;
  const int64_t parts = std::max<int64_t>(1, std::min(groups, (threads + all - 1) / all));
  const bool parallel = all * of.queries * of.keys >= PARALLEL;
  int finite = 1;
#pragma omp parallel num_threads(threads) if (parallel) reduction(min : finite)
  {
    Room room(of);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < all * parts; ++i) {
      const int64_t head = i / parts, part = i % parts;
      const int64_t b = head / of.heads, h = head % of.heads;
      room.pack(of, b, h);
      const int64_t end = std::min(of.queries, groups * (part + 1) / parts * ROWS);
      int64_t n = groups * part / parts * ROWS;
      for (; finite && n + ROWS <= end; n += ROWS) finite &= rows<ROWS>(of, room, b, h, n);
      for (; finite && n < end; ++n) finite &= rows<1>(of, room, b, h, n);
    }
  }
  return finite;
}

}  // extern "C"
