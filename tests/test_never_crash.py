"""Whatever a forward does, the outcome is a conversion or an MHCError: never another exception, never the process.

Each case is the branch of a block. All cases of a group run in one process of their own, which must end in good order.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_rewrite import mhcify, plan, report
from mhc_rewrite.errors import MHCError

WIDTH = 8
Branch = Callable[[Any, Tensor], Any]


class Odd(torch.autograd.Function):
    """tanh, with a gradient of its own that tells whether it was kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 7 * gradient + 0 * x


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), 3 * torch.einsum("bti,btj->ij", x, gradient)


class Several(torch.autograd.Function):
    """Two results, and an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return x * factor, x + factor

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        return 5 * first + second, None


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def dispatched(self: Any, x: Tensor) -> Tensor:
    with Passing():
        return self.a(x)


def swallows(self: Any, x: Tensor) -> Tensor:
    try:
        if float(x.sum()) > 0:
            return self.a(x)
    except Exception:
        pass
    return self.b(x)


def in_a_thread(self: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: self.a(x)).result()


def half_in_a_thread(self: Any, x: Tensor) -> Tensor:
    out: list[Tensor] = []
    thread = threading.Thread(target=lambda: out.append(x * 2))  # noise on stderr, and nothing in `out`
    thread.start()
    thread.join()
    return self.a(out[0])


def with_einops(self: Any, x: Tensor) -> Tensor:
    import einops

    y = einops.rearrange(x, "b t (h d) -> b h t d", h=2)
    y = einops.repeat(y.mean(2, keepdim=True), "b h 1 d -> b h t d", t=x.shape[1])
    return self.a(einops.rearrange(y, "b h t d -> b t (h d)")) + self.b(einops.reduce(x, "b t c -> b 1 c", "mean"))


# What each has to come to: "converts", or a word of the refusal; None where the original itself may not run.
CONVERTS = "converts"
CASES: dict[str, tuple[Branch, str | None]] = {
    "function": (lambda s, x: Odd.apply(s.a(x)), CONVERTS),
    "function_of_two": (lambda s, x: OwnLinear.apply(x, s.w), CONVERTS),
    "function_with_results": (lambda s, x: sum(Several.apply(s.a(x), 0.5)), CONVERTS),
    "checkpoint_reentrant": (lambda s, x: checkpoints.checkpoint(s.a, x, use_reentrant=True), CONVERTS),
    "checkpoint": (lambda s, x: checkpoints.checkpoint(s.a, x, use_reentrant=False), CONVERTS),
    "checkpoint_default": (lambda s, x: checkpoints.checkpoint(lambda y: s.b(s.a(y).relu()), x), CONVERTS),
    "checkpoint_sequential": (lambda s, x: checkpoints.checkpoint_sequential([s.a, s.b], 2, x, use_reentrant=False),
                              CONVERTS),
    "script": (lambda s, x: scripted(s.a(x)), CONVERTS),
    "as_tensor": (lambda s, x: s.a(torch.as_tensor(x)), CONVERTS),
    "as_subclass": (lambda s, x: s.a(x).as_subclass(Tensor), CONVERTS),
    "einops": (with_einops, CONVERTS),
    "dispatch_mode": (dispatched, CONVERTS),
    "aten": (lambda s, x: torch.ops.aten.mul.Tensor(s.a(x), 2.0), CONVERTS),
    "legacy_constant": (lambda s, x: s.a(x) * torch.DoubleTensor([0.5]), CONVERTS),
    "isinstance": (lambda s, x: s.a(x) if isinstance(x, Tensor) and x.__class__ is Tensor else 0 * x, CONVERTS),
    "item": (lambda s, x: s.a(x) * x.mean().item(), CONVERTS),
    "data": (lambda s, x: s.a(x.data), CONVERTS),
    "vmap": (lambda s, x: torch.vmap(s.a)(x), "torch.func"),
    "vmap_of_lambda": (lambda s, x: torch.vmap(lambda t: t @ s.w)(x), "torch.func"),
    "jvp": (lambda s, x: torch.func.jvp(s.a, (x,), (x,))[1], "torch.func"),
    "grad": (lambda s, x: torch.func.grad(lambda t: s.a(t).sum())(x), "gradients"),
    "vjp": (lambda s, x: torch.func.vjp(s.a, x)[0], "gradients"),
    "jacobian": (lambda s, x: torch.autograd.functional.jacobian(s.a, x).sum(), "gradients"),
    "functional_call": (lambda s, x: torch.func.functional_call(s.a, {"weight": 2 * s.w}, (x,)), "other weights"),
    "functional_call_own": (lambda s, x: torch.func.functional_call(s.a, {"weight": s.w}, (x,)), "other weights"),
    "jit_trace": (lambda s, x: torch.jit.trace(s.a, x)(x), "captured"),
    "to_dlpack": (lambda s, x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())),
                  "by other means"),
    "from_dlpack": (lambda s, x: torch.from_dlpack(x.detach()), "DLPack"),
    "make_subclass": (lambda s, x: s.a(Tensor._make_subclass(Tensor, x)), "by other means"),
    "new_parameter": (lambda s, x: s.a(nn.Parameter(x)), "captured"),
    "legacy": (lambda s, x: torch.Tensor(s.a(x).detach()), None),
    "numpy": (lambda s, x: torch.from_numpy(s.a(x).detach().numpy()), "numpy"),
    "asarray": (lambda s, x: torch.from_numpy(np.asarray(x.detach())), "numpy"),
    "ufunc": (lambda s, x: torch.from_numpy(np.tanh(x.detach().numpy())), "numpy"),
    "pointer": (lambda s, x: s.a(x) * ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_double))[0], "pointer"),
    "storage": (lambda s, x: s.a(x) * x.untyped_storage()[0], "storage"),
    "pickle": (lambda s, x: s.a(pickle.loads(pickle.dumps(x.detach()))), "pickle"),
    "deepcopy": (lambda s, x: s.a(copy.deepcopy(x.detach())), CONVERTS),
    "thread": (in_a_thread, "thread"),
    "half_in_a_thread": (half_in_a_thread, None),
    "set_data": (lambda s, x: (setattr(x, "data", 2 * x.data), s.a(x))[1], "assigns to .data"),
    "hook": (lambda s, x: (s.a(x).register_hook(lambda g: 2 * g), s.a(x))[1], None),
    "inference": (lambda s, x: torch.inference_mode()(s.a)(x).clone(), "captured"),
    "swallowed": (swallows, "content of a tensor"),
    "compiled": (lambda s, x: torch.compile(lambda t: s.a(t), backend="eager")(x), None),
    "sparse": (lambda s, x: torch.sparse.mm(x[0].to_sparse(), s.w)[None] + s.a(x), None),
    "nested": (lambda s, x: torch.nested.nested_tensor(list(s.a(x))).to_padded_tensor(0.0), None),
    "cond": (lambda s, x: torch.cond(x.sum() > 0, s.a, s.b, (x,)), None),
    "own_error": (lambda s, x: {}[x], None),
    "exit": (lambda s, x: sys.exit(3) if type(x) is not Tensor else s.a(x), "SystemExit"),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.b(x) + self.branch(self, x))


class Model(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(branch) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def outcome(branch: Branch) -> str:
    """What converting comes to. Where it converts, outputs and gradients are those of the original."""
    torch.manual_seed(0)
    model, x = Model(branch).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    try:
        converted = mhcify(copy.deepcopy(model), (x,), n_streams=2)
    except MHCError as error:
        return str(error)
    assert len(report(converted).plan.sites) == 2
    other = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    for training in (False, True):
        results = []
        for one in (model, converted):
            one.train(training).zero_grad()
            result = one(other)
            result.square().sum().backward()
            grads = [p.grad for n, p in one.named_parameters() if ".mhc_" not in n and p.grad is not None]
            results.append((result, grads))
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    return CONVERTS


def own_process(code: str, timeout: float = 240) -> str:
    """Runs code in a process of its own, which has to end in good order."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=here, capture_output=True, text=True, timeout=timeout,
        env={"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_case_converts_or_is_refused() -> None:
    code = (
        "from test_never_crash import CASES, outcome\n"
        "for name, (branch, _) in CASES.items():\n"
        "    print(name, '->', ' '.join(outcome(branch).split()), flush=True)\n"
    )
    said = dict(line.split(" -> ", 1) for line in own_process(code).splitlines() if " -> " in line)
    assert list(said) == list(CASES)
    for name, (_, wanted) in CASES.items():
        if wanted is not None:
            assert (said[name] == CONVERTS) == (wanted == CONVERTS) and wanted in said[name], (name, said[name])
    for name, text in said.items():
        if text != CONVERTS and "can't be captured" in text:
            assert "'layers.0' (Block)" in text, name


REENTRANT = """
import torch
from conftest import define_torchvision_operators
define_torchvision_operators()
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from mhc_rewrite import mhcify

sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
for build in (lambda: LlamaForCausalLM(LlamaConfig(**sizes)), lambda: BertModel(BertConfig(**sizes))):
    for reentrant in (True, False):
        model = build().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        mhcify(model, n_streams=2)
        model.train()
        tokens = torch.randint(0, 64, (2, 6))
        model(input_ids=tokens)[0].float().square().mean().backward()
        given = sum(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "layer" in n)
        print("trained", given)
"""


@pytest.mark.slow
def test_reentrant_checkpointing_of_transformers() -> None:
    trained = [int(line.split()[1]) for line in own_process(REENTRANT).splitlines() if line.startswith("trained")]
    assert len(trained) == 4 and min(trained) > 20


def plain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Model(lambda s, x: s.a(x)), torch.randn(2, 5, WIDTH)


def test_symbolic_trace_of_a_converted_model() -> None:
    model, x = plain()
    mhcify(model, (x,), n_streams=2)
    traced = fx.symbolic_trace(model)  # converted layers are leaves
    torch.testing.assert_close(traced(x), model(x))


def test_a_compiled_model_is_converted_inside() -> None:
    model, x = plain()
    wanted = model.eval()(x)
    compiled = torch.compile(model, backend="eager")
    assert [site.name for site in plan(compiled, (x,)).sites] == [
        "_orig_mod.layers.0.mhc_0",
        "_orig_mod.layers.1.mhc_0",
    ]
    mhcify(compiled, (x,), n_streams=2)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("where", ["layer", "in place"])
def test_a_model_compiled_in_part_is_converted(where: str) -> None:
    model, x = plain()
    wanted = model.eval()(x)
    if where == "layer":
        model.layers[1] = torch.compile(model.layers[1], backend="eager")
    else:
        model.compile(backend="eager")
    mhcify(model, (x,), n_streams=2)
    torch.testing.assert_close(model(x), wanted)
