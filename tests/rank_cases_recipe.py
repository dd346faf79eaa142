"""Cases of tests/test_distributed_recipe.py, as those in rank_cases.py: wrappers, checkpoints, trainers, compilers.

Where a checkpoint is, or what another launch has seen, is a file in the current folder, which the launches share.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision_operators import define_torchvision_operators

from handmade.common import WIDTH
from mhc_rewrite import mhcify, parameter_groups
from mhc_rewrite.distributed import check_sites, shard_sites
from oracle import perturb, site_parameters
from rank_cases import (
    agree,
    batch,
    converted,
    gradients,
    in_one,
    loss,
    plain,
    refused,
    shard,
    shard_by_themselves,
    sites_of,
    step,
    whole,
)

# -- wrappers ----------------------------------------------------------------------------------------------------------

DDP_OPTIONS = ({"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True})


def ddp_options() -> None:
    _, want = in_one(converted())
    for options in DDP_OPTIONS:
        model: Any = converted(recompute=4)
        if "find_unused_parameters" in options:
            model.unused = nn.Linear(2, 2)
        wrapped = DistributedDataParallel(model, **options)
        for _ in range(2):  # a static graph is known after the first
            wrapped.zero_grad()
            step(wrapped)
        check_sites(wrapped)
        agree({name: its for name, its in gradients(model).items() if "unused" not in name}, want)


def ddp_accumulates() -> None:
    _, want = in_one(converted())
    model = converted()
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        step(wrapped)
    step(wrapped)
    agree({name: gradient / 2 for name, gradient in gradients(model).items()}, want)


def fsdp_root_only() -> None:
    _, want = in_one(converted())
    model = fully_shard(converted(recompute=4))
    step(model)
    agree(gradients(model), want)


def fsdp_offloaded() -> None:
    """Parameters on the host: here that is where they are, so this shows no more than that the policy is taken."""
    _, want = in_one(converted())
    model = shard(converted(recompute=4), offload_policy=CPUOffloadPolicy(pin_memory=False))
    step(model)
    agree(gradients(model), want)


def sites_of_stages_are_checked() -> None:
    """Ranks with other sites, or none: an error at once on all, where collectives would wait for one another."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    for number in range(2):
        model = converted(1 + (dist.get_rank() == number))
        loss(model(batch(0))).backward()
        refused(lambda model=model: check_sites(model), "layers.1.mhc_0.", "group")  # type: ignore[misc]
        check_sites(model, own)


# -- optimizers and checkpoints ----------------------------------------------------------------------------------------

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # With its own eps what is left of gradients that should be zero would be as large a step as any.
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.1, lr=1e-2, site_lr=2e-2), eps=1e-3)


def trained(
    model: nn.Module, adam: torch.optim.Optimizer, steps: int, run: Callable[..., Tensor] = step
) -> list[float]:
    """The losses of some steps with clipping."""
    losses = []
    for _ in range(steps):
        adam.zero_grad()
        losses.append(float(run(model)))
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        adam.step()
    return losses


def alone(model: nn.Module) -> Tensor:
    return in_one(model)[0]


def clipped_steps() -> None:
    """Clipping sees the norm of all; parameters after three steps."""
    one = converted()
    want_losses = trained(one, optimizer(one), 3, alone)
    want = {name: p.detach() for name, p in one.named_parameters()}
    for spread in (DistributedDataParallel, shard, shard_by_themselves):
        model = converted()
        wrapped = spread(model)
        got = trained(wrapped, optimizer(model), 3)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want_losses), rtol=1e-5, atol=0)
        agree({name: whole(p.detach()) for name, p in model.named_parameters()}, want, rtol=1e-4)
        check_sites(model)


def state_of(model: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Any]:
    weights, states = get_state_dict(model, adam, options=FLAT)
    return {"model": weights, "optimizer": states}


def loaded(model: nn.Module, folder: str) -> torch.optim.Optimizer:
    adam = optimizer(model)
    state = state_of(model, adam)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, adam, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)
    return adam


def numbers(model: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, whole; a copy."""
    state = state_of(model, adam)
    return {
        f"{part}.{name}": whole(value).clone()
        for part, values in state.items() for name, value in values.items() if isinstance(value, Tensor)
    }  # fmt: skip


def saves(async_save: bool = False) -> None:
    """Two steps, a checkpoint, and two steps more, whose losses stand in a file."""
    model = shard_by_themselves(converted(recompute=4))
    adam = optimizer(model)
    trained(model, adam, 2)
    want = numbers(model, adam)
    if async_save:
        group = dist.new_group()  # on that of the steps its collectives would meet theirs
        written: Any = dcp.async_save(state_of(model, adam), checkpoint_id="checkpoint", process_group=group)
    else:
        dcp.save(state_of(model, adam), checkpoint_id="checkpoint")
    losses = trained(model, adam, 2)  # the checkpoint is as it was before these
    if async_save:
        written.result()
    torch.save({"numbers": want, "losses": losses}, f"seen{dist.get_rank()}.pt")


def saves_in_the_background() -> None:
    saves(async_save=True)


def resumes_to_the_bit() -> None:
    seen = torch.load(f"seen{dist.get_rank()}.pt")
    model: Any = converted(recompute=4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    adam = loaded(shard_by_themselves(model), "checkpoint")
    got = numbers(model, adam)
    assert got.keys() == seen["numbers"].keys()
    for name, its in seen["numbers"].items():
        assert torch.equal(got[name], its), name
    assert trained(model, adam, 2) == seen["losses"]


def resumes_alone() -> dict[str, float]:
    """In one process, not sharded, what two have saved."""
    assert dist.get_world_size() == 1
    seen = torch.load("seen0.pt")
    model = converted()
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))  # the batches of both
    adam = loaded(model, "checkpoint")
    for name, its in numbers(model, adam).items():
        assert torch.equal(its, seen["numbers"][name]), name

    def run(model: nn.Module) -> Tensor:
        value = loss(model(x))
        value.backward()
        return value.detach()

    got = trained(model, adam, 2, run)
    error = max(abs(mine / its - 1) for mine, its in zip(got, seen["losses"], strict=True))
    assert error <= 1e-5, error
    return {"loss": error}


def full_state_dicts() -> None:
    """Gathered for one rank to save, and handed out by one rank; to a converted model, and what it has learned."""
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    handed_out = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    want = converted().state_dict()
    for spread in (shard, shard_by_themselves, DistributedDataParallel):
        found = get_model_state_dict(spread(converted()), options=full)
        if dist.get_rank() == 0:
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], its) for name, its in want.items())
        model: Any = mhcify(plain(), (batch(0),))
        wrapped = spread(model)
        set_model_state_dict(wrapped, found if dist.get_rank() == 0 else {}, options=handed_out)
        for name, p in model.named_parameters():
            assert torch.equal(whole(p.detach()), want[name]), name


STEPS, KILLED_AT, SAVED_EVERY = 6, 5, 2


def run_of(first: int, dies: bool) -> list[float]:
    model: Any = converted()
    shard_by_themselves(model)
    adam = loaded(model, f"step{first}") if first else optimizer(model)
    losses = []
    for number in range(first + 1, STEPS + 1):
        losses += trained(model, adam, 1)
        if dies and number == KILLED_AT and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number % SAVED_EVERY == 0 and (first or dies):
            dcp.save(state_of(model, adam), checkpoint_id=f"step{number}")
    return losses


def is_not_killed() -> None:
    torch.save(run_of(0, dies=False), "losses.pt")


def is_killed() -> None:
    run_of(0, dies=True)


def goes_on_after_the_kill() -> dict[str, int]:
    first = max(int(path.parent.name[4:]) for path in Path().glob("step*/.metadata"))
    assert first == KILLED_AT - 1
    losses = run_of(first, dies=False)
    assert losses == torch.load("losses.pt")[first:]
    return {"steps": len(losses)}


# -- trainers ----------------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 64, (8, 7), generator=torch.Generator().manual_seed(0))


def small_llama() -> Any:
    define_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, int] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def converted_llama() -> Any:
    model = mhcify(small_llama())
    perturb(model)
    return model


def as_launched() -> None:
    """What torchrun sets, and what looks for it finds the group that is there already."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)


def alike_in_any_number(name: str, model: nn.Module) -> None:
    """Holds trained parameters against those of the launch before, if there was one."""
    mine = {key: whole(p.detach()) for key, p in model.named_parameters()}
    file = Path(f"{name}.pt")
    if file.exists():
        agree(mine, torch.load(file), rtol=1e-4)
    dist.barrier()
    if dist.get_rank() == 0:
        torch.save(mine, file)


def trainer() -> None:
    """transformers' Trainer, with all processes together as many sequences in a step."""
    as_launched()
    define_torchvision_operators()
    from transformers import TrainingArguments

    from mhc_rewrite.hf import MHCTrainer

    model = converted_llama()
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir="trainer", max_steps=2, per_device_train_batch_size=4 // dist.get_world_size(), report_to=[],
        save_strategy="no", use_cpu=True, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", seed=1,
        disable_tqdm=True, max_grad_norm=0.5,
    )  # fmt: skip
    data: Any = [{"input_ids": ids, "labels": ids} for ids in IDS]
    made = MHCTrainer(model=model, args=arguments, train_dataset=data)
    made.train()
    assert made.args.world_size == dist.get_world_size()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {name for name, _ in site_parameters(model)} <= moved
    check_sites(model)
    alike_in_any_number("trainer", model)


def accelerates() -> None:
    """accelerate, which wraps the model in DDP."""
    as_launched()
    from accelerate import Accelerator

    model = converted_llama()
    data: Any = torch.utils.data.DataLoader(IDS, batch_size=4 // dist.get_world_size())  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)
    wrapped, sgd, loader = accelerator.prepare(model, torch.optim.SGD(parameter_groups(model, 0.0), lr=0.1), data)
    assert isinstance(wrapped, DistributedDataParallel) or dist.get_world_size() == 1
    for ids in loader:
        sgd.zero_grad()
        accelerator.backward(wrapped(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
        sgd.step()
    check_sites(model)
    alike_in_any_number("accelerate", model)


def llama_from_meta() -> None:
    """Built without memory, converted, sharded; then weights from the first rank, and sites as they start."""
    start = small_llama()
    full = start.state_dict() if dist.get_rank() == 0 else {}
    want_model = mhcify(start)
    with torch.device("meta"):
        model = small_llama()
    mhcify(model)
    assert all(p.is_meta for p in model.parameters())
    shard_sites(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model).to_empty(device="cpu")
    model.model.rotary_emb.__init__(config=model.config)  # its tables are in no checkpoint
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, full, options=options)
    for site in sites_of(model):
        site.reset_parameters()
    results = []
    for one, ids in ((want_model, IDS), (model, IDS.chunk(dist.get_world_size())[dist.get_rank()])):
        value = one(input_ids=ids, labels=ids).loss
        value.backward()
        value = value.detach()
        dist.all_reduce(value)
        results.append((value / dist.get_world_size(), gradients(one)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    agree(results[1][1], results[0][1], rtol=1e-4)
    for name, its in want_model.named_parameters():
        assert torch.equal(whole(model.get_parameter(name).detach()), its), name


# -- the harness itself ------------------------------------------------------------------------------------------------


def waits() -> None:
    """Says who it is and what it has started, and waits for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(f"pids{dist.get_rank()}").write_text(f"{os.getpid()} {child.pid}\n")
    time.sleep(1000)


def fails_beside_one_that_waits() -> None:
    if dist.get_rank() == 0:
        waits()
    while not Path("pids0").exists():
        time.sleep(0.05)
    raise ValueError("of the second one")
