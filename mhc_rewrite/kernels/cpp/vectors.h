// Eight floats as a vector, and how they come from rows of fp32, bf16 and fp16 and go back.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
constexpr int MOST = 16;  // streams
constexpr int LINE = 64;  // bytes of a cache line

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

}  // namespace
