"""What is measured is what was asked for; the seconds themselves are no test's business."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import HyperConnection, MHCConfig, mhcify
from mhc_rewrite.bench import bench, perturb, saved_bytes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


INPUTS = {"x": torch.randn(3, 8)}


def test_rows() -> None:
    model = Layer()
    before = copy.deepcopy(model.state_dict())
    told: list[str] = []
    costs = bench(model, INPUTS, backends=["eager", "aot_eager"], rounds=1, progress=told.append)
    rows = [(cost.model, cost.backend) for cost in costs]
    assert rows == [(m, b) for b in ("eager", "aot_eager") for m in ("original", "converted")]
    assert all(cost.seconds > 0 and cost.saved > 0 for cost in costs)
    assert [cost.ratio for cost in costs[::2]] == [1.0, 1.0] and all(cost.ratio > 0 for cost in costs)
    assert [cost.first_call > 0 for cost in costs] == [False, False, True, True]
    assert "converting" in told and told[-1].startswith("round 3 of 3")
    # The model itself is neither converted nor trained.
    assert type(model) is Layer and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (
        all(parameter.grad is None for parameter in model.parameters())
        and not torch.compiler.config.force_disable_caches
    )


def test_forward_keeps_nothing() -> None:
    assert [cost.saved for cost in bench(Layer(), INPUTS, training=False, backends=["eager"], rounds=1)] == [0, 0]


def test_saved_bytes_counts_memory_once_and_no_parameters() -> None:
    weight = nn.Linear(8, 8, bias=False)
    x = torch.randn(3, 8, requires_grad=True)

    def step() -> None:
        h = weight(x)  # keeps x, and the weight, which does not count
        (h * h).sum().backward()  # keeps h twice

    assert saved_bytes(step, [weight]) == 2 * 3 * 8 * 4


def test_perturb_moves_every_site_parameter_and_no_other() -> None:
    model = mhcify(Layer(), INPUTS, config=MHCConfig(n_streams=2))
    before = copy.deepcopy(model.state_dict())
    perturb(model)
    own = {f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, HyperConnection) for p in m._parameters}
    assert {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)} == own
    assert len(own) == 6


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_autocast_reaches_the_forward(autocast: torch.dtype | None) -> None:
    seen: set[torch.dtype] = set()

    class Watching(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            out = self.b(x)
            seen.add(out.dtype)
            return x + out

    bench(Watching(), INPUTS, backends=["eager"], rounds=1, autocast=autocast)
    assert (torch.bfloat16 in seen) == (autocast is not None)
