// The mixes of one token's streams, forward and backward. N: the number of streams, where the compiler should know it;
// 0 otherwise.

#pragma once

#include "products.h"
#include "vectors.h"

namespace {

// What one site hands on: X' = H_res X + H_post y.
template <class E, class D>
struct Mix {
  const E* X;
  const D* y;
  const float *h_post, *h_res;
  int64_t rows, M, C;  // X' has `rows` streams, X has M

  Mix at(int64_t t) const { return {X + t * M * C, y + t * C, h_post + t * rows, h_res + t * rows * M, rows, M, C}; }
};

// X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y, as it is stored, for every eight elements of a row: at(c, elements
// there) gives what takes (i, X'[i]). With `ahead` the next token's streams are fetched.
template <int N, class E, class D, class At>
INLINE inline void each_mixed(const Mix<E, D>& token, bool ahead, const At& at) {
  const auto [X, y, h_post, h_res, given_rows, given_M, C] = token;
  const int64_t rows = N ? N : given_rows, M = N ? N : given_M;
  each_eight(C, [&, X = X, y = y, h_post = h_post, h_res = h_res, C = C](int64_t c, auto left) INLINE {
    V x[N ? N : MOST];
    for (int64_t j = 0; j < M; ++j) {
      x[j] = load(X + j * C + c, left);
      if (ahead) fetch(X + (M + j) * C + c);
    }
    const V from_y = load(y + c, left);
    const auto take = at(c, left);
    for (int64_t i = 0; i < rows; ++i) {
      V mixed = h_post[i] * from_y;
      for (int64_t j = 0; j < M; ++j) mixed += h_res[i * M + j] * x[j];
      take(i, narrow(E{}, mixed));
    }
  });
}

// X' of one token into `out`, and with `kept` also as floats. (GCC 12: all captured by value is a tenth slower.)
template <int N, class E, class D>
void mix_out(const Mix<E, D>& token, E* out, float* kept, bool past) {
  const int64_t C = token.C;
  each_mixed<N>(token, true, [&, out, C](int64_t c, auto left) INLINE {
    return [&, out, C, c, left](int64_t i, Eight<E> mixed) INLINE {
      store(out + i * C + c, mixed, left, past);
      if (kept) store(kept + i * C + c, widen(mixed), left, false);
    };
  });
}

// A block's rows by panels: element c of stream j of token l lies at [j, c / PANEL, l, c % PANEL] of
// (S, W / PANEL, BLOCK, PANEL). Rows as they are would lie a multiple of 4 KiB apart for most C, and so all in a few
// sets of the first cache.
inline int64_t in_panels(int64_t j, int64_t c, int64_t l, int64_t W) {
  return (j * W + c / PANEL * PANEL) * BLOCK + l * PANEL + c % PANEL;
}

// X' of one token again: with PRODUCTS its products with g_u, with PANELS the rows themselves, as token l of a block.
template <int N, bool PRODUCTS, bool PANELS, class E, class D>
void rebuild(const Mix<E, D>& token, const E* g_u, float* products, float* panels, int64_t l) {
  const int64_t rows = N ? N : token.rows, W = padded(token.C, PANEL);
  V acc[N ? N : MOST] = {};
  each_mixed<N>(token, !PANELS, [=, &acc](int64_t c, auto left) INLINE {
    const V from_u = PRODUCTS ? load(g_u + c, left) : V{};
    return [=, &acc](int64_t i, Eight<E> mixed) INLINE {
      const V value = widen(mixed);
      if (PANELS) store(panels + in_panels(i, c, l, W), value);
      if (PRODUCTS) acc[i] += value * from_u;
    };
  });
  for (int64_t i = 0; PRODUCTS && i < rows; ++i) products[i] = sum(acc[i]);
}

// The gradients of the operands of token l of a block from that of X', which is `direct`, or with PANELS the sum of
// both.
template <int N, bool PANELS, class E, class D>
void mix_out_backward(const Mix<E, D>& token, const float* panels, int64_t l, const E* direct, E* g_X, D* g_y,
                      float* g_post, float* g_res, bool past) {
  const auto [X, y, h_post, h_res, given_rows, given_M, C] = token;
  const int64_t rows = N ? N : given_rows, M = N ? N : given_M, W = padded(C, PANEL);
  V of_post[N ? N : MOST] = {}, of_res[N ? N * N : MOST * MOST] = {};
  each_eight(C, [&, X = X, y = y, h_post = h_post, h_res = h_res, C = C](int64_t c, auto left) INLINE {
    V to[N ? N : MOST];
    for (int64_t i = 0; i < rows; ++i) {
      to[i] = load(direct + i * C + c, left);
      if (PANELS) to[i] += load(panels + in_panels(i, c, l, W));
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

// The next two are steps of a block, whose streams are in the cache, or where `ALONE` passes of their own, which fetch
// the next token's streams.

// u = sum_j weights[j] X[j].
template <int N, bool ALONE, class X, class E>
void mix_in(const X* x, const float* given, int64_t streams, int64_t C, E* u, bool past) {
  const int64_t S = N ? N : streams;
  float weights[N ? N : MOST];
  std::copy(given, given + S, weights);
  each_eight(C, [&, x, u, C](int64_t c, auto left) INLINE {
    V total = V{};
    for (int64_t j = 0; j < S; ++j) {
      total += weights[j] * load(x + j * C + c, left);
      if (ALONE) fetch(x + (S + j) * C + c);
    }
    store(u + c, narrow(E{}, total), left, ALONE && past);
  });
}

// The products a . X[j] of one token's streams.
template <int N, bool ALONE, class A, class X>
void dots(const A* a, const X* x, int64_t streams, int64_t C, float* out) {
  const int64_t S = N ? N : streams;
  V acc[N ? N : MOST] = {};
  each_eight(C, [&, a, x, C](int64_t c, auto left) INLINE {
    const V value = load(a + c, left);
    for (int64_t j = 0; j < S; ++j) {
      acc[j] += value * load(x + j * C + c, left);
      if (ALONE) fetch(x + (S + j) * C + c);
    }
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

}  // namespace
