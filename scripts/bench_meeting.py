"""Many agents meet: seconds until all have their ranks, at first, after some are lost, and after as many have come.

`python -m scripts.bench_meeting AGENTS LOST` prints one measurement as JSON. Each agent is a thread around torchrun's
own rendezvous, with the patches of trainer/launch; the store is a process of its own. Nothing is trained.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer.launch import slurm
from trainer.parallel import elastic

COUNTS = (4, 16, 64)
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.1


class Agent:
    """What a torchrun agent does to meet others."""

    def __init__(self, parameters: Any) -> None:
        from torch.distributed.elastic.rendezvous import registry

        self._handler: Any = registry.get_rendezvous_handler(parameters)
        self.rank, self.size = -1, 0

    def meet(self, expected: int) -> None:
        """Meet until `expected` agents have; in between wait, as an agent that trains does, for those that come."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = self._handler.next_rendezvous()
            self.rank, self.size = found.rank, found.world_size
            if self.size == expected or not self._some_wait(deadline):
                return

    def meet_those_that_come(self, expected: int) -> None:
        self._some_wait(time.monotonic() + PATIENCE_SECONDS)
        self.meet(expected)

    def die(self) -> None:
        """Be gone without a word: no heartbeat follows."""
        self._handler._stop_heartbeats()

    def _some_wait(self, deadline: float) -> bool:
        while not self._handler.num_nodes_waiting():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


def all_at_once(acts: Sequence[Callable[[], None]]) -> float:
    """Do them side by side; return the seconds until the last is done."""
    threads = [threading.Thread(target=act, daemon=True) for act in acts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    return time.perf_counter() - began


def check(agents: Sequence[Agent]) -> None:
    """Every agent knows the size, and each has a rank of its own."""
    assert {agent.size for agent in agents} == {len(agents)}, [agent.size for agent in agents]
    assert sorted(agent.rank for agent in agents) == [*range(len(agents))]


def measure(count: int, lost: int, settings: str = slurm.RENDEZVOUS) -> dict[str, Any]:
    """Let `count` agents meet in this process, lose some and gain as many. `settings` are --rdzv-conf."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault(elastic.SHARED_STORE, "1")  # as the launcher does: see trap 1 in launch/torchrun.py
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from trainer.launch import torchrun

    torchrun._patch_meeting(run)
    configured = dict(setting.split("=") for setting in settings.split(","))
    command = [sys.executable, "-m", "trainer", "rendezvous", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout is not None
            endpoint = store.stdout.readline().removesuffix(" listens\n")
            fewest = count - lost
            parameters = RendezvousParameters(
                "c10d", endpoint, "meeting", fewest, count, local_addr="127.0.0.1", **configured
            )
            agents = [Agent(parameters) for _ in range(count)]
            first = all_at_once([lambda agent=agent: agent.meet(count) for agent in agents])
            check(agents)
            for agent in agents[fewest:]:
                agent.die()
            agents = agents[:fewest]
            after_loss = all_at_once([lambda agent=agent: agent.meet(fewest) for agent in agents])
            check(agents)
            newcomers = [Agent(parameters) for _ in range(lost)]
            staying = [lambda agent=agent: agent.meet_those_that_come(count) for agent in agents]
            coming = [lambda agent=agent: agent.meet(count) for agent in newcomers]
            after_gain = all_at_once([*staying, *coming])
            check([*agents, *newcomers])
        finally:
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
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])), flush=True)
    os._exit(0)  # threads of agents that died may still wait
