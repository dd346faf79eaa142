// The three products with phi: the projection, its gradient towards the state, and its gradient towards phi.

#pragma once

#include "vectors.h"

namespace {

constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;  // elements of C that the gradient of the projection takes at once
constexpr int CHUNK = 128;              // elements of C that the projection takes at once
constexpr int BLOCK = 16;               // tokens of a block of the backward; LANES are one of the forward

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
void project_chunk(const float* x, const float* phi, int64_t KP, int64_t count, float* product, Ahead& ahead) {
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

}  // namespace
