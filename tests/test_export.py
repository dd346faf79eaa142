"""Graphs that leave Python: ONNX, exported programs where this package is not installed, TorchScript traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import mhc_rewrite
import oracle
from handmade.common import PreNorm, Stack
from mhc_rewrite import mhcify
from mhc_rewrite.connections import CONNECTIONS

BATCH, TOKENS = torch.export.Dim("batch"), torch.export.Dim("tokens")
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=64, num_key_value_heads=2, use_cache=False))


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8))


def text(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(batch: int, _: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


FREE = {"input_ids": {0: BATCH, 1: TOKENS}, "attention_mask": {0: BATCH, 1: TOKENS}, "pixel_values": {0: BATCH}}
TRANSFORMERS = {"llama": (llama, text), "vit": (vit, images)}


def converted(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    mhcify(model.eval(), example, **options)
    oracle.perturb(model)
    return model.requires_grad_(False)


# Without the package's operators every stream and iteration is spelled out, and compiled: two show all that more do.
SHORT = {"n_streams": 2, "sinkhorn_iterations": 2}


def stack(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A model by hand, its example, and inputs of another size."""
    torch.manual_seed(0)
    x, other = torch.randn(2, 6, 16), torch.randn(3, 5, 16)
    return converted(Stack([PreNorm() for _ in range(2)]), (x,), **options), x, other


def mhc_operators(program: torch.export.ExportedProgram) -> set[str]:
    return {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and "mhc_rewrite" in str(node.target)
    }


# -- ONNX --------------------------------------------------------------------------------------------------------------


def onnx_session(model: nn.Module, kwargs: dict[str, Tensor], free: Any, file: Path) -> Any:
    pytest.importorskip("onnxscript", reason="torch exports to ONNX with the packages of the extra `export`")
    runtime = pytest.importorskip("onnxruntime", reason="of the extra `export`")
    torch.onnx.export(model, (), kwargs=kwargs, dynamo=True, dynamic_shapes=free, verbose=False).save(str(file))
    return runtime.InferenceSession(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_onnx_of_transformers(name: str, tmp_path: Path) -> None:
    build, inputs = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = converted(build(), None, **SHORT)
    kwargs = inputs(2, 9)
    session = onnx_session(model, kwargs, {key: FREE[key] for key in kwargs}, tmp_path / "model.onnx")
    assert [given.name for given in session.get_inputs()] == list(kwargs)
    for given in (kwargs, inputs(3, 6)):
        made = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in given.items()})[0])
        assert float((made - model(**given)[0]).abs().max()) <= 1e-5


# Of those that are a function tests/test_family.py exports the functions.
@pytest.mark.parametrize(
    "connection",
    [*(c for c in CONNECTIONS if not CONNECTIONS[c].function), pytest.param("tbp", marks=pytest.mark.long)],
)
def test_onnx_of_a_model_by_hand(connection: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 5, 16), torch.randn(3, 7, 16)
    model = converted(Stack([PreNorm() for _ in range(2)]), (x,), connection=connection)
    session = onnx_session(model, {"x": x}, {"x": {0: BATCH, 1: TOKENS}}, tmp_path / "model.onnx")
    for given in (x, other):
        made = torch.from_numpy(session.run(None, {"x": given.numpy()})[0])
        assert float((made - model(given)).abs().max()) <= 1e-5
    assert mhc_operators(torch.export.export(model, (x,))), "after it, graphs hold this package's operators again"


# -- where this package is not -----------------------------------------------------------------------------------------

LOAD = """
import sys
sys.modules["mhc_rewrite"] = None  # as if it were not installed
import torch
model = {load}
x, want = torch.load({data!r})
assert float((model(x) - want).abs().max()) <= 1e-5
assert not [name for name in sys.modules if name.startswith("mhc_rewrite.")]
"""


def loads_without_the_package(load: str, data: Path, x: Tensor, want: Tensor) -> subprocess.CompletedProcess[str]:
    torch.save((x, want), data)
    script = LOAD.format(load=load, data=str(data))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=data.parent)


@pytest.mark.parametrize("strict", (False, True))
def test_a_portable_program_loads_without_the_package(strict: bool, tmp_path: Path) -> None:
    model, x, other = stack()
    file = tmp_path / "model.pt2"
    free = ({0: BATCH, 1: TOKENS},)
    with mhc_rewrite.portable():
        program = torch.export.export(model, (x,), dynamic_shapes=free, strict=strict)
    assert mhc_operators(program) == set()
    assert torch.allclose(program.module()(other), model(other), atol=1e-5)
    torch.export.save(program, file)
    run = loads_without_the_package(
        f"torch.export.load({str(file)!r}).module()", tmp_path / "data", other, model(other)
    )
    assert run.returncode == 0, run.stderr


def test_other_programs_need_the_package(tmp_path: Path) -> None:
    """The check above can fail."""
    model, x, _ = stack()
    program = torch.export.export(model, (x,))
    assert mhc_operators(program)
    file = tmp_path / "model.pt2"
    torch.export.save(program, file)
    run = loads_without_the_package(f"torch.export.load({str(file)!r}).module()", tmp_path / "data", x, model(x))
    assert run.returncode != 0 and "mhc_rewrite" in run.stderr


@pytest.mark.slow
@pytest.mark.long
def test_a_portable_package_of_aotinductor_loads_without_the_package(tmp_path: Path) -> None:
    model, x, _ = stack(**SHORT)
    file = str(tmp_path / "model.pt2")
    with mhc_rewrite.portable():
        program = torch.export.export(model, (x,))
    torch._inductor.aoti_compile_and_package(program, package_path=file)
    load = f"torch._inductor.aoti_load_package({file!r})"
    run = loads_without_the_package(load, tmp_path / "data", x, model(x))
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_portable_computes_the_same(connection: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Stack([PreNorm() for _ in range(3)]).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    mhcify(model, (x,), connection=connection)
    oracle.perturb(model)
    runs = []
    for inside in (False, True):
        model.zero_grad()
        if inside:
            with mhc_rewrite.portable():
                y = model(x)
        else:
            y = model(x)
        y.square().sum().backward()
        runs.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*runs):
        assert one.dtype == other.dtype
    # In bf16 the two round at other places, so that gradients of hc, which amplifies, say nothing.
    tolerance, compared = (1e-9, len(runs[0])) if dtype == torch.float64 else (0.05, 1)
    for one, other in zip(runs[0][:compared], runs[1]):
        assert float((one - other).norm()) <= tolerance * float(one.norm()) + 1e-12


def test_portable_ends_with_its_block() -> None:
    model, x, _ = stack()
    with pytest.raises(ZeroDivisionError), mhc_rewrite.portable():
        _ = 1 / 0
    assert mhc_operators(torch.export.export(model, (x,)))


# -- export without a word, and TorchScript ----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_export_of_calls_that_were_not_seen(name: str, strict: bool) -> None:
    """Exported, ViT's layers get an attention mask that no eager call gives them."""
    build, inputs = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = converted(build(), None)
    kwargs, other = inputs(2, 9), inputs(3, 6)
    forget_calls(model)
    free = {key: FREE[key] for key in kwargs}
    try:
        program = torch.export.export(model, (), kwargs, dynamic_shapes=free, strict=strict)
    except torch._dynamo.exc.UserError:
        with pytest.raises(torch._dynamo.exc.UserError):
            torch.export.export(build().eval(), (), kwargs, dynamic_shapes=free, strict=strict)
        pytest.skip("this torch can't export the original with such sizes free")
    assert torch.allclose(program.module()(**other)[0], model(**other)[0], atol=1e-5)


def forget_calls(model: nn.Module) -> None:
    for module in model.modules():
        role = module.__dict__.get("_mhc_role")
        if role is not None and role.carrier is not None:
            role.carrier.variants.clear()


def test_torchscript_trace() -> None:
    model, x, _ = stack()
    traced = torch.jit.trace(model, (x,))
    assert torch.allclose(traced(x), model(x), atol=1e-6)
