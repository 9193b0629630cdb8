"""A peer's death is told to ranks that would wait in NCCL: real processes, whose main threads wait for nothing else."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import SMOKE, start, wait_until
from trainer import config as configs
from trainer import job
from trainer.errors import EXIT_FAILED
from trainer.log.events import LOST_A_PEER
from trainer.parallel import peers, world
from trainer.parallel.world import World

Start = Callable[[str, int], list[Any]]


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    running: list[Any] = []

    def begin(what: str, count: int) -> list[Any]:
        command = [sys.executable, "-m", "tests.peers_worker", what]
        running.extend(start([*command, str(rank), str(count), str(tmp_path)]) for rank in range(count))
        return running

    yield begin
    for process in running:
        process.kill()
        process.wait()


def said(directory: Path, count: int) -> list[str]:
    files = [directory / f"rank-{rank}.txt" for rank in range(count)]
    return [file.read_text() if file.exists() else "" for file in files]


def test_a_killed_peer_is_told_to_all_others_within_seconds_and_to_the_watchdog_nobody_waits(begun: Start, tmp_path):
    processes = begun("wait", 4)
    assert wait_until(lambda: said(tmp_path, 4) == ["ready"] * 4, 60), said(tmp_path, 4)
    processes[2].send_signal(signal.SIGKILL)
    assert wait_until(lambda: said(tmp_path, 4) == ["lost", "lost", "ready", "lost"], 30), said(tmp_path, 4)
    assert [process.wait(30) for process in processes] == [EXIT_FAILED, EXIT_FAILED, -signal.SIGKILL, EXIT_FAILED]


def test_a_rank_that_fails_alone_is_a_lost_peer_of_the_others(begun: Start, tmp_path):
    processes = begun("fail", 2)
    assert [process.wait(60) for process in processes] == [EXIT_FAILED, EXIT_FAILED]
    assert said(tmp_path, 2) == ["lost", "ready"]


@pytest.mark.parametrize("what", ["leave", "stop"])
def test_ranks_that_leave_one_by_one_or_are_stopped_for_a_while_lose_nobody(begun: Start, tmp_path, what: str):
    processes = begun(what, 3)
    if what == "stop":
        assert wait_until(lambda: said(tmp_path, 3) == ["ready"] * 3, 60)
        time.sleep(2 * peers.HERE_SECONDS)
        assert said(tmp_path, 3) == ["ready"] * 3
        processes[1].send_signal(signal.SIGCONT)
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert said(tmp_path, 3) == ["left"] * 3


@pytest.mark.parametrize(
    ("device", "share", "size", "needed"),
    [("cuda", False, 2, True), ("cuda", False, 1, False), ("cuda", True, 2, False), ("cpu", False, 2, False)],
)
def test_only_ranks_that_wait_in_nccl_need_to_be_told(device: str, share: bool, size: int, needed: bool):
    backend = world.backend(torch.device(device), share)
    assert peers.needed(World(0, size, torch.device(device)), backend) == needed


def test_a_rank_that_is_told_logs_that_it_lost_a_peer_and_leaves(monkeypatch):
    """As a rank whose own collective fails: it is not blamed."""
    monkeypatch.setattr(peers, "watched", lambda ranks, lost: lost())
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    claim, state = mock.Mock(ranks=World(0, 2, torch.device("cuda"))), SimpleNamespace(step=7)
    with pytest.raises(SystemExit):
        job.watched_peers(configs.load(SMOKE), claim, state)  # pyright: ignore[reportArgumentType]
    claim.end.assert_called_once_with("failed", 7, LOST_A_PEER)
    claim.watchdog.stop.assert_called_once()
