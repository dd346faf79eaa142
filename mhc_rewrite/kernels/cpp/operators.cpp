// The operators on CPU tensors in fp32, bf16 and fp16, with their gradients: what kernels/aten.py computes, in as few
// passes over memory as the table of costs allows. Built and called by kernels/cpu.py.
//
// A thread owns a range of tokens and takes them in blocks whose state stays in its second-level cache: it is read from
// memory once, projected, and read again from the cache, while the next block is fetched. All arithmetic is fp32; rows
// in bf16 and fp16 are widened in registers. Vectors of eight floats run along C, but where coefficients are made:
// there a vector holds the same number of eight tokens. Equation numbers: arXiv:2512.24880v2.
//
// Names: T tokens; X holds M streams, n or 1 where all are equal; S streams of the state that is projected; C width;
// K = n^2 + 2n columns, padded to KP; E the streams' element type and D the branch's.

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;  // elements of C that the gradient of the projection takes at once
constexpr int CHUNK = 128;        // elements of C that the projection takes at once
constexpr int BLOCK = 16;         // tokens of a block of the backward; LANES are one of the forward
constexpr int MOST = 16;          // streams
constexpr int LINE = 64;          // bytes of a cache line

// -- eight floats ------------------------------------------------------------------------------------------------------

typedef float V __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(32), aligned(4), may_alias));

inline V all(float x) { return V{x, x, x, x, x, x, x, x}; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }

inline float sum(V v) {
  float total = 0;
  for (int l = 0; l < LANES; ++l) total += v[l];
  return total;
}

inline int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// e^x to 2e-7, x within the range of fp32.
inline V exp(V x) {
  x = min(max(x, all(-87.0f)), all(88.0f));
  const V magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  const V shifted = x * 1.44269504f + magic;
  const V k = shifted - magic;
  const V r = (x - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts
  V p = all(1.9841270e-4f);
  for (float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return reinterpret_cast<V>(reinterpret_cast<VI>(p) + (reinterpret_cast<VI>(shifted) << 23));
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

inline V tanh(V x) {
  for (int l = 0; l < LANES; ++l) x[l] = std::tanh(x[l]);
  return x;
}

// -- elements in memory -----------------------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  _Float16 value;
};

typedef uint16_t Bits8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef _Float16 Half8 __attribute__((vector_size(16), aligned(2), may_alias));

inline V widen(V v) { return v; }
inline V widen(Half8 v) { return __builtin_convertvector(v, V); }
inline V widen(Bits8 v) {
#ifdef __AVX2__
  return reinterpret_cast<V>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)), 16));
#else
  return reinterpret_cast<V>(__builtin_convertvector(v, VI) << 16);
#endif
}

// Eight floats as eight elements, rounded to nearest, ties to even.
inline V narrow(float, V v) { return v; }
inline Half8 narrow(Fp16, V v) { return __builtin_convertvector(v, Half8); }
inline Bits8 narrow(Bf16, V v) {
#ifdef __AVX512BF16__
  return reinterpret_cast<Bits8>(_mm256_cvtneps_pbh(reinterpret_cast<__m256>(v)));
#else
  const VI bits = reinterpret_cast<VI>(v);
  const VI rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Bits8);  // a NaN stays one
#endif
}

template <class E>
using Eight = decltype(narrow(E{}, V{}));

// The eight elements at p, or the first `left` of them and zeros. `left` is a constant but at a row's end.
template <class E, class Left>
inline V load(const E* p, Left left) {
  if (left == LANES) return widen(*reinterpret_cast<const Eight<E>*>(p));
  Eight<E> some{};
  std::memcpy(&some, p, left * sizeof(E));
  return widen(some);
}

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }

// `past`: around the cache, where a result is too large to be still there when it is read.
template <class E, class Left>
inline void store(E* p, Eight<E> v, Left left, bool past) {
  if (left < LANES) {
    std::memcpy(p, &v, left * sizeof(E));
    return;
  }
#ifdef __AVX__
  if (past) {
    if constexpr (sizeof(v) == 32) _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
    else _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
    return;
  }
#endif
  *reinterpret_cast<Eight<E>*>(p) = v;
}

// Loops over rows are written as lambdas; only where these are inlined does the compiler keep what they capture in
// registers.
#define INLINE __attribute__((always_inline))

// body(c, elements there) for every eight elements of a row.
template <class Body>
INLINE inline void each_eight(int64_t C, const Body& body) {
  int64_t c = 0;
  for (; c + LANES <= C; c += LANES) body(c, std::integral_constant<int64_t, LANES>{});
  if (c < C) body(c, C - c);
}

// The same place of the next token is fetched while this one is computed. Past the end of a tensor this does nothing.
template <class E>
inline void fetch(const E* p) {
  __builtin_prefetch(p, 0, 3);
}

// Zeroed floats on a cache line's boundary.
class Space {
 public:
  explicit Space(int64_t count) : memory(new float[count + LINE / 4]()) {
    const auto at = reinterpret_cast<uintptr_t>(memory.get());
    start = memory.get() + (LINE - at % LINE) % LINE / sizeof(float);
  }
  operator float*() const { return start; }

 private:
  std::unique_ptr<float[]> memory;
  float* start;
};

// What the next block will read, fetched line by line while this one is computed.
class Ahead {
 public:
  template <class E>
  void add(const E* at, int64_t elements) {
    regions[count++] = {reinterpret_cast<const char*>(at), reinterpret_cast<const char*>(at + elements)};
  }
  void next() {
    if (count == 0) return;
    Region& region = regions[count - 1];
    __builtin_prefetch(region.at, 0, 2);
    region.at += LINE;
    if (region.at >= region.end) --count;
  }

 private:
  struct Region {
    const char *at, *end;
  };
  Region regions[4];
  int count = 0;
};

// -- from projected tokens to coefficients, eight tokens at a time ---------------------------------------------------

struct Site {
  int64_t n, K, KP;
  bool constrained, transposed;
  float eps;  // of the kind, see kinds.py
  int64_t iterations;
  const float *alpha, *bias;

  float scale(int64_t k) const { return alpha[k < n ? 0 : k < 2 * n ? 1 : 2]; }
  // Where H_res[i, j] stands among the columns.
  int64_t column(int64_t i, int64_t j) const { return 2 * n + (transposed ? j * n + i : i * n + j); }
};

// Logits may be so far apart that a whole row of exp underflows; 2 * 40 below zero fp32 still has normal numbers.
constexpr float NEAR = 40.0f;

// Sinkhorn-Knopp [9] of eight tokens: logits in, H_res out. `sums` keeps what each pass divided by, `first` the result
// of the first pass.
struct Sinkhorn {
  const Site& site;
  std::vector<V> sums, first;

  explicit Sinkhorn(const Site& s) : site(s), sums(2 * s.iterations * s.n), first(s.n * s.n) {}

  void forward(V* m) {
    if (!near(m)) return each_alone(m, nullptr);
    const int64_t n = site.n;
    for (int64_t j = 0; j < n; ++j) {
      V top = m[j];
      for (int64_t i = 1; i < n; ++i) top = max(top, m[i * n + j]);
      for (int64_t i = 0; i < n; ++i) m[i * n + j] = exp(m[i * n + j] - top);
    }
    for (int64_t k = 0; k < 2 * site.iterations; ++k) {
      const int64_t line = k % 2 ? n : 1, step = k % 2 ? 1 : n;
      for (int64_t a = 0; a < n; ++a) {
        V total = all(k ? site.eps : 0.0f);
        for (int64_t b = 0; b < n; ++b) total += m[a * line + b * step];
        const V inverse = 1.0f / total;
        for (int64_t b = 0; b < n; ++b) m[a * line + b * step] *= inverse;
        sums[k * n + a] = total;
      }
      if (k == 0 && site.eps > 0) {
        std::copy(m, m + n * n, first.begin());
        for (int64_t e = 0; e < n * n; ++e) m[e] += site.eps;
      }
    }
  }

  // m: logits; g: the gradient of H_res in, of the logits out. That of the iterations as executed.
  void backward(V* m, V* g) {
    if (!near(m)) return each_alone(m, g);
    forward(m);
    const int64_t n = site.n;
    for (int64_t e = 0; e < n * n; ++e) g[e] *= m[e];  // with respect to the logarithm
    for (int64_t k = 2 * site.iterations - 1; k >= 0; --k) {
      const int64_t line = k % 2 ? n : 1, step = k % 2 ? 1 : n;
      for (int64_t a = 0; a < n; ++a) {
        V total = V{};
        for (int64_t b = 0; b < n; ++b) total += g[a * line + b * step];
        for (int64_t b = 0; b < n; ++b) {
          const int64_t e = a * line + b * step;
          g[e] -= m[e] * total;
          m[e] *= sums[k * n + a];  // as it was before this pass
        }
      }
      if (k == 1 && site.eps > 0) {
        for (int64_t e = 0; e < n * n; ++e) {
          m[e] = first[e];
          g[e] *= m[e] / (m[e] + site.eps);
        }
      }
    }
  }

 private:
  bool near(const V* m) const {
    if (site.eps > 0) return true;  // what eps was added to can't underflow
    V low = m[0], high = m[0];
    for (int64_t e = 1; e < site.n * site.n; ++e) low = min(low, m[e]), high = max(high, m[e]);
    const V apart = high - low;
    for (int l = 0; l < LANES; ++l)
      if (!(apart[l] <= NEAR)) return false;
    return true;
  }

  // Logits far apart, one token after the other: on logarithms, in fp64. With `g` also the gradient.
  void each_alone(V* m, V* g) const {
    const int64_t n = site.n, passes = 2 * site.iterations;
    std::vector<double> log_m(n * n), kept(passes * n), q(n * n);
    for (int l = 0; l < LANES; ++l) {
      for (int64_t e = 0; e < n * n; ++e) log_m[e] = m[e][l];
      for (int64_t k = 0; k < passes; ++k) {
        const int64_t line = k % 2 ? n : 1, step = k % 2 ? 1 : n;
        for (int64_t a = 0; a < n; ++a) {
          double top = log_m[a * line], total = 0;
          for (int64_t b = 1; b < n; ++b) top = std::max(top, log_m[a * line + b * step]);
          for (int64_t b = 0; b < n; ++b) total += std::exp(log_m[a * line + b * step] - top);
          kept[k * n + a] = std::log(total) + top;
          for (int64_t b = 0; b < n; ++b) log_m[a * line + b * step] -= kept[k * n + a];
        }
      }
      for (int64_t e = 0; e < n * n; ++e) m[e][l] = std::exp(log_m[e]);
      if (!g) continue;
      for (int64_t e = 0; e < n * n; ++e) q[e] = g[e][l] * std::exp(log_m[e]);
      for (int64_t k = passes - 1; k >= 0; --k) {
        const int64_t line = k % 2 ? n : 1, step = k % 2 ? 1 : n;
        for (int64_t a = 0; a < n; ++a) {
          double total = 0;
          for (int64_t b = 0; b < n; ++b) total += q[a * line + b * step];
          for (int64_t b = 0; b < n; ++b) {
            const int64_t e = a * line + b * step;
            q[e] -= std::exp(log_m[e]) * total;
            log_m[e] += kept[k * n + a];
          }
        }
      }
      for (int64_t e = 0; e < n * n; ++e) g[e][l] = q[e];
    }
  }
};

// Eight tokens' rows of `columns` numbers as vectors over tokens, and back; `real` of them are there.
void transpose_in(V* to, const float* from, int64_t columns, int64_t stride, int64_t real) {
  for (int64_t k = 0; k < columns; ++k)
    for (int l = 0; l < LANES; ++l) to[k][l] = l < real ? from[l * stride + k] : 0.0f;
}

void transpose_out(float* to, const V* from, int64_t columns, int64_t stride, int64_t real) {
  for (int64_t l = 0; l < real; ++l)
    for (int64_t k = 0; k < columns; ++k) to[l * stride + k] = from[k][l];
}

// Vectors of a thread's eight tokens; columns [pre | post | res].
struct Octet {
  const Site& site;
  Sinkhorn sinkhorn;
  std::vector<V> raw, h, g, m, q;

  explicit Octet(const Site& s)
      : site(s), sinkhorn(s), raw(s.K), h(s.K), g(s.K), m(s.n * s.n), q(s.n * s.n) {}

  // H_pre, H_post and H_res [i, j] from `raw` [17, 18, 19].
  void forward() {
    const int64_t n = site.n;
    for (int64_t k = 0; k < (site.constrained ? 2 * n : site.K); ++k) h[k] = of_column(k);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        if (site.constrained) m[i * n + j] = logit(site.column(i, j));
        else m[i * n + j] = h[2 * n + i * n + j];
      }
    if (site.constrained) sinkhorn.forward(m.data());
  }

  // H_pre into `h`; with the gradients of H_pre, H_post and H_res in `g` [pre | post | res as i, j], those of
  // s = alpha raw + bias into `g`, in the order of the columns, and `by_alpha` += g ds/dalpha.
  void backward(V* by_alpha) {
    const int64_t n = site.n;
    if (!site.constrained) {
      for (int64_t k = 0; k < site.K; ++k) {
        const V squashed = tanh(raw[k]);
        by_alpha[k < n ? 0 : k < 2 * n ? 1 : 2] += g[k] * squashed;
        if (k < n) h[k] = site.bias[k] + site.alpha[0] * squashed;
      }
      return;
    }
    for (int64_t k = 0; k < n; ++k) {
      const V a = sigmoid(logit(k)), b = sigmoid(logit(n + k));
      h[k] = a + site.eps;
      g[k] *= a * (1.0f - a);
      g[n + k] *= 2.0f * b * (1.0f - b);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) m[i * n + j] = logit(site.column(i, j)), q[i * n + j] = g[2 * n + i * n + j];
    sinkhorn.backward(m.data(), q.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) g[site.column(i, j)] = q[i * n + j];
    for (int64_t k = 0; k < site.K; ++k) by_alpha[k < n ? 0 : k < 2 * n ? 1 : 2] += g[k] * raw[k];
  }

  // From the gradient of s to that of raw.
  V of_raw(int64_t k) const {
    if (site.constrained) return site.scale(k) * g[k];
    const V squashed = tanh(raw[k]);
    return site.scale(k) * g[k] * (1.0f - squashed * squashed);
  }

 private:
  V logit(int64_t k) const { return site.scale(k) * raw[k] + site.bias[k]; }

  V of_column(int64_t k) const {
    if (!site.constrained) return site.bias[k] + site.scale(k) * tanh(raw[k]);
    return k < site.n ? sigmoid(logit(k)) + site.eps : 2.0f * sigmoid(logit(k));
  }
};

// -- the three products with phi --------------------------------------------------------------------------------------

// Long sums are made of short ones, which keeps rounding errors from adding up.
inline void add(float* p, V v) { store(p, load(p) + v); }

// product (TOKENS, KP) += x (TOKENS, count) phi (count, KP), for 8 GROUPS columns.
template <int TOKENS, int GROUPS>
void project_columns(const float* x, const float* phi, int64_t KP, int64_t count, float* product, Ahead& ahead) {
  V acc[TOKENS][GROUPS] = {};
  for (int64_t c = 0; c < count; ++c) {
    V w[GROUPS];
    for (int g = 0; g < GROUPS; ++g) w[g] = load(phi + c * KP + g * LANES);
    for (int t = 0; t < TOKENS; ++t) {
      const V value = all(x[t * CHUNK + c]);
      for (int g = 0; g < GROUPS; ++g) acc[t][g] += value * w[g];
    }
    ahead.next();
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int g = 0; g < GROUPS; ++g) add(product + t * KP + g * LANES, acc[t][g]);
}

// Rows of x lie CHUNK apart.
template <int TOKENS>
void project(const float* x, const float* phi, int64_t KP, int64_t count, float* product, Ahead& ahead) {
  int64_t k = 0;
  for (; k + 3 * LANES <= KP; k += 3 * LANES)
    project_columns<TOKENS, 3>(x, phi + k, KP, count, product + k, ahead);
  if (KP - k == 2 * LANES) project_columns<TOKENS, 2>(x, phi + k, KP, count, product + k, ahead);
  if (KP - k == LANES) project_columns<TOKENS, 1>(x, phi + k, KP, count, product + k, ahead);
}

// out (TOKENS, PANEL) = g (TOKENS, KP) panel (K, PANEL).
template <int TOKENS>
void project_back(const float* g, int64_t KP, const float* panel, int64_t K, float* out) {
  V acc[TOKENS][VECTORS] = {};
  for (int64_t k = 0; k < K; ++k) {
    V w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) w[v] = load(panel + k * PANEL + v * LANES);
    for (int t = 0; t < TOKENS; ++t) {
      const V value = all(g[t * KP + k]);
      for (int v = 0; v < VECTORS; ++v) acc[t][v] += value * w[v];
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int v = 0; v < VECTORS; ++v) store(out + t * PANEL + v * LANES, acc[t][v]);
}

// panel (KP, PANEL) += g^T (KP, tokens) x (tokens, PANEL).
void outer(const float* g, int64_t KP, const float* x, int64_t tokens, float* panel, Ahead& ahead) {
  for (int64_t k = 0; k < KP; k += LANES) {
    V acc[LANES][VECTORS] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      V row[VECTORS];
      for (int v = 0; v < VECTORS; ++v) row[v] = load(x + t * PANEL + v * LANES);
      for (int q = 0; q < LANES; ++q) {
        const V value = all(g[t * KP + k + q]);
        for (int v = 0; v < VECTORS; ++v) acc[q][v] += value * row[v];
      }
      ahead.next();
    }
    for (int q = 0; q < LANES; ++q)
      for (int v = 0; v < VECTORS; ++v) add(panel + (k + q) * PANEL + v * LANES, acc[q][v]);
  }
}

// -- the mixes of one token. N: the number of streams, where the compiler should know it; 0 otherwise ----------------

// What one site hands on: X' = H_res X + H_post y.
template <class E, class D>
struct Mix {
  const E* X;
  const D* y;
  const float *h_post, *h_res;
  int64_t rows, M, C;  // X' has `rows` streams, X has M

  Mix at(int64_t t) const { return {X + t * M * C, y + t * C, h_post + t * rows, h_res + t * rows * M, rows, M, C}; }
};

// X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y, into `out`, and with `kept` also as floats, rounded as in `out`.
template <int N, class E, class D>
void mix_out(const Mix<E, D>& token, E* out, float* kept, bool past) {
  const auto [X, y, h_post, h_res, given_rows, given_M, C] = token;
  const int64_t rows = N ? N : given_rows, M = N ? N : given_M;
  each_eight(C, [&, X = X, y = y, h_post = h_post, h_res = h_res, C = C](int64_t c, auto left) INLINE {
    V x[N ? N : MOST];
    for (int64_t j = 0; j < M; ++j) {
      x[j] = load(X + j * C + c, left);
      fetch(X + (M + j) * C + c);
    }
    const V from_y = load(y + c, left);
    for (int64_t i = 0; i < rows; ++i) {
      V mixed = h_post[i] * from_y;
      for (int64_t j = 0; j < M; ++j) mixed += h_res[i * M + j] * x[j];
      const auto narrowed = narrow(E{}, mixed);
      store(out + i * C + c, narrowed, left, past);
      if (kept) store(kept + i * C + c, widen(narrowed), left, false);
    }
  });
}

// A block's rows by panels: element c of stream j of token l lies at [j, c / PANEL, l, c % PANEL] of (S, W / PANEL, BLOCK,
// PANEL). Rows as they are would lie a multiple of 4 KiB apart for most C, and so all in a few sets of the first cache.
inline int64_t in_panels(int64_t j, int64_t c, int64_t l, int64_t W) {
  return (j * W + c / PANEL * PANEL) * BLOCK + l * PANEL + c % PANEL;
}

// X' of token l of a block again, by panels, and its products with g_u.
template <int N, class E, class D>
void rebuild(const Mix<E, D>& token, const E* g_u, int64_t l, int64_t W, float* panels, float* products) {
  const auto [X, y, h_post, h_res, given_rows, given_M, C] = token;
  const int64_t rows = N ? N : given_rows, M = N ? N : given_M;
  V acc[N ? N : MOST] = {};
  each_eight(C, [&, X = X, y = y, h_post = h_post, h_res = h_res, C = C](int64_t c, auto left) INLINE {
    V x[N ? N : MOST];
    for (int64_t j = 0; j < M; ++j) x[j] = load(X + j * C + c, left);
    const V from_y = load(y + c, left), from_u = load(g_u + c, left);
    for (int64_t i = 0; i < rows; ++i) {
      V mixed = h_post[i] * from_y;
      for (int64_t j = 0; j < M; ++j) mixed += h_res[i * M + j] * x[j];
      mixed = widen(narrow(E{}, mixed));  // as it was stored
      store(panels + in_panels(i, c, l, W), mixed);
      acc[i] += mixed * from_u;
    }
  });
  for (int64_t i = 0; i < rows; ++i) products[i] = sum(acc[i]);
}

// The gradients of the operands of token l of a block from that of X', which is `direct`, or with `panels` the sum of
// both.
template <int N, class E, class D>
void mix_out_backward(const Mix<E, D>& token, const float* panels, int64_t l, const E* direct, E* g_X, D* g_y, float* g_post,
                      float* g_res, bool past) {
  const auto [X, y, h_post, h_res, given_rows, given_M, C] = token;
  const int64_t rows = N ? N : given_rows, M = N ? N : given_M, W = padded(C, PANEL);
  V of_post[N ? N : MOST] = {}, of_res[N ? N * N : MOST * MOST] = {};
  each_eight(C, [&, X = X, y = y, h_post = h_post, h_res = h_res, C = C](int64_t c, auto left) INLINE {
    V to[N ? N : MOST];
    for (int64_t i = 0; i < rows; ++i) {
      to[i] = load(direct + i * C + c, left);
      if (panels) to[i] += load(panels + in_panels(i, c, l, W));
      fetch(direct + (rows + i) * C + c);
    }
    const V from_y = load(y + c, left);
    V to_y = V{};
    for (int64_t i = 0; i < rows; ++i) {
      to_y += h_post[i] * to[i];
      of_post[i] += to[i] * from_y;
    }
    store(g_y + c, narrow(D{}, to_y), left, past);
    for (int64_t j = 0; j < M; ++j) {
      const V x = load(X + j * C + c, left);
      fetch(X + (M + j) * C + c);
      V to_x = V{};
      for (int64_t i = 0; i < rows; ++i) {
        to_x += h_res[i * M + j] * to[i];
        of_res[i * M + j] += to[i] * x;
      }
      store(g_X + j * C + c, narrow(E{}, to_x), left, past);
    }
  });
  for (int64_t i = 0; i < rows; ++i) g_post[i] = sum(of_post[i]);
  for (int64_t e = 0; e < rows * M; ++e) g_res[e] = sum(of_res[e]);
}

// u = sum_j weights[j] X[j].
template <int N, class X, class E>
void mix_in(const X* x, const float* given, int64_t streams, int64_t C, E* u) {
  const int64_t S = N ? N : streams;
  float weights[N ? N : MOST];
  std::copy(given, given + S, weights);
  each_eight(C, [&, x, u, C](int64_t c, auto left) INLINE {
    V total = V{};
    for (int64_t j = 0; j < S; ++j) total += weights[j] * load(x + j * C + c, left);
    store(u + c, narrow(E{}, total), left, false);
  });
}

// The products a . X[j] of one token's streams.
template <int N, class A, class X>
void dots(const A* a, const X* x, int64_t streams, int64_t C, float* out) {
  const int64_t S = N ? N : streams;
  V acc[N ? N : MOST] = {};
  each_eight(C, [&, a, x, C](int64_t c, auto left) INLINE {
    const V value = load(a + c, left);
    for (int64_t j = 0; j < S; ++j) acc[j] += value * load(x + j * C + c, left);
  });
  for (int64_t j = 0; j < S; ++j) out[j] = sum(acc[j]);
}

// Some elements of a row as floats at `to`, and the sum of their squares.
template <class X>
V gather(const X* x, int64_t count, float* to) {
  V squares = V{};
  each_eight(count, [&squares, x, to](int64_t c, auto left) INLINE {
    const V value = load(x + c, left);
    squares += value * value;
    store(to + c, value);
  });
  return squares;
}

// -- work on ranges of tokens -----------------------------------------------------------------------------------------

// body(part, first token, last) for each of `parts` ranges, side by side.
template <class Body>
void parallel(int64_t T, int64_t parts, const Body& body) {
  struct Work {
    const Body& body;
    int64_t T, step;
  } work{body, T, padded((T + parts - 1) / parts, LANES)};
  const auto run = [](int64_t begin, int64_t end, void* given) {
    const Work& w = *static_cast<Work*>(given);
    for (int64_t p = begin; p < end; ++p) w.body(p, std::min(p * w.step, w.T), std::min((p + 1) * w.step, w.T));
  };
  torch_parallel_for(0, parts, 1, run, &work);
}

int64_t parts_of(int64_t T) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return std::max<int64_t>(1, std::min<int64_t>(threads, (T + LANES - 1) / LANES));
}

// Results larger than this go around the cache: half of them would be gone before they are read.
constexpr int64_t LARGE = 4 << 20;

// Whether rows of C elements at p are large together and may be written in whole aligned vectors.
template <class E>
bool goes_past(const E* p, int64_t rows, int64_t C) {
  const auto aligned = [](uintptr_t at) { return at % sizeof(Eight<E>) == 0; };
  return rows * C * static_cast<int64_t>(sizeof(E)) > LARGE && aligned(reinterpret_cast<uintptr_t>(p)) &&
         aligned(C * sizeof(E));
}

// phi (size, K) with its rows padded to KP columns; nothing where they are so already.
Space padded_columns(const float* phi, int64_t size, int64_t K, int64_t KP) {
  Space out(K == KP ? 0 : size * KP);
  for (int64_t c = 0; K != KP && c < size; ++c) std::copy(phi + c * K, phi + (c + 1) * K, out + c * KP);
  return out;
}

// phi by panels of PANEL elements of C: (S, W / PANEL, K, PANEL), W = C padded.
Space panels_of(const float* phi, int64_t S, int64_t C, int64_t K) {
  const int64_t W = padded(C, PANEL);
  Space out(S * W * K);
  for (int64_t j = 0; j < S; ++j)
    for (int64_t c = 0; c < C; ++c) {
      float* to = out + (j * W + c / PANEL * PANEL) * K + c % PANEL;
      for (int64_t k = 0; k < K; ++k) to[k * PANEL] = phi[(j * C + c) * K + k];
    }
  return out;
}

template <class E>
struct Outputs {
  E *state, *u;  // state: X', where there is a site before
  float *h_post, *h_res, *raw, *r;
};

// `pre` of X (T, S, C), or where `mix` is given, of the X' that it makes: `boundary`.
template <int N, class E, class D>
void forward(int64_t T, const E* X, const Mix<E, D>* mix, int64_t S, int64_t C, const Site& site, float eps_norm,
             const float* phi_given, const Outputs<E>& out) {
  const int64_t K = site.K, KP = site.KP, n = site.n, norms = site.constrained ? 1 : n;
  const Space wider = padded_columns(phi_given, S * C, K, KP);
  const float* phi = K == KP ? phi_given : wider;
  const bool past = mix && goes_past(out.state, T * S, C);
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    Octet octet(site);
    const Space state(mix ? LANES * S * C : 0), product(LANES * KP), chunk(LANES * CHUNK);
    for (int64_t t = first; t < last; t += LANES) {
      const int64_t count = std::min<int64_t>(LANES, last - t);
      Ahead ahead;
      if (const int64_t more = std::min<int64_t>(LANES, last - t - LANES); more > 0) {
        if (mix) ahead.add(mix->at(t + LANES).y, more * C), ahead.add(mix->at(t + LANES).X, more * mix->M * C);
        else ahead.add(X + (t + LANES) * S * C, more * S * C);
      }
      if (mix)
        for (int64_t l = 0; l < count; ++l)
          mix_out<N>(mix->at(t + l), out.state + (t + l) * S * C, state + l * S * C, past);
      V squares[LANES][MOST] = {};
      std::fill(product + 0, product + LANES * KP, 0.0f);
      for (int64_t j = 0; j < S; ++j)
        for (int64_t c0 = 0; c0 < C; c0 += CHUNK) {
          const int64_t width = std::min<int64_t>(CHUNK, C - c0);
          for (int64_t l = 0; l < count; ++l) {
            float* to = chunk + l * CHUNK;
            squares[l][j] += mix ? gather(state + (l * S + j) * C + c0, width, to)
                                 : gather(X + ((t + l) * S + j) * C + c0, width, to);
          }
          const float* weights = phi + (j * C + c0) * KP;
          if (count == LANES) project<LANES>(chunk, weights, KP, width, product, ahead);
          else for (int64_t l = 0; l < count; ++l)
            project<1>(chunk + l * CHUNK, weights, KP, width, product + l * KP, ahead);
        }
      for (int64_t l = 0; l < count; ++l) {  // the norm, and its division [14, 15, 16]
        float *r = out.r + (t + l) * norms, of_stream[MOST], total = 0;
        for (int64_t j = 0; j < S; ++j) total += of_stream[j] = sum(squares[l][j]);
        if (site.constrained) r[0] = std::sqrt(total / (S * C) + eps_norm);
        else for (int64_t j = 0; j < n; ++j) r[j] = std::sqrt(of_stream[S == 1 ? 0 : j] / C + eps_norm);
        for (int64_t k = 0; k < K; ++k)
          out.raw[(t + l) * K + k] = product[l * KP + k] / r[site.constrained ? 0 : k % n];
      }
      transpose_in(octet.raw.data(), out.raw + t * K, K, K, count);
      octet.forward();
      transpose_out(out.h_post + t * n, octet.h.data() + n, n, n, count);
      transpose_out(out.h_res + t * n * n, octet.m.data(), n * n, n * n, count);
      for (int64_t l = 0; l < count; ++l) {
        float weights[MOST] = {};
        for (int64_t j = 0; j < n; ++j) weights[S == 1 ? 0 : j] += octet.h[j][l];
        E* u = out.u + (t + l) * C;
        if (mix) mix_in<N>(state + l * S * C, weights, S, C, u);
        else mix_in<N>(X + (t + l) * S * C, weights, S, C, u);
      }
    }
  });
}

template <class E, class D>
struct Gradients {
  const E *g_state, *g_u;  // given
  const float *g_post, *g_res;
  E* g_X;  // made; g_y, g_h_post and g_h_res where there is a site before
  D* g_y;
  float *g_h_post, *g_h_res, *g_phi, *g_alpha, *g_bias;
};

// The gradients of `forward`'s operands. X' is built again instead of kept.
template <int N, class E, class D>
void backward(int64_t T, const E* X, const Mix<E, D>* mix, int64_t S, int64_t C, const Site& site,
              const float* phi_given, const float* raw, const float* r, const Gradients<E, D>& g) {
  const int64_t M = mix ? mix->M : S, W = padded(C, PANEL), K = site.K, KP = site.KP, n = site.n;
  const int64_t norms = site.constrained ? 1 : n, parts = parts_of(T);
  const Space phi = panels_of(phi_given, S, C, K);
  const bool past = goes_past(g.g_X, T * M, C) && (!mix || goes_past(g.g_y, T * M, C));
  // Each part sums what its own tokens give the parameters; the parts are added in order, so that the same inputs on
  // the same number of threads give the same bits.
  std::vector<std::unique_ptr<Space>> of_phi(parts);
  std::vector<float> of_scales(parts * (K + 3));
  parallel(T, parts, [&](int64_t part, int64_t first, int64_t last) {
    of_phi[part] = std::make_unique<Space>(S * W * KP);
    Octet octet(site);
    std::vector<V> by_alpha(3), by_bias(K);
    const Space state(BLOCK * (mix ? S * W : PANEL)), g_state(BLOCK * S * W), g_product(BLOCK * KP);
    alignas(LINE) float back[BLOCK * PANEL];
    for (int64_t t = first; t < last; t += BLOCK) {
      const int64_t count = std::min<int64_t>(BLOCK, last - t);
      Ahead ahead;
      if (const int64_t more = std::min<int64_t>(BLOCK, last - t - BLOCK); more > 0) {
        const int64_t next = t + BLOCK;
        ahead.add(g.g_u + next * C, more * C);
        if (mix) {
          ahead.add(g.g_state + next * S * C, more * S * C);
          ahead.add(mix->at(next).y, more * C);
        }
        ahead.add(X + next * M * C, more * M * C);
      }
      float h_pre[BLOCK][MOST], decay[BLOCK][MOST];
      for (int64_t o = 0; o < count; o += LANES) {
        const int64_t some = std::min<int64_t>(LANES, count - o);
        for (int64_t k = 0; k < n; ++k) octet.g[k] = V{};
        for (int64_t l = 0; l < some; ++l) {
          const E* g_u = g.g_u + (t + o + l) * C;
          float products[MOST];
          if (mix) rebuild<N>(mix->at(t + o + l), g_u, o + l, W, state, products);
          else dots<N>(g_u, X + (t + o + l) * S * C, S, C, products);
          for (int64_t j = 0; j < n; ++j) octet.g[j][l] = products[S == 1 ? 0 : j];
        }
        transpose_in(octet.raw.data(), raw + (t + o) * K, K, K, some);
        transpose_in(octet.g.data() + n, g.g_post + (t + o) * n, n, n, some);
        transpose_in(octet.g.data() + 2 * n, g.g_res + (t + o) * n * n, n * n, n * n, some);
        octet.backward(by_alpha.data());
        for (int64_t k = 0; k < K; ++k) by_bias[k] += octet.g[k];
        for (int64_t l = 0; l < some; ++l)
          for (int64_t j = 0; j < S; ++j) h_pre[o + l][j] = decay[o + l][j] = 0;
        for (int64_t k = 0; k < K; ++k) {
          const V g_raw = octet.of_raw(k), along = g_raw * octet.raw[k];
          for (int64_t l = 0; l < some; ++l) {
            const float norm = r[(t + o + l) * norms + (site.constrained ? 0 : k % n)];
            g_product[(o + l) * KP + k] = g_raw[l] / norm;
            // r depends on x too: d(product / r) holds - raw x / (size r^2), with the size of the mean.
            if (site.constrained)
              for (int64_t j = 0; j < S; ++j) decay[o + l][j] += along[l] / (S * C * norm * norm);
            else decay[o + l][S == 1 ? 0 : k % n] += along[l] / (C * norm * norm);
          }
        }
        for (int64_t l = 0; l < some; ++l)
          for (int64_t j = 0; j < n; ++j) h_pre[o + l][S == 1 ? 0 : j] += octet.h[j][l];
      }
      for (int64_t j = 0; j < S; ++j)
        for (int64_t c0 = 0; c0 < C; c0 += PANEL) {
          const int64_t width = std::min<int64_t>(PANEL, C - c0), at = j * W + c0;
          float* x = mix ? state + at * BLOCK : state;
          if (!mix && width < PANEL) std::fill(x, x + BLOCK * PANEL, 0.0f);
          for (int64_t l = 0; !mix && l < count; ++l)
            gather(X + ((t + l) * S + j) * C + c0, width, x + l * PANEL);
          int64_t l = 0;
          for (; l + LANES <= count; l += LANES)
            project_back<LANES>(g_product + l * KP, KP, phi + at * K, K, back + l * PANEL);
          for (; l < count; ++l) project_back<1>(g_product + l * KP, KP, phi + at * K, K, back + l * PANEL);
          for (l = 0; l < count; ++l) {
            const V from_u = all(h_pre[l][j]), lost = all(decay[l][j]);
            const float *of_raw = back + l * PANEL, *of_x = x + l * PANEL;
            float* to = g_state + at * BLOCK + l * PANEL;
            each_eight(width, [=, g_u = g.g_u + (t + l) * C + c0](int64_t c, auto left) INLINE {
              store(to + c, load(of_raw + c) - lost * load(of_x + c) + from_u * load(g_u + c, left));
            });
          }
          outer(g_product, KP, x, count, *of_phi[part] + at * KP, ahead);
        }
      for (int64_t l = 0; l < count; ++l) {
        const int64_t token = t + l;
        if (mix) {
          mix_out_backward<N>(mix->at(token), g_state, l, g.g_state + token * S * C, g.g_X + token * M * C,
                              g.g_y + token * C, g.g_h_post + token * S, g.g_h_res + token * S * M, past);
          continue;
        }
        for (int64_t j = 0; j < S; ++j) {
          const float* panels = g_state;
          each_eight(C, [=, to = g.g_X + (token * S + j) * C](int64_t c, auto left) INLINE {
            store(to + c, narrow(E{}, load(panels + in_panels(j, c, l, W))), left, past);
          });
        }
      }
    }
    float* scales = of_scales.data() + part * (K + 3);
    for (int64_t k = 0; k < K; ++k) scales[k] = sum(by_bias[k]);
    for (int64_t a = 0; a < 3; ++a) scales[K + a] = sum(by_alpha[a]);
  });
  std::fill(g.g_bias, g.g_bias + K, 0.0f);
  std::fill(g.g_alpha, g.g_alpha + 3, 0.0f);
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t k = 0; k < K; ++k) g.g_bias[k] += of_scales[p * (K + 3) + k];
    for (int64_t a = 0; a < 3; ++a) g.g_alpha[a] += of_scales[p * (K + 3) + K + a];
  }
  parallel(S * C, parts, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = (row / C * W + row % C) / PANEL * PANEL * KP + row % C % PANEL;
      for (int64_t k = 0; k < K; ++k) {
        float total = 0;
        for (int64_t p = 0; p < parts; ++p) total += (*of_phi[p])[at + k * PANEL];
        g.g_phi[row * K + k] = total;
      }
    }
  });
}

template <int N, class E, class D>
void post(int64_t T, const Mix<E, D>& mix, E* out) {
  const bool past = goes_past(out, T * mix.rows, mix.C);
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) mix_out<N>(mix.at(t), out + t * mix.rows * mix.C, nullptr, past);
  });
}

template <int N, class E, class D>
void post_backward(int64_t T, const Mix<E, D>& mix, const E* g_out, E* g_X, D* g_y, float* g_post, float* g_res) {
  const int64_t M = mix.M, rows = mix.rows, C = mix.C;
  const bool past = goes_past(g_X, T * M, C) && goes_past(g_y, T * M, C);
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      mix_out_backward<N>(mix.at(t), nullptr, 0, g_out + t * rows * C, g_X + t * M * C, g_y + t * C, g_post + t * rows,
                          g_res + t * rows * M, past);
  });
}

// -- from types and sizes known at run time to those known to the compiler ---------------------------------------------

enum Type { FP32, BF16, FP16 };

// call(E{}, D{}, N) for the types of streams and branch, which kernels/cpu.py has brought to one of these pairs, and
// for the usual numbers of streams, if X and X' have the same.
template <class Call>
void resolve(int64_t streams, int64_t branch, int64_t rows, int64_t M, const Call& call) {
  const auto with_types = [&](auto n) {
    if (streams == BF16) call(Bf16{}, Bf16{}, n);
    else if (streams == FP16) call(Fp16{}, Fp16{}, n);
    else if (branch == BF16) call(float{}, Bf16{}, n);
    else if (branch == FP16) call(float{}, Fp16{}, n);
    else call(float{}, float{}, n);
  };
  if (rows == 4 && M == 4) with_types(std::integral_constant<int, 4>{});
  else with_types(std::integral_constant<int, 0>{});
}

Site site_of(int64_t n, int64_t constrained, int64_t transposed, double eps, int64_t iterations, const float* alpha,
             const float* bias) {
  const int64_t K = n * n + 2 * n;
  return {n, K, padded(K, LANES), constrained != 0, transposed != 0, static_cast<float>(eps), iterations, alpha, bias};
}

}  // namespace

// -- what kernels/cpu.py calls: contiguous tensors, flat tokens, shapes as in kernels/aten.py --------------------------

extern "C" {

// `pre`, or with y `boundary`.
void mhc_forward(
    int64_t streams, int64_t branch, int64_t T, int64_t C, int64_t M, int64_t n, int64_t constrained,
    int64_t transposed, double eps, int64_t iterations, double eps_norm, const void* X, const void* y,
    const float* h_post_in, const float* h_res_in, void* state, const float* phi, const float* alpha,
    const float* bias, void* u, float* h_post, float* h_res, float* raw, float* r) {
  const Site site = site_of(n, constrained, transposed, eps, iterations, alpha, bias);
  resolve(streams, branch, y ? n : M, M, [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const auto* x = static_cast<const E*>(X);
    const Mix<E, D> mix{x, static_cast<const D*>(y), h_post_in, h_res_in, n, M, C};
    forward<N.value>(T, x, y ? &mix : nullptr, y ? n : M, C, site, static_cast<float>(eps_norm), phi,
                     Outputs<E>{static_cast<E*>(state), static_cast<E*>(u), h_post, h_res, raw, r});
  });
}

// `pre_backward`, or with y `boundary_backward`.
void mhc_backward(
    int64_t streams, int64_t branch, int64_t T, int64_t C, int64_t M, int64_t n, int64_t constrained,
    int64_t transposed, double eps, int64_t iterations, const void* g_state, const void* g_u, const float* g_post,
    const float* g_res, const void* X, const void* y, const float* h_post_in, const float* h_res_in, const float* phi,
    const float* alpha, const float* bias, const float* raw, const float* r, void* g_X, void* g_y, float* g_h_post,
    float* g_h_res, float* g_phi, float* g_alpha, float* g_bias) {
  const Site site = site_of(n, constrained, transposed, eps, iterations, alpha, bias);
  resolve(streams, branch, y ? n : M, M, [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const auto* x = static_cast<const E*>(X);
    const Mix<E, D> mix{x, static_cast<const D*>(y), h_post_in, h_res_in, n, M, C};
    const Gradients<E, D> g{static_cast<const E*>(g_state), static_cast<const E*>(g_u), g_post, g_res,
                            static_cast<E*>(g_X), static_cast<D*>(g_y), g_h_post, g_h_res, g_phi, g_alpha, g_bias};
    backward<N.value>(T, x, y ? &mix : nullptr, y ? n : M, C, site, phi, raw, r, g);
  });
}

void mhc_post(int64_t streams, int64_t branch, int64_t T, int64_t C, int64_t M, int64_t rows, const void* X,
              const void* y, const float* h_post, const float* h_res, void* out) {
  resolve(streams, branch, rows, M, [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const Mix<E, D> mix{static_cast<const E*>(X), static_cast<const D*>(y), h_post, h_res, rows, M, C};
    post<N.value>(T, mix, static_cast<E*>(out));
  });
}

void mhc_post_backward(int64_t streams, int64_t branch, int64_t T, int64_t C, int64_t M, int64_t rows,
                       const void* g_out, const void* X, const void* y, const float* h_post, const float* h_res,
                       void* g_X, void* g_y, float* g_post, float* g_res) {
  resolve(streams, branch, rows, M, [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const Mix<E, D> mix{static_cast<const E*>(X), static_cast<const D*>(y), h_post, h_res, rows, M, C};
    post_backward<N.value>(T, mix, static_cast<const E*>(g_out), static_cast<E*>(g_X), static_cast<D*>(g_y), g_post,
                           g_res);
  });
}

}  // extern "C"
