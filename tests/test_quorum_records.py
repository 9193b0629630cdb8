"""The logs of members that change: the steps are in one file, each once, whoever was the main member when."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint_worker import IDENTITY
from tests.logs import ended, started, step
from trainer import config, member
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint.checkpointer import MainCheckpointer
from trainer.log import events
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    EventLog,
    MembersChanged,
    StepDone,
    Warned,
)
from trainer.log.history import History
from trainer.member import Records
from trainer.parallel.protocol import Epoch, Report
from trainer.parallel.quorum import Change, EpochWorld
from trainer.phases import no_hook


class Member:
    def __init__(self, run: Path, number: int) -> None:
        self.log = EventLog.open(run, 0, number)
        self.log.create()
        self.records = Records(
            run, 0, number, self.log, lambda to, change: to.append(started(change.step, pid=100 + number)), no_show
        )

    def close(self) -> None:
        self.records.close()
        self.log.close()


def no_show(log: EventLog, since: float, shown: contextlib.ExitStack) -> None:
    pass


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def make(run: Path) -> Iterator[Callable[[int], list[Member]]]:
    """Returns so many members."""
    with contextlib.ExitStack() as stack:
        yield lambda count: [stack.enter_context(contextlib.closing(Member(run, n))) for n in range(count)]


@pytest.fixture
def meet() -> Callable[..., None]:
    number = 0

    def meet(at_step: int | None, *members: Member, lost: int | None = None) -> None:
        nonlocal number
        number += 1
        order = tuple(m.records._member for m in members)
        reports = {m.records._member: Report(step=at_step, note=m.records.note()) for m in members}
        left = {} if lost is None else {lost: "its connection closed"}
        epoch = Epoch(number, order, "", at_step, (), dict.fromkeys(order, ()), dict.fromkeys(order, ()), reports, left)
        for present in members:
            present.records.changed(Change(epoch, at_step or 0, 0.1, False, len(epoch.members)))

    return meet


def kinds(run: Path, number: int) -> list[Any]:
    """Read the file of a number: steps as numbers, other events as their kinds."""
    found = events.read_file(events.path_of(run, 0, number))
    return [e.event.step if isinstance(e.event, StepDone) else e.event.kind for e in found]


def test_a_former_main_member_adds_nothing_to_the_log_of_all_and_each_step_is_there_once(
    run: Path, make: Any, meet: Any
):
    first, second = make(2)
    meet(None, first, second)
    for present in (first, second):
        present.records.record(step(1))
    second.records.record(step(2))  # the first one falls a step behind, and is no longer the main one
    meet(2, second, first)
    for present in (second, first):
        present.records.record(step(3))
    first.records.append(Warned(message="a disk is slow"))
    first.records.append(ended("failed", 3, None))
    meet(3, first)  # the second one is gone
    first.records.record(step(4))
    first.records.append(ended("finished", 4))
    assert kinds(run, 0) == [
        AttemptStarted.kind, 1, 2, MembersChanged.kind, 3, MembersChanged.kind, 4, AttemptEnded.kind,
    ]  # fmt: skip
    assert kinds(run, 1) == [AttemptStarted.kind]
    assert [attempt.status for attempt in History.read(run).attempts] == ["finished"]


def test_the_next_main_member_writes_the_step_that_the_dead_one_had_committed_and_not_recorded(
    run: Path, make: Any, meet: Any
):
    first, second, third = make(3)
    meet(None, first, second, third)
    for present in (first, second, third):
        present.records.record(step(1))
    for present in (second, third):  # the first one dies between the two
        present.records.record(step(2))
    second.records.append(Warned(message="a disk is slow"))
    meet(2, second, third, lost=0)
    second.records.append(Warned(message="a disk is slower"))
    assert kinds(run, 0) == [AttemptStarted.kind, 1, 2, MembersChanged.kind, Warned.kind]
    assert kinds(run, 1) == [AttemptStarted.kind, Warned.kind]
    assert {entry.rank for entry in events.read_file(events.path_of(run, 0, 0))} == {0}


def test_a_worker_that_fails_before_anybody_has_trained_says_so_whatever_its_number(run: Path, make: Any):
    for number, present in enumerate(make(2)):
        present.records.append(member.ended("failed", 0, "CheckpointError: none is intact"))
        assert kinds(run, number) == [AttemptEnded.kind]


def test_a_save_that_fails_is_reported_of_the_member_that_wrote_it(run: Path, monkeypatch: pytest.MonkeyPatch):
    def full(run: Path, step: int) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    class State:
        step = 1

        def tensors(self) -> dict[str, torch.Tensor]:
            return {"a": torch.zeros(3)}

    monkeypatch.setattr(checkpoint_files, "stage", full)
    written: list[Any] = []
    alone, facts, log, state = EpochWorld(0, 1, torch.device("cpu")), IDENTITY, written, State()
    arguments: Any = (lambda: alone, lambda state: None, run, alone, facts, config.Checkpoint(), log, no_hook, no_hook)
    saving = MainCheckpointer(*arguments, member=11)
    for state.step in (1, 2):  # the second save waits for the first
        saving.save(state)  # pyright: ignore[reportArgumentType]
    saving.close()
    failed = [event for event in written if isinstance(event, CheckpointFailed)]
    assert [(event.step, event.on_rank) for event in failed][:1] == [(1, 11)]
