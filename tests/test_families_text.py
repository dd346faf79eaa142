"""Every text and speech family: its sites and streams, equality at initialisation, equality with an n-stream model
written by hand once the site parameters are perturbed, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from families_text import BY_NAME, LISTED, OTHERS, build
from family import Family, check_perturbed, check_preserve, check_structure, output, plan_streams, record, relative
from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import AlreadyConvertedError
from oracle import Params

families = pytest.mark.parametrize(
    "family", [*LISTED, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)], ids=str
)
listed = pytest.mark.parametrize("family", LISTED, ids=str)


@families
def test_sites_and_streams(family: Family, record_property: Callable[[str, object], None]) -> None:
    check_structure(family, record_property)


@families
def test_computes_the_original_function_at_initialisation(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    check_preserve(family, record_property)


@families
def test_perturbed_equals_the_model_written_by_hand(
    family: Family, record_property: Callable[[str, object], None]
) -> None:
    check_perturbed(family, record_property)


@listed
def test_example_inputs_are_derived(family: Family) -> None:
    """A transformers model needs no example: the same sites are found without one."""
    assert plan_streams(plan(family.model(torch.float32))) == family.streams


def test_lines_of_the_source() -> None:
    """A site points at the add in the modeling file."""
    family = BY_NAME["Llama"]
    first, second = plan(family.model(torch.float32), family.example(torch.float32)).sites[:2]
    for site in (first, second):
        assert site.source.file.endswith("modeling_llama.py")
        assert "residual + hidden_states" in site.source.text
    assert first.source.line < second.source.line


DEEPSEEK_V4: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "pad_token_id": 0,
}


def test_a_model_with_hyper_connections_of_its_own_is_refused(
    record_property: Callable[[str, object], None],
) -> None:
    model = build("DeepseekV4ForCausalLM", "DeepseekV4Config", **DEEPSEEK_V4)().eval()
    example = {"input_ids": torch.randint(3, 99, (2, 7))}
    before = model(**example).logits
    names = list(model.state_dict())
    with pytest.raises(AlreadyConvertedError, match=r"(?i)hyper-?connection"):
        mhcify(model, example)
    record(record_property, "DeepSeek-V4", sites="refused")
    assert list(model.state_dict()) == names
    assert torch.equal(model(**example).logits, before)


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX parallel", "BERT", "T5"])
def test_the_comparison_sees_miswired_streams(name: str) -> None:
    """Sites in another order, and streams that collapse and expand between layers, are far from the right outputs."""
    family = BY_NAME[name]
    args, kwargs = family.arguments()
    params = drawn(family)

    def run(params: dict[str, Params], spoil: Callable[[torch.nn.Module], None] = lambda model: None) -> torch.Tensor:
        model = family.oracle(family.model(), params)
        spoil(model)
        with torch.no_grad():
            return output(model(*args, **kwargs))

    def collapse_between_layers(model: torch.nn.Module) -> None:
        for stream in family.streams:
            for layer in model.get_submodule(re.split(r"\.\d+\b", stream[0])[0]):
                layer.register_forward_hook(lambda module, args, out: averaged(out))

    right = run(params)
    exchanged = dict(zip(params, reversed(params.values())))
    assert relative(run(exchanged), right) >= 0.01
    assert relative(run(params, collapse_between_layers), right) >= 0.01


def averaged(returned: Any) -> Any:
    """A layer's (B, T, n, C) with equal streams, the mean of what they were."""
    if isinstance(returned, tuple):
        return averaged(returned[0]), *returned[1:]
    return returned.mean(-2, keepdim=True).expand_as(returned) if returned.dim() == 4 else returned


def drawn(family: Family, n: int = 4, width: int = 32) -> dict[str, Params]:
    """Random parameters for every site of a family."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    names = dict.fromkeys(name for stream in family.streams for name in stream)
    k = n * n + 2 * n
    return {name: Params(normal(n * width, k) / (n * width) ** 0.5, 0.5 + normal(3).abs(), normal(k)) for name in names}
