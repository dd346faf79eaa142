"""Models that need what forward hooks collect, on layers that are captured as a part of their parent."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from handmade.common import WIDTH, features
from handmade.found import block
from mhc_rewrite import mhcify, report
from mhc_rewrite.errors import UnsupportedModelError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Encoder(nn.Module):
    """Adds positions made from the tokens before its layers, so its forward holds the stream's first site."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layers = block(), nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Collecting(nn.Module):
    """Reads the encoder's hidden states, which hooks collect, and has further layers or none."""

    def __init__(self, further: bool) -> None:
        super().__init__()
        self.encoder, self.further = Encoder(), nn.ModuleList(Layer() for _ in range(2 * further))
        self.collected: list[Tensor] = []
        for layer in self.encoder.layers:
            layer.register_forward_hook(lambda module, args, result: self.collected.append(result))

    def forward(self, x: Tensor) -> Tensor:
        self.collected.clear()
        self.encoder(x)
        x = torch.stack(self.collected).mean(0).mean(1, keepdim=True)
        for layer in self.further:
            x = layer(x)
        return x


class Sees(Collecting):
    def __deepcopy__(self, memo: dict[int, object]) -> Sees:
        """Hooks are of one object."""
        other = type(self)(len(self.further) > 0).to(next(self.parameters()).dtype)
        other.load_state_dict(self.state_dict())
        return other


@pytest.mark.filterwarnings("ignore:.*has forward hooks")
@pytest.mark.parametrize("further", (True, False))
def test_the_refusal_says_which_hooks_did_not_run(further: bool) -> None:
    torch.manual_seed(0)
    model, x = Sees(further).double().eval(), features(2, 5, WIDTH)
    want = model(x)
    with pytest.raises(
        UnsupportedModelError, match=r"hooks on 'encoder.layers.0' do not run: .* part of 'encoder'"
    ) as told:
        mhcify(model, (x,))
    advice = re.search(r"exclude=\((.*),\)", str(told.value))
    assert (advice is not None) == further
    if advice is not None:
        other = mhcify(copy.deepcopy(model), (x,), exclude=(advice[1].strip("'"),))
        torch.testing.assert_close(other(x), want)
        assert len(report(other).plan.sites) == 4
