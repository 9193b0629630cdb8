"""Faults of membership: nodes that leave, join, or do both again and again. All are made from outside."""

from collections.abc import Mapping
from typing import ClassVar

from trainer.faults.fault import LINUX, NODES, Fault, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.process import LOST

JOINING_SECONDS = 0.3  # from an agent's connection to the store until it waits for the next round


class MembershipFault(Fault):
    group = "membership"
    detected = "the rendezvous: keep-alives that stop, or a node that waits to join"
    recovered = "all workers start again at the new world size"
    needs = (LINUX, NODES)
    on_rank = False
    names_rank = False
    exits = LOST
    detect_seconds = 30.0
    recover_seconds = 60.0


class NodeLeaves(MembershipFault):
    imitates = "a node is taken out for maintenance"
    made = "SIGKILL of the last node's agent and workers; no other node replaces it"
    expected_incidents = ("worker_lost",)
    node_balance = -1

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.kill_node(-1)


class NodeJoins(MembershipFault):
    imitates = "a repaired node comes back"
    made = "one more agent starts"
    node_balance = 1

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.cluster.add_node()


class NodeFlaps(MembershipFault):
    imitates = "a node that joins and dies again and again"
    made = "an agent starts and is killed, in turn"
    settings: ClassVar = {"times": Setting(2, "how often", 1), "seconds": Setting(6.0, "how long it lives")}
    expected_incidents = ("worker_lost",)
    recover_seconds = 120.0

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        for _ in range(planned.settings["times"]):
            if outside.stopping.is_set() or not outside.cluster.running:
                return
            node = outside.cluster.add_node()
            # It has joined when it starts workers.
            outside.wait_until(lambda node=node: bool(node.workers()) or not node.running)
            outside.wait(planned.settings["seconds"])
            node.kill()


class SlowJoiner(MembershipFault):
    imitates = "a node that takes long to boot"
    made = "one more agent starts, and is stopped for a while as it joins"
    settings: ClassVar = {"seconds": Setting(3.0, "how long it is stopped")}

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        node = outside.cluster.add_node()
        outside.wait_until(node.connected)
        outside.wait(JOINING_SECONDS)
        outside.freeze(node, planned.settings["seconds"])
