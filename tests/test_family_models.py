"""The relatives of mHC in whole models: the original function and gradients for all at the start, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import connections_by_hand as by_hand
from family import relative
from handmade import BY_NAME
from mhc_rewrite import MHCConfig, mhcify, report
from mhc_rewrite.errors import ConfigError
from test_perturbed import Compared
from test_starts import CURVED, chain, sites

# Every relative on one trunk of each kind, every number of streams that is one of its own somewhere.
PERTURBED = [
    ("identity", "nanogpt", 3), ("identity", "ResNet", 2),
    ("mhc_lite", "nanogpt", 5), ("mhc_lite", "post-norm", 3),
    ("kromhc", "nanogpt", 8), ("kromhc", "encoder-decoder", 2), ("kromhc", "ResNet", 4),
    ("tbp", "nanogpt", 4), ("tbp", "ResNet", 3),
    ("cayley", "nanogpt", 4), ("cayley", "post-norm", 3),
]  # fmt: skip


@pytest.mark.parametrize("connection,name,n", PERTURBED)
def test_equals_hand_written(connection: str, name: str, n: int) -> None:
    compared = Compared(BY_NAME[name], n, connection=connection)
    for train in (False, True):
        compared.train(train).check_preserved()
    compared.perturb()
    for train in (False, True):
        compared.train(train).check_perturbed()


def gradients(connection: str, n: int, steps: int) -> list[list[torch.Tensor]]:
    """Of each mapping's bias, site by site, after so many steps of Adam."""
    model, x = chain(dtype=torch.float32)
    mhcify(model, (x,), n_streams=n, connection=connection)
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam([p for site in sites(model) for p in site.parameters()], 1e-3)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        found = [list(site.bias.grad.abs().split([n, n, len(site.bias) - 2 * n])) for site in sites(model)]
        optimizer.step()
    return found


LEARNING = [
    ("identity", 4), ("mhc_lite", 2), ("mhc_lite", 3), ("kromhc", 4), ("kromhc", 8), ("kromhc", 16),
    ("tbp", 2), ("tbp", 5), ("cayley", 2), ("cayley", 4),
]  # fmt: skip


@pytest.mark.parametrize("connection,n", LEARNING)
def test_every_mapping_has_a_gradient(connection: str, n: int) -> None:
    """From the first step; of two streams that keep their mean, from the second. Not the first and last site."""
    found = gradients(connection, n, steps=1 if n == 2 else 0)[1:-1]
    for number, (pre, post, res) in enumerate(found):
        assert pre.max() > 1e-4 * post.max()
        assert by_hand.COLUMNS[connection](n) == len(res) and (len(res) == 0 or res.max() > 1e-6 * post.max())
        # Later ones are not followed by sites enough that read all digits.
        assert connection != "kromhc" or number > 1 or res.min() > 1e-6 * post.max(), "every factor"


@pytest.mark.parametrize("connection", by_hand.H_RES)
def test_a_trunk_that_is_not_linear(connection: str) -> None:
    model, x = chain(CURVED["norm"])
    want = model(x)
    made = report(mhcify(model, (x,), connection=connection))
    assert "starts with equal streams" in str(made) and {site.config.init for site in sites(model)} == {"equal"}
    assert relative(model(x), want) < 1e-12


@pytest.mark.parametrize("connection,n", [("mhc_lite", 6), ("kromhc", 3), ("kromhc", 12)])
def test_undefined_numbers_of_streams(connection: str, n: int) -> None:
    with pytest.raises(ConfigError, match=rf"connection='{connection}' with n_streams={n}: .*connection='tbp'"):
        MHCConfig(connection=connection, n_streams=n)
    MHCConfig(connection="tbp", n_streams=n)
