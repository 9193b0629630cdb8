"""Many agents meet: seconds until all have their ranks, at first, after some are lost, and after as many have come.

`python -m scripts.bench_meeting AGENTS LOST` prints one measurement as JSON. Each agent is a process around torchrun's
own rendezvous, with the patches of trainer/launch; so is the store. Nothing is trained.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from trainer.launch import slurm
from trainer.parallel import elastic

COUNTS = (4, 16, 64)
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.1


def serve_agent(parameters: Any, orders: Connection) -> None:
    """Do what a torchrun agent does to meet others, whenever told how many are expected; answer (rank, size)."""
    from torch.distributed.elastic.rendezvous import registry

    handler: Any = registry.get_rendezvous_handler(parameters)

    def some_wait(deadline: float) -> bool:
        while not handler.num_nodes_waiting():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    while True:
        expected, others_come = orders.recv()
        deadline = time.monotonic() + PATIENCE_SECONDS
        if others_come:
            some_wait(deadline)
        while True:  # in between wait, as an agent that trains does, for those that come
            found = handler.next_rendezvous()
            if found.world_size == expected or not some_wait(deadline):
                break
        orders.send((found.rank, found.world_size))


class Agent:
    """A process that meets others. It is forked, since 64 imports of torch would take longer than all meetings."""

    def __init__(self, parameters: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=serve_agent, args=(parameters, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def order(self, expected: int, *, others_come: bool = False) -> None:
        self._orders.send((expected, others_come))

    def answer(self) -> tuple[int, int]:
        """Its rank and the size of the meeting."""
        assert self._orders.poll(PATIENCE_SECONDS + 30), "an agent does not answer"
        return self._orders.recv()

    def die(self) -> None:
        """Be gone without a word: no heartbeat follows."""
        self._process.kill()
        self._process.join()


def meeting_seconds(began: float, agents: Sequence[Agent]) -> float:
    """Wait until all have met; every agent knows the size, and each has a rank of its own."""
    answers = [agent.answer() for agent in agents]
    seconds = time.perf_counter() - began
    assert {size for _, size in answers} == {len(agents)}, answers
    assert sorted(rank for rank, _ in answers) == [*range(len(agents))], answers
    return seconds


def measure(count: int, lost: int, settings: str = slurm.RENDEZVOUS) -> dict[str, Any]:
    """Let `count` agents meet on this machine, lose some and gain as many. `settings` are --rdzv-conf."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault(elastic.SHARED_STORE, "1")  # as the launcher does: see trap 1 in launch/torchrun.py
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from trainer.launch import torchrun

    torchrun._patch_meeting(run)
    configured = dict(setting.split("=") for setting in settings.split(","))
    command = [sys.executable, "-m", "trainer", "rendezvous", "--listen", "127.0.0.1:0"]
    agents: list[Agent] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout is not None
            endpoint = store.stdout.readline().removesuffix(" listens\n")
            fewest = count - lost
            parameters = RendezvousParameters(
                "c10d", endpoint, "meeting", fewest, count, local_addr="127.0.0.1", **configured
            )
            began = time.perf_counter()
            agents = [Agent(parameters) for _ in range(count)]
            for agent in agents:
                agent.order(count)
            first = meeting_seconds(began, agents)

            began = time.perf_counter()
            for agent in agents[fewest:]:
                agent.die()
            agents = agents[:fewest]
            for agent in agents:
                agent.order(fewest)
            after_loss = meeting_seconds(began, agents)

            began = time.perf_counter()
            for agent in agents:
                agent.order(count, others_come=True)
            newcomers = [Agent(parameters) for _ in range(lost)]
            agents += newcomers
            for agent in newcomers:
                agent.order(count)
            after_gain = meeting_seconds(began, agents)
        finally:
            for agent in agents:
                agent.die()
            store.terminate()
    return {"agents": count, "lost": lost, "first": first, "after_loss": after_loss, "after_gain": after_gain}


def figure() -> dict[str, Any]:
    """One measurement for each of COUNTS, each in a process of its own; an eighth of the agents is lost."""
    rows = []
    for count in COUNTS:
        command = [sys.executable, "-m", "scripts.bench_meeting", str(count), str(max(1, count // 8))]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    return {"rows": rows}


def rows(figure: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table in BENCHMARKS.md."""
    return [
        (
            f"{row['agents']} agents on one machine meet; meet again after {row['lost']} are lost; and after "
            f"{row['lost']} have come",
            f"{row['first']:.1f} s; {row['after_loss']:.1f} s, 6 of them until the loss is noticed, 5 for others to "
            f"come; {row['after_gain']:.1f} s",
            "",
        )
        for row in figure["rows"]
    ]


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
