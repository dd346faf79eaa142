"""Converted models in the hands of trainers: optimizer groups, Trainer, adapters, compiled steps, averages."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import oracle
from handmade.common import PreNorm, Stack, features
from mhc_rewrite import HyperConnection, lowering, mhcify, modules_to_save, parameter_groups, torch_private
from mhc_rewrite.errors import StreamError
from mhc_rewrite.hf import MHCTrainer

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=64, num_key_value_heads=2, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "bert": lambda: BertModel(BertConfig(**SMALL, vocab_size=64)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    ),
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)),
}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, weight_decay=0.1, learning_rate=1e-3, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    return TrainingArguments(**{**settings, **more})


def padded() -> list[dict[str, Tensor]]:
    mask = torch.ones_like(IDS)
    mask[::2, :2] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(IDS, mask)]


def sites(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(oracle.site_parameters(model))


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_groups_spare_what_trainer_spares(name: str, tmp_path: Path) -> None:
    model = mhcify(MODELS[name]())
    trainer = Trainer(model=model, args=arguments(tmp_path))
    names = set(dict(model.named_parameters())) - set(sites(model))  # Trainer has tied parameters under all names
    decayed = set(trainer.get_decay_parameter_names(model)) & names
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, lr=1e-4, site_lr=1e-2)}
    ids = {id(p) for p in groups["weights"]["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in ids} == decayed
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1, "norms and biases": 0.0, "phi": 0.0, "alpha and bias": 0.0,
    }  # fmt: skip
    assert [group["lr"] for group in groups.values()] == [1e-4, 1e-4, 1e-2, 1e-2]
    assert all(p.dim() == 2 for p in groups["phi"]["params"])
    of_sites = {id(p) for p in (*groups["phi"]["params"], *groups["alpha and bias"]["params"])}
    assert of_sites == {id(p) for p in sites(model).values()}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_groups_hold_what_is_trained_alone() -> None:
    model = mhcify(llama())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert [group["name"] for group in parameter_groups(adapted, 0.1)] == ["weights"]  # LoRA's, and "lr" of nobody
    assert "lr" not in parameter_groups(adapted, 0.1)[0]
    adapted = peft.get_peft_model(
        mhcify(llama()), peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["mhc_0", "mhc_1"])
    )
    groups = {group["name"]: group["params"] for group in parameter_groups(adapted, 0.1)}
    assert {name: len(params) for name, params in groups.items()} == {"weights": 4, "phi": 4, "alpha and bias": 8}
    assert all(p.requires_grad for params in groups.values() for p in params)


def test_groups_in_timm() -> None:
    model = mhcify(Stack([PreNorm() for _ in range(2)]), (features(2, 5, 16).float(),))
    optimizer = create_optimizer_v2(parameter_groups(model, 0.05, site_lr=1e-2), opt="adamw", lr=1e-3)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        (0.05, 1e-3), (0.0, 1e-3), (0.0, 1e-2), (0.0, 1e-2),
    ]  # fmt: skip


# -- Trainer -----------------------------------------------------------------------------------------------------------


def moved_by_decay(trainer: Trainer) -> set[str]:
    """The parameters that a step with gradients of zero moves."""
    optimizer = trainer.create_optimizer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("site_lr", (None, 1e-2))
def test_trainer_leaves_sites_alone(site_lr: float | None, tmp_path: Path) -> None:
    model = mhcify(llama())
    oracle.perturb(model)  # what is zero does not decay
    plain = moved_by_decay(Trainer(model=copy.deepcopy(model), args=arguments(tmp_path)))
    trainer = MHCTrainer(model=model, args=arguments(tmp_path), site_lr=site_lr)
    assert moved_by_decay(trainer) == plain - set(sites(model))
    assert plain & set(sites(model)), "Trainer by itself decays them"
    ids = {id(p) for p in sites(model).values()}
    rates = {group["lr"] for group in trainer.optimizer.param_groups for p in group["params"] if id(p) in ids}
    assert rates == {site_lr or 1e-3}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(list(model.parameters()))


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    """As one run: the sites' learning rate, the optimizer's state and the best model at the end come back."""

    def run(steps: int, resume: bool = False) -> nn.Module:
        model = mhcify(llama())
        args = arguments(tmp_path / str(resume), max_steps=4, save_strategy="steps", save_steps=2, seed=1)
        trainer = MHCTrainer(model=model, args=args, train_dataset=padded(), site_lr=1e-2)
        if resume:
            checkpoint = tmp_path / "False" / "checkpoint-2"
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            trainer.train()
        assert trainer.state.global_step == steps
        return model

    whole = run(4)
    resumed = run(4, resume=True)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.allclose(one, other, atol=1e-7), name
    assert any(not torch.equal(p, q) for p, q in zip(sites(whole).values(), sites(mhcify(llama())).values()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("inductor", "mhc"))
@pytest.mark.long
def test_trainer_compiles_with_padding(backend: str, tmp_path: Path) -> None:
    """A mask, and `num_items_in_batch`: calls that no eager one has shown."""
    if backend not in torch._dynamo.list_backends(exclude_tags=()):  # in a checkout that is not installed
        torch._dynamo.register_backend(lowering.mhc, name="mhc")
    losses = []
    for options in ({}, {"torch_compile_backend": backend}):
        model = mhcify(llama())
        trainer = MHCTrainer(model=model, args=arguments(tmp_path, seed=1, **options), train_dataset=padded())
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- what came before --------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_is_named() -> None:
    model = Stack([PreNorm() for _ in range(2)])
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="AdamW was made before the conversion.*parameter_groups"):
        mhcify(model, (features(2, 5, 16).float(),))
    del optimizer
    other = Stack([PreNorm() for _ in range(2)])
    torch.optim.AdamW(other.parameters())  # which nobody holds
    kept = torch.optim.AdamW(model.parameters())  # another model's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mhcify(other, (features(2, 5, 16).float(),))
    assert kept is not None


def test_an_adapter_made_before_is_named() -> None:
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.warns(UserWarning, match=r"modules_to_save=mhc_rewrite.modules_to_save\(model\)"):
        mhcify(adapted, {"input_ids": IDS})


def test_sites_in_an_adapter(tmp_path: Path) -> None:
    """The advice: the sites are trained and saved with the adapter, and come back with it."""
    model = mhcify(llama())
    assert modules_to_save(model) == ["mhc_0", "mhc_1"]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=modules_to_save(model))
    )
    oracle_of = [m for n, m in adapted.named_modules() if isinstance(m, HyperConnection) and "modules_to_save" in n]
    with torch.no_grad():
        for number, module in enumerate(oracle_of):
            module.phi.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
            module.alpha.fill_(1.0)
    want = adapted(input_ids=IDS).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mhcify(llama()), tmp_path)
    assert torch.allclose(again(input_ids=IDS).logits, want, atol=1e-6)
    assert not torch.allclose(mhcify(llama())(input_ids=IDS).logits, want, atol=1e-3)


ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters_leave_sites_alone(name: str, tmp_path: Path) -> None:
    """They train beside sites that have learned, which stay as they are, and come back onto the same base."""
    base = mhcify(llama())
    oracle.perturb(base)
    fresh, before = copy.deepcopy(base), {n: p.clone() for n, p in sites(base).items()}
    adapted = peft.get_peft_model(base, ADAPTERS[name]())
    first = adapted(input_ids=IDS).logits.detach()
    Trainer(model=adapted, args=arguments(tmp_path, learning_rate=0.1), train_dataset=padded()).train()
    assert all(torch.equal(before[n], p) and not p.requires_grad for n, p in sites(base).items())
    want = adapted.eval()(input_ids=IDS).logits
    assert not torch.allclose(first, want, atol=1e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=IDS).logits, want)


# -- compiled ----------------------------------------------------------------------------------------------------------


class Memory:
    """A cache of a kind of its own, made during the call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Any] = {"count": 0}


class Mixer(nn.Module):
    """What the block does with what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        y = self.linear(x).tanh()
        if memory is not None:
            memory.seen.append(y)
            memory.by_name["count"] += 1
            y = y + sum(memory.seen) / memory.by_name["count"]
        return y


class Manifold(nn.Module):
    """A layer with many ways to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(16), Mixer(), nn.Linear(16, 16)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Memory | None = None, scale: float = 1.0,
        mode: str = "plain", extra: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        y = self.mixer(self.norm(x), memory)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0.0)
        x = x + y * scale
        z = self.mlp(self.norm(x)).relu() if mode == "plain" else self.mlp(self.norm(x)).sigmoid()
        return x + (z if extra is None else z * extra["gains"][0])


class Caller(nn.Module):
    """Passes on what it is told, and makes the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Manifold() for _ in range(3)])

    def forward(self, x: Tensor, remember: bool = False, **options: Any) -> Tensor:
        memory = Memory() if remember else None
        for layer in self.layers:
            x = layer(x, memory=memory, **options)
        return x


WAYS = {
    "mask": lambda: {"mask": torch.tensor([[True, True, False, True, False]] * 2)},
    "number": lambda: {"scale": 0.5},
    "text": lambda: {"mode": "other"},
    "containers": lambda: {"extra": {"gains": [torch.full((16,), 0.5)]}},
    "object made inside": lambda: {"remember": True},
    "all": lambda: {"scale": 0.25, "mode": "other", "remember": True, "mask": torch.ones(2, 5, dtype=torch.bool)},
}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("way", WAYS)
def test_a_new_kind_of_call_compiles_whole(way: str, training: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mhcify(Caller(), (torch.randn(2, 5, 16),)).train(training)
    oracle.perturb(model)
    eager, kwargs = copy.deepcopy(model), WAYS[way]()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (5, 7) if "mask" not in kwargs else (5, 5):  # sizes become free at the second
        x = torch.randn(2, length, 16)
        got, want = compiled(x, **kwargs), eager(x, **kwargs)
        assert torch.allclose(got, want, atol=1e-6)
        got.square().sum().backward()
        want.square().sum().backward()
        assert not torch.allclose(want, eager(x), atol=1e-3), "this way of calling changes nothing"
    for (name, one), other in zip(model.named_parameters(), eager.parameters()):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
    assert torch.allclose(model(x, **kwargs), want, atol=1e-6), "and eager calls go on"


def test_where_dynamo_has_no_value_the_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning, and once: the next compilation knows the call. A whole graph is refused with the way out."""

    def no_value(self: Any, tracked: Any) -> Any:
        raise torch_private._NoStandIn("this has no value")

    monkeypatch.setattr(torch_private._StandIns, "_tensor", no_value)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = mhcify(Caller(), (torch.randn(2, 5, 16),)).eval(), torch.randn(2, 5, 16)
    oracle.perturb(model)
    want = copy.deepcopy(model)(x, scale=0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call the model so once without torch\.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(x, scale=0.5)
    with pytest.warns(UserWarning, match="graph breaks.*this has no value"):
        assert torch.allclose(torch.compile(model, backend="eager")(x, scale=0.5), want, atol=1e-6)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x, scale=0.5), want, atol=1e-6)


class Optional(nn.Module):
    """A layer whose second residual add the example does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = x + self.first(x).tanh()
        return x + self.second(x).tanh() if twice else x


def test_what_can_not_be_captured_says_so_in_compiled_code() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 5, 16)
    model = mhcify(Stack(layers := [Optional() for _ in range(2)]), (x,))
    assert len(layers) == 2
    for layer in layers:
        with pytest.raises(StreamError, match="runs residual adds that the example inputs did not"):
            torch.compile(layer, backend="eager")(x, twice=True)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("kwargs", ({}, {"use_cache": True}, {"labels": IDS, "num_items_in_batch": torch.tensor(9)}))
def test_a_padded_batch_compiles_whole(kwargs: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = mhcify(llama()).eval()
    oracle.perturb(model)
    for module in model.modules():  # nothing was seen
        role = module.__dict__.get("_mhc_role")
        if role is not None and role.carrier is not None:
            role.carrier.variants.clear()
    mask = torch.stack([item["attention_mask"] for item in padded()])
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(input_ids=IDS, attention_mask=mask, **kwargs).logits
    assert torch.allclose(got, eager(input_ids=IDS, attention_mask=mask, **kwargs).logits, atol=1e-5)


# -- other things that trainers do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_switched_on_before(reentrant: bool) -> None:
    model = llama(use_cache=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    mhcify(model)
    oracle.perturb(model)
    plain = copy.deepcopy(model)
    plain.gradient_checkpointing_disable()
    for each in (model, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for (name, one), other in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.allclose(one.grad, other[1].grad, atol=1e-6), name


@pytest.mark.parametrize("before", (False, True))
@torch.no_grad()  # on a CPU torch has no backward for it
@pytest.mark.long
def test_flex_attention(before: bool) -> None:
    model = llama()
    if before:
        model.set_attn_implementation("flex_attention")
    mhcify(model)
    oracle.perturb(model)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation("flex_attention")
    assert torch.allclose(model(input_ids=IDS).logits, eager(input_ids=IDS).logits, atol=1e-5)


def test_what_a_model_compiles_itself_is_seen_through() -> None:
    torch.manual_seed(0)
    model = Stack([PreNorm() for _ in range(2)])
    want = model(x := features(2, 5, 16).float())
    for layer in model.children() if not hasattr(model, "layers") else model.layers:
        for child in layer.children():
            child.compile(backend="eager")
    assert torch.allclose(mhcify(model, (x,))(x), want, atol=1e-5)


@pytest.mark.parametrize("kind", ("vera", "lora"))
def test_a_new_call_in_the_middle_of_a_step(kind: str) -> None:
    """Buffers that autograd has kept, VeRA's shared ones, are not written to by a capture."""
    model = mhcify(llama())
    settings = peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]) if kind == "vera" else peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"])  # fmt: skip
    adapted = peft.get_peft_model(model, settings).train()
    versions = {name: buffer._version for name, buffer in adapted.named_buffers()}
    embeddings = torch.randn(2, 5, 32, requires_grad=True)
    for module in adapted.modules():
        role = module.__dict__.get("_mhc_role")
        if role is not None and role.carrier is not None:
            role.carrier.variants.clear()
    adapted(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad is not None
    assert {name: buffer._version for name, buffer in adapted.named_buffers()} == versions


class Residual(nn.Module):
    """resnet's basic block, with an activation on the trunk that works in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("shape", [(1, 8, 6, 6), (2, 8, 1, 1), (1, 8, 1, 1), (2, 8, 6, 6)], ids=str)
def test_in_place_on_the_trunk(shape: tuple[int, ...]) -> None:
    """Where batch and streams fold as a view, too: a batch of one, an image of one pixel."""
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(Residual(inplace) for _ in range(3))).eval()
        mhcify(model, (torch.randn(2, 8, 6, 6),))
        oracle.perturb(model)
        torch.manual_seed(1)
        y = model(torch.randn(shape))
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*results))


@pytest.mark.parametrize("average", ("swa", "ema"))
def test_averages_of_weights(average: str) -> None:
    torch.manual_seed(0)
    model = mhcify(Stack([PreNorm() for _ in range(2)]), (features(2, 5, 16).float(),))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if average == "ema" else None)
    states = []
    for seed in (1, 2):
        oracle.perturb(model, seed)
        averaged.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    mean = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    model.load_state_dict(mean)
    x = features(2, 5, 16).float()
    assert torch.allclose(averaged(x), model(x), atol=1e-6)
