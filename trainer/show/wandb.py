"""A run in Weights & Biases: a subscriber to the event log that hands metrics to a helper process.

Not a thread: in-process, W&B costs the trainer 0.2–0.3 ms of the interpreter's time per step and hooks into its exit;
and when the trainer is SIGKILLed, it loses what it had buffered (up to 15 s, measured with 0.31). The helper sees its
pipe end, writes everything down, marks the run crashed and leaves.
"""

import contextlib
import fcntl
import json
import netrc
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Self
from urllib.parse import urlsplit

from trainer import errors
from trainer.config import Config
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    Entry,
    EvalDone,
    Event,
    StepDone,
)
from trainer.log.history import History
from trainer.log.incidents import Incident, IncidentBuilder

WandbMode = Literal["online", "offline", "disabled"]
WANDB_HOST = "https://api.wandb.ai"
WANDB_SECONDS = 0.25  # waking the helper for every step costs the trainer 0.1 ms each time
PENDING_BYTES = 64 * 2**20  # about 200,000 steps; W&B has then been stuck for long
NOT_FOR_WANDB = ("run_id", "format", "config", "mathematics")  # of config.json: said otherwise, or said twice
STATUS_EXIT = {"finished": errors.EXIT_FINISHED, "preempted": errors.EXIT_PREEMPTED, "failed": errors.EXIT_FAILED}


def wandb_mode(config: Config, environ: Mapping[str, str] = os.environ) -> WandbMode:
    """How to reach W&B. WANDB_MODE wins; "auto" is online where a key is known, else offline.

    A key is only ever looked for in WANDB_API_KEY and in netrc's entry for the host (WANDB_BASE_URL, NETRC honoured);
    it is neither read nor kept here. Raises ConfigError on a WANDB_MODE that is none of ours.
    """
    chosen = environ.get("WANDB_MODE") or config.wandb.mode
    chosen = {"dryrun": "offline", "run": "online"}.get(chosen, chosen)
    match chosen:
        case "online" | "offline" | "disabled":
            return chosen
        case "auto":
            return "online" if environ.get("WANDB_API_KEY") or _in_netrc(environ) else "offline"
        case _:
            raise errors.ConfigError(
                [
                    f"WANDB_MODE = {chosen!r} is no mode.\n"
                    "  Set it to online, offline or disabled, or unset it to let wandb.mode decide."
                ]
            )


def _in_netrc(environ: Mapping[str, str]) -> bool:
    host = urlsplit(environ.get("WANDB_BASE_URL") or WANDB_HOST).netloc
    names = [environ["NETRC"]] if environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in names:
        # Not authenticators(): it would take the "default" entry, some other service's password, for a W&B key.
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(name).expanduser()).hosts.get(host, ("", "", ""))[2]:
                return True
    return False


class WandbSink:
    """Sends one process's events to W&B through a helper process. Subscribe it on rank 0 only.

    A call never waits: it writes to a pipe that does not block and keeps what does not fit. Whatever goes wrong is said
    once, through `on_problem`, on the thread that calls the sink or closes it; training goes on. `run_info` needs
    "run_id", stable over the run's attempts; the rest of it (fingerprint, versions) joins the config that W&B shows.
    Offline, each attempt leaves its own folder in RUN/wandb, all with one id: `wandb sync` joins them later.

    `earlier` is the log of the attempts before. With it the counts below go on over restarts: `run/attempt` beside
    every step (where it changes, the run was restarted; steps shown twice were replayed); `run/incidents`,
    `run/restarts`, `run/lost_steps`, `run/seconds_without_training` and the line `run/incident` at each incident's
    step, which raises an alert too; `checkpoint/failures` beside `checkpoint/stall_seconds` and `checkpoint/seconds`.
    """

    def __init__(
        self,
        run_directory: Path,
        config: Config,
        run_info: Mapping[str, Any],
        on_problem: Callable[[str], None],
        close_timeout_seconds: float = 30.0,
        earlier: Sequence[Entry] = (),
    ) -> None:
        self.mode: WandbMode = wandb_mode(config)
        self._directory = run_directory
        self._on_problem = on_problem
        self._close_timeout_seconds = close_timeout_seconds
        self._pending = bytearray()
        self._written_at = float("-inf")
        self._marks = _Marks(earlier)
        self._helper: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._url: str | None = None
        if self.mode != "disabled":
            self._start({"init": self._init_arguments(config, run_info), "finish_timeout": close_timeout_seconds})

    def __call__(self, entry: Entry) -> None:
        if self._helper is None:
            return
        for message in self._marks.messages(entry):
            self._pending += json.dumps(message).encode() + b"\n"
        # A checkpoint is an event too: steps lost here by a kill come after it, and are replayed.
        if not isinstance(entry.event, StepDone) or not 0 <= entry.time - self._written_at < WANDB_SECONDS:
            self._written_at = entry.time
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The helper's process id while it runs for us."""
        return self._helper.pid if self._helper is not None else None

    @property
    def url(self) -> str | None:
        """The run's page once W&B has named it; None offline or before that."""
        if self._url is None:
            first_line, newline, _ = self._output(4096).partition("\n")
            self._url = first_line.removeprefix("url ") if newline and first_line.startswith("url ") else None
        return self._url

    def close(self) -> None:
        """Let W&B write what it has, for at most `close_timeout_seconds`. Call it before the event log is closed."""
        if self._helper is None:
            return
        deadline = time.monotonic() + self._close_timeout_seconds
        self._drain(deadline)
        if (helper := self._helper) is None:
            return
        assert helper.stdin is not None
        helper.stdin.close()
        try:
            status = helper.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._give_up(f"it was not done after {self._close_timeout_seconds:g} s and was ended")
            return
        self._helper = None
        if status:
            self._report(self._reason())
        self._forget()

    def _init_arguments(self, config: Config, run_info: Mapping[str, Any]) -> dict[str, Any]:
        shown = {key: value for key, value in run_info.items() if key not in NOT_FOR_WANDB}
        wandb = config.wandb
        return {
            "id": run_info["run_id"],
            "name": os.environ.get("WANDB_NAME") or self._directory.resolve().name,
            "mode": self.mode,
            "dir": str(self._directory.resolve()),
            "project": wandb.project,
            "entity": wandb.entity or None,
            "group": wandb.group or None,
            "tags": list(wandb.tags) or None,
            "config": config.model_dump(mode="json") | shown,
        }

    def _start(self, first: dict[str, Any]) -> None:
        package_root = Path(__file__).resolve().parents[2]
        environ = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package_root), environ.get("PYTHONPATH")]))
        environ["WANDB_SILENT"] = "true"
        environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            (self._directory / "wandb").mkdir(parents=True, exist_ok=True)  # else W&B would move to /tmp unasked
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - read until the end; closed with the sink
            self._helper = subprocess.Popen(
                # -P: a wandb.py in the working directory is not W&B.
                [sys.executable, "-P", "-c", "from trainer.show.wandb import relay; relay()"],
                stdin=subprocess.PIPE,
                stdout=self._said,  # not ours: whoever reads the trainer's output would wait for the helper too
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,  # Ctrl-C and a launcher's kill are for the trainer
            )
            assert self._helper.stdin is not None
            os.set_blocking(self._helper.stdin.fileno(), False)
        except OSError as error:
            self._report(str(error))
            self._forget()
        else:
            self._pending += json.dumps(first).encode() + b"\n"
            self._write()

    def _write(self) -> None:
        assert self._helper is not None
        assert self._helper.stdin is not None
        if not self._pending:
            return
        try:
            with memoryview(self._pending) as pending:
                written = os.write(self._helper.stdin.fileno(), pending[: 2**16])
            del self._pending[:written]
        except BlockingIOError:
            if len(self._pending) > PENDING_BYTES:
                self._give_up("it takes no more metrics")
        except OSError:  # the helper is gone
            self._give_up(self._reason())

    def _drain(self, deadline: float) -> None:
        while self._pending and self._helper is not None:
            assert self._helper.stdin is not None
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([], [self._helper.stdin], [], wait)[1]:
                return  # the wait for the helper's end finds the same deadline passed
            self._write()

    def _give_up(self, why: str) -> None:
        helper, self._helper = self._helper, None
        assert helper is not None
        assert helper.stdin is not None
        self._pending.clear()
        helper.kill()  # wandb-core watches its parent and follows within 0.1 s
        helper.stdin.close()
        helper.wait()
        self._report(why)
        self._forget()

    def _report(self, why: str) -> None:
        self._on_problem(
            f"W&B stopped: {why.rstrip('.')}. Training goes on and the event log keeps every metric; "
            f"what reached {self._directory / 'wandb'} can be uploaded with `wandb sync`."
        )

    def _forget(self) -> None:
        _ = self.url  # remembered for who asks later
        if self._said is not None:
            self._said.close()
            self._said = None

    def _reason(self) -> str:
        lines = [line for line in self._output(2**20).splitlines() if line.strip()]
        return lines[-1].strip()[:500] if lines else "its helper process ended without a word"

    def _output(self, size: int) -> str:
        # pread: the helper shares the file's offset.
        return "" if self._said is None else os.pread(self._said.fileno(), size, 0).decode(errors="replace")


class _Marks:
    """Turns entries into messages for the helper. Its counts are the run's, not the attempt's."""

    def __init__(self, earlier: Sequence[Entry]) -> None:
        self._incidents = IncidentBuilder(earlier)
        self._earlier = earlier
        self._redone = 0
        self._checkpoint_failures = sum(
            isinstance(entry.event, CheckpointFailed) and entry.rank == 0 for entry in earlier
        )

    def messages(self, entry: Entry) -> Iterator[dict[str, Any]]:
        for incident in self._incidents.add(entry):
            yield from self._incident(incident)
        event = entry.event
        if isinstance(event, StepDone):
            self._redone += event.redone
            yield {"log": _step_metrics(event, entry.attempt, self._redone)}
        else:
            yield from self._rare(entry.attempt, event)

    def _rare(self, attempt: int, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case AttemptStarted(from_step=step):
                self._redone = sum(
                    done.redone for n, done in History.from_entries(self._earlier).committed.items() if n <= step
                )
                self._earlier = ()
                yield {"log": {"step": step, "run/attempt": attempt, "run/world_size": event.world_size}}
                if not attempt:  # the curves begin at 0, not at the first incident
                    yield {"log": {"step": step, **self._counts()}}
            case EvalDone(step=step, set=name):
                scores = {f"eval/{name}/loss": event.loss, f"eval/{name}/bits_per_byte": event.bits_per_byte}
                yield {"log": {"step": step, **scores}}
            case CheckpointSaved(step=step):
                times = {"checkpoint/stall_seconds": event.stall_seconds, "checkpoint/seconds": event.seconds}
                yield {"log": {"step": step, "checkpoint/failures": self._checkpoint_failures, **times}}
            case CheckpointFailed(step=step):
                self._checkpoint_failures += 1
                yield {"log": {"step": step, "checkpoint/failures": self._checkpoint_failures}}
            case AttemptEnded():
                hashes = {"weights_sha256": event.weights_sha256, "state_sha256": event.state_sha256}
                if event.status not in ("finished", "preempted"):
                    yield _alert(f"attempt {attempt} failed", event.reason, "ERROR")
                yield {"end": STATUS_EXIT.get(event.status, errors.EXIT_FAILED), "summary": hashes}

    def _incident(self, incident: Incident) -> Iterator[dict[str, Any]]:
        where = {} if incident.step is None else {"step": incident.step}
        line = f"attempt {incident.attempt}: {incident.text}"
        yield {"log": {**where, **self._counts(), "run/incident": line}}
        level = "INFO" if incident.kind == "preempted" else "WARN"
        yield _alert(f"{incident.kind.replace('_', ' ')} in attempt {incident.attempt}", incident.text, level)

    def _counts(self) -> dict[str, float]:
        told = self._incidents.incidents
        ends = [incident for incident in told if incident.ends_attempt]
        return {
            "run/incidents": len(told),
            "run/restarts": len(ends),
            "run/lost_steps": sum(incident.lost_steps or 0 for incident in ends),
            "run/seconds_without_training": sum(incident.seconds or 0.0 for incident in ends),
        }


def _alert(title: str, text: str, level: str) -> dict[str, Any]:
    return {"alert": {"title": title, "text": text, "level": level}}


def _step_metrics(event: StepDone, attempt: int, redone: int) -> dict[str, Any]:
    metrics = {
        "step": event.step,
        "run/attempt": attempt,
        "train/loss": event.loss,
        "train/grad_norm": event.grad_norm,
        "train/learning_rate": event.learning_rate,
        "train/tokens": event.step * event.tokens,  # the config fixes a step's tokens, so replays count once
        "exact/redone": redone,
    }
    if event.seconds > 0:
        metrics["train/tokens_per_second"] = event.tokens / event.seconds
    if event.flushed is not None:
        metrics["exact/flushed"] = event.flushed
    return metrics


def relay() -> None:
    """The helper process: JSON lines from standard input to W&B, until `end` or until the trainer is gone."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)  # the trainer decides when it is over: its pipe ends
    first = json.loads(sys.stdin.readline())
    turn = _take_turn(Path(first["init"]["dir"]) / "wandb" / "helper.lock", first["finish_timeout"])
    run = open_run(first["init"], first["finish_timeout"])
    os.nice(10)  # only now: on a busy machine a start at low priority takes longer than a short run
    exit_code = errors.EXIT_FAILED  # no `end`: the trainer was killed
    for line in sys.stdin:
        try:
            message = json.loads(line)
        except ValueError:  # killed in the middle of a line
            break
        if "log" in message:
            run.log(message["log"])
        elif "alert" in message:
            run.alert(**message["alert"], wait_duration=0)
        else:
            run.summary.update(message["summary"])
            exit_code = message["end"]
    if exit_code == errors.EXIT_PREEMPTED:
        run.mark_preempting()
    run.finish(exit_code)
    turn.close()


def _take_turn(path: Path, timeout_seconds: float) -> contextlib.ExitStack:
    """Wait, a bounded time, until the helper of the attempt before has written all it has; hold the run until closed.

    A killed trainer may be back before its old helper is done, and two writers of one run number their rows alike.
    """
    held = contextlib.ExitStack()
    deadline = time.monotonic() + timeout_seconds
    with contextlib.suppress(OSError):  # a file system without locks: no worse than before
        lock = held.enter_context(path.open("a"))
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
                break
            except BlockingIOError:
                time.sleep(0.05)
    return held


def open_run(arguments: dict[str, Any], finish_timeout_seconds: float) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        finish_timeout=finish_timeout_seconds,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        x_sync_dir_suffix=str(os.getpid()),  # folders are named by the second; two attempts may share one
        x_transaction_log_flush_interval=1.0,
    )
    # allow_val_change: another attempt may use other ranks, devices, intervals.
    run = wandb.init(**arguments, resume="allow", allow_val_change=True, settings=settings)
    if run.url:
        print(f"url {run.url}", flush=True)
    # Our own axis: W&B's step must rise, and after a restart steps are replayed.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run
