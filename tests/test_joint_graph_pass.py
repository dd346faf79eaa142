"""This project's pass on Inductor's joint graph and those that the user asks for are one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from mhc_rewrite.torch_private import joint_graph_pass


class Theirs(CustomGraphPass):
    def __init__(self, ran: list[str], name: str) -> None:
        self.ran, self.name = ran, name

    def __call__(self, graph: fx.Graph) -> None:
        self.ran.append(self.name)

    def uuid(self) -> Any:
        return self.name


@pytest.mark.parametrize("through_config", [False, True])
def test_theirs_run_first_and_count_for_the_cache(through_config: bool) -> None:
    ran: list[str] = []

    def made(asked: Any) -> Any:
        def run(graph: fx.Graph) -> None:
            ran.append("mine")

        if through_config:
            with torch._inductor.config.patch(joint_custom_pre_pass=asked):
                return joint_graph_pass(run, "mine's", {})
        return joint_graph_pass(run, "mine's", {"joint_custom_pre_pass": asked})

    for asked, order, uuid in (
        (None, ["mine"], ("mine's",)),
        (Theirs(ran, "a"), ["a", "mine"], ("a", "mine's")),
        ([Theirs(ran, "a"), Theirs(ran, "b")], ["a", "b", "mine"], ("a", "b", "mine's")),
        (lambda graph: ran.append("plain"), ["plain", "mine"], None),
    ):
        ran.clear()
        one = made(asked)
        assert isinstance(one, CustomGraphPass)
        one(fx.Graph())
        assert (ran, one.uuid()) == (order, uuid)
