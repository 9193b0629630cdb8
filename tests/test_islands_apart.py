"""Promises about clusters of islands that live and die apart: `trainer launch CONFIG --islands N`."""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

import trainer
from scripts import bench_islands, islands_picture
from tests.support import SMOKE, outcome, settings, start, summarise_run, wait_until, with_faults, write_corpus
from tests.support import trainer as command
from trainer import checkpoint, signals
from trainer import config as configs
from trainer.checkpoint import memory
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, ConfigError, CorruptionError, RunDirectoryError
from trainer.islands import apart, letters
from trainer.islands.post import Apart, Post, Together
from trainer.islands.state import check_alike
from trainer.launch import islands
from trainer.log import events, rundir
from trainer.parallel import elastic
from trainer.parallel.world import PeerLostError, World

SMALL: dict[str, Any] = {
    "budget.steps": 12, "checkpoint.every_steps": 4, "checkpoint.memory_every_steps": 2, "data.micro_batches": 4,
    "data.micro_batch_sequences": 1, "elastic.step_timeout_seconds": 4.0, "eval.every_steps": 6, "eval.max_tokens": 512,
    "islands.count": 4, "islands.inner_steps": 4, "islands.fragments": 2, "islands.overlap_steps": 2,
    "islands.mixing": 0.5, "islands.quantise": "int4", "model.context": 12, "model.n_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("apart") / "corpus")


def arguments(corpus: str) -> list[str]:
    return settings(**{key.replace(".", "__"): value for key, value in SMALL.items()}, data__source=corpus)


@pytest.fixture(scope="module")
def calm(corpus, tmp_path_factory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("calm") / "run"
    overrides = [f"{key}={json.dumps(value)}" for key, value in (SMALL | {"data.source": corpus}).items()]
    trainer.train(configs.load(SMOKE, overrides), run)
    return outcome(run)


def attempts(run: Path, cluster: int) -> list[events.AttemptStarted]:
    found = events.select(events.read(rundir.of_cluster(run, cluster)), events.AttemptStarted)
    return [event for _, event in found]


# Messages.


def posts(place: Path, count: int = 2, patience_seconds: float = 20.0) -> list[Post]:
    return [Post(place, cluster, count, patience_seconds) for cluster in range(count)]


def worlds(place: Path, count: int = 2) -> list[Apart]:
    return [Apart(post.cluster, count, torch.device("cpu"), post=post) for post in posts(place, count)]


@dataclasses.dataclass(frozen=True)
class Pair(World):
    """One of two ranks in threads of one process."""

    gate: Any = None
    said: Any = None

    @classmethod
    def both(cls) -> "list[Pair]":
        gate, said = threading.Barrier(2, timeout=20), [None, None]
        return [cls(rank, 2, torch.device("cpu"), gate=gate, said=said) for rank in range(2)]

    def _exchange(self, mine: Any) -> list[Any]:
        self.said[self.rank] = mine
        self.gate.wait()
        found = list(self.said)
        self.gate.wait()
        return found

    def _combined(self, tensor: torch.Tensor, combine: Any) -> None:
        tensor.copy_(combine(*self._exchange(tensor.clone())))

    def max(self, tensor: torch.Tensor) -> None:
        self._combined(tensor, torch.maximum)

    def sum(self, tensor: torch.Tensor) -> None:
        self._combined(tensor, torch.add)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        self._combined(tensor, lambda *both: both[source])


def at(world: Apart, step: int) -> Apart:
    assert world.post is not None
    world.post.at(step)
    return world


def test_what_clusters_say_to_each_other_is_what_ranks_would_and_one_that_comes_back_hears_it_again(tmp_path):
    heard: dict[int, Any] = {}

    def speak(world: Apart) -> Any:
        own = torch.tensor([1.0 + world.rank, -world.rank, 3.0])
        most, total, first, later = (own.clone() for _ in range(4))
        at(world, 1).max(most)
        letter = world.sum_later(later)
        world.sum(total)
        world.broadcast(first, 1)
        letter.wait()
        return [part.tolist() for part in (most, total, first, later)], world.agree(lambda: world.rank * 10)

    threads = [
        threading.Thread(target=lambda world=world: heard.update({world.rank: speak(world)}))
        for world in worlds(tmp_path, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    expected = [[3.0, 0.0, 3.0], [6.0, -3.0, 9.0], [2.0, -1.0, 3.0], [6.0, -3.0, 9.0]], [0, 10, 20]
    assert heard == dict.fromkeys(range(3), expected)
    assert speak(worlds(tmp_path, 3)[1]) == expected, "alone, long after"


def test_ranks_of_clusters_that_live_apart_hear_through_the_first_one_of_their_cluster_what_all_ranks_say(tmp_path):
    """Three clusters of two ranks, each a thread; within a cluster they hand each other what they have."""
    heard: dict[int, Any] = {}

    def speak(world: Together) -> Any:
        own = torch.tensor([1.0 + world.rank, -world.rank])
        most, total, fourth = (own.clone() for _ in range(3))
        world.max(most)
        world.sum(total)
        world.broadcast(fourth, 3)
        return [part.tolist() for part in (most, total, fourth)], world.agree(lambda: world.rank * 10)

    def start(world: Together) -> threading.Thread:
        thread = threading.Thread(target=lambda: heard.update({world.rank: speak(world)}))
        thread.start()
        return thread

    pairs = [(between, Pair.both()) for between in worlds(tmp_path, 3)]
    for thread in [start(Together.of(rank, at(between, 1))) for between, pair in pairs for rank in pair]:
        thread.join(timeout=20)
    expected = [[6.0, 0.0], [21.0, -15.0], [4.0, -3.0]], [0, 10, 20, 30, 40, 50]
    assert heard == dict.fromkeys(range(6), expected)


def test_a_message_that_is_computed_again_must_have_the_same_bits(tmp_path):
    at(worlds(tmp_path)[1], 3).sum_later(torch.tensor([0.25]))
    at(worlds(tmp_path)[1], 3).sum_later(torch.tensor([0.25]))
    with pytest.raises(CorruptionError, match="cluster 1 has computed step 3 again, and it gives other bits"):
        at(worlds(tmp_path)[1], 3).sum_later(torch.tensor([0.25000003]))


def test_of_two_processes_that_play_one_cluster_the_first_one_that_speaks_is_heard(tmp_path, monkeypatch):
    first, second = (at(worlds(tmp_path, 1)[0], 2).post for _ in range(2))
    assert first is not None
    assert second is not None
    write_bytes = Path.write_bytes

    def slowly(path: Path, content: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        first.give(first.next(), b"stop", is_function_of_config=False)  # between the other's look and its word
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", slowly)
    name = second.next()
    second.give(name, b"go on", is_function_of_config=False)
    assert second.take(name, 0) == b"stop"
    assert [path.name for path in name.parent.iterdir()] == ["01-0"]


def test_a_cluster_that_is_begun_again_with_another_config_is_refused(tmp_path):
    def config(*changes: str) -> configs.Config:
        return configs.load(SMOKE, ["islands.count=2", *changes])

    check_alike(config(), worlds(tmp_path, 1)[0])
    check_alike(config(), worlds(tmp_path, 1)[0])
    with pytest.raises(ConfigError) as refused:
        check_alike(config("checkpoint.every_steps=7"), worlds(tmp_path, 1)[0])
    assert "rank 0 was started with another config than before: checkpoint.every_steps" in refused.value.problems[0]


def test_a_cluster_that_computes_with_another_torch_than_the_first_one_is_refused_unless_that_is_accepted(tmp_path):
    alone, (first, other, again) = World(0, 1, torch.device("cpu")), posts(tmp_path, 3)
    apart.check_machines(first, alone, {"torch": "2.13"}, accepts=False)
    with pytest.raises(RunDirectoryError, match=r'cluster 1 was not started.*\n    torch: "2.13" → "2.14"\n'):
        apart.check_machines(other, alone, {"torch": "2.14"}, accepts=False)
    apart.check_machines(again, alone, {"torch": "2.14"}, accepts=True)


def test_a_stop_that_was_not_asked_for_the_first_time_is_not_heard_when_the_step_is_repeated(tmp_path):
    """Else the clusters would disagree on where the run has ended."""
    world, again = (at(worlds(tmp_path, 1)[0], 2) for _ in range(2))
    assert world.agree(lambda: False) == [False]
    assert again.agree(lambda: True) == [False]


def test_a_cluster_that_is_waited_for_is_named_and_the_wait_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.islands.post.AWAITED_SECONDS", 0.01)
    steps, reports = list[int](), list[events.Event]()
    waiting = Post(tmp_path, 0, 2, 0.2, steps.append, reports.append)
    waiting.at(5)
    name = waiting.next()
    late = posts(tmp_path)[1]
    late.at(5)
    giving = threading.Timer(0.05, lambda: late.give(late.next(), b"here"))
    giving.start()
    assert waiting.take(name, 1) == b"here"
    (awaited,) = reports
    assert isinstance(awaited, events.ClusterAwaited)
    assert (awaited.step, awaited.cluster, awaited.seconds >= 0.04) == (5, 1, True)
    assert set(steps) == {5}, "the watchdog hears that the step goes on"
    with pytest.raises(PeerLostError, match=r"cluster 1 has given no message for 0\.2 s"):
        waiting.take(waiting.next(), 1)


def test_messages_are_kept_from_the_step_on_that_somebody_may_begin_from(tmp_path):
    post, late = posts(tmp_path)
    for step in (0, 1, 2, 3):
        post.at(step)
        post.give(post.next(), b"x")
    post.forget(2)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"start", "step-00000003"}
    late.at(2)
    with pytest.raises(PeerLostError, match="messages of step 2 are gone: a newer checkpoint is there by now"):
        late.take(late.next(), 0)


class Weights:
    """As much of a TrainState as a Checkpointer restores."""

    def __init__(self) -> None:
        self.step, self.weights = 0, torch.zeros(3)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights}

    def restored(self, step: int) -> None:
        self.step = step


@pytest.mark.parametrize("cluster", [0, 1])
def test_copies_in_memory_that_an_earlier_job_left_are_not_used_and_those_of_this_job_are(
    tmp_path, monkeypatch, cluster
):
    """On disk is step 8; an earlier job has left a copy of step 10 here, and this job one of step 9."""
    run, identity = tmp_path / "run", {"fingerprint": "f", "run_id": "r"}
    own = rundir.of_cluster(run, cluster)
    own.mkdir(parents=True)
    monkeypatch.setattr(apart.rundir, "read", lambda run: identity)
    monkeypatch.delenv(elastic.FAILURES_FILE, raising=False)
    chosen = configs.load(SMOKE, ["checkpoint.memory_every_steps=2"]).checkpoint
    world = World(0, 1, torch.device("cpu"))

    def save(where: Path, step: int) -> None:
        saver = checkpoint.Saver(where, world, identity, chosen, lambda *_: None, lambda *_: None)
        saver.begin(step, {"weights": torch.full((3,), float(step))})
        saver.finish()
        saver.close()

    def start(cluster: int, job: str) -> tuple[str, int]:
        given = elastic.Apart(str(run), str(tmp_path / job), cluster, 2, 0, 1)
        monkeypatch.setenv(elastic.APART, json.dumps(dataclasses.asdict(given)))
        log: Any = SimpleNamespace(append=lambda event: None)
        post = Post(tmp_path / job, cluster, 2, 1.0)
        state: Any = Weights()
        checkpointer = apart.ApartCheckpointer(
            post, rundir.of_cluster(run, cluster), world, identity, chosen, log, lambda *_: None, lambda *_: None
        )
        state_from = checkpointer.restore(state)
        checkpointer.close()
        return state_from, state.step

    place = memory.place(run, "r")
    try:
        save(run, 8)
        start(0, "earlier")
        save(place, 10)
        assert start(0, "earlier") == ("memory", 10)
        # Cluster 0 of this job is on another node, with no such copy; here a cluster begins, and begins again.
        Post(tmp_path / "this", 0, 2, 1.0).give(tmp_path / "this" / "start" / "01", b"8")
        assert start(cluster, "this") == ("disk", 8)
        assert start(cluster, "this") == ("disk", 8)
        memory.discard(place)
        start(0, "this")
        save(place, 9)
        assert start(cluster, "this") == ("memory", 9)
    finally:
        memory.discard(place)


# Launchers.


def cluster_of(plan: islands.Plan, number: int, process: Any = None) -> islands.Cluster:
    lock = FileLock(plan.place / f"cluster-{number}.lock", thread_local=False)
    lock.acquire(timeout=0)
    return islands.Cluster(number, lock, elastic.make_failures_file(), process)


def job_of(plan: islands.Plan, post: Path, stack: contextlib.ExitStack) -> islands.Job:
    """A launcher's job whose clusters are no processes: only its signals are to be closed."""
    job = islands.Job(plan, post, None)
    stack.callback(job._stop.close)
    return job


@pytest.fixture
def kept(monkeypatch) -> Iterator[list[int]]:
    """Numbers of the clusters that launchers of this process begin to keep, without starting them."""
    numbers: list[int] = []

    def keep(job: islands.Job, number: int) -> bool:
        numbers.append(number)
        job._clusters.append(cluster_of(job.plan, number))
        return True

    monkeypatch.setattr(islands.Job, "_keep", keep)
    handlers = {number: signal.getsignal(number) for number in signals.heeded()}
    yield numbers
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("status", [EXIT_FINISHED, EXIT_PREEMPTED])
def test_a_spare_leaves_when_the_job_is_over_also_if_that_is_a_stop(tmp_path, kept, monkeypatch, status):
    monkeypatch.setattr(islands, "LOOK_SECONDS", 0.05)
    config = configs.load(SMOKE, ["islands.count=4", "elastic.step_timeout_seconds=1"])
    plan = islands.Plan(config, [], tmp_path / "run", 2, 0)
    with contextlib.ExitStack() as stack:
        post = islands._enter(plan, stack)
        first, spare = (job_of(plan, post, stack) for _ in range(2))
        process: Any = SimpleNamespace(pids=[0], failed=0, send_signal=lambda number: None)
        first._clusters = [cluster_of(plan, number, process) for number in range(2)]

        def leave() -> None:
            first._ended(first._clusters[0], status)
            for cluster in first._clusters:
                cluster.lock.release()

        threading.Timer(0.2, leave).start()
        assert spare.run() == status
        late = job_of(islands.Plan(config, [], tmp_path / "run", 2, 2), post, stack)
        assert late.run() == status
    assert kept == [], "no cluster is started any more"


@pytest.mark.parametrize(
    ("is_cpu_only", "seconds", "kept_before", "taken_over"),
    [(True, 0, [0], [1, 2]), (True, 1e9, [0], []), (False, 0, [0], []), (False, 0, [], [0])],
    ids=["CPUs", "too early", "its GPU is taken", "one GPU for three free clusters"],
)
def test_a_cluster_is_taken_over_only_after_its_time_and_where_a_gpu_is_left_for_it(
    tmp_path, kept, monkeypatch, is_cpu_only, seconds, kept_before, taken_over
):
    monkeypatch.setattr(islands, "is_cpu_only", lambda config: is_cpu_only)
    config = configs.load(SMOKE, ["islands.count=4", f"elastic.takeover_seconds={seconds}"])
    plan = islands.Plan(config, [], tmp_path / "run", 3, 1)
    with contextlib.ExitStack() as stack:
        job = job_of(plan, islands._enter(plan, stack), stack)
        job._clusters = [cluster_of(plan, number) for number in kept_before]
        job._free_since = dict.fromkeys(range(3), time.monotonic() - 1e6)
        job._look()
        assert kept == taken_over


@pytest.mark.parametrize(("status", "is_kept"), [(EXIT_FINISHED, False), (EXIT_PREEMPTED, True)])
def test_the_last_launcher_of_a_finished_job_removes_its_messages(tmp_path, status, is_kept):
    plan = islands.Plan(configs.load(SMOKE, ["islands.count=4"]), [], tmp_path / "run", 2, 1)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    post = islands._enter(plan, first)
    assert islands._enter(plan, second) == post
    (post / letters.OVER).write_text(str(status))
    first.close()
    assert post.is_dir(), "the other one may need a message"
    second.close()
    assert post.is_dir() == is_kept
    with contextlib.ExitStack() as stack:
        assert islands._enter(plan, stack) != post, "a new job"


# Whole jobs.


def launch(run: Path, corpus: str, *more: str, islands: int = 2) -> list[str]:
    return ["launch", str(SMOKE), "--run", str(run), "--islands", str(islands), *arguments(corpus), *more]


DEATHS = [(1, 2, "in_send"), (0, 4, "in_receive"), (1, 6, "in_outer_update"), (0, 8, "after_save"), (1, 9, "in_update")]


@pytest.mark.slow
def test_clusters_that_die_cost_the_others_no_attempt_and_end_with_the_bits_of_one_process(corpus, calm, tmp_path):
    kills = [{"kind": "sigkill", "rank": rank, "at_step": step, "phase": phase} for rank, step, phase in DEATHS]
    run = tmp_path / "run"
    ended = command(*launch(run, corpus, *with_faults(kills)))
    assert outcome(run) == calm
    assert "cluster 1 was ended by SIGKILL. It is started again; the others go on." in ended.stderr
    assert [len(attempts(run, cluster)) for cluster in (0, 1)] == [3, 4], "one more for each death of its own"
    lost = [event.reason for _, event in events.select(events.read(rundir.of_cluster(run, 1)), events.WorkersLost)]
    assert lost == ["rank 1 was ended by SIGKILL"] * 3
    assert not list((run / "islands").glob("post-*")), "nobody is left who might need a message"
    other = summarise_run(rundir.of_cluster(run, 1))
    assert (other["status"], other["state_sha256"]) == ("finished", calm["state_sha256"])


@pytest.mark.slow
def test_a_rank_that_dies_takes_its_own_cluster_with_it_and_costs_the_other_cluster_no_attempt(corpus, tmp_path):
    """Two clusters of two ranks: of the first one dies its second rank, of the other one its first, at an exchange."""
    of_two = settings(islands__count=2, parallel__island_ranks=2)
    kills = [
        {"kind": "sigkill", "rank": rank, "at_step": step, "phase": phase}
        for rank, step, phase in [(1, 5, "in_update"), (2, 8, "in_receive")]
    ]
    command("train", SMOKE, "--run", tmp_path / "calm", *arguments(corpus), *settings(islands__count=2))
    run = tmp_path / "run"
    ended = command(*launch(run, corpus, *of_two, *with_faults(kills)))
    assert outcome(run) == outcome(tmp_path / "calm")
    assert [[one.world_size for one in attempts(run, cluster)] for cluster in (0, 1)] == [[2] * 4] * 2, "twice"
    lost = [
        event.reason
        for cluster in (0, 1)
        for _, event in events.select(events.read(rundir.of_cluster(run, cluster)), events.WorkersLost)
    ]
    assert lost == ["rank 1 was ended by SIGKILL", "rank 2 was ended by SIGKILL"]
    assert "cluster 1 was ended by SIGKILL. It is started again; the others go on." in ended.stderr


def test_a_stop_is_heeded_by_all_clusters_after_one_step_and_any_number_of_them_goes_on(corpus, calm, tmp_path):
    """Cluster 1 is asked in step 5; they meet after step 6."""
    ask = with_faults([{"kind": "sigterm", "rank": 1, "at_step": 5, "phase": "before_update"}])
    keep_one = settings(checkpoint__keep_last=1)
    ended = command(*launch(tmp_path / "run", corpus, *ask, *keep_one), check=False)
    assert ended.returncode == EXIT_PREEMPTED, ended.stderr
    (post,) = (tmp_path / "run" / "islands").glob("post-*")
    assert (post / letters.OVER).read_text() == str(EXIT_PREEMPTED)
    assert min(path.name for path in post.glob("step-*")) == "step-00000006", "saved after 4, and after 6"
    ends = [
        event
        for cluster in (0, 1)
        for _, event in events.select(events.read(rundir.of_cluster(tmp_path / "run", cluster)), events.AttemptEnded)
    ]
    assert [(end.status, end.step) for end in ends] == [("preempted", 6)] * 2
    command(*launch(tmp_path / "run", corpus, *keep_one, islands=3))
    assert outcome(tmp_path / "run") == calm


@pytest.mark.slow
def test_a_cluster_whose_launcher_dies_is_taken_over_by_another_one(corpus, calm, tmp_path):
    run = tmp_path / "run"
    stop = with_faults([{"kind": "stopped", "rank": 1, "at_step": 5}])
    patient = settings(elastic__step_timeout_seconds=60.0)
    both = [launch(run, corpus, "--workers", "1", *stop, *more) for more in ([], patient)]
    with contextlib.ExitStack() as stack:
        launchers = []
        for arguments in both:
            output = tmp_path / f"output-{len(launchers)}"
            process = start([sys.executable, "-m", "trainer", *arguments], output)
            launchers.append(process)
            stack.callback(process.wait, 60)
            stack.callback(process.kill)
            lock = run / "islands" / f"cluster-{len(launchers) - 1}.lock"
            assert wait_until(lock.exists, 60)
        assert wait_until(lambda: fired(rundir.of_cluster(run, 1)), 60)
        launchers[1].kill()  # with it its cluster, which is stopped
        assert launchers[0].wait(timeout=60) == 0
    assert outcome(run) == calm
    assert len(attempts(run, 0)) == 1
    assert "cluster 1 has had no launcher for 4 s, and is taken over here." in (tmp_path / "output-0").read_text()


def fired(run: Path) -> bool:
    return events.events_directory(run).exists() and bool(list(events.select(events.read(run), events.FaultFired)))


# What is shown of it.


def test_no_row_of_the_benchmark_takes_three_minutes_and_the_list_says_which_are_measured(tmp_path):
    (tmp_path / "link-10mbit-int4.json").write_text(json.dumps({"bytes": 1500.0, "seconds": 0.25}))
    lines = {line.split()[0]: line for line in bench_islands.listed(tmp_path)}
    assert len(lines) == 8 + 3
    assert all(bench_islands.about_seconds(name) < 180 for name in lines)
    assert lines.pop("link-10mbit-int4").endswith("s   1.5 kB and 0.250 s per 1,000 tokens")
    assert all(line.endswith("not measured") for line in lines.values())


def test_the_picture_compares_the_bytes_of_the_same_time():
    """A synchronous run of a megabyte each second, and islands of ten kilobytes every second second."""
    sent = {
        "synchronous": [[at, 1e6 * (1 + at)] for at in range(61)],
        "islands": [[2 * at, 1e4 * (1 + at)] for at in range(26)],
    }
    assert islands_picture.title({"sent": sent}) == "Islands send 196 times fewer bytes in the same time"


# Bad input.


@pytest.mark.parametrize(
    ("changes", "clusters", "here", "said"),
    [
        ({"islands.count": 0}, 2, 2, "--islands starts clusters that compute islands, and islands.count = 0"),
        ({"parallel.island_ranks": 2}, 5, 5, "data.micro_batches = 8 leaves 2 of 10 ranks without work"),
        ({}, 2, 3, "--workers 3 exceeds --islands 2"),
        ({}, 5, 5, "islands.count = 4 leaves 1 of 5 ranks without an island"),
    ],
)
def test_clusters_that_cannot_live_apart_are_refused(tmp_path, changes, clusters, here, said):
    chosen = {"islands.count": 4} | changes
    config = configs.load(SMOKE, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
    with pytest.raises(ConfigError) as refused:
        islands.check(islands.Plan(config, [], tmp_path / "run", clusters, here))
    assert said in refused.value.problems[0]
