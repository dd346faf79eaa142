// The operators on CPU tensors in fp32, bf16 and fp16, with their gradients: what kernels/aten.py computes, in as few
// passes over memory as the table of costs allows. Built and called by kernels/cpu.py.
//
// passes.h has the passes over the streams, coefficients.h what mHC and its closest relatives make of a projection.
// `pre` and `boundary` put the two together, block by block; `project`, `read` and their like, which are given their
// coefficients, are the passes alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "coefficients.h"
#include "mixes.h"
#include "passes.h"
#include "vectors.h"

namespace {

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

template <class T>
constexpr Type TYPE = Type::Float;
template <>
constexpr Type TYPE<Bf16> = Type::BFloat16;
template <>
constexpr Type TYPE<Fp16> = Type::Half;

template <class T = float>
T* at(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == TYPE<T>, "An operand of the CPU kernels of mhc_rewrite has another dtype.");
  STD_TORCH_CHECK(tensor.is_contiguous(), "The CPU kernels of mhc_rewrite take contiguous tensors.");
  return static_cast<T*>(tensor.data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<Type> type = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

// What a site before hands on: y, H_post and H_res.
struct Branch {
  const Tensor &y, &h_post, &h_res;

  template <class E, class D>
  Mix<E, D> of(const Tensor& X) const {
    return {at<E>(X), at<D>(y), at(h_post), at(h_res), h_res.size(1), X.size(1), X.size(2)};
  }
  Tensor empty_state(const Tensor& X) const { return empty(X, {X.size(0), h_res.size(1), X.size(2)}); }
};

// call(state, N) for X, or where there is a site before, for the X' that it makes.
template <class Call>
void with_state(const Tensor& X, const Branch* branch, const Call& call) {
  const int64_t S = branch ? branch->h_res.size(1) : X.size(1);
  resolve(X.scalar_type(), (branch ? branch->y : X).scalar_type(), S, X.size(1), [&](auto e, auto d, auto N) {
    using E = decltype(e);
    using D = decltype(d);
    const Mix<E, D> mix = branch ? branch->of<E, D>(X) : Mix<E, D>{};
    call(State<E, D>{X.size(0), S, X.size(2), at<E>(X), branch ? &mix : nullptr}, N);
  });
}

// -- the projection, and what the operators put around it -------------------------------------------------------------

// raw and r; X' into `made`, where there is a site before. next_of(state, N, raw) gives what follows each block.
template <class NextOf>
std::tuple<Tensor, Tensor> run_project(const Tensor& X, const Branch* branch, const Tensor* made, const Tensor& phi,
                                       int64_t norms, double eps, const NextOf& next_of) {
  const Projection by{at(phi), phi.size(1), norms};
  const Tensor raw = empty(phi, {X.size(0), by.K}), r = empty(phi, {X.size(0), norms});
  with_state(X, branch, [&](const auto& of, auto N) {
    using E = typename std::decay_t<decltype(of)>::Streams;
    project<N.value>(of, by, static_cast<float>(eps), made ? at<E>(*made) : nullptr, at(raw), at(r),
                     next_of(of, N, at(raw)));
  });
  return {raw, r};
}

const auto nothing_next = [](const auto&, auto, const float*) -> Next {
  return [](int64_t, int64_t, int64_t, const float*) {};
};

// The gradients of X and phi; those of y, H_post and H_res into `g_branch`, where there is a site before.
std::tuple<Tensor, Tensor> run_project_backward(const Tensor* g_state, const Tensor& g_u, const Tensor& X,
                                                const Branch* branch, const Branch* g_branch, const Tensor& phi,
                                                const Tensor& raw, const Tensor& r, bool products,
                                                const Between& between) {
  const Tensor g_X = empty_like(X), g_phi = empty_like(phi);
  with_state(X, branch, [&](const auto& of, auto N) {
    using E = typename std::decay_t<decltype(of)>::Streams;
    using D = typename std::decay_t<decltype(of)>::Branch;
    Gradients<E, D> g{nullptr, at<E>(g_u), at<E>(g_X), nullptr, nullptr, nullptr, at(g_phi)};
    if (branch) {
      g.g_state = at<E>(*g_state), g.g_y = at<D>(g_branch->y);
      g.g_h_post = at(g_branch->h_post), g.g_h_res = at(g_branch->h_res);
    }
    project_backward<N.value>(of, {at(phi), phi.size(1), r.size(1)}, at(raw), at(r), products, between, g);
  });
  return {g_X, g_phi};
}

// H_pre and the gradient of raw as they are given.
Between given_rows(const Tensor& h_pre, const Tensor& g_raw) {
  const int64_t S = h_pre.size(1), K = g_raw.size(1), KP = padded(K, LANES);
  return [=, h_pre = at(h_pre), g_raw = at(g_raw)](int64_t, int64_t t, int64_t count, Rows& rows) {
    for (int64_t l = 0; l < count; ++l) {
      std::copy(h_pre + (t + l) * S, h_pre + (t + l + 1) * S, rows.h_pre[l]);
      std::copy(g_raw + (t + l) * K, g_raw + (t + l + 1) * K, rows.g_raw + l * KP);
    }
  };
}

struct Parameters {
  const Tensor &phi, &alpha, &bias;
  bool constrained, transposed;
  double eps;
  int64_t iterations;

  Site site() const {
    const int64_t K = phi.size(1), n = std::lround(std::sqrt(static_cast<double>(K + 1))) - 1;
    return {n, K, constrained, transposed, static_cast<float>(eps), iterations, at(alpha), at(bias)};
  }
};

// One for each part of T tokens.
template <class Own>
std::vector<Own> for_parts(int64_t T, const Site& site) {
  std::vector<Own> made;
  const int64_t parts = parts_of(T);
  made.reserve(parts);
  for (int64_t p = 0; p < parts; ++p) made.emplace_back(site);
  return made;
}

using Made = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// `pre`, or with a branch `boundary`, whose X' goes into `made`: a block's coefficients and what it reads follow its
// projection.
Made run_site(const Tensor& X, const Branch* branch, const Tensor* made, const Parameters& given, double eps_norm) {
  const Site site = given.site();
  const int64_t T = X.size(0), C = X.size(2), n = site.n, K = site.K;
  const Tensor u = empty(X, {T, C}), h_post = empty(given.phi, {T, n}), h_res = empty(given.phi, {T, n, n});
  std::vector<Octet> octets = for_parts<Octet>(T, site);
  const auto coefficients_and_read = [&](const auto& of, auto N, const float* raw) -> Next {
    using E = typename std::decay_t<decltype(of)>::Streams;
    return [=, &octets, X = of.X, S = of.S, u = at<E>(u), h_post = at(h_post), h_res = at(h_res)](
               int64_t part, int64_t t, int64_t count, const float* state) {
      Octet& octet = octets[part];
      transpose_in(octet.raw.data(), raw + t * K, K, K, count);
      octet.forward();
      transpose_out(h_post + t * n, octet.h.data() + n, n, n, count);
      transpose_out(h_res + t * n * n, octet.m.data(), n * n, n * n, count);
      for (int64_t l = 0; l < count; ++l) {
        float weights[MOST] = {};
        for (int64_t j = 0; j < n; ++j) weights[S == 1 ? 0 : j] += octet.h[j][l];
        E* to = u + (t + l) * C;
        if (state) mix_in<N.value, false>(state + l * S * C, weights, S, C, to, false);
        else mix_in<N.value, false>(X + (t + l) * S * C, weights, S, C, to, false);
      }
    };
  };
  const auto [raw, r] =
      run_project(X, branch, made, given.phi, site.constrained ? 1 : n, eps_norm, coefficients_and_read);
  return {u, h_post, h_res, raw, r};
}

// `pre_backward`, or with a branch `boundary_backward`, which fills `g_branch` too.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_site_backward(
    const Tensor* g_state, const Tensor& g_u, const Tensor& g_post, const Tensor& g_res, const Tensor& X,
    const Branch* branch, const Branch* g_branch, const Parameters& given, const Tensor& raw, const Tensor& r) {
  const Site site = given.site();
  const int64_t n = site.n, K = site.K, KP = padded(K, LANES), S = branch ? n : X.size(1);
  // What each part's own tokens give alpha and bias; added in order.
  struct Part {
    Octet octet;
    std::vector<V> by_alpha, by_bias;

    explicit Part(const Site& site) : octet(site), by_alpha(3), by_bias(site.K) {}
  };
  std::vector<Part> of_parts = for_parts<Part>(X.size(0), site);
  const auto coefficients = [=, &of_parts, raw = at(raw), g_post = at(g_post), g_res = at(g_res)](
                                int64_t part, int64_t t, int64_t count, Rows& rows) {
    auto& [octet, by_alpha, by_bias] = of_parts[part];
    for (int64_t o = 0; o < count; o += LANES) {
      const int64_t some = std::min<int64_t>(LANES, count - o);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t l = 0; l < LANES; ++l) octet.g[j][l] = l < some ? rows.products[o + l][S == 1 ? 0 : j] : 0.0f;
      transpose_in(octet.raw.data(), raw + (t + o) * K, K, K, some);
      transpose_in(octet.g.data() + n, g_post + (t + o) * n, n, n, some);
      transpose_in(octet.g.data() + 2 * n, g_res + (t + o) * n * n, n * n, n * n, some);
      octet.backward(by_alpha.data());
      for (int64_t k = 0; k < K; ++k) {
        by_bias[k] += octet.g[k];
        octet.g[k] = octet.of_raw(k);
      }
      transpose_out(rows.g_raw + o * KP, octet.g.data(), K, KP, some);
      for (int64_t l = 0; l < some; ++l)
        for (int64_t j = 0; j < n; ++j) rows.h_pre[o + l][S == 1 ? 0 : j] += octet.h[j][l];
    }
  };
  const auto [g_X, g_phi] =
      run_project_backward(g_state, g_u, X, branch, g_branch, given.phi, raw, r, true, coefficients);
  const Tensor g_alpha = empty_like(given.alpha), g_bias = empty_like(given.bias);
  std::fill(at(g_alpha), at(g_alpha) + 3, 0.0f);
  std::fill(at(g_bias), at(g_bias) + K, 0.0f);
  for (const Part& part : of_parts) {
    for (int64_t a = 0; a < 3; ++a) at(g_alpha)[a] += sum(part.by_alpha[a]);
    for (int64_t k = 0; k < K; ++k) at(g_bias)[k] += sum(part.by_bias[k]);
  }
  return {g_X, g_phi, g_alpha, g_bias};
}

Tensor run_products(const Tensor& g_u, const Tensor& X, const Branch* branch) {
  const int64_t S = branch ? branch->h_res.size(1) : X.size(1);
  const Tensor out = empty(X, {X.size(0), S}, Type::Float);
  with_state(X, branch, [&](const auto& of, auto N) {
    products_of_tokens<N.value>(of, at<typename std::decay_t<decltype(of)>::Streams>(g_u), at(out));
  });
  return out;
}

// -- the operators that kernels/cpu.py declares -----------------------------------------------------------------------

namespace operators {

Made pre(const Tensor& X, const Tensor& phi, const Tensor& alpha, const Tensor& bias, bool constrained, bool transposed,
         double eps_kind, int64_t iterations, double eps) {
  return run_site(X, nullptr, nullptr, {phi, alpha, bias, constrained, transposed, eps_kind, iterations}, eps);
}

auto pre_backward(const Tensor& g_u, const Tensor& g_post, const Tensor& g_res, const Tensor& X, const Tensor& phi,
                  const Tensor& alpha, const Tensor& bias, const Tensor& raw, const Tensor& r, bool constrained,
                  bool transposed, double eps_kind, int64_t iterations) {
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  return run_site_backward(nullptr, g_u, g_post, g_res, X, nullptr, nullptr, parameters, raw, r);
}

auto boundary(const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res, const Tensor& phi,
              const Tensor& alpha, const Tensor& bias, bool constrained, bool transposed, double eps_kind,
              int64_t iterations, double eps) {
  const Branch branch{y, h_post, h_res};
  const Tensor state = branch.empty_state(X);
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  return std::tuple_cat(std::make_tuple(state), run_site(X, &branch, &state, parameters, eps));
}

auto boundary_backward(const Tensor& g_state, const Tensor& g_u, const Tensor& g_post, const Tensor& g_res,
                       const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res, const Tensor& phi,
                       const Tensor& alpha, const Tensor& bias, const Tensor& raw, const Tensor& r, bool constrained,
                       bool transposed, double eps_kind, int64_t iterations) {
  const Tensor g_y = empty_like(y), g_h_post = empty_like(h_post), g_h_res = empty_like(h_res);
  const Branch branch{y, h_post, h_res}, g_branch{g_y, g_h_post, g_h_res};
  const Parameters parameters{phi, alpha, bias, constrained, transposed, eps_kind, iterations};
  const auto [g_X, g_phi, g_alpha, g_bias] =
      run_site_backward(&g_state, g_u, g_post, g_res, X, &branch, &g_branch, parameters, raw, r);
  return std::make_tuple(g_X, g_y, g_h_post, g_h_res, g_phi, g_alpha, g_bias);
}

Tensor post(const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res) {
  const Branch branch{y, h_post, h_res};
  const Tensor out = branch.empty_state(X);
  with_state(X, &branch, [&](const auto& of, auto N) {
    mix_tokens<N.value>(of.T, *of.mix, at<typename std::decay_t<decltype(of)>::Streams>(out));
  });
  return out;
}

auto post_backward(const Tensor& g_out, const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res) {
  const Branch branch{y, h_post, h_res};
  const Tensor g_X = empty_like(X), g_y = empty_like(y), g_post = empty_like(h_post), g_res = empty_like(h_res);
  with_state(X, &branch, [&](const auto& of, auto N) {
    using E = typename std::decay_t<decltype(of)>::Streams;
    using D = typename std::decay_t<decltype(of)>::Branch;
    mix_tokens_backward<N.value>(of.T, *of.mix, at<E>(g_out), at<E>(g_X), at<D>(g_y), at(g_post), at(g_res));
  });
  return std::make_tuple(g_X, g_y, g_post, g_res);
}

auto project(const Tensor& X, const Tensor& phi, double eps) {
  return run_project(X, nullptr, nullptr, phi, 1, eps, nothing_next);
}

auto project_backward(const Tensor& g_u, const Tensor& h_pre, const Tensor& g_raw, const Tensor& X, const Tensor& phi,
                      const Tensor& raw, const Tensor& r) {
  const Between rows = given_rows(h_pre, g_raw);
  return run_project_backward(nullptr, g_u, X, nullptr, nullptr, phi, raw, r, false, rows);
}

auto post_project(const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res, const Tensor& phi,
                  double eps) {
  const Branch branch{y, h_post, h_res};
  const Tensor state = branch.empty_state(X);
  return std::tuple_cat(std::make_tuple(state), run_project(X, &branch, &state, phi, 1, eps, nothing_next));
}

auto post_project_backward(const Tensor& g_state, const Tensor& g_u, const Tensor& h_pre, const Tensor& g_raw,
                           const Tensor& X, const Tensor& y, const Tensor& h_post, const Tensor& h_res,
                           const Tensor& phi, const Tensor& raw, const Tensor& r) {
  const Tensor g_y = empty_like(y), g_h_post = empty_like(h_post), g_h_res = empty_like(h_res);
  const Branch branch{y, h_post, h_res}, g_branch{g_y, g_h_post, g_h_res};
  const Between rows = given_rows(h_pre, g_raw);
  const auto [g_X, g_phi] = run_project_backward(&g_state, g_u, X, &branch, &g_branch, phi, raw, r, false, rows);
  return std::make_tuple(g_X, g_y, g_h_post, g_h_res, g_phi);
}

Tensor read(const Tensor& X, const Tensor& h_pre) {
  const Tensor u = empty(X, {X.size(0), X.size(2)});
  with_state(X, nullptr, [&](const auto& of, auto N) {
    read_tokens<N.value>(of, at(h_pre), at<typename std::decay_t<decltype(of)>::Streams>(u));
  });
  return u;
}

Tensor read_products(const Tensor& g_u, const Tensor& X) { return run_products(g_u, X, nullptr); }

Tensor post_read_products(const Tensor& g_u, const Tensor& X, const Tensor& y, const Tensor& h_post,
                          const Tensor& h_res) {
  const Branch branch{y, h_post, h_res};
  return run_products(g_u, X, &branch);
}

}  // namespace operators

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhc_rewrite_cpu, CPU, library) {
  library.impl("pre", TORCH_BOX(&operators::pre));
  library.impl("pre_backward", TORCH_BOX(&operators::pre_backward));
  library.impl("boundary", TORCH_BOX(&operators::boundary));
  library.impl("boundary_backward", TORCH_BOX(&operators::boundary_backward));
  library.impl("post", TORCH_BOX(&operators::post));
  library.impl("post_backward", TORCH_BOX(&operators::post_backward));
  library.impl("project", TORCH_BOX(&operators::project));
  library.impl("project_backward", TORCH_BOX(&operators::project_backward));
  library.impl("post_project", TORCH_BOX(&operators::post_project));
  library.impl("post_project_backward", TORCH_BOX(&operators::post_project_backward));
  library.impl("read", TORCH_BOX(&operators::read));
  library.impl("read_products", TORCH_BOX(&operators::read_products));
  library.impl("post_read_products", TORCH_BOX(&operators::post_read_products));
}
