"""What a forward's Python reads is not frozen into its capture.

Layers differ in it, and it changes after the conversion: either way the converted model does what an independent
n-stream model does, or the conversion is refused by name. Each case is a factor of a block's branch, and a change.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import os
import random
import secrets
import sys
import threading
import time
import types
import weakref
from array import array
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, report
from mhc_rewrite.errors import CaptureError
from oracle import Streams, perturb

WIDTH, N, LAYERS = 8, 3, 3
THIS = sys.modules[__name__]


@dataclasses.dataclass
class Config:
    p: float = 0.5
    flag: bool = True
    inner: Any = None


class Slotted:
    __slots__ = ("p",)

    def __init__(self, p: float) -> None:
        self.p = p


class Delegating:
    """Attributes out of a dict of its own."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


class Mapping(dict):
    """A dict whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Kind(enum.Enum):
    ONE, TWO = 1.0, 2.0


class Constants:
    p = 0.5


Pair = namedtuple("Pair", "p q")
NUMBER, FLAG = 0.5, True
NUMBERS, TABLE, SETTINGS = [0.5], {"p": 0.5, "q": {"r": 0.5}}, Config()
CONTEXT, LOCAL, NET = contextvars.ContextVar("p", default=0.5), threading.local(), nn.Sequential(nn.Dropout(0.4))
LOCAL.p = 0.5
NAMESPACE, ARRAY = types.SimpleNamespace(p=0.5), np.array([0.5, 0.25])


def number() -> float:
    return NUMBER


def closing_over(values: list[float]) -> Callable[[], float]:
    return lambda: values[0]


HELD = [0.5]
from_closure = closing_over(HELD)


def power(x: Tensor, k: float) -> float:
    return k


class Block(nn.Module):
    level = 0.5

    def __init__(self, factor: Callable[..., Any], index: int) -> None:
        super().__init__()
        self.factor = factor
        self.a = nn.Linear(WIDTH, WIDTH)
        self.dp = nn.Dropout(0.1 * (index + 1))
        k = 0.2 * (index + 1)
        self.scale, self.flag, self.count, self.name, self.none = k, index % 2 == 0, index + 1, f"kind{index}", None
        self.config = Config(k, inner=Config(k + 0.1))
        self.numbers, self.table, self.pair, self.kinds = [k, 1.0], {"p": k}, Pair(k, 1), {index}
        self.slotted, self.delegating, self.mapping = Slotted(k), Delegating(p=k), Mapping(p=k)
        self.namespace, self.parsed = types.SimpleNamespace(p=k), argparse.Namespace(p=k)
        self.ordered = OrderedDict(p=k)
        self.float64, self.float32, self.array = np.float64(k), np.float32(k), np.array([k, 1.0])
        self.function, self.partial = (lambda: k), functools.partial(power, k=k)
        self.tensor = torch.tensor(k, dtype=torch.float64)
        self.tensors, self.configs = [torch.tensor(k, dtype=torch.float64)], [Config(k), Config(1.0)]
        self.by_name, self.kind = {"c": Config(k)}, Kind.ONE if index else Kind.TWO
        self.parts = [self.dp]
        self.bytes, self.queue, self.typed = bytearray([index + 1]), deque([k]), array("d", [k])
        self.decimal = Decimal(index + 1)

    @property
    def kept(self) -> float:
        return 1 - self.dp.p

    @functools.cached_property
    def once(self) -> float:
        return 1 - self.dp.p

    def doubled(self) -> float:
        return 2 * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor(self, x) * self.a(x)


class Model(nn.Module):
    def __init__(self, factor: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(factor, index) for index in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def streams(model: Model, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The n-stream model, which asks the original's blocks for their factors anew."""
    run = Streams(state, N)
    X = run.expand(x)
    for index, layer in enumerate(model.layers):
        X = run.site(f"layers.{index}.mhc_0", X, lambda u, layer=layer: layer.factor(layer, u) * layer.a(u))
    return run.collapse(X)


# name: (the factor, what changes it: code over the layer `l`)
READ: dict[str, tuple[Callable[..., Any], str]] = {
    "child": (lambda s, x: 1 - s.dp.p if s.training else 1.0, "l.dp.p = 0.7"),
    "child_by_getattr": (lambda s, x: getattr(getattr(s, "d" + "p"), "p"), "l.dp.p = 0.7"),  # noqa: B009
    "child_of_a_list": (lambda s, x: s.parts[0].p, "l.dp.p = 0.7"),
    "children": (lambda s, x: sum(m.p for m in s.modules() if isinstance(m, nn.Dropout)), "l.dp.p = 0.7"),
    "childs_size": (lambda s, x: 0.1 * s.a.out_features, "l.a.out_features = 3"),
    "childs_mode": (lambda s, x: 2.0 if s.dp.training else 1.0, "l.dp.train(not l.training)"),
    "comprehension": (lambda s, x: sum([s.scale for _ in range(2)]), "l.scale = 0.7"),
    "generator": (lambda s, x: sum(s.scale for _ in range(2)), "l.scale = 0.7"),
    "lambda": (lambda s, x: (lambda: s.scale)(), "l.scale = 0.7"),
    "inner_default": (lambda s, x: (lambda k=s.scale: k)(), "l.scale = 0.7"),
    "method": (lambda s, x: s.doubled(), "l.scale = 0.7"),
    "property": (lambda s, x: s.kept, "l.dp.p = 0.7"),
    "cached": (lambda s, x: s.once, "l.once = 0.7"),
    "flag": (lambda s, x: 2.0 if s.flag else 1.0, "l.flag = not l.flag"),
    "name": (lambda s, x: 2.0 if s.name == "kind0" else 1.0, "l.name = 'kind0'"),
    "enum": (lambda s, x: s.kind.value, "l.kind = Kind.TWO"),
    "enum_compared": (lambda s, x: 2.0 if s.kind is Kind.ONE else 1.0, "l.kind = Kind.TWO"),
    "loop": (lambda s, x: sum(1.0 for _ in range(s.count)), "l.count = 9"),
    "none": (lambda s, x: 1.0 if s.none is None else s.none, "l.none = 0.7"),
    "hasattr": (lambda s, x: 2.0 if hasattr(s, "extra") else 1.0, "l.extra = 1"),
    "getattr_default": (lambda s, x: getattr(s, "extra", 1.0), "l.extra = 0.3"),
    "vars": (lambda s, x: vars(s)["scale"], "l.scale = 0.7"),
    "dunder_dict": (lambda s, x: s.__dict__["scale"], "l.scale = 0.7"),
    "config": (lambda s, x: s.config.p, "l.config.p = 0.9"),
    "config_replaced": (lambda s, x: s.config.inner.p, "l.config = Config(inner=Config(0.9))"),
    "config_inner": (lambda s, x: s.config.inner.p, "l.config.inner.p = 0.9"),
    "config_hasattr": (lambda s, x: 2.0 if hasattr(s.config, "extra") else 1.0, "l.config.extra = 1"),
    "config_flag": (lambda s, x: 2.0 if s.config.flag else 1.0, "l.config.flag = False"),
    "list": (lambda s, x: s.numbers[0], "l.numbers[0] = 0.9"),
    "dict": (lambda s, x: s.table["p"], "l.table['p'] = 0.9"),
    "dict_get": (lambda s, x: s.table.get("q", 1.0), "l.table['q'] = 0.9"),
    "set": (lambda s, x: 1.0 if 1 in s.kinds else 2.0, "l.kinds.add(1) or l.kinds.discard(1) or l.kinds.add(7)"),
    "pair": (lambda s, x: s.pair.p, "l.pair = Pair(0.9, 1)"),
    "ordered": (lambda s, x: s.ordered["p"], "l.ordered['p'] = 0.9"),
    "configs": (lambda s, x: sum(c.p for c in s.configs), "l.configs[1].p = 0.3"),
    "configs_longer": (lambda s, x: sum(c.p for c in s.configs), "l.configs.append(Config(0.3))"),
    "config_by_name": (lambda s, x: s.by_name["c"].p, "l.by_name['c'] = Config(0.3)"),
    "slots": (lambda s, x: s.slotted.p, "l.slotted.p = 0.9"),
    "delegating": (lambda s, x: s.delegating.p, "l.delegating.values['p'] = 0.9"),
    "mapping": (lambda s, x: s.mapping.p, "l.mapping['p'] = 0.9"),
    "namespace": (lambda s, x: s.namespace.p, "l.namespace.p = 0.9"),
    "argparse": (lambda s, x: s.parsed.p, "l.parsed.p = 0.9"),
    "float64": (lambda s, x: s.float64, "l.float64 = np.float64(0.9)"),
    "float32": (lambda s, x: float(s.float32), "l.float32 = np.float32(0.9)"),
    "array": (lambda s, x: float(s.array[0]), "l.array[0] = 0.9"),
    "array_as_tensor": (lambda s, x: torch.from_numpy(s.array)[0], "l.array = np.array([0.9, 1.0])"),
    "tensor": (lambda s, x: s.tensor, "l.tensor = torch.tensor(0.9, dtype=torch.float64)"),
    "tensor_in_a_list": (lambda s, x: s.tensors[0], "l.tensors[0] = torch.tensor(0.9, dtype=torch.float64)"),
    "function": (lambda s, x: s.function(), "l.function = lambda: 0.9"),
    "partial": (lambda s, x: s.partial(x), "l.partial = functools.partial(power, k=0.9)"),
    "class_attribute": (lambda s, x: s.level, "Block.level = 0.9"),
    "class_by_type": (lambda s, x: type(s).level, "Block.level = 0.9"),
    "class_by_name": (lambda s, x: Block.level, "Block.level = 0.9"),
    "constants": (lambda s, x: Constants.p, "Constants.p = 0.9"),
    "global": (lambda s, x: NUMBER, "THIS.NUMBER = 0.9"),
    "global_flag": (lambda s, x: 2.0 if FLAG else 1.0, "THIS.FLAG = False"),
    "global_by_function": (lambda s, x: number(), "THIS.NUMBER = 0.9"),
    "globals": (lambda s, x: globals()["NUMBER"], "THIS.NUMBER = 0.9"),
    "global_list": (lambda s, x: NUMBERS[0], "NUMBERS[0] = 0.9"),
    "global_dict": (lambda s, x: TABLE["q"]["r"], "TABLE['q']['r'] = 0.9"),
    "global_config": (lambda s, x: SETTINGS.p, "SETTINGS.p = 0.9"),
    "global_namespace": (lambda s, x: NAMESPACE.p, "NAMESPACE.p = 0.9"),
    "global_array": (lambda s, x: float(ARRAY[0]), "ARRAY[0] = 0.9"),
    "global_module": (lambda s, x: NET[0].p, "NET[0].p = 0.9"),
    "context": (lambda s, x: CONTEXT.get(), "CONTEXT.set(0.9)"),
    "thread_local": (lambda s, x: LOCAL.p, "LOCAL.p = 0.9"),
    "byte_array": (lambda s, x: s.bytes[0] / 9, "l.bytes[0] = 7"),
    "deque": (lambda s, x: s.queue[0], "l.queue[0] = 0.9"),
    "typed_array": (lambda s, x: s.typed[0], "l.typed[0] = 0.9"),
    "decimal": (lambda s, x: float(s.decimal), "l.decimal = Decimal('0.9')"),
    "closure": (lambda s, x: from_closure(), "HELD[0] = 0.9"),
    "default": (lambda s, x, held=HELD: held[0], "HELD[0] = 0.9"),
    "environment": (lambda s, x: float(os.environ.get("FROZEN", "1")), "os.environ['FROZEN'] = '2'"),
    "getenv": (lambda s, x: float(os.getenv("FROZEN", "1")), "os.environ['FROZEN'] = '2'"),
    "default_dtype": (lambda s, x: 2.0 if torch.get_default_dtype() is torch.float64 else 1.0,
                      "torch.set_default_dtype(torch.float64)"),
    "needs_gradient": (lambda s, x: 2.0 if s.a.weight.requires_grad else 1.0, "l.a.weight.requires_grad_(False)"),
    "grad_enabled": (lambda s, x: 2.0 if torch.is_grad_enabled() else 1.0, "torch.set_grad_enabled(False)"),
    "deterministic": (lambda s, x: 2.0 if torch.are_deterministic_algorithms_enabled() else 1.0,
                      "torch.use_deterministic_algorithms(True)"),
    "seed": (lambda s, x: float(torch.initial_seed() % 7), "torch.manual_seed(3)"),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "random": (lambda s, x: random.random(), "Python's random"),
    "randint": (lambda s, x: random.randint(0, 5), "Python's random"),
    "choice": (lambda s, x: random.choice([0.1, 0.2]), "Python's random"),
    "gauss": (lambda s, x: random.gauss(0, 1), "Python's random"),
    "own_random": (lambda s, x: random.Random().random(), "Python's random"),
    "system_random": (lambda s, x: random.SystemRandom().random(), "the system's random"),
    "numpy": (lambda s, x: np.random.rand(), "numpy's random"),
    "numpy_binomial": (lambda s, x: float(np.random.binomial(1, 0.5)), "numpy's random"),
    "numpy_generator": (lambda s, x: float(GENERATOR.normal()), "numpy's random"),
    "numpy_state": (lambda s, x: float(STATE.rand()), "numpy's random"),
    "numpy_fresh": (lambda s, x: float(np.random.default_rng().normal()), "random"),
    "urandom": (lambda s, x: os.urandom(1)[0] / 255, "the system's random"),
    "secrets": (lambda s, x: secrets.randbelow(10), "the system's random"),
    "time": (lambda s, x: time.time() % 1, "the clock"),
    "perf_counter": (lambda s, x: time.perf_counter() % 1, "the clock"),
    "now": (lambda s, x: datetime.now().microsecond / 1e6, "the clock"),
    "file": (lambda s, x: float(len(open(os.devnull).read())), "a file"),
    "torch_state": (lambda s, x: float(torch.get_rng_state()[0]), "the state of torch's random"),
    "seeding": (lambda s, x: (torch.manual_seed(0), torch.rand(()))[1], "the state of torch's random"),
    "counter": (lambda s, x: counts(s), "stores"),
    "appends": (lambda s, x: (s.tensors.append(x.mean()), 1.0)[1], "stores a result"),
    "keeps": (lambda s, x: (s.table.update(last=x), 1.0)[1], "stores a result"),
    "object": (lambda s, x: (setattr(s.config, "last", x), 1.0)[1], "stores a result"),
    "counts_in_a_list": (lambda s, x: (s.numbers.append(1.0), 1.0)[1], "changes"),
    "counts_globally": (lambda s, x: (TABLE.update(p=TABLE["p"] + 1), 1.0)[1], "changes"),
    "iterator": (lambda s, x: next(COUNTER), "iterator"),
    "swallowed": (lambda s, x: swallowed(), "Python's random"),
}  # fmt: skip
COUNTER = itertools.cycle([0.1, 0.2])
GENERATOR, STATE = np.random.default_rng(0), np.random.RandomState(0)


def counts(self: Any) -> float:
    self.calls = getattr(self, "calls", 0) + 1
    return 1.0


def swallowed() -> float:
    try:
        return random.random()
    except Exception:
        return 0.5


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the changes change outside of the model is put back."""
    monkeypatch.delenv("FROZEN", raising=False)
    kept = {name: copy.deepcopy(vars(THIS)[name]) for name in
            ("NUMBER", "FLAG", "NUMBERS", "TABLE", "SETTINGS", "NAMESPACE", "ARRAY", "HELD")}  # fmt: skip
    levels = Block.level, Constants.p
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    Block.level, Constants.p = levels
    os.environ.pop("FROZEN", None)
    THIS.NUMBER, THIS.FLAG = kept["NUMBER"], kept["FLAG"]
    NUMBERS[:], HELD[:], ARRAY[:] = kept["NUMBERS"], kept["HELD"], kept["ARRAY"]
    TABLE.clear()
    TABLE.update(kept["TABLE"])
    NET[0].p, LOCAL.p = 0.4, 0.5
    CONTEXT.set(0.5)
    SETTINGS.p, NAMESPACE.p = kept["SETTINGS"].p, kept["NAMESPACE"].p


def features() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build(factor: Callable[..., Any]) -> tuple[Model, Model]:
    """The original, and its conversion with perturbed sites."""
    torch.manual_seed(0)
    original = Model(factor).double()
    converted = mhcify(copy.deepcopy(original), (features(),), n_streams=N)
    perturb(converted)
    return original, converted


def check(original: Model, converted: Model) -> Tensor:
    """Outputs and gradients of the converted model are those of the independent one."""
    x = features()
    seen = []
    for run, model in ((lambda: streams(original, dict(converted.named_parameters()), x), original),
                       (lambda: converted(x), converted)):  # fmt: skip
        for one in (original, converted):
            one.zero_grad()
        result = run()
        if result.requires_grad:
            result.square().sum().backward()
        grads = [p.grad.clone() if p.grad is not None else None for p in (layer.a.weight for layer in model.layers)]
        sites = [p.grad.clone() if p.grad is not None else None for n, p in converted.named_parameters() if "mhc" in n]
        seen.append((result.detach(), grads, sites))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-9)
    return seen[1][0]


@pytest.mark.parametrize("name", READ)
def test_what_is_read_stays_alive(name: str) -> None:
    factor, change = READ[name]
    original, converted = build(factor)
    assert [site.name for site in report(converted).plan.sites] == [f"layers.{i}.mhc_0" for i in range(LAYERS)]
    for training in (False, True):
        for model in (original, converted):
            model.train(training)
        before = check(original, converted)
        if training is False:
            continue
        for model in (original, converted):
            exec(change, globals(), {"l": model.layers[1]})
        after = check(original, converted)
        assert name in ("childs_mode", "child") or (before - after).abs().max() > 1e-6, "the change changes nothing"
        converted.eval(), original.eval()
        check(original, converted)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_neither_be_guarded_nor_read_anew_is_refused(name: str) -> None:
    factor, why = REFUSED[name]
    model = Model(factor).double()
    states = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state()
    with pytest.raises(CaptureError) as caught:
        mhcify(model, (features(),))
    message = str(caught.value)
    assert why in message and "'layers.0' (Block)" in message
    assert not any(isinstance(t, Tensor) and type(t) is not Tensor for t in model.layers[0].tensors)
    after = random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state()
    assert after[:2] == states[:2] and torch.equal(after[2], states[2])


class Skipping(nn.Module):
    """Skips branches by chance in its own loop; `draw` says whether to."""

    def __init__(self, draw: Callable[[], bool]) -> None:
        super().__init__()
        self.draw = draw
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if self.training and self.draw():
                continue
            x = x + part(x)
        return x


@pytest.mark.parametrize(
    "draw", [lambda: random.random() < 0.5, lambda: np.random.rand() < 0.5], ids=["random", "numpy"]
)
def test_a_draw_in_a_loop_is_refused_and_not_frozen(draw: Callable[[], bool]) -> None:
    random.seed(0)
    np.random.seed(0)
    with pytest.raises(CaptureError, match="random numbers"):
        mhcify(Skipping(draw), (features().float(),))


class Noisy(nn.Module):
    """Draws of torch, in the captured forward itself and in its children."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x) * (torch.rand(()) < 0.5 if self.training else 1.0)
        return x


def test_torchs_draws_stay_draws() -> None:
    original, x = Noisy(), features().float()
    converted = mhcify(copy.deepcopy(original), (x,), n_streams=2)
    outputs = []
    for model in (original.train(), converted.train()):
        for seed in range(20):
            torch.manual_seed(seed)
            outputs.append(model(x))
    torch.testing.assert_close(outputs[20:], outputs[:20], rtol=1e-5, atol=1e-5)
    distinct = [len({tuple(o.flatten().tolist()) for o in half}) for half in (outputs[:20], outputs[20:])]
    assert distinct[0] == distinct[1] > 10


class Asking(nn.Module):
    """What a forward may ask torch; the answer is the caller's, not the capture's."""

    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.ask = ask
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x) * (2.0 if self.ask(x) else 1.0)
        return x + self.b(x)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.is_grad_enabled(),
        lambda x: x.requires_grad,
        lambda x: torch.is_inference_mode_enabled(),
        lambda x: torch.is_autocast_enabled("cpu"),
        lambda x: torch.get_autocast_dtype("cpu") is torch.float16,
    ],
    ids=["grad", "requires_grad", "inference", "autocast", "autocast_dtype"],
)
def test_torchs_state_is_as_in_life(ask: Callable[[Tensor], bool]) -> None:
    torch.manual_seed(0)
    original = Asking(ask)
    converted = mhcify(copy.deepcopy(original), (features().float(),), n_streams=2)
    ways: list[Callable[[], Any]] = [
        torch.enable_grad, torch.no_grad, torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.autocast("cpu", torch.float16),
    ]  # fmt: skip
    for _ in range(2):
        for way in ways:
            for needs in (False, True):
                results = []
                for model in (original.eval(), converted.eval()):
                    with way():
                        results.append(model(features().float().requires_grad_(needs)))
                torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


def test_an_argument_object_is_read_anew() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, config: Any) -> Tensor:
            x = x + self.a(x) * config.p
            return x + self.b(x) * (2.0 if config.flag else 1.0) * (3.0 if config.inner is None else 1.0)

    original, x = Scaled().double(), features()
    converted = mhcify(copy.deepcopy(original), (x, Config()), n_streams=2)
    for config in (Config(), Config(0.7), Config(0.7, False), Config(0.7, False, "set"), Config(0.7, True, "other")):
        torch.testing.assert_close(converted(x, config), original(x, config), rtol=1e-10, atol=1e-10)


class Bag:
    """An object that may be empty, and says so by a method as well."""

    def __init__(self, *items: float) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def is_empty(self) -> bool:
        return not self.items


class Weighed(nn.Module):
    def __init__(self, weigh: Callable[[Any], float]) -> None:
        super().__init__()
        self.weigh = weigh
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bag: Any) -> Tensor:
        x = x + self.a(x) * self.weigh(bag)
        return x + self.b(x)


@pytest.mark.parametrize(
    "weigh", [lambda bag: 2.0 if bag else 1.0, lambda bag: 1.0 + len(bag)], ids=["truth", "length"]
)
def test_the_size_of_an_argument_object_is_guarded(weigh: Callable[[Any], float]) -> None:
    original, x = Weighed(weigh).double(), features()
    converted = mhcify(copy.deepcopy(original), (x, Bag(1.0)), n_streams=2)
    for bag in (Bag(1.0), Bag(), Bag(1.0, 2.0), Bag(1.0)):
        torch.testing.assert_close(converted(x, bag), original(x, bag), rtol=1e-10, atol=1e-10)


def test_what_a_method_of_an_argument_says_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"is_empty\(\)"):
        mhcify(Weighed(lambda bag: 2.0 if bag.is_empty() else 1.0).double(), (features(), Bag(1.0)))


def test_what_is_read_by_way_of_the_parent() -> None:
    """A parent that a layer holds on to, outright or weakly, is watched as well."""
    for factor in (lambda s, x: s.parent[0].layers[0].dp.p, lambda s, x: s.weak().layers[0].dp.p):
        torch.manual_seed(0)
        original = Model(factor).double()
        converted = copy.deepcopy(original)
        for model in (original, converted):
            for layer in model.layers:
                layer.__dict__["parent"], layer.weak = [model], weakref.ref(model)
        mhcify(converted, (features(),), n_streams=N)
        perturb(converted)
        check(original, converted)
        for model in (original, converted):
            model.layers[0].dp.p = 0.9
        check(original, converted)


def test_layers_that_read_the_same_share_a_capture_and_others_do_not() -> None:
    def captures(factor: Callable[..., Any]) -> int:
        model = mhcify(Model(factor).double(), (features(),), n_streams=2)
        roles = [layer.__dict__["_mhc_role"].carrier for layer in model.layers]
        return len({id(found[0].captured) for role in roles for found in role.variants.values()})

    assert captures(lambda s, x: SETTINGS.p) == 2  # one a mode
    assert captures(lambda s, x: s.config.p) == 2 * LAYERS
    assert captures(lambda s, x: 2.0 if s.flag else 1.0) == 2 * 2


@pytest.mark.slow
def test_a_changed_number_is_seen_under_compile() -> None:
    original, converted = build(lambda s, x: s.dp.p * s.config.p * s.numbers[0] * NUMBERS[0] * TABLE["p"] * SETTINGS.p)
    compiled = torch.compile(converted.eval(), backend="eager", fullgraph=True)
    original.eval()
    torch.testing.assert_close(compiled(features()), check(original, converted))
    for change in ("l.config.p = 0.9", "NUMBERS[0] = 0.9"):
        for model in (original, converted):
            exec(change, globals(), {"l": model.layers[1]})
        got = compiled(features())
        torch.testing.assert_close(got, check(original, converted))


def test_a_forward_that_asks_whether_it_is_compiled() -> None:
    """It is captured for compiled code as it is there; where the answer differs while Dynamo traces, it is refused."""
    torch._dynamo.reset()

    def compiled(factor: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
        original, converted = build(factor)
        got = torch.compile(converted.eval(), backend="eager", fullgraph=True)(features())
        there, _ = build(lambda s, x: factor(s, x, True))
        there.load_state_dict(original.state_dict())
        return got, streams(there, dict(converted.named_parameters()), features()), check(original.eval(), converted)

    def asks(s: Any, x: Tensor, there: bool = False) -> Any:
        return 2.0 if there or torch.compiler.is_compiling() else 1.0

    def asks_for_nothing(s: Any, x: Tensor, there: bool = False) -> Any:
        return s.scale * (1.0 if torch.compiler.is_compiling() else 2.0 / 2)

    def asks_dynamo(s: Any, x: Tensor, there: bool = False) -> Any:
        return 2.0 if there or torch.compiler.is_dynamo_compiling() else 1.0

    got, want, eager = compiled(asks)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, eager, atol=1e-2)
    got, want, eager = compiled(asks_for_nothing)
    torch.testing.assert_close((got, got), (want, eager))
    with pytest.raises(Exception, match=r"Ask torch\.compiler\.is_compiling instead"):
        compiled(asks_dynamo)


def test_copies_look_at_themselves() -> None:
    original, converted = build(lambda s, x: s.config.p * s.tensor)
    other = copy.deepcopy(converted)
    for layer, value in ((other.layers[1], 0.9), (original.layers[1], 0.9)):
        layer.config.p = value
        layer.tensor = torch.tensor(0.3, dtype=torch.float64)
    check(original, other)
    original.layers[1].config.p = converted.layers[1].config.p
    original.layers[1].tensor = converted.layers[1].tensor
    check(original, converted)
