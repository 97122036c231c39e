// Attention on bytes: scores, softmax, its codes, and their product with v, a few queries at a time.
// No score leaves the cache.
//
// The arithmetic is that of questlib/integer/softmax.py and questlib/integer/cpu/attention.py,
// operation by operation, so that both give the same bits.

#include "dot.h"

#include <utility>

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int LANES = Dot::LANES;

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

// The largest of what was added, in lanes: the compiler does not reorder one maximum by itself.
class Largest {
  typedef float Lanes __attribute__((vector_size(64)));
  static constexpr int64_t COUNT = sizeof(Lanes) / sizeof(float);
  Lanes lanes[2] = {Lanes{} - INFINITY, Lanes{} - INFINITY};

 public:
  void add(const float* x, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * COUNT <= n; i += 2 * COUNT)
      for (int64_t j = 0; j < 2; ++j) {
        Lanes own;
        std::memcpy(&own, x + i + j * COUNT, sizeof own);
        lanes[j] = own > lanes[j] ? own : lanes[j];
      }
    for (; i < n; ++i) lanes[0][0] = x[i] > lanes[0][0] ? x[i] : lanes[0][0];
  }

  float value() const {
    const Lanes both = lanes[0] > lanes[1] ? lanes[0] : lanes[1];
    float top = both[0];
    for (int64_t i = 1; i < COUNT; ++i) top = both[i] > top ? both[i] : top;
    return top;
  }
};

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

// How products lay out what they multiply.
struct Layout {
  int64_t rows;   // queries at a time
  int64_t side;   // keys whose scores are computed side by side
  int64_t keys;   // a multiple of which keys are padded to
  int64_t depth;  // likewise for the head width
};

// What one thread works in.
struct Room {
  Layout layout;
  int64_t keys, depth, blocks;  // keys and head width, padded; vectors of output channels
  // How far rows of scores and codes, and vectors of v, lie apart: more than they hold, because
  // powers of two would put all of them into the same few lines of the cache.
  int64_t pitch, plane;
  std::unique_ptr<int8_t[], Free> k, v;
  std::unique_ptr<int32_t[], Free> start;
  std::unique_ptr<uint8_t[], Free> q, codes;
  std::unique_ptr<float[], Free> scores, half;

  Room(const Problem& of, const Layout& layout)
      : layout(layout),
        keys(up(of.keys, layout.keys)),
        depth(up(of.dim, layout.depth)),
        blocks(up(of.dim, LANES) / LANES),
        pitch(keys + 64),
        plane(keys * LANES + 64),
        k(aligned<int8_t>(keys * depth)),
        v(aligned<int8_t>(plane * blocks)),
        start(aligned<int32_t>(keys)),
        q(aligned<uint8_t>(layout.rows * depth)),
        codes(aligned<uint8_t>(layout.rows * pitch)),
        scores(aligned<float>(layout.rows * pitch)),
        half(aligned<float>(keys)) {
    std::fill(q.get(), q.get() + layout.rows * depth, uint8_t(0));
    std::fill(codes.get(), codes.get() + layout.rows * pitch, uint8_t(0));
  }

  // One head's k as [keys / side][depth / 4][side][4], v as [blocks][keys / 4][LANES][4], its
  // blocks `plane` apart.
  void pack(const Problem& of, int64_t b, int64_t h) {
    const int64_t width = of.heads * of.dim, side = layout.side;
    const int8_t* own_k = of.k + b * of.keys * width + h * of.dim;
    const int8_t* own_v = of.v + b * of.keys * width + h * of.dim;
    std::fill(k.get(), k.get() + keys * depth, int8_t(0));
    std::fill(v.get(), v.get() + plane * blocks, int8_t(0));
    std::fill(start.get(), start.get() + keys, 0);
    for (int64_t m = 0; m < of.keys; ++m) {
      int8_t* to_k = k.get() + m / side * depth * side + m % side * 4;
      int8_t* to_v = v.get() + m / 4 * LANES * 4 + m % 4;
      int32_t sum = 0;
      for (int64_t d = 0; d < of.dim; ++d) {
        const int8_t key = own_k[m * width + d];
        to_k[d / 4 * side * 4 + d % 4] = key;
        sum += key;
        to_v[d / LANES * plane + d % LANES * 4] = own_v[m * width + d];
      }
      start[m] = -of.zero * sum;
    }
  }
};

// One query's sums of one vector of output channels, rescaled.
inline void rescale(const Problem& of, const int32_t* sums, int64_t head, int64_t first,
                    float code_sum, float* out) {
  for (int64_t i = 0; i < LANES && first + i < of.dim; ++i) {
    const int64_t c = head * of.dim + first + i;
    float y = float(sums[i]) * of.factor[c];
    if (of.codes_add) y += code_sum * of.codes_add[c];
    out[first + i] = y;
  }
}

// ---- products by vectors ----

// f(0), ..., f(N - 1), as constants. An array whose indices are constants stays in registers; with
// loops in place of this, GCC keeps the sums of the innermost loop in memory, at half the speed.
template <class F, int... I>
[[gnu::always_inline]] inline void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void each(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

struct Vectors {
  static constexpr int ROWS = Dot::ROWS, WIDTH = Dot::WIDTH;
  static constexpr int64_t PAIR = 2 * LANES;
  static constexpr Layout LAYOUT = {ROWS, PAIR, PAIR, 4};

  // scores [count, keys], and each row's largest
  static void score(const Problem& of, const Room& room, int64_t count, Largest* top) {
    if (count == ROWS)
      score_of<ROWS>(of, room, 0, top);
    else
      for (int64_t r = 0; r < count; ++r) score_of<1>(of, room, r, top);
  }

  // out [count, dim], rows `width` apart
  static void output(const Problem& of, const Room& room, int64_t head, const float* code_sum,
                     float* out, int64_t width, int64_t count) {
    if (count == ROWS)
      output_of<ROWS>(of, room, head, code_sum, out, width, 0);
    else
      for (int64_t r = 0; r < count; ++r) output_of<1>(of, room, head, code_sum, out, width, r);
  }

 private:
  // The sums of two vectors of keys from m on, for R queries.
  template <int R>
  [[gnu::always_inline]] static inline void sums_of(const Room& room, int64_t row, int64_t m,
                                                    Dot* a, Dot* b) {
    each<R>([&](auto r) {
      a[r].load(room.start.get() + m);
      b[r].load(room.start.get() + m + LANES);
    });
    const int64_t depth = room.depth;
    const int8_t* k = room.k.get() + m * depth;
    const uint8_t* q = room.q.get() + row * depth;
    for (int64_t d = 0; d < depth; d += 4, k += PAIR * 4)
      each<R>([&](auto r) {
        const auto x = Dot::splat(q + r * depth + d);
        a[r].add(x, k);
        b[r].add(x, k + LANES * 4);
      });
  }

  // A vector of sums as scores, which are written to memory, too.
  [[gnu::always_inline]] static inline void write(const Dot& sums, float scale, float* to,
                                                  Floats& scores) {
    sums.floats(scores);
    scores *= scale;
    std::memcpy(to, &scores, sizeof scores);
  }

  template <int R>
  static void score_of(const Problem& of, const Room& room, int64_t row, Largest* top) {
    const int64_t whole = of.keys / PAIR * PAIR, pitch = room.pitch;
    const float scale = of.scale;
    float* scores = room.scores.get() + row * pitch;
    Floats most[R];
    each<R>([&](auto r) { most[r] = Floats{} - INFINITY; });
    for (int64_t m = 0; m < whole; m += PAIR) {
      Dot a[R], b[R];
      sums_of<R>(room, row, m, a, b);
      each<R>([&](auto r) {
        Floats x, y;
        write(a[r], scale, scores + r * pitch + m, x);
        write(b[r], scale, scores + r * pitch + m + LANES, y);
        const Floats larger = x > y ? x : y;
        most[r] = larger > most[r] ? larger : most[r];
      });
    }
    each<R>([&](auto r) {
      float lanes[LANES];
      std::memcpy(lanes, &most[r], sizeof lanes);
      top[row + r].add(lanes, LANES);
    });
    if (whole == room.keys) return;
    Dot a[R], b[R];
    sums_of<R>(room, row, whole, a, b);
    each<R>([&](auto r) {
      Floats x, y;
      float* to = scores + r * pitch + whole;
      write(a[r], scale, to, x);
      write(b[r], scale, to + LANES, y);
      top[row + r].add(to, of.keys - whole);
    });
  }

  template <int R>
  static void output_of(const Problem& of, const Room& room, int64_t head, const float* code_sum,
                        float* out, int64_t width, int64_t row) {
    for (int64_t block = 0; block < room.blocks;) {
      const int64_t left = room.blocks - block;
      if (WIDTH >= 3 && left >= 3) {
        vectors<R, WIDTH>(of, room, block, head, code_sum, out, width, row);
        block += WIDTH;
      } else if (left >= 2) {
        vectors<R, 2>(of, room, block, head, code_sum, out, width, row);
        block += 2;
      } else {
        vectors<R, 1>(of, room, block, head, code_sum, out, width, row);
        block += 1;
      }
    }
  }

  // N vectors of output channels from `block` on, for R queries
  template <int R, int N>
  static void vectors(const Problem& of, const Room& room, int64_t block, int64_t head,
                      const float* code_sum, float* out, int64_t width, int64_t row) {
    const int32_t zeros[LANES] = {0};
    Dot sum[R * N];
    each<R * N>([&](auto i) { sum[i].load(zeros); });
    const int64_t pitch = room.pitch, plane = room.plane;
    const int8_t* v = room.v.get() + block * plane;
    const uint8_t* codes = room.codes.get() + row * pitch;
    const int64_t end = up(of.keys, 4);
    for (int64_t m = 0; m < end; m += 4)
      each<R>([&](auto r) {
        const auto x = Dot::splat(codes + r * pitch + m);
        each<N>([&](auto j) { sum[r * N + j].add(x, v + j * plane + m * LANES); });
      });
    each<R>([&](auto r) {
      each<N>([&](auto j) {
        int32_t sums[LANES];
        sum[r * N + j].store(sums);
        rescale(of, sums, head, (block + j) * LANES, code_sum[row + r], out + (row + r) * width);
      });
    });
  }
};

#if defined(__AMX_INT8__)
// ---- products by tiles (Intel AMX): sixteen rows of 64 bytes times 64 of sixteen columns ----

struct Tiles {
  static constexpr int ROWS = 16, WIDE = 64;
  static constexpr Layout LAYOUT = {ROWS, LANES, WIDE, WIDE};

  // Linux gives tiles to processes that ask for them.
  static bool allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
  }

  static void score(const Problem& of, const Room& room, int64_t count, Largest* top) {
    alignas(64) int32_t sums[ROWS * WIDE];
    const Configured configured;
    for (int64_t m = 0; m < room.keys; m += WIDE) {
      const int32_t* start = room.start.get() + m;  // the same for all rows: a stride of 0
      _tile_loadd(0, start, 0);
      _tile_loadd(1, start + 16, 0);
      _tile_loadd(2, start + 32, 0);
      _tile_loadd(3, start + 48, 0);
      const int64_t next = room.depth * LANES;  // of sixteen keys
      for (int64_t d = 0; d < room.depth; d += WIDE) {
        const int8_t* k = room.k.get() + m * room.depth + d * LANES;
        _tile_loadd(4, room.q.get() + d, room.depth);
        _tile_loadd(5, k, WIDE);
        _tile_dpbusd(0, 4, 5);
        _tile_loadd(6, k + next, WIDE);
        _tile_dpbusd(1, 4, 6);
        _tile_loadd(5, k + 2 * next, WIDE);
        _tile_dpbusd(2, 4, 5);
        _tile_loadd(6, k + 3 * next, WIDE);
        _tile_dpbusd(3, 4, 6);
      }
      store(sums);
      for (int64_t r = 0; r < count; ++r) {
        float* to = room.scores.get() + r * room.pitch + m;
        for (int64_t i = 0; i < WIDE; ++i) to[i] = float(sums[r * WIDE + i]) * of.scale;
        top[r].add(to, std::min<int64_t>(WIDE, of.keys - m));
      }
    }
  }

  static void output(const Problem& of, const Room& room, int64_t head, const float* code_sum,
                     float* out, int64_t width, int64_t count) {
    alignas(64) int32_t sums[ROWS * WIDE];
    const Configured configured;
    for (int64_t block = 0; block < room.blocks; block += 4) {
      const int64_t n = std::min<int64_t>(4, room.blocks - block);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const int64_t next = room.plane;  // of sixteen channels
      for (int64_t m = 0; m < room.keys; m += WIDE) {
        const int8_t* v = room.v.get() + block * next + m * LANES;
        _tile_loadd(4, room.codes.get() + m, room.pitch);
        _tile_loadd(5, v, WIDE);
        _tile_dpbusd(0, 4, 5);
        if (n > 1) {
          _tile_loadd(6, v + next, WIDE);
          _tile_dpbusd(1, 4, 6);
        }
        if (n > 2) {
          _tile_loadd(5, v + 2 * next, WIDE);
          _tile_dpbusd(2, 4, 5);
        }
        if (n > 3) {
          _tile_loadd(6, v + 3 * next, WIDE);
          _tile_dpbusd(3, 4, 6);
        }
      }
      store(sums);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < n; ++j)
          rescale(of, sums + r * WIDE + j * LANES, head, (block + j) * LANES, code_sum[r],
                  out + r * width);
    }
  }

 private:
  // All tiles whole; oneDNN configures its own before each product.
  struct Configured {
    Configured() {
      alignas(64) uint8_t config[64] = {1};  // the palette; tiles' columns in bytes, then rows
      for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = WIDE;
        config[48 + i] = ROWS;
      }
      _tile_loadconfig(config);
    }
    ~Configured() { _tile_release(); }
  };

  // Tiles 0 to 3 side by side, [ROWS, 64].
  static void store(int32_t* sums) {
    _tile_stored(0, sums, 4 * WIDE);
    _tile_stored(1, sums + 16, 4 * WIDE);
    _tile_stored(2, sums + 32, 4 * WIDE);
    _tile_stored(3, sums + 48, 4 * WIDE);
  }
};
#endif

// One query's scores, of which the largest is `top` -> codes of the softmax, and their sum. Returns
// whether the scores have a softmax.
bool softmax(const Problem& of, float top, float* __restrict s, float* half,
             uint8_t* __restrict codes, float* code_sum) {
  for (int64_t m = 0; m < of.keys; ++m) s[m] = power((s[m] - top) * 1.442695041f);
  const float sum = sum_by_halves(s, of.keys, half);
  // NaN where a score is, or where the largest is infinite
  if (!(sum < INFINITY)) return false;
  const float weight = of.inverse / sum;
  uint32_t total = 0;  // modulo 2^32
  for (int64_t m = 0; m < of.keys; ++m) {
    const uint32_t code = bits_of(std::min(s[m] * weight, of.high) + ROUND);
    codes[m] = uint8_t(code);
    total += code;
  }
  *code_sum = float(int32_t(total - uint32_t(of.keys) * bits_of(ROUND)));
  return true;
}

// ---- attention ----

// `count` queries of one head, from query n on.
template <class Products>
bool rows(const Problem& of, Room& room, int64_t b, int64_t h, int64_t n, int64_t count) {
  const int64_t width = of.heads * of.dim;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* from = of.q + (b * of.queries + n + r) * width + h * of.dim;
    std::copy(from, from + of.dim, room.q.get() + r * room.depth);
  }
  Largest top[Products::ROWS];
  Products::score(of, room, count, top);
  float code_sum[Products::ROWS];
  for (int64_t r = 0; r < count; ++r) {
    float* scores = room.scores.get() + r * room.pitch;
    if (of.mask) {
      const float* mask =
          of.mask + (b * of.heads + h) * of.mask_head + (n + r) * of.mask_query;
      for (int64_t m = 0; m < of.keys; ++m) scores[m] += mask[m];
      top[r] = Largest();
      top[r].add(scores, of.keys);
    }
    uint8_t* codes = room.codes.get() + r * room.pitch;
    if (!softmax(of, top[r].value(), scores, room.half.get(), codes, code_sum + r)) return false;
  }
  float* out = of.out + (b * of.queries + n) * width + h * of.dim;
  Products::output(of, room, h, code_sum, out, width, count);
  return true;
}

template <class Products>
int attend(const Problem& of, int threads) {
  constexpr int64_t ROWS = Products::ROWS;
  const int64_t all = of.batch * of.heads;
  // Few heads are divided among the threads, each part with its own copy of k and v.
  const int64_t groups = (of.queries + ROWS - 1) / ROWS;
  const int64_t parts = std::max<int64_t>(1, std::min(groups, (threads + all - 1) / all));
  const bool parallel = all * of.queries * of.keys >= PARALLEL;
  int finite = 1;
#pragma omp parallel num_threads(threads) if (parallel) reduction(min : finite)
  {
    Room room(of, Products::LAYOUT);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < all * parts; ++i) {
      const int64_t head = i / parts, part = i % parts;
      const int64_t b = head / of.heads, h = head % of.heads;
      room.pack(of, b, h);
      const int64_t end = std::min(of.queries, groups * (part + 1) / parts * ROWS);
      for (int64_t n = groups * part / parts * ROWS; finite && n < end; n += ROWS)
        finite &= rows<Products>(of, room, b, h, n, std::min(ROWS, end - n));
    }
  }
  return finite;
}

}  // namespace

extern "C" {

// Returns whether every query has a finite largest score; if not, `out` is not filled.
int attention(Problem of, int threads) {
#if defined(__AMX_INT8__)
  if (Tiles::allowed()) return attend<Tiles>(of, threads);
#endif
  return attend<Vectors>(of, threads);
}

}  // extern "C"
