"""The operators as on a GPU: `ops` with the Triton kernels under them, through autograd, by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_rewrite.kernels import gpu, ops, reference, selection

OPTIONS = ("mhc", 20, 1e-6)


def leaves(given: int, n: int = 4, width: int = 33) -> list[Tensor]:
    """X, y, H_post, H_res, phi, alpha, bias; two leading axes, X transposed in memory."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((given, width), (width,), (n,), (n, n))
    values = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    values[0] = values[0].transpose(0, 1).contiguous().transpose(0, 1)
    parameters = [torch.randn(n * width, n * n + 2 * n, generator=generator) / (n * width) ** 0.5]
    parameters += [torch.tensor([0.7, -0.4, 1.3]), torch.randn(n * n + 2 * n, generator=generator)]
    return [value.requires_grad_() for value in (*values, *parameters)]


@pytest.mark.parametrize("given", [4, 1])
@pytest.mark.parametrize("name", ["pre", "post", "post_collapse", "boundary"])
def test_operators_on_triton(name: str, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "kernels_for", lambda X, y, coefficients: gpu)
    values = leaves(given)
    use = {"pre": [0, 4, 5, 6], "boundary": range(7)}.get(name, range(4))
    options = OPTIONS if name in ("pre", "boundary") else ()
    mine = [values[k] for k in use]
    wide = [value.detach().double().requires_grad_() for value in mine]
    truth = {"post_collapse": lambda *args: reference.post(*args).mean(-2)}.get(name, getattr(reference, name, None))
    want, got = truth(*wide, *options), getattr(ops, name)(*mine, *options)
    want = (want,) if isinstance(want, Tensor) else want
    got = (got,) if isinstance(got, Tensor) else got[: len(want)]
    weights = [torch.randn(w.shape, generator=torch.Generator().manual_seed(k)) for k, w in enumerate(want)]
    got_gradients = torch.autograd.grad(got, mine, weights)
    want_gradients = torch.autograd.grad(want, wide, [w.double() for w in weights])
    for a, b in zip((*got, *got_gradients), (*want, *want_gradients)):
        assert a.shape == b.shape and (a.double() - b).norm() <= 1e-5 * b.norm()
