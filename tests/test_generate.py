"""A converted transformers model is still that model: generation, caches, masks, collected outputs, checkpointing,
low precision, compilation."""

from __future__ import annotations

import copy
import re
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from families_text import BY_NAME, LISTED, MAMBA, MAMBA_2, build, speech, tokens
from family import Family, output, relative, seeded
from mhc_rewrite import mhcify
from oracle import perturb, site_names, site_parameters, site_params

pytestmark = pytest.mark.slow  # `make test-fast` answers within two minutes

GENERATING = ["GPT-2", "Llama", "T5", "Mamba", "Mixtral"]
SEQUENCES = ["GPT-2", "Llama", "Gemma-3", "OPT", "GPT-NeoX parallel", "Falcon parallel", "BERT", "Mixtral"]
COLLECTING = ["GPT-2", "Llama", "OPT", "GPT-J", "Falcon sequential", "Phi", "BERT", "T5", "Whisper", "Mamba"]
ATTENTIONS = ["GPT-2", "Llama", "GPT-J", "BERT", "T5", "Mixtral"]
CHECKPOINTED = ["GPT-2", "Llama", "GPT-NeoX parallel", "BERT", "T5", "Mixtral", "Mamba"]

NEW_TOKENS = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
}


def rows(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", [BY_NAME[name] for name in names], ids=str)


def converted(family: Family, dtype: torch.dtype = torch.float64, *, perturbed: bool) -> tuple[nn.Module, nn.Module]:
    """(original, converted)."""
    original = family.model(dtype)
    model = mhcify(copy.deepcopy(original), family.example(dtype))
    if perturbed:
        perturb(model, seed=zlib.crc32(family.name.encode()))
    return original, model


def generate(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    with seeded("generate"):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **(NEW_TOKENS | options))


def prompt_of(name: str) -> Tensor:
    with seeded("prompt " + name):
        return tokens(2, 6)


@rows(GENERATING)
def test_generates_the_same_tokens_at_initialisation(family: Family) -> None:
    original, model = converted(family, perturbed=False)
    prompt = prompt_of(family.name)
    for mode, options in MODES.items():
        assert torch.equal(generate(model, prompt, **options), generate(original, prompt, **options)), mode


@rows(GENERATING)
def test_generates_the_same_tokens_with_and_without_a_cache_when_perturbed(family: Family) -> None:
    original, model = converted(family, perturbed=True)
    prompt = prompt_of(family.name)
    with_cache, without = (generate(model, prompt, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, generate(original, prompt)), "the perturbation does not show in the tokens"


def test_whisper_generates_the_same_tokens() -> None:
    original, model = converted(BY_NAME["Whisper"], perturbed=False)
    with seeded("speech"):
        features = speech()["input_features"].double()
    got, want = (
        m.generate(input_features=features, max_new_tokens=6, do_sample=False, return_timestamps=False)
        for m in (model, original)
    )
    assert torch.equal(got, want)


@rows(SEQUENCES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 12)], ids=str)
def test_any_batch_and_length(family: Family, shape: tuple[int, int]) -> None:
    """Each row of a perturbed batch equals that row alone: nothing of the example's shape is baked in."""
    original, model = converted(family, perturbed=False)
    with seeded("batch"):
        batch = tokens(*shape)
    with torch.no_grad():
        assert relative(output(model(batch)), output(original(batch))) <= 1e-10
        perturb(model)
        whole = output(model(batch))
        for row in range(shape[0]):
            assert relative(output(model(batch[row : row + 1])), whole[row : row + 1]) <= 1e-9


@rows(SEQUENCES)
def test_padding_mask(family: Family) -> None:
    """Right padding that the mask hides changes nothing: perturbed, a padded row equals the row without padding."""
    original, model = converted(family, perturbed=False)
    with seeded("batch"):
        batch = tokens(2, 9)
    mask = torch.ones_like(batch)
    mask[1, 6:] = 0
    with torch.no_grad():
        want, got = (output(m(batch, attention_mask=mask)) for m in (original, model))
        assert relative(got[mask.bool()], want[mask.bool()]) <= 1e-10
        perturb(model)
        padded = output(model(batch, attention_mask=mask))[1:, :6]
        assert relative(padded, output(model(batch[1:, :6]))) <= 1e-9


@rows([family.name for family in LISTED if family.name not in ("BERT", "T5", "Whisper")])
def test_with_and_without_a_cache(family: Family) -> None:
    """A perturbed model that reads its prompt in two pieces through the cache computes what it does in one."""
    _, model = converted(family, perturbed=True)
    with seeded("batch"):
        batch = tokens(2, 8)
    cache = "cache_params" if "Mamba" in family.name else "past_key_values"
    with torch.no_grad():
        whole = output(model(batch, use_cache=False))
        pieces = []
        past = None
        for start, stop in ((0, 6), (6, 7), (7, 8)):
            result = model(batch[:, start:stop], use_cache=True, **({cache: past} if past is not None else {}))
            past = getattr(result, cache)
            pieces.append(result.logits)
    # Norms and scans of some models run in fp32 inside an fp64 model, the cached ones in another order.
    assert relative(torch.cat(pieces, 1), whole) <= 1e-5


@rows(COLLECTING)
def test_hidden_states_have_the_original_shape(family: Family) -> None:
    """Collected entries are the mean of the streams: the first and the last one of a perturbed model are what went in
    and what came out."""
    original, model = converted(family, perturbed=False)
    args, kwargs = family.arguments()
    kwargs["output_hidden_states"] = True
    with torch.no_grad():
        want, same = original(*args, **kwargs), model(*args, **kwargs)
        perturb(model)
        moved = model(*args, **kwargs)
    fields = [field for field in want if "hidden_states" in field]
    assert fields
    for field in fields:
        assert len(same[field]) == len(moved[field]) == len(want[field]) > 2
        for index, (mine, theirs) in enumerate(zip(same[field], want[field], strict=True)):
            assert relative(mine, theirs) <= 1e-10, (field, index)
        for mine, theirs in zip(moved[field], want[field], strict=True):
            assert mine.shape == theirs.shape
        # Mamba collects what its layers return, not what they receive.
        if "Mamba" not in family.name and "decoder" not in field:
            assert relative(moved[field][0], want[field][0]) <= 1e-12
        assert relative(moved[field][-1], want[field][-1]) >= 0.1
    if fields == ["hidden_states"] and family.name != "BERT":
        # Mamba's logits are fp32.
        logits = model.get_output_embeddings()(moved.hidden_states[-1]).detach()
        assert relative(logits, moved.logits) <= 1e-6


@rows(COLLECTING)
def test_hidden_states_are_the_means_of_the_streams(family: Family) -> None:
    """Perturbed, the entries equal the mean of what the layers of the model written by hand pass on."""
    original, model = converted(family, perturbed=True)
    by_hand = family.oracle(original, params_of(model))
    seen: dict[str, list[Tensor]] = {}
    for stream in family.streams:
        layers = re.split(r"\.\d+\b", stream[0])[0]
        seen[layers] = []
        for layer in by_hand.get_submodule(layers):
            layer.register_forward_hook(lambda module, args, out, at=seen[layers]: at.append(state_of(out)))
    args, kwargs = family.arguments()
    with torch.no_grad():
        by_hand(*args, **kwargs)
        collected = model(*args, **kwargs, output_hidden_states=True)
    fields = ["encoder_hidden_states", "decoder_hidden_states"] if len(seen) == 2 else ["hidden_states"]
    for field, states in zip(fields, seen.values(), strict=True):
        entries = collected[field] if "Mamba" in family.name else collected[field][1:]
        # The last entry is taken behind the final norm.
        for entry, state in zip(entries[: len(states) - 1], states):
            assert relative(entry, state) <= 1e-9


def params_of(model: nn.Module) -> dict[str, Any]:
    state = model.state_dict()
    return {name: site_params(state, name) for name in site_names(state)}


def state_of(returned: Any) -> Tensor:
    """What a layer written by hand passes on, as the mean of its streams (B, T, n, C) -> (B, T, C)."""
    state = returned[0] if isinstance(returned, tuple) else returned
    return state.mean(-2) if state.dim() == 4 else state


@rows(ATTENTIONS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_attentions(family: Family, grad: bool) -> None:
    """A call that the conversion did not see: what it collects is collected once."""
    original = family.model()
    original.set_attn_implementation("eager")
    model = mhcify(copy.deepcopy(original), family.example())
    args, kwargs = family.arguments()
    with torch.set_grad_enabled(grad):
        want, same = (m(*args, **kwargs, output_attentions=True) for m in (original, model))
        perturb(model)
        moved = model(*args, **kwargs, output_attentions=True)
    fields = [field for field in want if "attentions" in field]
    assert fields
    for field in fields:
        assert len(want[field]) == len(same[field]) == len(moved[field])
        for mine, theirs, far in zip(same[field], want[field], moved[field], strict=True):
            assert relative(mine, theirs) <= 1e-9
            assert far.shape == theirs.shape


@rows(CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(family: Family) -> None:
    _, model = converted(family, perturbed=True)
    model.train()
    plain = gradients(model, family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model, family)
    assert plain.keys() == checkpointed.keys()
    assert any(name.endswith(".phi") for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-9, atol=1e-12), name


def gradients(model: nn.Module, family: Family) -> dict[str, Tensor]:
    args, kwargs = family.arguments()
    # Dropout is on: the same masks have to be drawn, and drawn again where a layer is recomputed.
    with seeded("dropout"):
        return gradients_of(model, output(model(*args, **kwargs)))


def gradients_of(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    result.pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@rows(["GPT-2", "Llama", "Gemma-2", "BERT", "T5", "Mixtral", "Mamba"])
@pytest.mark.parametrize("cast", ["to", "bfloat16"])
def test_bfloat16_keeps_the_sites_in_fp32(family: Family, cast: str) -> None:
    original, model = converted(family, torch.float32, perturbed=False)
    original = original.to(torch.bfloat16)
    model = model.to(torch.bfloat16) if cast == "to" else model.bfloat16()
    args, kwargs = family.arguments(torch.bfloat16)
    with torch.no_grad():
        got, want = output(model(*args, **kwargs)), output(original(*args, **kwargs))
    assert {p.dtype for _, p in site_parameters(model)} == {torch.float32}
    ours = {name for name, _ in site_parameters(model)}
    assert {p.dtype for name, p in model.named_parameters() if name not in ours} == {torch.bfloat16}
    assert got.dtype == want.dtype
    # A rounding of bf16 here and there, through three layers.
    assert relative(got.float(), want.float()) <= 0.1
    output(model(*args, **kwargs)).float().pow(2).mean().backward()
    assert {p.grad.dtype for _, p in site_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Mamba", "Mamba-2"])
def test_a_trunk_in_fp32_beside_branches_in_bfloat16(name: str, dtype: torch.dtype) -> None:
    """`residual_in_fp32`, Mamba's default."""
    fields = MAMBA | MAMBA_2 if name == "Mamba-2" else MAMBA
    kind = name.replace("-", "")
    original = build(f"{kind}ForCausalLM", f"{kind}Config", **(fields | {"residual_in_fp32": True}))().to(dtype).eval()
    with seeded("batch"):
        batch = tokens()
    model = mhcify(copy.deepcopy(original), {"input_ids": batch})
    with torch.no_grad():
        want, got = (m(batch, output_hidden_states=True) for m in (original, model))
    assert [state.dtype for state in got.hidden_states] == [state.dtype for state in want.hidden_states]
    assert relative(got.logits, want.logits) <= (1e-5 if dtype == torch.float32 else 0.05)


class Container(nn.Module):
    """A model whose own forward holds the adds, and returns what transformers' models return."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> BaseModelOutput:
        for block in self.blocks:
            x = x + block(x)
        return BaseModelOutput(last_hidden_state=x)


def test_a_model_output_stays_one() -> None:
    x = torch.randn(2, 5, 8)
    original = Container()
    model = mhcify(copy.deepcopy(original), {"x": x})
    result = model(x)
    assert type(result) is BaseModelOutput
    assert relative(result[0].detach(), original(x).last_hidden_state.detach()) <= 1e-5
    assert result.last_hidden_state is result[0] and result.hidden_states is None


@pytest.mark.slow
@rows(["GPT-2", "Llama"])
def test_compiled_without_a_graph_break(family: Family) -> None:
    # Two layers, two streams and three iterations: compile time is that of the unrolled coefficients.
    original = family.model(torch.float32)
    stack = original.get_submodule(family.streams[0][0].rpartition(".")[0].rpartition(".")[0])
    del stack[2:]
    original.config.num_hidden_layers = 2
    model = mhcify(original, family.example(torch.float32), n_streams=2, sinkhorn_iterations=3)
    perturb(model)
    args, kwargs = family.arguments(torch.float32)
    kwargs["use_cache"] = False
    want = output(model(*args, **kwargs))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = output(compiled(*args, **kwargs))
    assert relative(got.detach(), want.detach()) <= 1e-4

    eager = gradients_of(model, want)
    traced = gradients_of(model, got)
    for name, gradient in eager.items():
        assert float((traced[name] - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), 1e-3), name
