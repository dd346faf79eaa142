"""Calls are independent of each other: in several threads at once, cold and warm, and inside one another."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, PreNorm, Stack, features, prenorm_by_hand
from handmade.layers import PostNorm
from mhc_rewrite import mhcify
from mhc_rewrite.capture import state
from mhc_rewrite.capture.call import copied
from mhc_rewrite.errors import CaptureError
from oracle import Streams

THREADS = 4


def in_threads(calls: list[Callable[[], Any]], timeout: float = 120.0) -> list[Any]:
    """What the calls give, all started at once, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "the threads wait for each other"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaModel(config).double().eval()


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        hidden_size=WIDTH, embedding_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AlbertModel(config).double().eval()


def tokens(number: int) -> Tensor:
    return torch.randint(40, (2, 4 + number), generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("build", [llama, albert], ids=["Llama", "ALBERT"])
def test_hidden_states(build: Callable[[], nn.Module]) -> None:
    """Kinds of calls that none has shown, cold, and then warm again and again: as one after the other."""
    model = mhcify(build(), {"input_ids": tokens(0)})
    oracle.perturb(model)
    alone = copy.deepcopy(model)

    def call(model: nn.Module, number: int) -> list[Tensor]:
        with torch.no_grad():
            result = model(tokens(number), output_hidden_states=True)
        return [*result.hidden_states, result.last_hidden_state]

    want = [call(alone, number) for number in range(THREADS)]
    for _ in range(5):
        results = in_threads([lambda number=number: call(model, number) for number in range(THREADS)])
        for mine, theirs in zip(results, want, strict=True):
            assert all(type(t) is Tensor for t in mine)
            assert [t.shape for t in mine] == [t.shape for t in theirs]
            assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
    assert variants(model) == variants(alone), "a kind of call was captured twice"


def variants(model: nn.Module) -> list[int]:
    roles = [module.__dict__.get("_mhc_role") for module in model.modules()]
    return [sum(map(len, role.carrier.variants.values())) for role in roles if role is not None and role.carrier]


def test_training_in_threads() -> None:
    """Gradients too, and random state is nobody's business but the caller's."""
    torch.manual_seed(0)
    model = mhcify(Stack([PostNorm() for _ in range(2)]).double(), (features(2, 5, WIDTH),))
    oracle.perturb(model)
    inputs = [features(2, 3 + number, WIDTH) for number in range(THREADS)]

    def gradient(number: int) -> Tensor:
        x = inputs[number].clone().requires_grad_()
        return torch.autograd.grad(model(x).cos().sum(), x)[0]

    want = [gradient(number) for number in range(THREADS)]
    for _ in range(5):
        got = in_threads([lambda number=number: gradient(number) for number in range(THREADS)])
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, want, strict=True))


def test_replicas() -> None:
    """What DataParallel makes share the roles of the model."""
    torch.manual_seed(0)
    model = mhcify(Stack([PreNorm() for _ in range(2)]).double(), (features(2, 5, WIDTH),))
    oracle.perturb(model)
    replicas = []
    for _ in range(THREADS):
        clones = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, clone in clones.items():
            for name, child in module._modules.items():
                clone._modules[name] = clones.get(child)
            for name, p in module._parameters.items():
                setattr(clone, name, p)
        replicas.append(clones[model])
    x = features(2, 5, WIDTH)
    want = model(x)
    for result in in_threads([lambda replica=replica: replica(x) for replica in replicas]):
        assert torch.allclose(result, want, rtol=1e-12)


class Within(nn.Module):
    """A block that calls itself, or the model that it is part of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PreNorm()

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        if depth:
            x = self(x, depth - 1)
        return self.inner(x)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_recursion(depth: int) -> None:
    torch.manual_seed(0)
    original = Stack([Within() for _ in range(2)]).double().eval()
    x = features(2, 5, WIDTH)
    model = mhcify(copy.deepcopy(original), (x,))
    oracle.perturb(model)
    hand = Streams(dict(oracle.site_parameters(model)), 4)
    X = hand.expand(x)
    for number, layer in enumerate(original.layers):
        for _ in range(depth + 1):
            X = prenorm_by_hand(layer.inner, hand, f"layers.{number}.inner", X)
    want = original.norm(hand.collapse(X))
    assert torch.allclose(model(x, depth), want, rtol=1e-10)


def test_a_call_inside_a_call() -> None:
    torch.manual_seed(0)
    model = mhcify(Stack([PreNorm() for _ in range(3)]).double(), (features(2, 5, WIDTH),))
    oracle.perturb(model)
    x, other = features(2, 5, WIDTH), features(1, 7, WIDTH)
    want = model(x), model(other)
    inner: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        handle.remove()
        inner.append(model(other))

    handle = model.layers[1].register_forward_hook(hook)
    assert torch.equal(model(x), want[0]) and torch.equal(inner[0], want[1])


# A capture and the other threads


def test_a_capture_disturbs_nobody() -> None:
    """Other threads call modules, copy tensors and make some, while this one captures again and again."""
    torch.manual_seed(0)
    done = threading.Event()
    theirs = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    want, problems = theirs(torch.ones(4)), []

    def meanwhile() -> None:
        while not done.is_set():
            twin = copy.deepcopy(theirs)
            if not isinstance(twin[0].weight, nn.Parameter) or not torch.equal(twin(torch.ones(4)), want):
                problems.append("another module")
            if torch.zeros(3).shape != (3,):
                problems.append("a factory")

    thread = threading.Thread(target=meanwhile, daemon=True)
    thread.start()
    before = nn.Module.__call__, torch.zeros, Tensor.__deepcopy__
    for _ in range(3):
        mhcify(Stack([PreNorm() for _ in range(2)]).double(), (features(2, 5, WIDTH),))
        copied([torch.ones(3)])
    done.set()
    thread.join()
    assert not problems
    assert before == (nn.Module.__call__, torch.zeros, Tensor.__deepcopy__)


def test_a_capture_waits_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that stays in the model for good is no reason to stand still for good."""
    monkeypatch.setattr(state, "PATIENCE", 0.2)
    model = mhcify(llama(), {"input_ids": tokens(0)})
    entered, leave = threading.Event(), threading.Event()

    def stay(*_: Any) -> None:
        handle.remove()
        entered.set()
        leave.wait(60)

    handle = model.layers[1].register_forward_hook(stay)
    thread = threading.Thread(target=lambda: model(tokens(0)), daemon=True)
    thread.start()
    assert entered.wait(60)
    try:
        with pytest.raises(CaptureError, match="other threads have to leave the model"), state.alone():
            pass
    finally:
        leave.set()
        thread.join()
    with state.alone():
        assert model(tokens(1)).last_hidden_state.shape == (2, 5, WIDTH)


def test_random_state_stays() -> None:
    torch.manual_seed(3)
    random.seed(3)
    model = mhcify(llama(), {"input_ids": tokens(0)})
    before = torch.get_rng_state(), random.getstate()
    model(tokens(1), use_cache=False, output_attentions=True)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
