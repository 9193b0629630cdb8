"""Faults of the network: links between nodes, and the rendezvous store. All are made from outside."""

from collections.abc import Mapping
from typing import ClassVar

from trainer.faults.fault import LINUX, NAMESPACES, NODES, SHAPING, Fault, Harmless, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.process import LOST


class NetworkFault(Fault):
    group = "network"
    detected = "the watchdog: no progress within elastic.step_timeout_seconds"
    recovered = "the side that holds the rendezvous continues alone; the other joins when it can"
    needs = (LINUX, NAMESPACES, NODES)
    expected_incidents = ("hung", "worker_lost")
    on_rank = False
    names_rank = False
    exits = LOST
    detect_seconds = 30.0
    recover_seconds = 90.0


class StoreFault(NetworkFault):
    needs = (LINUX, NODES)
    needs_store = True
    not_in: ClassVar = {"quorum": "there is no rendezvous store: the arbiter is in its place"}


class Partition(NetworkFault):
    imitates = "a failed switch"
    made = "the last node's link goes down"
    settings: ClassVar = {"seconds": Setting(20.0, "how long")}

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        hosts, host = outside.last_host()
        with hosts.down(host):
            outside.wait(planned.settings["seconds"])


class OneWayLoss(NetworkFault):
    imitates = "a bad cable"
    made = "what the last node sends is dropped; it still receives"
    settings: ClassVar = {"seconds": Setting(20.0, "how long")}

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        hosts, host = outside.last_host()
        with hosts.dropping(host):
            outside.wait(planned.settings["seconds"])


class LinkFlap(Partition):
    imitates = "a loose connector"
    made = "the last node's link goes down and up again"
    detected = "TCP sends again: no fault, unless it takes too long"
    recovered = "automatically"
    settings: ClassVar = {"times": Setting(3, "how often", 1), "seconds": Setting(0.3, "down each time")}
    expected_incidents = ()

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        for _ in range(planned.settings["times"]):
            super().fire_from_outside(planned, outside, victims)
            if outside.wait(planned.settings["seconds"]):
                return


class SlowLink(Harmless, NetworkFault):
    imitates = "a congested network"
    made = "the last node's link is delayed and limited"
    needs = (LINUX, NAMESPACES, NODES, SHAPING)
    settings: ClassVar = {"milliseconds": Setting(20.0, "delay"), "seconds": Setting(5.0, "how long")}

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        hosts, host = outside.last_host()
        with hosts.slow(host, planned.settings["milliseconds"]):
            outside.wait(planned.settings["seconds"])


class LinkDiesOfTwo(Partition):
    imitates = "a cable or a switch of one of two networks fails"
    made = "the first of the last node's two links goes down"
    links = 2
    over_mptcp: ClassVar = {
        "detected": "Multipath TCP: no fault, the other link is there",
        "recovered": "connections go on over the other link",
        "expected_incidents": (),
        "unnoticed": True,
        "exits": (0,),
        "recover_seconds": 20.0,
    }


class LinkSlowOfTwo(SlowLink):
    imitates = "one of two networks is congested"
    made = "the first of the last node's two links is delayed and limited"
    links = 2
    over_mptcp: ClassVar = {"recovered": "most goes over the other link", "unnoticed": True, "exits": (0,)}


class StoreKilled(StoreFault):
    imitates = "the rendezvous host dies"
    made = "the rendezvous store is killed"
    detected = "the agents' keep-alives fail"
    recovered = "the job ends, its workers asked to save and leave; the same command resumes"
    expected_incidents = ("preempted", "hung", "worker_lost")

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.store().kill()


class StoreUnreachable(Harmless, StoreFault):
    imitates = "the way to the rendezvous host fails for a while"
    made = "connections to the rendezvous store are frozen"
    detected = "no fault while nothing needs the store"
    settings: ClassVar = {"seconds": Setting(3.0, "how long")}

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.freeze(outside.store(), planned.settings["seconds"])


class StoreRestarted(StoreFault):
    imitates = "the rendezvous host comes back empty"
    made = "the rendezvous store is killed and started again"
    detected = "the agents' keep-alives fail, or nothing needs the store"
    recovered = "the job ends; the same command resumes"
    expected_incidents = ()

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.store().kill()
        outside.cluster.start_store()
