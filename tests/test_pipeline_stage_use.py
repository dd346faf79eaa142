"""Stages of pipelines in use: models of transformers, what else passes, hooks, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handmade.common import VOCABULARY, WIDTH, PreNorm, Stack, features, prenorm_by_hand
from mhc_rewrite import HyperConnection, mhcify, report, unmhcify
from mhc_rewrite.distributed import pipeline_stage
from mhc_rewrite.errors import MHCError, StreamError, UnsupportedModelError
from oracle import Streams, perturb
from stages import Decoder, Embedded, cut, grads, in_stages

TOKENS = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1.0, 1, 0, 1, 1], [1, 1, 1, 0, 0]])
LAYERS = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm", "output"]]


def decoder(*example: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = mhcify(Decoder(), (TOKENS, *example), **options)
    perturb(model)
    return model


def loss(out: Any) -> Tensor:
    first = out if isinstance(out, Tensor) else out[0]
    return (first.double() * torch.arange(first.shape[-1]).cos()).exp().mean()


def test_against_streams_by_hand() -> None:
    """Not against the converted model alone, which might be wrong in the same way."""
    torch.manual_seed(0)
    model: Any = Stack([PreNorm() for _ in range(3)]).double()
    x = features(2, 5, WIDTH)
    plain = copy.deepcopy(model)
    mhcify(model, (x,))
    perturb(model)
    hand = Streams(dict(model.named_parameters()), 4)
    X = hand.expand(x)
    for number, layer in enumerate(plain.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
    want = loss(plain.norm(hand.collapse(X)))
    got, passed = in_stages(cut(model, [["layers.0"], ["layers.1"], ["layers.2", "norm"]], (x,)), (x,), {}, loss)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)
    X = prenorm_by_hand(plain.layers[0], hand, "layers.0", hand.expand(x))
    torch.testing.assert_close(passed[0][0].detach(), X.detach(), rtol=1e-12, atol=1e-14)


# -- transformers ------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64, "num_attention_heads": 4}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation="eager"))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, tie_word_embeddings=False))


OF_TRANSFORMERS: dict[str, tuple[Callable[[], Any], list[list[str]], list[str]]] = {
    "llama": (
        llama,
        [["model.embed_tokens", "model.layers.0"], ["model.layers.1"], ["model.layers.2", "model.norm", "lm_head"]],
        ["attention_mask"]),
    "gpt2": (
        gpt2,
        [["transformer.wte", "transformer.wpe", "transformer.h.0"], ["transformer.h.1"],
         ["transformer.h.2", "transformer.ln_f", "lm_head"]],
        ["attention_mask", "input_ids"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_transformers(kind: str) -> None:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    build, parts, needed = OF_TRANSFORMERS[kind]
    torch.manual_seed(0)
    model = build().double().eval()
    registry = dict(_CAN_RECORD_REGISTRY)
    tokens = torch.randint(64, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    example = {"input_ids": tokens, "attention_mask": mask, "use_cache": False, "return_dict": False}
    mhcify(model, example)
    perturb(model)
    want = loss(model(**example))
    want.backward()
    gradients = {name: g.clone() for name, g in grads(model).items()}
    model.zero_grad()
    stages = cut(model, parts, example)
    assert dict(_CAN_RECORD_REGISTRY) == registry  # a dict whose class gives what is put into it another key
    assert isinstance(getattr(stages[1], parts[0][0].split(".")[0]), nn.Module)
    for name in needed:  # an error says which are missing, and the advice works
        given = {key: example[key] for key in needed if key != name}
        with pytest.raises(StreamError, match=rf"needs .*{name}.*schedule\.step\(\.\.\., .*{name}={name}"):
            stages[1](torch.zeros(2, 6, 4, 32, dtype=torch.float64), **given)
    value, _ = in_stages(stages, (tokens,), {name: example[name] for name in needed}, loss)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=0)
    for name, its in gradients.items():
        torch.testing.assert_close(grads(model)[name], its, rtol=1e-10, atol=1e-14, msg=name)
    with pytest.raises(StreamError, match="one microbatch"):
        stages[0](tokens[:, :4], attention_mask=mask[:, :4])
    if kind == "llama":  # whose mask is made in the dtype of the trunk, and added
        with pytest.raises(StreamError, match=r"model.to\(torch.bfloat16\) before it"):
            stages[1](torch.zeros(2, 6, 4, 32), attention_mask=mask)


def test_another_dtype_where_nothing_is_made_in_one() -> None:
    """A policy of mixed precision comes behind the cut."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    example = {"input_ids": torch.randint(64, (2, 6)), "use_cache": False, "return_dict": False}
    mhcify(model, example)
    perturb(model)
    stages = cut(model, OF_TRANSFORMERS["llama"][1], example)
    model.to(torch.bfloat16)
    found: Any = example["input_ids"]
    for stage in stages:
        found = stage(found)
    torch.testing.assert_close(found[0], model(**example)[0], rtol=0, atol=0)


# -- in use ------------------------------------------------------------------------------------------------------------


def test_a_stage_lives_without_the_model() -> None:
    model = decoder()
    want = model(TOKENS)
    stages = cut(model, LAYERS, (TOKENS,))
    names = {name for name, _ in model.named_parameters()}
    del model
    found: Any = TOKENS
    for stage in stages:
        found = stage(found)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert {name for stage in stages for name, _ in stage.named_parameters()} == names
    assert [name for stage in stages for name, _ in stage.named_buffers()] == ["freqs"] * 3
    assert not any("freqs" in stage.state_dict() for stage in stages)
    assert len(stages[1].layers) == 2 and set(stages[1].layers) == {"1", "2"}


def test_hooks_on_the_last_layer_of_a_stage() -> None:
    """FSDP and others wait for the gradient of what a layer returned."""
    stages = cut(decoder(), LAYERS, (TOKENS,))
    seen: list[torch.Size] = []

    def watch(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda gradient: seen.append(gradient.shape))

    stages[0].get_submodule("layers.0").register_forward_hook(watch)
    in_stages(stages, (TOKENS,), {}, loss)
    assert seen == [(2, 5, WIDTH)]


def test_other_sizes_where_the_forward_asks_for_none() -> None:
    model = decoder()
    stages = cut(model, LAYERS, (TOKENS,))
    tokens = TOKENS[:1, :3]
    found: Any = tokens
    for stage in stages:
        found = stage(found)
    torch.testing.assert_close(found, model(tokens), rtol=0, atol=0)


def test_a_schedule_that_the_forward_reads() -> None:
    class Warm(Decoder):
        gain = 1.0

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(tokens, mask) * self.gain

    model: Any = mhcify(Warm(), (TOKENS,))
    stages = cut(model, LAYERS, (TOKENS,))
    stages[0](TOKENS)
    model.gain = 2.0
    with pytest.raises(StreamError, match="has changed since"):
        stages[0](TOKENS)


def test_no_gradient_is_kept_from_frozen_parts() -> None:
    model = decoder()
    for name, p in model.named_parameters():
        p.requires_grad_("mhc_" in name)
    want = loss(model(TOKENS))
    want.backward()
    gradients = {name: g.clone() for name, g in grads(model).items()}
    model.zero_grad()
    in_stages(cut(model, LAYERS, (TOKENS,)), (TOKENS,), {}, loss)
    for name, its in gradients.items():
        torch.testing.assert_close(grads(model)[name], its)
    assert grads(model).keys() == gradients.keys()


# -- refused -----------------------------------------------------------------------------------------------------------


def tied() -> Any:
    model = Decoder()
    model.output.weight = model.tok_embeddings.weight
    return mhcify(model, (TOKENS,))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, int, str]] = {
    "not converted": (Decoder, LAYERS, 0, r"Decoder is not converted; mhcify\(model\)"),
    "no such stage": (decoder, LAYERS, 3, "no stage 3 of 3; the first one is 0"),
    "an empty stage": (decoder, [LAYERS[0], []], 0, "Stage 1 of Decoder names no module"),
    "no such module": (decoder, [["embed"], ["layers"]], 0, "no module 'embed', which is in stage 0"),
    "a part of a layer": (
        decoder, [*LAYERS[:1], ["layers.1.attn"], *LAYERS[2:]], 0,
        "'layers.1.attn', in stage 1, is a part of 'layers.1'.*calls as a whole.*may have: tok_embeddings, layers.0"),
    "a layer forgotten": (
        decoder, [LAYERS[0], ["layers.1"], LAYERS[2]], 0, "calls 'layers.2', which is in no stage"),
    "a layer twice": (
        decoder, [LAYERS[0], [*LAYERS[1], "layers.3"], LAYERS[2]], 0, "'layers.3', which is named more than once"),
    "out of order": (
        decoder, [["tok_embeddings", "layers.1"], ["layers.0", "layers.2"], LAYERS[2]], 1,
        "'layers.1', of stage 0, is called behind 'layers.0', of stage 1"),
    "tied": (tied, LAYERS, 0, "'tok_embeddings.weight' is also 'output.weight'.*Untie them"),
    "called at no time": (
        lambda: mhcify(unused(), (TOKENS,)), [["tok_embeddings", "spare"], ["layers", "norm", "output"]], 0,
        "does not call 'spare'"),
}  # fmt: skip


def unused() -> Any:
    model: Any = Decoder()
    model.spare = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    build, layers, index, words = REFUSED[kind]
    with pytest.raises(MHCError, match=f"(?s){words}"):
        pipeline_stage(build(), layers, index, (TOKENS,))


def test_caches_can_not_pass() -> None:
    model = llama()
    example = {"input_ids": torch.randint(64, (2, 6)), "return_dict": False}
    mhcify(model, example)
    with pytest.raises(UnsupportedModelError, match="use_cache=False"):
        pipeline_stage(model, OF_TRANSFORMERS["llama"][1], 1, example)


def test_what_comes_in_is_held_to_its_form() -> None:
    stages = cut(decoder(MASK), LAYERS, (TOKENS, MASK))
    with pytest.raises(StreamError, match=r"n streams \(2, 5, 4, 16\).*got \(2, 5, 16\)"):
        stages[1](torch.zeros(2, 5, WIDTH), mask=MASK)
    with pytest.raises(StreamError, match=r"got 2 positional.*by name"):
        stages[1](torch.zeros(2, 5, 4, WIDTH), MASK)
    with pytest.raises(StreamError, match="'mask' is None in this call and was a Tensor"):
        stages[1](torch.zeros(2, 5, 4, WIDTH), mask=None)
    with pytest.raises(StreamError, match=r"needs 'mask'.*schedule\.step\(\.\.\., mask=mask\)"):
        stages[1](torch.zeros(2, 5, 4, WIDTH))


TAKEN_OUT: dict[str, Callable[[Any], Any]] = {
    "deleted": lambda model: model.layers.pop("3"),
    "an identity in its place": lambda model: model.layers.update({"3": nn.Identity()}),
    "all that others have": lambda model: (
        [model.layers.pop(k) for k in "01"],
        setattr(model, "tok_embeddings", None),
        setattr(model, "norm", None),
    ),
}


@pytest.mark.parametrize("how", TAKEN_OUT)
def test_layers_that_were_taken_out_of_a_copy(how: str) -> None:
    whole = decoder()
    model = copy.deepcopy(whole)
    TAKEN_OUT[how](model)
    with pytest.raises(StreamError, match=re.escape("pipeline_stage(model, layers, index)")):
        model(TOKENS)
    whole(TOKENS)
    if how == "deleted":
        for site in (module for module in model.modules() if isinstance(module, HyperConnection)):
            site.reset_parameters()
        unmhcify(model)(TOKENS)


def test_wrapped_layers_are_not_taken_out() -> None:
    model = decoder()

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

        def values(self) -> Any:
            return self.inner.values()  # type: ignore[operator]

    want = model(TOKENS)
    model.layers["1"] = Wrapper(model.layers["1"])
    torch.testing.assert_close(model(TOKENS), want, rtol=0, atol=0)
    model.layers = Wrapper(model.layers)
    torch.testing.assert_close(model(TOKENS), want, rtol=0, atol=0)


def test_the_streams_of_a_cut_differ() -> None:
    """Streams that are collapsed and expanded at a cut are equal: what passes here is not."""
    model = mhcify(Embedded(), (TOKENS,))
    perturb(model)
    parts = [["tok", "layers.0"], ["layers.1", "layers.2", "layers.3", "head"]]
    sent = pipeline_stage(model, parts, 0, (TOKENS,))(TOKENS)[-1]
    assert float((sent - sent.mean(-2, keepdim=True)).abs().max()) > 0.1


def test_a_compiled_stage() -> None:
    """As one graph, streams in and out."""
    stage = pipeline_stage(decoder(), LAYERS, 1, (TOKENS,))
    x = torch.randn(2, 5, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (stage, torch.compile(stage, backend="aot_eager", fullgraph=True)):
        stage.zero_grad()
        given = x.clone().requires_grad_()
        out = run(given)
        (out * torch.arange(WIDTH).cos()).exp().mean().backward()
        results.append([out, given.grad, *grads(stage).values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_and_reports() -> None:
    stages = cut(decoder(), LAYERS, (TOKENS,))
    copies = copy.deepcopy(stages)
    torch.testing.assert_close(copies[1](stages[0](TOKENS)), stages[1](stages[0](TOKENS)), rtol=0, atol=0)
    assert copies[0].get_parameter("layers.0.mhc_0.phi") is not stages[0].get_parameter("layers.0.mhc_0.phi")
    assert [str(report(stage)).split(":")[1].split(" in")[0] for stage in stages] == [
        " 2 sites",
        " 4 sites",
        " 2 sites",
    ]


def test_the_wire_in_bf16() -> None:
    """Three cuts of eight layers, as docs/distributed.md has it: half the bytes, and this much of the gradients."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (8, 16))
    model: Any = mhcify(Decoder(8), (tokens,))
    perturb(model)
    loss(model(tokens)).backward()
    want = {name: g.clone() for name, g in grads(model).items()}
    model.zero_grad()
    layers = [[f"layers.{k}", f"layers.{k + 1}"] for k in (0, 2, 4, 6)]
    stages = cut(model, [["tok_embeddings", *layers[0]], *layers[1:3], [*layers[3], "norm", "output"]], (tokens,))
    for stage in stages[:-1]:
        stage.register_forward_hook(lambda _, given, out: out.bfloat16())
    for stage in stages[1:]:
        stage.register_forward_pre_hook(lambda _, given: tuple(x.float() for x in given))
    _, passed = in_stages(stages, (tokens,), {}, loss)
    assert {(x.dtype, x.grad.dtype, x.shape[-2:]) for sent in passed for x in sent if x.grad is not None} == {
        (torch.bfloat16, torch.bfloat16, (4, WIDTH))
    }
    norm = float(torch.stack([g.norm() for g in want.values()]).norm())
    off = {name: float((grads(model)[name] - its).norm()) for name, its in want.items()}
    assert 1e-5 < float(torch.tensor(list(off.values())).norm()) / norm < 5e-4
    assert max(off[name] / float(its.norm()) for name, its in want.items() if float(its.norm()) > 1e-3 * norm) < 3e-3
