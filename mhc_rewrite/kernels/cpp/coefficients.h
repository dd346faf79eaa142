// From projected tokens to H_pre, H_post and H_res, and back with gradients, eight tokens at a time: a vector holds the
// same number of eight tokens. Equation numbers: arXiv:2512.24880v2.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

struct Site {
  int64_t n, K;
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

}  // namespace
