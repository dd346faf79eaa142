"""Parameters that are elsewhere: offloaded, sharded, on the meta device. Who brings them does so by module hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import oracle
from handmade.common import PreNorm, Stack, features
from handmade.layers import GPT
from mhc_rewrite import HyperConnection, mhcify
from mhc_rewrite.errors import KernelError
from mhc_rewrite.kernels import cpu, ops

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 11, 4, 8], [7, 3, 6, 12, 10]])
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    )  # tied weights


def t5() -> nn.Module:
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


MODELS = {build.__name__: build for build in (llama, bert, gpt2, t5)}


def call(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more)[0]


def converted(build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = mhcify(build().eval(), **options)
    oracle.perturb(model)
    return model


# -- operators ---------------------------------------------------------------------------------------------------------


def operands(n: int = 4, width: int = 8, tokens: int = 3) -> dict[str, Tensor]:
    columns = n * n + 2 * n
    shapes = dict(
        X=(tokens, n, width), y=(tokens, width), h_post=(tokens, n), h_res=(tokens, n, n), phi=(n * width, columns),
        alpha=(3,), bias=(columns,), raw=(tokens, columns), r=(tokens, 1), logits=(tokens, n, n),
    )  # fmt: skip
    shapes |= {"g_u": shapes["y"], "g_post": shapes["h_post"], "g_res": shapes["h_res"]}
    shapes |= {"g_out": shapes["X"], "g_state": shapes["X"]}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def arguments(schema: torch.FunctionSchema) -> list[Any]:
    plain = {"kind": "mhc", "iterations": 20, "eps": 1e-6, "code": "", "constrained": True, "transposed": False,
             "eps_kind": 0.0}  # fmt: skip
    made = {**operands(), **plain}
    if schema.name.endswith("post_collapse_backward"):
        made["g_out"] = made["y"]
    return [made[argument.name] for argument in schema.arguments]


OPERATORS = [
    *(getattr(torch.ops.mhc_rewrite, o).default for o in ("pre", "post", "boundary", "post_collapse", "sinkhorn")),
    *(getattr(torch.ops.mhc_rewrite, f"{o}_backward").default
      for o in ("pre", "post", "boundary", "post_collapse", "sinkhorn")),
    *(getattr(torch.ops.mhc_rewrite_cpu, o).default for o in ("pre", "post", "boundary")),
    *(getattr(torch.ops.mhc_rewrite_cpu, f"{o}_backward").default for o in ("pre", "post", "boundary")),
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operators_refuse_operands_on_different_devices(operator: Any) -> None:
    assert ops.pre_operator is not None and cpu.SOURCE.exists()  # what registers them
    given = arguments(operator._schema)
    tensors = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
    for place in tensors if len(tensors) > 1 else ():
        name = operator._schema.arguments[place].name
        one_away = [value.to("meta") if index == place else value for index, value in enumerate(given)]
        with pytest.raises(KernelError, match=rf"\b{name} on meta"):
            operator(*one_away)
    on_meta = [value.to("meta") if isinstance(value, Tensor) else value for value in given]
    made = operator(*on_meta)
    assert all(tensor.is_meta for tensor in ([made] if isinstance(made, Tensor) else made))


# -- offloading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ("cpu", "disk"))
def test_offloaded_by_accelerate(name: str, where: str, tmp_path: Path) -> None:
    model = converted(MODELS[name])
    want = call(model)
    if where == "cpu":
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, str(tmp_path), CPU)
    assert all(p.is_meta for _, p in oracle.site_parameters(model)), "nothing was offloaded"
    assert all(torch.equal(call(model), want) for _ in range(3))


def test_offloaded_in_parts_and_generating(tmp_path: Path) -> None:
    """A device map of accelerate's, with whole layers moved at once, and a cache."""
    model = converted(llama)
    want = model.generate(IDS, max_new_tokens=4, do_sample=False)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}  # fmt: skip
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert model.model.layers[2].mhc_0.phi.is_meta
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), want)


@pytest.mark.parametrize("name", ("stack", "gpt"))
def test_parameters_that_exist_only_while_their_module_is_called(name: str) -> None:
    """Any such library: a module's own parameters come before its forward, and go after it."""
    torch.manual_seed(0)
    build, x = {
        "stack": (lambda: Stack([PreNorm() for _ in range(3)]), features(2, 5, 16).float()),
        "gpt": (lambda: GPT(layers=2), torch.randint(0, 10, (2, 6))),
    }[name]
    model = mhcify(build(), (x,))
    oracle.perturb(model)
    with torch.no_grad():
        want = model(x)
        for module in model.modules():
            own = dict(module._parameters)

            def bring(module: nn.Module, args: Any, own: Any = own) -> None:
                module._parameters.update(own)

            def take(module: nn.Module, args: Any = None, result: Any = None, own: Any = own) -> None:
                module._parameters.update({n: nn.Parameter(p.to("meta")) for n, p in own.items() if p is not None})

            take(module)
            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(model(x), want)


# -- sharding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("recompute", (None, 1, 2))
@pytest.mark.parametrize("units", ("sites", "layers", "model"))
def test_fully_sharded(units: str, recompute: int | None, process_group: None) -> None:
    model = converted(llama, recompute=recompute)
    sharded = copy.deepcopy(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    for module in list(sharded.modules()):
        if isinstance(module, HyperConnection) and units == "sites":
            fully_shard(module)
    for layer in sharded.model.layers if units != "model" else ():
        fully_shard(layer)
    fully_shard(sharded)
    other = sharded(input_ids=IDS, labels=IDS).loss
    assert torch.equal(other, loss)
    other.backward()
    for (name, p), q in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.full_tensor()), name


# -- the meta device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_converted_on_the_meta_device(name: str) -> None:
    model = converted(MODELS[name])
    with accelerate.init_empty_weights():  # parameters alone: buffers that no state dict has are real
        empty = MODELS[name]().eval()
    mhcify(empty)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(call(empty), call(model))


@pytest.mark.parametrize("name", MODELS)
def test_materialised_and_started(name: str) -> None:
    """`to_empty`, the base model's weights, and the sites as they start."""
    torch.manual_seed(0)
    original = MODELS[name]().eval()
    with torch.device("meta"):
        empty = MODELS[name]().eval()
    mhcify(empty).to_empty(device="cpu")
    empty.load_state_dict(original.state_dict(), strict=False)
    for mine, other in zip(empty.buffers(), original.buffers(), strict=True):
        mine.copy_(other)
    for module in empty.modules():
        if isinstance(module, HyperConnection):
            module.reset_parameters()
    assert torch.allclose(call(empty), call(original), atol=1e-5)
