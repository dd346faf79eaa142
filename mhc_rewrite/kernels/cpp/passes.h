// Passes over the tokens' streams, whatever makes the coefficients: the projection and its gradients, the mixes.
//
// A thread owns a range of tokens and takes them in blocks whose state stays in its second-level cache: it is read from
// memory once, projected, and read again from the cache, while the next block is fetched. All arithmetic is fp32; rows
// in bf16 and fp16 are widened in registers. Vectors of eight floats run along C. Equation numbers: arXiv:2512.24880v2.
//
// Names: T tokens; X holds M streams, n or 1 where all are equal; S streams of the state that is projected; C width;
// K columns of phi, any number, padded to KP; E the streams' element type and D the branch's.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "mixes.h"
#include "products.h"
#include "vectors.h"

namespace {

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

// The state of a site: X (T, S, C), or where `mix` is given the X' that it makes.
template <class E, class D>
struct State {
  using Streams = E;
  using Branch = D;

  int64_t T, S, C;
  const E* X;
  const Mix<E, D>* mix;

  int64_t given() const { return mix ? mix->M : S; }
};

// phi (S C, K), and over what the norm is taken: 1 for all streams together, n for each of them.
struct Projection {
  const float* phi;
  int64_t K, norms;

  int64_t KP() const { return padded(K, LANES); }
  int64_t norm_of(int64_t k) const { return norms == 1 ? 0 : k % norms; }
};

// -- the projection ---------------------------------------------------------------------------------------------------

// phi (size, K) with its rows padded to KP columns; nothing where they are so already.
Space padded_columns(const float* phi, int64_t size, int64_t K, int64_t KP) {
  Space out(K == KP ? 0 : size * KP);
  for (int64_t c = 0; K != KP && c < size; ++c) std::copy(phi + c * K, phi + (c + 1) * K, out + c * KP);
  return out;
}

// What follows the projection of a block of at most LANES tokens: (part, first token, tokens, their X' as floats, which
// is still in the cache, where X' is made).
using Next = std::function<void(int64_t, int64_t, int64_t, const float*)>;

// raw (T, K) and r (T, norms); and X' into `made`, where there is one.
template <int N, class E, class D>
void project(const State<E, D>& of, const Projection& by, float eps, E* made, float* raw, float* r, const Next& next) {
  const auto [T, S, C, X, mix] = of;
  const int64_t K = by.K, KP = by.KP(), norms = by.norms;
  const Space wider = padded_columns(by.phi, S * C, K, KP);
  const float* phi = K == KP ? by.phi : wider;
  const bool past = mix && goes_past(made, T * S, C);
  parallel(T, parts_of(T), [&, T = T, S = S, C = C, X = X, mix = mix](int64_t part, int64_t first, int64_t last) {
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
          mix_out<N>(mix->at(t + l), made + (t + l) * S * C, state + l * S * C, past);
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
          if (count == LANES) project_chunk<LANES>(chunk, weights, KP, width, product, ahead);
          else for (int64_t l = 0; l < count; ++l)
            project_chunk<1>(chunk + l * CHUNK, weights, KP, width, product + l * KP, ahead);
        }
      for (int64_t l = 0; l < count; ++l) {  // the norm, and its division [14, 15, 16]
        float *of_token = r + (t + l) * norms, of_stream[MOST], total = 0;
        for (int64_t j = 0; j < S; ++j) total += of_stream[j] = sum(squares[l][j]);
        if (norms == 1) of_token[0] = std::sqrt(total / (S * C) + eps);
        else for (int64_t j = 0; j < norms; ++j) of_token[j] = std::sqrt(of_stream[S == 1 ? 0 : j] / C + eps);
        for (int64_t k = 0; k < K; ++k) raw[(t + l) * K + k] = product[l * KP + k] / of_token[by.norm_of(k)];
      }
      next(part, t, count, mix ? state + 0 : nullptr);
    }
  });
}

// -- its gradients ----------------------------------------------------------------------------------------------------

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

template <class E, class D>
struct Gradients {
  const E *g_state, *g_u;  // given; g_state where X' was made
  E* g_X;                  // made; g_y, g_h_post and g_h_res where X' was made
  D* g_y;
  float *g_h_post, *g_h_res, *g_phi;
};

// What is known of a block's coefficients.
struct Rows {
  float products[BLOCK][MOST];  // g_u . X[j], where they are needed
  float h_pre[BLOCK][MOST];     // zeros to be filled in, like the gradient of raw, (BLOCK, KP)
  float* g_raw;
};

// What fills in `rows`: (part, first token, tokens, rows).
using Between = std::function<void(int64_t, int64_t, int64_t, Rows&)>;

// From the gradient of raw to that of the product with phi, in place, and what each stream loses: r depends on x too,
// and d(product / r) holds - raw x / (size r^2), with the size of the mean.
void through_norm(int64_t t, int64_t count, int64_t S, int64_t C, const Projection& by, const float* raw,
                  const float* r, float* g_raw, float (*decay)[MOST]) {
  const int64_t K = by.K, KP = by.KP(), norms = by.norms;
  for (int64_t l = 0; l < count; ++l) {
    std::fill(decay[l], decay[l] + S, 0.0f);
    for (int64_t k = 0; k < K; ++k) {
      float& g = g_raw[l * KP + k];
      const float norm = r[(t + l) * norms + by.norm_of(k)], along = g * raw[(t + l) * K + k];
      decay[l][S == 1 ? 0 : by.norm_of(k)] += along / ((norms == 1 ? S * C : C) * norm * norm);
      g /= norm;
    }
    if (norms == 1) std::fill(decay[l], decay[l] + S, decay[l][0]);
  }
}

// The gradients of the operands of `project`, and of what u = sum_j H_pre[j] X[j] reads. X' is built again instead of
// kept. `products`: whether `between` needs them.
template <int N, class E, class D>
void project_backward(const State<E, D>& of, const Projection& by, const float* raw, const float* r, bool products,
                      const Between& between, const Gradients<E, D>& g) {
  const auto [T, S, C, X, mix] = of;
  const int64_t M = of.given(), W = padded(C, PANEL), K = by.K, KP = by.KP(), parts = parts_of(T);
  const Space phi = panels_of(by.phi, S, C, K);
  const bool past = goes_past(g.g_X, T * M, C) && (!mix || goes_past(g.g_y, T * M, C));
  // Each part sums what its own tokens give phi; the parts are added in order, so that the same inputs on the same
  // number of threads give the same bits.
  std::vector<std::unique_ptr<Space>> of_phi(parts);
  parallel(T, parts, [&, S = S, C = C, X = X, mix = mix](int64_t part, int64_t first, int64_t last) {
    of_phi[part] = std::make_unique<Space>(S * W * KP);
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
      Rows rows{};
      rows.g_raw = g_product;
      for (int64_t l = 0; l < count; ++l) {
        const E* g_u = g.g_u + (t + l) * C;
        if (mix && products) rebuild<N, true, true>(mix->at(t + l), g_u, rows.products[l], state, l);
        else if (mix) rebuild<N, false, true>(mix->at(t + l), g_u, rows.products[l], state, l);
        else if (products) dots<N, false>(g_u, X + (t + l) * S * C, S, C, rows.products[l]);
      }
      between(part, t, count, rows);
      float decay[BLOCK][MOST];
      through_norm(t, count, S, C, by, raw, r, g_product, decay);
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
            const V from_u = all(rows.h_pre[l][j]), lost = all(decay[l][j]);
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
          mix_out_backward<N, true>(mix->at(token), g_state, l, g.g_state + token * S * C, g.g_X + token * M * C,
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
  });
  parallel(S * C, parts, [&, C = C](int64_t, int64_t first, int64_t last) {
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

// -- the mixes alone --------------------------------------------------------------------------------------------------

// body(token) for every token, side by side.
template <class Body>
void each_token(int64_t T, const Body& body) {
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) body(t);
  });
}

template <int N, class E, class D>
void mix_tokens(int64_t T, const Mix<E, D>& mix, E* out) {
  const bool past = goes_past(out, T * mix.rows, mix.C);
  each_token(T, [&](int64_t t) { mix_out<N>(mix.at(t), out + t * mix.rows * mix.C, nullptr, past); });
}

template <int N, class E, class D>
void mix_tokens_backward(int64_t T, const Mix<E, D>& mix, const E* g_out, E* g_X, D* g_y, float* g_post,
                         float* g_res) {
  const int64_t M = mix.M, rows = mix.rows, C = mix.C;
  const bool past = goes_past(g_X, T * M, C) && goes_past(g_y, T * M, C);
  each_token(T, [&](int64_t t) {
    mix_out_backward<N, false>(mix.at(t), nullptr, 0, g_out + t * rows * C, g_X + t * M * C, g_y + t * C,
                               g_post + t * rows, g_res + t * rows * M, past);
  });
}

// u = sum_j h_pre[j] X[j] of every token.
template <int N, class E, class D>
void read_tokens(const State<E, D>& of, const float* h_pre, E* u) {
  const auto [T, S, C, X, mix] = of;
  const bool past = goes_past(u, T, C);
  each_token(T, [=, S = S, C = C, X = X](int64_t t) {
    mix_in<N, true>(X + t * S * C, h_pre + t * S, S, C, u + t * C, past);
  });
}

// g_u . X[j] of every token's state.
template <int N, class E, class D>
void products_of_tokens(const State<E, D>& of, const E* g_u, float* products) {
  const auto [T, S, C, X, mix] = of;
  each_token(T, [=, S = S, C = C, X = X, mix = mix](int64_t t) {
    if (mix) rebuild<N, true, false>(mix->at(t), g_u + t * C, products + t * S, nullptr, 0);
    else dots<N, true>(g_u + t * C, X + t * S * C, S, C, products + t * S);
  });
}

}  // namespace
