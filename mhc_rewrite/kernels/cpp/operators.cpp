// The operators on CPU tensors in fp32, bf16 and fp16, with their gradients: what kernels/aten.py computes, in as few
// passes over memory as the table of costs allows. Built and called by kernels/cpu.py.
//
// A thread owns a range of tokens and takes them in blocks whose state stays in its second-level cache: it is read from
// memory once, projected, and read again from the cache, while the next block is fetched. All arithmetic is fp32; rows
// in bf16 and fp16 are widened in registers. Vectors of eight floats run along C, but where coefficients are made.
// Equation numbers: arXiv:2512.24880v2.
//
// Names: T tokens; X holds M streams, n or 1 where all are equal; S streams of the state that is projected; C width;
// K = n^2 + 2n columns, padded to KP; E the streams' element type and D the branch's.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <vector>

#include "coefficients.h"
#include "mixes.h"
#include "products.h"
#include "vectors.h"

namespace {

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
void mix_tokens(int64_t T, const Mix<E, D>& mix, E* out) {
  const bool past = goes_past(out, T * mix.rows, mix.C);
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) mix_out<N>(mix.at(t), out + t * mix.rows * mix.C, nullptr, past);
  });
}

template <int N, class E, class D>
void mix_tokens_backward(int64_t T, const Mix<E, D>& mix, const E* g_out, E* g_X, D* g_y, float* g_post,
                         float* g_res) {
  const int64_t M = mix.M, rows = mix.rows, C = mix.C;
  const bool past = goes_past(g_X, T * M, C) && goes_past(g_y, T * M, C);
  parallel(T, parts_of(T), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      mix_out_backward<N>(mix.at(t), nullptr, 0, g_out + t * rows * C, g_X + t * M * C, g_y + t * C, g_post + t * rows,
                          g_res + t * rows * M, past);
  });
}

// -- from types and sizes known at run time to those known to the compiler --------------------------------------------

using torch::stable::empty_like;
using torch::stable::Tensor;
using Type = torch::headeronly::ScalarType;

// call(E{}, D{}, N) for the types of streams and branch, which kernels/cpu.py has brought to one of these pairs, and
// for the usual numbers of streams, if X and X' have the same.
template <class Call>
void resolve(Type streams, Type branch, int64_t rows, int64_t M, const Call& call) {
  const auto with_types = [&](auto n) {
    if (streams == Type::BFloat16) call(Bf16{}, Bf16{}, n);
    else if (streams == Type::Half) call(Fp16{}, Fp16{}, n);
    else if (branch == Type::BFloat16) call(float{}, Bf16{}, n);
    else if (branch == Type::Half) call(float{}, Fp16{}, n);
    else call(float{}, float{}, n);
  };
  if (rows == 4 && M == 4) with_types(std::integral_constant<int, 4>{});
  else with_types(std::integral_constant<int, 0>{});
}

template <class T = float>
T* at(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "The CPU kernels of mhc_rewrite take contiguous tensors.");
  return static_cast<T*>(tensor.data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
}

// What a site before hands on: y, H_post and H_res.
struct Branch {
  const Tensor &y, &h_post, &h_res;

  template <class E, class D>
  Mix<E, D> of(const Tensor& X) const {
    return {at<E>(X), at<D>(y), at(h_post), at(h_res), h_res.size(1), X.size(1), X.size(2)};
  }
};

struct Parameters {
  const Tensor &phi, &alpha, &bias;
  bool constrained, transposed;
  double eps;
  int64_t iterations;

  Site site() const {
    const int64_t K = phi.size(1), n = std::lround(std::sqrt(static_cast<double>(K + 1))) - 1;
    return {n, K, padded(K, LANES), constrained, transposed, static_cast<float>(eps), iterations, at(alpha), at(bias)};
  }
};

using Made = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// `pre`, or with a branch `boundary`, whose X' goes into `state`.
Made run_forward(const Tensor& X, const Branch* branch, const Tensor* state, const Parameters& given, double eps_norm) {
  const Site site = given.site();
  const int64_t T = X.size(0), C = X.size(2), n = site.n, S = branch ? n : X.size(1);
  const Tensor u = empty(X, {T, C}), h_post = empty(given.phi, {T, n}), h_res = empty(given.phi, {T, n, n}),
               raw = empty(given.phi, {T, site.K}), r = empty(given.phi, {T, site.constrained ? 1 : n});
  resolve(X.scalar_type(), (branch ? branch->y : X).scalar_type(), S, X.size(1), [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const Mix<E, D> mix = branch ? branch->of<E, D>(X) : Mix<E, D>{};
    forward<N.value>(T, at<E>(X), branch ? &mix : nullptr, S, C, site, static_cast<float>(eps_norm), at(given.phi),
                     Outputs<E>{state ? at<E>(*state) : nullptr, at<E>(u), at(h_post), at(h_res), at(raw), at(r)});
  });
  return {u, h_post, h_res, raw, r};
}

// `pre_backward`, or with a branch `boundary_backward`, which fills g_y, g_h_post and g_h_res too.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(
    const Tensor* g_state, const Tensor& g_u, const Tensor& g_post, const Tensor& g_res, const Tensor& X,
    const Branch* branch, const Branch* g_branch, const Parameters& given, const Tensor& raw, const Tensor& r) {
  const Site site = given.site();
  const Tensor g_X = empty_like(X), g_phi = empty_like(given.phi), g_alpha = empty_like(given.alpha),
               g_bias = empty_like(given.bias);
  const int64_t S = branch ? site.n : X.size(1);
  resolve(X.scalar_type(), (branch ? branch->y : X).scalar_type(), S, X.size(1), [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const Mix<E, D> mix = branch ? branch->of<E, D>(X) : Mix<E, D>{};
    Gradients<E, D> g{nullptr, at<E>(g_u), at(g_post), at(g_res), at<E>(g_X), nullptr, nullptr, nullptr,
                      at(g_phi), at(g_alpha), at(g_bias)};
    if (branch) {
      g.g_state = at<E>(*g_state), g.g_y = at<D>(g_branch->y);
      g.g_h_post = at(g_branch->h_post), g.g_h_res = at(g_branch->h_res);
    }
    backward<N.value>(X.size(0), at<E>(X), branch ? &mix : nullptr, S, X.size(2), site, at(given.phi), at(raw), at(r),
                      g);
  });
  return {g_X, g_phi, g_alpha, g_bias};
}

// -- the operators that kernels/cpu.py declares -----------------------------------------------------------------------

Made pre(const Tensor& X, const Tensor& phi, const Tensor& alpha, const Tensor& bias, bool constrained, bool transposed,
         double eps_kind, int64_t iterations, double eps) {
  return run_forward(X, nullptr, nullptr, {phi, alpha, bias, constrained, transposed, eps_kind, iterations}, eps);
}

auto pre_backward(const Tensor& g_u, const Tensor& g_post, const Tensor& g_res, const Tensor& X, const Tensor& phi,
                  const Tensor& alpha, const Tensor& bias, const Tensor& raw, const Tensor& r, bool constrained,
                  bool transposed, double eps_kind, int64_t iterations) {
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  return run_backward(nullptr, g_u, g_post, g_res, X, nullptr, nullptr, parameters, raw, r);
}

auto boundary(const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res, const Tensor& phi,
              const Tensor& alpha, const Tensor& bias, bool constrained, bool transposed, double eps_kind,
              int64_t iterations, double eps) {
  const Branch branch{y, h_post, h_res};
  const Tensor state = empty(X, {X.size(0), h_res.size(1), X.size(2)});
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  return std::tuple_cat(std::make_tuple(state), run_forward(X, &branch, &state, parameters, eps));
}

auto boundary_backward(const Tensor& g_state, const Tensor& g_u, const Tensor& g_post, const Tensor& g_res,
                       const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res, const Tensor& phi,
                       const Tensor& alpha, const Tensor& bias, const Tensor& raw, const Tensor& r, bool constrained,
                       bool transposed, double eps_kind, int64_t iterations) {
  const Tensor g_y = empty_like(y), g_h_post = empty_like(h_post), g_h_res = empty_like(h_res);
  const Branch branch{y, h_post, h_res}, g_branch{g_y, g_h_post, g_h_res};
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  const auto [g_X, g_phi, g_alpha, g_bias] =
      run_backward(&g_state, g_u, g_post, g_res, X, &branch, &g_branch, parameters, raw, r);
  return std::make_tuple(g_X, g_y, g_h_post, g_h_res, g_phi, g_alpha, g_bias);
}

Tensor post(const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res) {
  const int64_t rows = h_res.size(1);
  const Branch branch{y, h_post, h_res};
  const Tensor out = empty(X, {X.size(0), rows, X.size(2)});
  resolve(X.scalar_type(), y.scalar_type(), rows, X.size(1), [&](auto e, auto d, auto N) {
    using E = decltype(e);
    mix_tokens<N.value>(X.size(0), branch.of<E, decltype(d)>(X), at<E>(out));
  });
  return out;
}

auto post_backward(const Tensor& g_out, const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res) {
  const Branch branch{y, h_post, h_res};
  const Tensor g_X = empty_like(X), g_y = empty_like(y), g_post = empty_like(h_post), g_res = empty_like(h_res);
  resolve(X.scalar_type(), y.scalar_type(), h_res.size(1), X.size(1), [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    mix_tokens_backward<N.value>(X.size(0), branch.of<E, D>(X), at<E>(g_out), at<E>(g_X), at<D>(g_y), at(g_post),
                                 at(g_res));
  });
  return std::make_tuple(g_X, g_y, g_post, g_res);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhc_rewrite_cpu, CPU, library) {
  library.impl("pre", TORCH_BOX(&pre));
  library.impl("pre_backward", TORCH_BOX(&pre_backward));
  library.impl("boundary", TORCH_BOX(&boundary));
  library.impl("boundary_backward", TORCH_BOX(&boundary_backward));
  library.impl("post", TORCH_BOX(&post));
  library.impl("post_backward", TORCH_BOX(&post_backward));
}
