"""The launcher of `trainer launch CONFIG --islands n`: clusters of islands, each of which lives and dies alone.

    launcher ── starts ──▶ cluster 0      the run itself: its log, evaluations, checkpoints
             ├─ starts ──▶ cluster 1      trains in RUN/islands/cluster-1, beside the log cluster-1.txt
             └─ …                         one that dies is started again, alone; the others wait for its next message

A cluster is `parallel.island_ranks` processes, which end and begin together: a death is felt by its cluster alone.

There is no arbiter: clusters exchange files (islands/post.py), and nobody has to know who lives. On several nodes that
share the run directory, the same command on each starts its share of the clusters. A cluster has a lock, which its
launcher holds and the kernel frees: where one is free for a while, another launcher starts the cluster. Hosts that do
not see one directory exchange the files by their launchers (courier.py).
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from trainer import files, signals
from trainer.config import Config, check_world
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE, ConfigError, RunDirectoryError
from trainer.islands import letters
from trainer.launch import courier, forkserver, processes, quorum, torchrun
from trainer.launch.quorum import (
    LEAVE_SECONDS,
    RESTARTS_WITHOUT_PROGRESS,
    GroupOfProcesses,
    is_cpu_only,
    terminal_line,
)  # fmt: skip
from trainer.log import rundir
from trainer.parallel import arbiter, elastic

POLL_SECONDS = 0.02
LOOK_SECONDS = 0.5
"""Seconds between a launcher's looks for clusters that have none, for stopped ones, and for the end of the job."""


@dataclass(frozen=True)
class Plan:
    """Clusters to be started on this node, and their job."""

    config: Config
    command: Sequence[str]
    """Arguments of `-m trainer` for a cluster, without --run."""
    run: Path
    clusters: int
    """Clusters of the job, on all nodes."""
    here: int
    """Clusters of the job on this node."""
    listen: str = ""
    """Address where launchers on hosts that do not see the run directory join; empty: nowhere."""
    join: str = ""
    """Address of the launcher that this one joins, with a run directory of its own; empty: none."""

    @property
    def place(self) -> Path:
        return self.run / "islands"


def output_of(run: Path, cluster: int) -> Path:
    """Return the file for what a cluster other than the first one prints."""
    return run / "islands" / f"cluster-{cluster}.txt"


@dataclass
class Cluster:
    """A cluster that this launcher is to keep alive."""

    number: int
    lock: FileLock
    failures: Path
    """File through which its next attempt learns how it has ended."""
    process: GroupOfProcesses | None = None
    """Its ranks."""
    status: int | None = None
    """Exit status of one that left in order."""
    stopped_at: float | None = None


def launch(plan: Plan) -> int:
    """Run the clusters, or this node's share of them; return the exit status. Raises TopropeErrors before any work."""
    check(plan)
    # Before there is a thread: clusters are forked from a process that has imported torch.
    server = forkserver.fork(forkserver.PRELOADED) if is_cpu_only(plan.config) else None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        if server is not None:
            stack.callback(server.close)
        remote = None
        if plan.join:
            patience = plan.config.elastic.takeover_seconds or plan.config.elastic.step_timeout_seconds
            remote = courier.Joined(
                quorum.parse_address(plan.join), quorum.token_of_others(plan.run), plan.run, plan.clusters, plan.here,
                patience,
            )  # fmt: skip
        post = _enter(plan, stack, remote.post if remote else "")
        if remote is not None:
            stack.callback(remote.close)
            remote.begin()
        elif plan.listen:
            stack.callback(arbiter.address_path(plan.run).unlink, missing_ok=True)
            remote = _listen(plan, post)
            stack.callback(remote.close)
        job = Job(plan, post, server, remote)
        stack.callback(job.close)
        return job.run()


def _listen(plan: Plan, post: Path) -> courier.Listening:
    listener = arbiter.listen(*quorum.parse_address(plan.listen))
    token = os.environ.get(arbiter.TOKEN) or quorum.token_of(plan.run)
    quorum.publish_address(plan.run, listener, token)
    return courier.Listening(listener, token, plan.run, post, plan.clusters)


def check(plan: Plan) -> None:
    """Raise ConfigError for what cannot be computed by clusters that live apart."""
    config, problems = plan.config, []
    if not config.islands.count:
        problems.append(
            "--islands starts clusters that compute islands, and islands.count = 0: there are none.\n"
            "  Set islands.count, or start --workers without --islands."
        )
    if plan.here > plan.clusters:
        problems.append(
            f"--workers {plan.here} exceeds --islands {plan.clusters}: those are the clusters of all nodes.\n"
            "  Leave --workers out to start all of them here."
        )
    if problems:
        raise ConfigError(problems)
    check_world(config, plan.clusters * config.parallel.island_ranks)
    rundir.check(plan.run, config)


def _enter(plan: Plan, stack: contextlib.ExitStack, post: str = "") -> Path:
    """Join the job that is going on in the run directory, or begin one; return the directory of its messages.

    `post` is its name, if another host has begun the job.
    """
    place = plan.place
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "start.lock", fallback_to_soft=False):
        alive = stack.enter_context((place / "job.lock").open("a"))
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            job = json.loads((place / "job.json").read_text(encoding="utf-8"))
        else:
            # No launcher lives, so all begin from one checkpoint, and no message of before is needed.
            for old in place.glob("post-*"):
                if old.name != post:
                    shutil.rmtree(old, ignore_errors=True)
            job = {"post": post or f"post-{secrets.token_hex(4)}", "clusters": plan.clusters}
            (place / job["post"]).mkdir(exist_ok=True)
            files.write(place / "job.json", json.dumps(job))
        fcntl.flock(alive, fcntl.LOCK_SH)  # held by every launcher of the job
    if job["clusters"] != plan.clusters:
        raise RunDirectoryError(
            f"{plan.run} is being trained by {job['clusters']} clusters, not by {plan.clusters}.\n"
            f"  All nodes of a job give the same number: --islands {job['clusters']}. Or wait for the end of that job."
        )
    if post not in ("", job["post"]):
        raise RunDirectoryError(
            f"{plan.run} is being trained by another job than that of {plan.join}.\n"
            "  Give a --run of its own, or wait for the end of the job here."
        )
    stack.callback(_leave, place / job["post"], alive)
    return place / job["post"]


def _leave(post: Path, alive: IO[str]) -> None:
    """Remove the messages of a finished job, unless another launcher lives: its clusters may need them."""
    with FileLock(post.parent / "start.lock", fallback_to_soft=False), contextlib.suppress(OSError):
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another launcher lives
        if letters.over(post) == EXIT_FINISHED:
            shutil.rmtree(post, ignore_errors=True)
        fcntl.flock(alive, fcntl.LOCK_UN)  # before start.lock: who comes next begins a job


@dataclass
class Job:
    """The clusters of this node."""

    plan: Plan
    post: Path
    server: forkserver.ForkServer | None
    remote: courier.Listening | courier.Joined | None = None
    """By which files travel to hosts that do not see the run directory."""
    _clusters: list[Cluster] = field(default_factory=list)
    _free_since: dict[int, float] = field(default_factory=dict)
    """When a cluster was first seen without a launcher."""
    _highest_step: int = 0
    _restarts: int = 0
    """Since there was a new step."""
    _status: int | None = None
    _kill_at: float | None = None
    _look_at: float = 0.0
    _over: int | None = None
    """Status with which the job has ended, also on other nodes; None if it goes on."""

    def __post_init__(self) -> None:
        self._stop = signals.PassedOn(self._signal_all)

    def run(self) -> int:
        self._stop.listen()
        self._over = letters.over(self.post)
        for number in self.remote.numbers if isinstance(self.remote, courier.Joined) else range(self.plan.clusters):
            if len(self._clusters) < self.plan.here and self._over is None:
                self._keep(number)
        if isinstance(self.remote, courier.Listening):
            self.remote.begin()
        if not self._clusters and self._over is None:
            terminal_line(f"All {self.plan.clusters} clusters have launchers. This one waits until one has none.")
        while self._goes_on():
            time.sleep(POLL_SECONDS)
            self._stop.pass_on()
            for cluster in self._clusters:
                if cluster.process is not None and (status := cluster.process.poll()) is not None:
                    self._ended(cluster, status)
            if time.monotonic() > self._look_at:
                self._look_at = time.monotonic() + LOOK_SECONDS
                self._look()
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._signal_all(signal.SIGKILL)
        return self._exit_status()

    def _goes_on(self) -> bool:
        if not self._clusters:
            return not self._stop.number and self._over is None
        return any(cluster.process is not None for cluster in self._clusters)

    def close(self) -> None:
        """End what still runs."""
        self._signal_all(signal.SIGKILL)
        self._stop.close()
        for cluster in self._clusters:
            if cluster.process is not None:
                cluster.process.wait()
            torchrun.remove_notes(cluster.failures)
            cluster.lock.release()

    def _exit_status(self) -> int:
        if self._status is not None:
            return self._status
        statuses = {cluster.status for cluster in self._clusters} or {self._over}
        if statuses == {EXIT_FINISHED}:
            return EXIT_FINISHED
        return EXIT_PREEMPTED if self._stop.number or EXIT_PREEMPTED in statuses else EXIT_FAILED

    # Clusters

    def _keep(self, number: int) -> bool:
        """Start a cluster, unless another launcher keeps it."""
        lock = FileLock(self.plan.place / f"cluster-{number}.lock", fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        cluster = Cluster(number, lock, elastic.make_failures_file())
        self._clusters.append(cluster)
        self._start(cluster)
        return True

    def _start(self, cluster: Cluster) -> None:
        plan, number, ranks = self.plan, cluster.number, self.plan.config.parallel.island_ranks
        place, meeting = self._clusters.index(cluster), tempfile.TemporaryDirectory(prefix="toprope-group-")
        given = elastic.Apart(
            str(plan.run), str(self.post), number, plan.clusters, place, max(plan.here, place + 1), ranks, 0,
            meeting.name,
        )  # fmt: skip
        started = [self._start_rank(cluster, replace(given, rank=rank)) for rank in range(ranks)]
        cluster.process, cluster.stopped_at = GroupOfProcesses(started, meeting), None

    def _start_rank(self, cluster: Cluster, given: elastic.Apart) -> Any:
        run, number = self.plan.run, cluster.number
        environment = os.environ | given.environment() | {elastic.FAILURES_FILE: str(cluster.failures)}
        if number:  # the first one shows the run
            environment["WANDB_MODE"] = "disabled"
        command = [*self.plan.command, "--run", str(rundir.of_cluster(run, number))]
        output = output_of(run, number) if number else None
        if output is not None and given.rank:  # one file for each: they would write over one another
            output = output.with_suffix(f".{given.rank}.txt")
        process = None
        if self.server is not None:
            process = self.server.start("trainer", command, environment, output=output)
        if process is None:
            with contextlib.ExitStack() as stack:
                stdout = stack.enter_context(output.open("wb")) if output else None
                process = subprocess.Popen(
                    [sys.executable, "-u", "-m", "trainer", *command], env=environment, start_new_session=True,
                    stdout=stdout, stderr=stdout,
                )  # fmt: skip
        return process

    def _ended(self, cluster: Cluster, status: int) -> None:
        group, cluster.process = cluster.process, None
        assert group is not None
        rank = cluster.number * self.plan.config.parallel.island_ranks + group.failed
        end = elastic.failure(rank, group.pids[group.failed], status)
        if status in (EXIT_FINISHED, EXIT_PREEMPTED):
            cluster.status = status
            if cluster.number == 0:  # all that counts is on disk
                files.write(self.post / letters.OVER, str(status))
            if status == EXIT_PREEMPTED:
                self._stop.ask(signal.SIGTERM)
            return
        if self._stop.number or self._status is not None:
            # A stop is heeded where the clusters meet, which may be many steps on; without this one they never do.
            self._kill_at = self._kill_at or time.monotonic() + LEAVE_SECONDS
            return
        step = letters.newest_step(self.post)
        if step > self._highest_step:
            self._highest_step, self._restarts = step, 0
        self._restarts += 1
        if status == EXIT_USAGE and not step:  # else its run directory may be held by a process that is about to end
            self._end(EXIT_USAGE, cluster, end)
        elif elastic.gave_up(cluster.failures) or self._restarts > RESTARTS_WITHOUT_PROGRESS * len(self._clusters):
            self._end(EXIT_FAILED, cluster, end)
        else:
            elastic.note_failures([end], cluster.failures)
            terminal_line(f"cluster {cluster.number} {elastic.how(end)}. It is started again; the others go on.")
            self._start(cluster)

    def _end(self, status: int, cluster: Cluster, end: dict[str, Any]) -> None:
        self._status, self._kill_at = status, time.monotonic() + 2.0
        said = f"; its last words are in {output_of(self.plan.run, cluster.number)}" if cluster.number else ""
        terminal_line(f"The job has ended: cluster {cluster.number} {elastic.how(end)}{said}.")

    def _look(self) -> None:
        """End a cluster that is stopped for too long, and take over one that has no launcher for as long."""
        settings, now = self.plan.config.elastic, time.monotonic()
        patience = settings.takeover_seconds or settings.step_timeout_seconds
        for cluster in self._clusters:
            if cluster.process is None:
                continue
            is_stopped = any(processes.stat(pid)[:1] == ["T"] for pid in cluster.process.pids)
            cluster.stopped_at = (cluster.stopped_at or now) if is_stopped else None
            if cluster.stopped_at is not None and now - cluster.stopped_at > settings.step_timeout_seconds:
                seconds = settings.step_timeout_seconds
                terminal_line(f"cluster {cluster.number} has been stopped for {seconds:g} s, and is ended.")
                cluster.process.kill()
        self._over = letters.over(self.post)
        if self._over == EXIT_PREEMPTED:
            # A cluster that has begun from what the stop has saved waits for clusters that have left.
            self._stop.ask(signal.SIGTERM)
            self._kill_at = self._kill_at or now + LEAVE_SECONDS
        if self._stop.number or self._status is not None or self._over is not None:
            return
        if isinstance(self.remote, courier.Joined):
            if self.remote.problem:
                self._status, self._kill_at = EXIT_FAILED, now
                terminal_line(f"This node has left the job: {self.remote.problem}")
            return
        has_gpu_each = not is_cpu_only(self.plan.config) and not self.plan.config.parallel.share_gpus
        kept = {cluster.number for cluster in self._clusters}
        for number in set(range(self.plan.clusters)) - kept:
            if has_gpu_each and len(self._clusters) >= self.plan.here:
                return  # no GPU is left: a spare, or a node with room, takes the cluster over
            if not self._is_free(number):
                self._free_since.pop(number, None)
            elif now - self._free_since.setdefault(number, now) > patience and self._keep(number):
                terminal_line(f"cluster {number} has had no launcher for {patience:g} s, and is taken over here.")

    def _is_free(self, number: int) -> bool:
        lock = FileLock(self.plan.place / f"cluster-{number}.lock", fallback_to_soft=False)
        try:
            with lock.acquire(timeout=0):
                return True
        except Timeout:
            return False

    def _signal_all(self, number: int) -> None:
        for cluster in self._clusters:
            if cluster.process is not None:
                cluster.process.send_signal(number)
