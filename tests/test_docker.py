"""Docker: what compose.yaml promises of its containers, and an image that is built and run where that is possible."""

from typing import Any

import pytest
import yaml

from tests.support import ROOT
from trainer.launch import cluster

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
NODES = ("node-a", "node-b", "node-c")


@pytest.mark.parametrize("name", ["rendezvous", *NODES])
def test_a_container_has_no_rights_that_it_does_not_need_and_says_how_it_is(name):
    service = COMPOSE["services"][name]
    assert service["user"] == "1000:1000" and service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    assert service["healthcheck"]["test"][0] == "CMD"


def test_three_nodes_meet_at_a_rendezvous_of_their_own_and_any_of_them_may_be_lost():
    assert set(COMPOSE["services"]) == {"rendezvous", *NODES}
    commands = [COMPOSE["services"][name]["command"] for name in NODES]
    assert commands[0] == commands[1] == commands[2]
    parts = cluster.torchrun_parts(["torchrun", *commands[0]])
    assert parts is not None and "--nnodes=1:3" in commands[0]
    assert "--rdzv-endpoint=rendezvous:29400" in commands[0]
    assert COMPOSE["services"]["rendezvous"]["entrypoint"][-1] == "0.0.0.0:29400"
    assert {COMPOSE["services"][name]["hostname"] for name in NODES} == set(NODES)


def test_a_container_that_is_stopped_has_the_time_to_save():
    node = COMPOSE["services"]["node-a"]
    (shutdown,) = [int(word.partition("=")[2]) for word in node["command"] if word.startswith("--shutdown-timeout=")]
    assert shutdown < int(node["stop_grace_period"].removesuffix("s"))
    assert set(node["volumes"]) == {"runs:/runs", "cache:/cache"} and set(COMPOSE["volumes"]) == {"runs", "cache"}
