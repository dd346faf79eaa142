"""What ranks send one another and wait for: formulas and numbers by hand. That they are what ranks really send is shown
by tests/test_distributed_cost.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipeline_overlap import one_forward_one_backward, order_of, simulate
from torch.distributed.pipelining import ScheduleDualPipeV

import mhc_rewrite
from mhc_rewrite import MHCConfig
from mhc_rewrite import cost as costs
from mhc_rewrite.cost import Cost, Device, Job, Links, Mesh, Stream, bandwidth, messages, on_mesh, padded
from mhc_rewrite.errors import ConfigError
from test_cli import folder, run  # noqa: F401 (folder is a fixture)
from test_cost import INPUTS, Net, rows

# C = 10, n = 2, two sites, fp32: phi (20, 8), alpha (3,), bias (8,).
SMALL = Cost(MHCConfig(n_streams=2), (Stream(10, 2, 2, 4),))


# Meshes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, mesh, size",
    [
        ("dp=64,pp=8", Mesh(dp=64, pp=8), 512),
        (" pp = 2 , fsdp = 3 ", Mesh(fsdp=3, pp=2), 6),
        ("tp=8", Mesh(tp=8), 8),
        ("sp=4,dp=2,fsdp=2,pp=2", Mesh(2, 2, 1, 4, 2), 32),
        ("dp=1", Mesh(), 1),
    ],
)
def test_meshes(text: str, mesh: Mesh, size: int) -> None:
    assert Mesh.parse(text) == mesh and mesh.size == size
    assert Mesh.parse(str(mesh)) == mesh


@pytest.mark.parametrize(
    "text, message",
    [
        ("ep=8", "'ep=8' of 'ep=8' names none of dp, fsdp, tp, sp, pp"),
        ("dp=8,", "'' of 'dp=8,' names none"),
        ("", "names none"),
        ("8x8", "as in fsdp=64,pp=8"),
        ("dp=8 pp=8", "in 'dp=8 pp=8', dp has no number"),
        ("dp=eight", "dp has no number"),
        ("dp=-1", "dp has no number"),
        ("dp=1.5", "dp has no number"),
        ("dp", "dp has no number"),
        ("dp=0", "dp takes a whole number of ranks from 1 on, not 0"),
        ("dp=2,dp=4", "has dp twice"),
        ("tp=2,sp=4", "give one of tp=2 and sp=4"),
    ],
)
def test_what_is_no_mesh(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Mesh.parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize("ranks", [0, -3, 2.0, "2", True, None])
def test_ranks_are_whole_numbers(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="pp takes a whole number"):
        Mesh(pp=ranks)


def test_more_stages_than_sites() -> None:
    assert on_mesh(SMALL, Mesh(pp=2)).mesh.pp == 2
    with pytest.raises(ConfigError, match="pp=3 asks for more stages than the model has sites, which are 2"):
        on_mesh(SMALL, Mesh(pp=3))
    assert costs.cost(mhc_rewrite.plan(Net(), INPUTS), Mesh(pp=7)).cost.streams[1].sites == 4  # of 3 + 4
    with pytest.raises(ConfigError, match="which are 7"):
        costs.cost(mhc_rewrite.plan(Net(), INPUTS), mesh=Mesh(pp=8))


# Bytes ---------------------------------------------------------------------------------------------------------------


def test_shards_by_hand() -> None:
    # Three shards: phi padded to 21 rows, alpha to 3, bias to 9: 180 elements a site. Two gathers and a reduction.
    of = on_mesh(SMALL, Mesh(fsdp=3))
    assert of.bytes("fsdp", parameters=300) == (2 / 3 * 3 * 4 * 300, 2 / 3 * 3 * 4 * (300 + 2 * 180))
    # By themselves they are gathered once, in fp32 whatever the rest is.
    apart = dataclasses.replace(of, sites_apart=True, gathered=2, reduced=2)
    assert apart.bytes("fsdp", parameters=300) == (1200, 1200 + 2 / 3 * 2 * 4 * 360)
    assert apart.evaluate(apart.collectives, SMALL.streams[0]) == 2 * 2
    assert of.evaluate(of.collectives, SMALL.streams[0]) == 0
    # A stage keeps what it has gathered, and holds half of it all.
    stages = on_mesh(SMALL, Mesh(fsdp=3, pp=2))
    assert stages.bytes("fsdp", parameters=300, microbatches=8) == (2 / 3 * 2 * 4 * 150, 2 / 3 * 2 * 4 * (150 + 180))
    assert of.bytes("fsdp", parameters=300, microbatches=8)[0] == 17 * 4 * 200


def test_replicas_by_hand() -> None:
    assert on_mesh(SMALL, Mesh(dp=4)).bytes("dp", parameters=300) == (1.5 * 4 * 300, 1.5 * 4 * (300 + 2 * 171))
    # HSDP adds up what a rank has left.
    both = on_mesh(SMALL, Mesh(dp=4, fsdp=3))
    assert both.bytes("dp", parameters=300) == (1.5 * 4 * 100, 1.5 * 4 * (100 + 2 * 60))
    assert on_mesh(SMALL, Mesh()).bytes("dp", parameters=300) == (0, 0)


def test_blocks_over_several_ranks_by_hand() -> None:
    # Two all-reduces of (6, 10) a block, each 2 * 3/4 of it.
    sizes = {"tokens": 6, "microbatches": 5}
    assert on_mesh(SMALL, Mesh(tp=4)).bytes("tensor", **sizes) == (2 * 5 * 2 * 1.5 * 240,) * 2
    # As gatherings and reductions the same; the sites' gradients are added up once.
    before, after = on_mesh(SMALL, Mesh(sp=4)).bytes("tensor", **sizes)
    assert (before, after - before) == (2 * 5 * 2 * 1.5 * 240, 1.5 * 4 * 2 * 171)


def test_cuts_by_hand() -> None:
    of = on_mesh(SMALL, Mesh(pp=2))
    assert of.bytes("pipeline", tokens=6, microbatches=5, messages=3) == (5 * 3 * 240, 5 * 3 * 480)
    assert of.message(6) == (240, 480) and of.message(6)[1] == SMALL.evaluate(SMALL.cut, tokens=6)
    assert of.evaluate(of.after_expansion, SMALL.streams[0], tokens=6) == 240
    assert on_mesh(SMALL, Mesh(tp=2, pp=2)).message(6) == (240, 480)  # all of them hold all tokens
    assert on_mesh(SMALL, Mesh(sp=2, pp=2)).message(6) == (120, 240)


def test_one_stream_adds_nothing() -> None:
    of = on_mesh(dataclasses.replace(SMALL, config=MHCConfig(n_streams=1)), Mesh(2, 2, 1, 2, 2))
    for way in of.sent:
        before, after = of.bytes(way, parameters=100, tokens=6, microbatches=2, messages=1)
        assert before == after > 0


def test_several_streams() -> None:
    """Of a plan: 3 sites of width 8, then one set of parameters of width 12 that is called four times."""
    plan = mhc_rewrite.plan(Net(), INPUTS, n_streams=2)
    of = costs.cost(plan, Mesh(tp=2, pp=2))
    assert of.bytes("tensor", tokens=10) == ((3 * 8 + 4 * 12) / 2 * 4 * 10 * 4 / 2,) * 2
    assert of.message(10) == (4 * 12 * 10, 4 * 2 * 12 * 10)  # the wider of them
    shards = costs.cost(plan, Mesh(fsdp=2))
    before, after = shards.bytes("fsdp", parameters=10)
    assert after - before == 0.5 * 3 * 4 * (3 * (16 * 8 + 4 + 8) + 24 * 8 + 4 + 8)
    stretched = costs.cost(mhc_rewrite.plan(Net(), INPUTS, n_streams={"first": 4, "second": 2}), Mesh(pp=2))
    assert stretched.message(10) == (4 * 12 * 10, 4 * 4 * 8 * 10)


def test_kinds_of_elements() -> None:
    plans = [mhc_rewrite.plan(Net().to(dtype), (INPUTS[0].to(dtype),)) for dtype in (torch.float32, torch.bfloat16)]
    found = [costs.cost(plan, Mesh(fsdp=2)) for plan in plans]
    assert [(of.gathered, of.reduced, of.sites_apart) for of in found] == [(4, 4, False), (2, 2, True)]


def test_padding() -> None:
    """As FSDP does it: the first axis alone."""
    parameters = [torch.zeros(5, 3), torch.zeros(4), torch.zeros(()), torch.zeros(2, 7, 2)]
    assert padded(parameters, 1) == 15 + 4 + 1 + 28
    assert padded(parameters, 4) == 24 + 4 + 4 + 56


@pytest.mark.parametrize(
    "ranks, most",
    [([0], 0), ([0, 1], 1), ([0, 1, 2], 2), ([0, 1, 0, 1], 3), ([0, 1, 1, 0], 2), ([0, 1, 2, 2, 1, 0], 4), ([0, 0], 0)],
)
def test_messages(ranks: list[int], most: int) -> None:
    assert messages(ranks) == most
    for schedule in costs.SCHEDULES.values():
        pipeline = max(ranks) + 1
        assert messages(schedule.ranks(pipeline)) == schedule.stages * min(2, pipeline - 1)


# Time ----------------------------------------------------------------------------------------------------------------

LINKS = Links(node=8, inside=1000.0, between=10.0, source="")
# One flop a second, so that a token of one parameter takes 12 seconds; sites cost nothing.
DEVICE = Device("round", 1e30, 1e30, None, 1.0, "", 0.5, "", LINKS)
FREE_SITES = dataclasses.replace(DEVICE, bf16=1.0, fp32=1e30)


@pytest.mark.parametrize(
    "mesh, axis, share",
    [
        (Mesh(tp=8), "tensor", 1000), (Mesh(tp=16), "tensor", 80), (Mesh(fsdp=8), "fsdp", 1000),
        (Mesh(fsdp=64), "fsdp", 80), (Mesh(tp=2, fsdp=4), "fsdp", 1000), (Mesh(tp=2, fsdp=8), "fsdp", 40),
        (Mesh(sp=8, fsdp=8), "fsdp", 10), (Mesh(fsdp=4, dp=4), "dp", 20), (Mesh(fsdp=16, dp=4), "dp", 10),
        (Mesh(pp=8), "pipeline", 1000), (Mesh(pp=16), "pipeline", 10), (Mesh(fsdp=2, pp=4), "pipeline", 1000),
        (Mesh(fsdp=8, pp=2), "pipeline", 10),
    ],
)  # fmt: skip
def test_bandwidth(mesh: Mesh, axis: str, share: float) -> None:
    """Of a ring over k ranks of each node, k links lead out of it; a message to the next stage has one."""
    assert bandwidth(mesh, axis, LINKS) == share
    assert bandwidth(mesh, axis, dataclasses.replace(LINKS, between=900.0)) <= LINKS.inside


def test_waiting_by_hand() -> None:
    """Two layers of bf16, 1e6 seconds a microbatch on one rank."""
    of = Cost(MHCConfig(n_streams=2), (Stream(10, 2, 2, 2),))

    def waiting(mesh: Mesh, way: str, job: Job, schedule: str = "1F1B") -> tuple[float, float]:
        estimated = costs.estimate_on_mesh(on_mesh(of, mesh), FREE_SITES, job, schedule)
        return estimated.original.exposed[way], estimated.converted.exposed[way]

    slow, fast = Job(1e6, 1.0, 2, 100, 4), Job(1e6, 1e3, 2, 100, 4)
    assert costs.estimate_on_mesh(on_mesh(of, Mesh()), FREE_SITES, slow, "1F1B").original.total == 4 * 12 * 100
    # Two all-reduces a block, two blocks, four microbatches, of 2000 bytes; nothing hides them.
    assert waiting(Mesh(tp=2), "tensor", slow)[0] == 4 * 2 * 2 * 2000 / 1000
    # Gradients of 2e6 bytes at 1000 a second. Beside them two thirds of 1200 seconds; and of a million a layer is left.
    assert waiting(Mesh(dp=2), "dp", slow)[0] == pytest.approx(2e3 - 800)
    assert waiting(Mesh(dp=2), "dp", fast)[0] == pytest.approx(2e3 / 2)
    # Gathered eight times and reduced once: 9e6 bytes, beside four microbatches.
    assert waiting(Mesh(fsdp=2), "fsdp", slow)[0] == pytest.approx(9e3 / 2)
    assert waiting(Mesh(fsdp=2), "fsdp", dataclasses.replace(slow, layers=200))[0] == pytest.approx(9e3 - 4800)
    # In stages once and once, of half the parameters; beside one microbatch of half the model.
    assert waiting(Mesh(fsdp=2, pp=2), "fsdp", dataclasses.replace(slow, layers=200))[0] == pytest.approx(1e3 - 600)
    # A message of 2000 bytes takes 2 seconds, of two streams 4.
    assert waiting(Mesh(pp=2), "pipeline", slow) == (4 * 2, 4 * 4)
    with pytest.raises(ConfigError, match="has 4 stages under DualPipeV, and the model 2 layers"):
        waiting(Mesh(pp=2), "pipeline", slow, "DualPipeV")
    deep = dataclasses.replace(slow, layers=4)
    assert waiting(Mesh(pp=2), "pipeline", deep, "DualPipeV") == (4 * 2, 4 * 4)  # 600 seconds hide two messages
    with pytest.raises(ConfigError, match="at least as many microbatches, and a step has 3"):
        waiting(Mesh(pp=2), "pipeline", dataclasses.replace(deep, microbatches=3), "DualPipeV")


def test_a_long_message_is_not_hidden() -> None:
    of = on_mesh(Cost(MHCConfig(n_streams=2), (Stream(10, 2, 2, 2),)), Mesh(pp=2))
    job, slow = Job(0, 1.0, 4, 100, 4), dataclasses.replace(FREE_SITES, links=dataclasses.replace(LINKS, inside=4.0))
    estimated = costs.estimate_on_mesh(of, slow, job, "DualPipeV")
    # 500 and 1000 seconds each, of which the 100 of a stage's forward hide a part; four fill and drain.
    assert estimated.original.exposed["pipeline"] == 4 * 500 + 3 * (500 - 100)
    assert estimated.converted.exposed["pipeline"] == 4 * 1000 + 3 * (1000 - 100)
    assert estimated.original.computing == pytest.approx((4 + 1 / 6) * 600)


def test_sites_are_spread_out_with_sp_and_not_with_tp() -> None:
    of = Cost(MHCConfig(), (Stream(64, 8, 8, 2),))
    job = Job(1e6, 1e6, 4, 100, 1)
    added = {}
    for mesh in (Mesh(), Mesh(tp=4), Mesh(sp=4)):
        one = costs.estimate_on_mesh(on_mesh(of, mesh), costs.device("h100"), job, "1F1B")
        added[str(mesh)] = one.converted.computing - one.original.computing
        assert one.original.computing * mesh.size == pytest.approx(6 * 1e6 * 100 / (0.4 * 989.5e12))
    assert added["tp=4"] == pytest.approx(added["dp=1"]) and added["sp=4"] == pytest.approx(added["dp=1"] / 4)


PIPELINES = [(2, 4), (2, 5), (2, 40), (3, 9), (3, 11), (4, 8), (4, 9), (8, 16), (8, 33)]


def schedule_values(pipeline: int, microbatches: int, message: float, stages: int) -> dict[Any, float]:
    """Where a stage's forward takes 1 and its backward 2."""
    step = costs.mesh_step
    return {step.p: pipeline, step.m: microbatches, step.d: message, step.c: 3 * stages}


@pytest.mark.parametrize("pipeline, microbatches", [*PIPELINES, (2, 1), (4, 1), (4, 3)])
def test_1f1b_waits_as_its_order_does(pipeline: int, microbatches: int) -> None:
    order, schedule = one_forward_one_backward(pipeline, microbatches), costs.SCHEDULES["1F1B"]
    values = schedule_values(pipeline, microbatches, 0.01, 1)
    alone = simulate(order, 0.0)
    assert alone == pytest.approx((microbatches + float(schedule.idle.subs(values))) * 3)
    assert float(schedule.exposed.subs(values)) == pytest.approx(simulate(order, 0.01) - alone)


def dual_pipe_v(pipeline: int, microbatches: int) -> dict[int, Any]:
    """The order of torch's class, which asks stages for no more than their places."""
    places = costs.SCHEDULES["DualPipeV"].ranks(pipeline)
    ends = 0, len(places) - 1
    stages = [
        mock.MagicMock(stage_index=k, num_stages=len(places), group_size=pipeline, group_rank=0, is_last=k == ends[1],
                       is_first=k == 0, has_backward=True, stage_index_to_group_rank=dict(enumerate(places)))
        for k in ends
    ]  # fmt: skip
    return order_of(ScheduleDualPipeV(stages, microbatches, loss_fn=lambda out, target: out))


@pytest.mark.parametrize("pipeline, microbatches", PIPELINES)
def test_dual_pipe_v_waits_as_torch_s_order_does(pipeline: int, microbatches: int) -> None:
    microbatches = max(microbatches, 2 * pipeline)
    order, schedule = dual_pipe_v(pipeline, microbatches), costs.SCHEDULES["DualPipeV"]
    alone = simulate(order, 0.0)
    values = schedule_values(pipeline, microbatches, 0.001, 2)
    assert alone == pytest.approx((microbatches + float(schedule.idle.subs(values))) * 6)
    assert float(schedule.exposed.subs(values)) == pytest.approx(simulate(order, 0.001) - alone)
    # Of longer messages less is hidden than the formula says, by up to half.
    for message in (0.3, 1.0, 1.5, 2.0):
        said = float(schedule.exposed.subs(schedule_values(pipeline, microbatches, message, 2)))
        assert said <= simulate(order, message) - alone + 1e-9 <= 1.5 * said + 1e-9, message


def test_devices_without_links() -> None:
    assert costs.device("cpu").links is None
    assert all(costs.device(name).links.source for name in ("h100", "a100", "mi300x"))
    with pytest.raises(ConfigError, match="no figures for links between devices of this kind: two cores"):
        costs.estimate_on_mesh(on_mesh(SMALL, Mesh(dp=2)), costs.device("cpu"), Job(1, 1, 1, 1, 1), "1F1B")


def test_the_paper_on_a_mesh() -> None:
    of, job = costs.paper_on(Mesh(fsdp=8, pp=8), 4)
    assert (of.gathered, of.reduced, of.sites_apart) == (2, 4, True)
    assert (job.tokens, job.microbatches, job.tokens * job.microbatches * 8) == (4096, 160, 1280 * 4096)
    assert of.message(job.tokens) == (2 * 2560 * 4096, 4 * 2 * 2560 * 4096)
    with pytest.raises(ConfigError, match="1280 sequences, which do not go evenly onto dp \\* fsdp = 96"):
        costs.paper_on(Mesh(dp=3, fsdp=32), 4)


def test_a_job_of_a_model() -> None:
    net = Net()
    plan = mhc_rewrite.plan(net, INPUTS)
    job = costs.job(plan, net, Mesh(fsdp=3), 5.0, 7)
    assert job == Job(padded(net.parameters(), 3), 5.0, 4, 7, 1)
    assert costs.job(plan, net, Mesh(pp=2), 5.0, 7).microbatches == 8
    assert costs.job(plan, net, Mesh(pp=2), 5.0, 7, 3).microbatches == 3


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
class TestCommand:
    def test_the_paper(self) -> None:
        output = run("cost", "paper", "--n", "4", "--mesh", "fsdp=8,pp=8", "--mesh", "fsdp=128,pp=8").stdout
        first, last = rows(output, "bytes that a rank sends")[:2]
        of, job = costs.paper_on(Mesh(fsdp=8, pp=8), 4)
        assert first[:4] == ["fsdp=8,pp=8", "64", "160", "4"] and last[:4] == ["fsdp=128,pp=8", "1,024", "10", "4"]
        sent = [f"{value / 1e9:,.3f}" for way in ("fsdp", "pipeline") for value in costs.sent_bytes(of, job, way)]
        assert [first[k] for k in (4, 6, 7, 9)] == sent and first[-3:] == ["21.0", "->", "83.9"]
        first, last = rows(output, "ESTIMATE")
        shares = [
            f"{costs.estimate_on_mesh(of, costs.device('h100'), job, schedule).overhead:.1%}"
            for schedule in costs.SCHEDULES
        ]
        assert [cell for cell in first if cell.endswith("%")] == [*shares, "6.7%"]
        assert last[-4:] == ["-", "-", "-", "6.7%"]
        said = " ".join(output.split())
        assert "fsdp=128,pp=8 has 16 stages under DualPipeV, which takes at least as many microbatches" in said
        for text in (
            "M (ceiling(g/2) + 1)/p collectives to a step of FSDP",
            "ESTIMATE, not measured",
            "NVIDIA DGX H100 Datasheet",
            "1280 sequences",
            "names neither",
        ):
            assert text in said, text

    def test_a_model(self) -> None:
        result = run("cost", "nets.py:make", "--mesh", "fsdp=2,pp=3", "--n", "1,2", "--tokens", "100")
        assert result.exit_code == 0, result.stderr
        one, two = rows(result.stdout, "bytes that a rank sends")[:2]
        assert one[:4] == ["fsdp=2,pp=3", "6", "12", "1"] and two[3] == "2"
        assert one[-3:] == ["0.0", "->", "0.0"] and "C T h m s (n - 1)" in result.stdout
        assert "2 d (m + p - floor((m - 2)/p) - 3)" in result.stdout and "collectives to a step" not in result.stdout
        one, two = rows(result.stdout, "ESTIMATE")
        assert [cell for cell in one if cell.endswith("%")] == ["0.0%"]
        assert "6 stages under DualPipeV, and the model 3 layers" in result.stdout

    def test_without_a_pipeline_there_is_one_estimate(self) -> None:
        output = run("cost", "nets.py:make", "--mesh", "tp=2,dp=2", "--n", "4", "--microbatches", "3").stdout
        assert "DualPipeV:" not in output and "DDP, GB" in output and "pipeline, GB" not in output
        assert rows(output, "bytes that a rank sends")[0][:4] == ["dp=2,tp=2", "4", "3", "4"]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("paper", "--mesh", "gpus=64"), "names none of dp, fsdp, tp, sp, pp"),
            (("paper", "--mesh", "dp=64,pp=0"), "pp takes a whole number of ranks from 1 on, not 0"),
            (("paper", "--mesh", "dp=64,pp=61"), "more stages than the model has sites, which are 60"),
            (("paper", "--mesh", "dp=64,pp=31"), "31 stages under 1F1B, and the model 30 layers"),
            (("paper", "--mesh", "dp=100"), "1280 sequences, which do not go evenly onto dp * fsdp = 100"),
            (("paper", "--mesh", "dp=8", "--device", "cpu"), "no figures for links"),
            (("paper", "--mesh", "dp=8", "--parameters", "1e9"), "--parameters is not for the paper"),
            (("paper", "--mesh", "dp=8", "--microbatches", "2"), "--microbatches is for a SPEC with --mesh"),
            (("nets.py:make", "--microbatches", "2"), "--microbatches is for a SPEC with --mesh"),
            (("nets.py:make", "--mesh", "pp=4"), "more stages than the model has sites, which are 3"),
        ],
    )
    def test_mistakes(self, arguments: tuple[str, ...], message: str) -> None:
        result = run("cost", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "error: " in result.stderr and "Traceback" not in result.stderr
        assert message in " ".join(result.stderr.split())


def test_the_figures_of_the_documentation() -> None:
    """docs/performance.md, the table of the paper's model on many devices."""
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d+, \w+=", line)]
    assert len(lines) == 5
    for where, fsdp, pipeline, *figures, theirs in lines:
        ranks, _, name = where.partition(", ")
        mesh = Mesh.parse(name)
        of, job = costs.paper_on(mesh, 4)
        assert mesh.size == int(ranks) and theirs == "6.7 %"
        for way, cell in (("fsdp", fsdp), ("pipeline", pipeline)):
            assert cell == ", ".join(f"{value / 1e9:.3f}" for value in costs.sent_bytes(of, job, way))
        for schedule, waiting, overhead in zip(costs.SCHEDULES, figures[::2], figures[1::2]):
            one = costs.estimate_on_mesh(of, costs.device("h100"), job, schedule)
            assert waiting == f"{one.original.waiting:.3f}, {one.converted.waiting:.3f}"
            assert overhead == f"{100 * one.overhead:.1f} %"
