"""What the operators with given coefficients move, counted as in test_bytes.py, is what docs/kernels.md says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from traffic import counted

from mhc_rewrite.kernels import gpu

TOKENS, WIDTH, EPS = 67, 131, 1e-6


class Moves(NamedTuple):
    """A launch, and a token's rows of C elements that it reads and writes."""

    kernel: str
    read: int
    written: int


def in_the_table(n: int, m: int, columns: int) -> dict[str, list[Moves]]:
    """`m` streams are given; without columns nothing is projected."""

    def projected(streams: int) -> list[Moves]:
        return [Moves("_project_part_kernel", streams, 0), Moves("_norm_kernel", 0, 0)] if columns else []

    def gradient(of_tokens: list[Moves], read: int) -> list[Moves]:
        if not columns:
            return of_tokens
        return [Moves("_product_gradient_kernel", 0, 0), *of_tokens, Moves("_parameters_kernel", read, 0)]

    unmix = Moves("_post_backward_kernel", n + m + 1, m + 1)
    return {
        "project": projected(m),
        "read": [Moves("_post_forward_kernel", m, 1)],
        "read_products": [Moves("_dots_kernel", m + 1, 0)],
        "project_backward": gradient([Moves("_state_kernel", m + 1 if columns else 1, m)], m),
        "post_project": [Moves("_post_forward_kernel", m + 1, n), *projected(n)],
        "post_read_products": [Moves("_dots_kernel", m + 2, 0), Moves("_products_kernel", 0, 0)],
        "post_project_backward": gradient([Moves("_state_kernel", n + 1, n), unmix], m + 1),
    }


def calls(n: int, m: int, columns: int) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    X, h_pre, phi = random(TOKENS, m, WIDTH), random(TOKENS, m), random(m * WIDTH, columns)
    mix = random(TOKENS, WIDTH), random(TOKENS, n), random(TOKENS, n, m)
    g_u, g_raw, raw, r = random(TOKENS, WIDTH), random(TOKENS, columns), random(TOKENS, columns), torch.ones(TOKENS, 1)
    g_state, made_pre, made_phi = random(TOKENS, n, WIDTH), random(TOKENS, n), random(n * WIDTH, columns)
    return {
        "project": lambda: gpu.project(X, phi, EPS),
        "read": lambda: gpu.read(X, h_pre),
        "read_products": lambda: gpu.read_products(g_u, X),
        "project_backward": lambda: gpu.project_backward(g_u, h_pre, g_raw, X, phi, raw, r),
        "post_project": lambda: gpu.post_project(X, *mix, made_phi, EPS),
        "post_read_products": lambda: gpu.post_read_products(g_u, X, *mix),
        "post_project_backward": lambda: gpu.post_project_backward(
            g_state, g_u, made_pre, g_raw, X, *mix, made_phi, raw, r
        ),
    }


@pytest.mark.parametrize("n,m,columns", [(4, 4, 14), (3, 1, 7), (3, 3, 0)])
def test_moves_what_the_table_says(n: int, m: int, columns: int) -> None:
    run, table = calls(n, m, columns), in_the_table(n, m, columns)
    for name, expected in table.items():
        with counted() as launches:
            run[name]()
        found = []
        for launch in launches:
            streams = [moved for moved in launch.moved.values() if (moved.shape[0], moved.shape[-1]) == (TOKENS, WIDTH)]
            fetched, written, again = (
                sum(moved.per_token(what, TOKENS) for moved in streams) for what in ("fetched", "written", "rewritten")
            )
            assert fetched % WIDTH == written % WIDTH == again == 0, name
            found.append(Moves(launch.kernel, fetched // WIDTH, written // WIDTH))
        assert found == expected, name
