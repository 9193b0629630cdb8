"""A run in Weights & Biases, shown by a helper process that follows the run's event log.

Not a thread: in-process, W&B costs the trainer 0.2–0.3 ms of the interpreter's time per step and hooks into its exit;
and when the trainer is SIGKILLed, W&B loses what it had buffered (up to 15 s, measured with 0.31). The helper reads the
log's files, so it knows all that the trainer wrote down before it died. The end of its standard input says that the
trainer is done or gone: then it shows the rest, closes the W&B run and leaves.
"""

import contextlib
import json
import netrc
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, Self
from urllib.parse import urlsplit

from filelock import FileLock

from trainer import errors, files
from trainer.config import Config
from trainer.log import events, rundir
from trainer.log.code_length import CodeLength
from trainer.log.events import AttemptEnded, AttemptStarted, Entry, EvalDone, StepDone
from trainer.log.incidents import IncidentBuilder
from trainer.show import utilisation

WandbMode = Literal["online", "offline", "disabled"]
WANDB_HOST = "https://api.wandb.ai"
POLL_SECONDS = 0.25
NOT_FOR_WANDB = ("run_id", "format", "config", "mathematics")  # of config.json: shown elsewhere, or twice
STATUS_EXIT = {"finished": errors.EXIT_FINISHED, "preempted": errors.EXIT_PREEMPTED, "failed": errors.EXIT_FAILED}


def wandb_mode(config: Config, environ: Mapping[str, str] = os.environ) -> WandbMode:
    """Return how to reach W&B. WANDB_MODE wins; "auto" is online where an API key is known, else offline.

    A key is looked for in WANDB_API_KEY and in netrc's entry for the host (WANDB_BASE_URL and NETRC are honoured), and
    not kept here. Raises ConfigError if WANDB_MODE is not a mode.
    """
    chosen = environ.get("WANDB_MODE") or config.wandb.mode
    chosen = {"dryrun": "offline", "run": "online"}.get(chosen, chosen)
    if chosen == "auto":
        return "online" if environ.get("WANDB_API_KEY") or _in_netrc(environ) else "offline"
    if chosen not in ("online", "offline", "disabled"):
        remedy = "Set it to online, offline or disabled, or unset it to let wandb.mode decide."
        raise errors.ConfigError([f"WANDB_MODE = {chosen!r} is no mode.\n  {remedy}"])
    return chosen


def _in_netrc(environ: Mapping[str, str]) -> bool:
    for name in [environ["NETRC"]] if environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        # A file that holds no key for us, whatever its bytes are, is as good as none. ValueError: it is not text, or
        # the URL is none; RuntimeError: no home directory is known.
        # Not authenticators(): it would take the "default" entry, some other service's password, for a W&B key.
        with contextlib.suppress(OSError, netrc.NetrcParseError, ValueError, RuntimeError):
            host = urlsplit(environ.get("WANDB_BASE_URL") or WANDB_HOST).netloc
            if netrc.netrc(Path(name).expanduser()).hosts.get(host, ("", "", ""))[2]:
                return True
    return False


class WandbHelper:
    """The helper process that shows one attempt of a run in W&B, as the trainer sees it. For rank 0 only.

    Subscribe it to the event log: a call costs microseconds and notices a helper that died. Whatever goes wrong is
    reported once, through `on_problem`, on the thread that calls or closes it; training continues. The run id in
    config.json is the W&B run's id. Offline, each attempt leaves a folder in RUN/wandb: `wandb sync` joins them later.
    """

    def __init__(
        self, run: Path, config: Config, attempt: int, on_problem: Callable[[str], None],
        close_timeout_seconds: float = 30.0, since: float = 0.0,
    ) -> None:  # fmt: skip
        """`since`: a Unix time before which another helper has shown this attempt, that of a writer that died."""
        self.mode: WandbMode = wandb_mode(config)
        self.url: str | None = None  # the run's page, known when the helper has ended; None offline
        self._run, self._on_problem, self._close_timeout_seconds = run, on_problem, close_timeout_seconds
        self._helper: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._with_tensorboard = config.tensorboard.on
        if self.mode != "disabled" or self._with_tensorboard:
            self._start(attempt, since)

    def __call__(self, _: Entry) -> None:
        if self._helper is not None and self._helper.poll() is not None:
            self._forget(failed=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The helper's process id while it runs."""
        return self._helper.pid if self._helper is not None else None

    def close(self) -> None:
        """Let W&B write what the log has, for at most `close_timeout_seconds`. Call it before the log is closed."""
        if self._helper is None:
            return
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        try:
            self._forget(failed=self._helper.wait(self._close_timeout_seconds) != 0)
        except subprocess.TimeoutExpired:
            self._helper.kill()  # wandb-core watches its parent and follows within 0.1 s
            self._helper.wait()
            self._forget(f"it was not done after {self._close_timeout_seconds:g} s and was ended")

    def _start(self, attempt: int, since: float) -> None:
        run = self._run.resolve()
        options = (str(run), attempt, self.mode, self._close_timeout_seconds, since, self._with_tensorboard)
        call = f"follow{options!r}"
        command, environ = helper_command(f"from trainer.show.wandb import follow; {call}")
        try:
            (run / "wandb").mkdir(parents=True, exist_ok=True)  # without it, W&B would silently move to /tmp
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the helper
            # A file, not our standard output, whose reader would wait for the helper too. A session of its own, since
            # Ctrl-C and a launcher's kill are for the trainer.
            self._helper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT, env=environ,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._forget(str(error))

    def _forget(self, problem: str = "", failed: bool = False) -> None:
        """Note that the helper has ended. If it `failed`, its last line says why."""
        if self._helper is not None and self._helper.stdin is not None:
            self._helper.stdin.close()
        self._helper = None
        if self._output is not None:
            # pread: the helper shares the file's offset.
            written = os.pread(self._output.fileno(), 2**20, 0).decode(errors="replace").strip().splitlines()
            self._output.close()
            self._output = None
            if written and written[0].startswith("url "):
                self.url = written[0].removeprefix("url ")
            if failed:
                problem = written[-1].strip()[:500] if written else "its helper process ended without a message"
        if problem:
            what, rest = "W&B", f"; what reached {self._run / 'wandb'} can be uploaded with `wandb sync`"
            if self.mode == "disabled":
                what, rest = "TensorBoard", ""
            self._on_problem(
                f"{what} stopped: {problem.rstrip('.')}. Training continues and the event log keeps every metric{rest}."
            )


def helper_command(code: str) -> tuple[list[str], dict[str, str]]:
    """Return (command, environment) of a Python process that talks to W&B."""
    package_root = Path(__file__).resolve().parents[2]
    environ = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package_root), environ.get("PYTHONPATH")]))
    environ["WANDB_SILENT"] = "true"
    environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # -P: a wandb.py in the working directory is not W&B.
    return [sys.executable, "-P", "-c", code], environ


def follow(
    run_directory: str, attempt: int, mode: str, finish_timeout_seconds: float, since: float = 0.0,
    with_tensorboard: bool = False,
) -> None:  # fmt: skip
    """The helper process: show rank 0's events of an attempt in W&B, in TensorBoard, until standard input ends.

    With a Unix time `since`: those after what the helper of the writer before has shown, or where that one left no
    word, from that time on.
    """
    # The trainer decides when to end: the helper ignores signals to a whole session or job.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    run = Path(run_directory)
    follower = events.Follower(run, f"attempt-{attempt:04d}-rank-00000.jsonl")
    others = events.Follower(run, f"attempt-{attempt:04d}-rank-*.jsonl")
    with contextlib.ExitStack() as stack:
        # A killed trainer may be back before its old helper is done, and two writers of one run number their rows
        # alike. Suppressed: a timeout, or a file system without locks.
        lock = FileLock(run / "wandb" / "helper.lock", fallback_to_soft=False)
        with contextlib.suppress(OSError):
            stack.enter_context(lock.acquire(timeout=finish_timeout_seconds))
        own = list(events.read_file(events.path_of(run, attempt, 0))) if since else []
        # The helper of a writer that died may have been late, and have shown what the next writer wrote.
        begin = _take_shown(run, attempt)
        count = sum(entry.time < since for entry in own) if begin is None or not since else begin
        earlier = [
            entry
            for entry in events.read(run)
            if entry.attempt < attempt and not isinstance(entry.event, events.FaultFired)
        ]
        shown = Sinks()
        if mode != "disabled":
            shown.sinks.append(open_run(_arguments(run, mode), finish_timeout_seconds))
        if with_tensorboard:
            from trainer.show.tensorboard import TensorboardRun

            shown.sinks.append(TensorboardRun(run, attempt))
        os.nice(10)  # only now: on a busy machine a start at low priority takes longer than a short run
        about = rundir.read(run)
        metrics = _Metrics(shown, [*earlier, *own[:count]], about.get("parent"), about)
        is_over, seen = False, 0
        while not is_over:
            # Nothing is ever written to standard input: it is readable when it ends.
            is_over = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
            for entry in follower.poll():
                seen += 1
                if seen > count:
                    metrics.show(entry)
            for entry in others.poll():
                if entry.rank and isinstance(entry.event, events.RankPace):
                    metrics.show(entry)
        _leave_shown(run, attempt, seen)
        if metrics.exit_status == errors.EXIT_PREEMPTED:
            shown.mark_preempting()
        shown.finish(metrics.exit_status)


def _shown_path(run: Path) -> Path:
    return run / "wandb" / "shown.json"


def _leave_shown(run: Path, attempt: int, entries: int) -> None:
    """Tell the helper of the next writer how many entries of the log are shown."""
    with contextlib.suppress(OSError):
        files.write(_shown_path(run), json.dumps({"attempt": attempt, "entries": entries}) + "\n")


def _take_shown(run: Path, attempt: int) -> int | None:
    """Return what the helper before has left, and remove it: it is not true of the helper after this one."""
    found = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        left = files.read_object(_shown_path(run))
        found = int(left["entries"]) if left["attempt"] == attempt else None
    with contextlib.suppress(OSError):
        _shown_path(run).unlink(missing_ok=True)
    return found


def _arguments(run: Path, mode: str) -> dict[str, Any]:
    """The arguments of `wandb.init` for a training run."""
    about = rundir.read(run)
    wishes = {name: about["config"]["wandb"][name] or None for name in ("project", "entity", "group", "tags")}
    wishes["job_type"] = about["config"]["wandb"].get("job_type") or None
    facts = {key: value for key, value in about.items() if key not in NOT_FOR_WANDB}
    name = os.environ.get("WANDB_NAME") or run.name
    return {"id": about["run_id"], "name": name, "mode": mode, "dir": str(run), **wishes,
            "config": about["config"] | facts}  # fmt: skip


def open_run(arguments: dict[str, Any], finish_timeout_seconds: float) -> Any:
    """Start or resume a W&B run in this process; `arguments` are those of `wandb.init`. Prints its page's address."""
    import wandb

    settings = wandb.Settings(
        console="off", disable_git=True, disable_code=True, save_code=False, x_save_requirements=False,
        x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True, finish_timeout=finish_timeout_seconds,
        x_sync_dir_suffix=str(os.getpid()),  # folders are named by the second; two attempts may share one
        x_transaction_log_flush_interval=1.0,
    )  # fmt: skip
    # allow_val_change: another attempt may use other ranks, devices, intervals.
    run = wandb.init(**arguments, resume="allow", allow_val_change=True, settings=settings)
    if run.url:
        print(f"url {run.url}", flush=True)
    # An axis of our own: W&B's step must rise, and after a restart steps are replayed.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


class Sinks:
    """Several places where a run is shown, with as much of a W&B run's interface as `_Metrics` uses."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []

    @property
    def step(self) -> int:
        return max((sink.step for sink in self.sinks), default=0)

    def log(self, row: Mapping[str, Any], step: int, commit: bool) -> None:
        for sink in self.sinks:
            sink.log(row, step=step, commit=commit)

    def alert(self, **about: Any) -> None:
        for sink in self.sinks:
            sink.alert(**about)

    def summarise(self, facts: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.summary.update(facts)

    def mark_preempting(self) -> None:
        for sink in self.sinks:
            sink.mark_preempting()

    def finish(self, exit_status: int) -> None:
        for sink in self.sinks:
            sink.finish(exit_status)


class _Metrics:
    """Shows log entries in a W&B run: metrics, incidents, alerts.

    Counts are those of the whole run, `earlier` attempts included. Where `run/attempt` changes, the run was restarted;
    steps shown twice were replayed. Each incident has a row at its step, and raises an alert.

    W&B numbers its rows by `_step`, and offline each process begins at 0: rows of another attempt under numbers that
    were given before are lost when the folders are uploaded. The log says how many rows the earlier attempts made.
    """

    def __init__(
        self, shown: Any, earlier: Iterable[Entry], parent: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`parent` is what config.json says of the run that this one began from, `about` all that it says."""
        self._flops_per_token, self._peak_flops = utilisation.known(about or {})
        self._world_size = 1
        self._parent = parent or {"step": 0, "tokens": 0}
        self.exit_status = errors.EXIT_FAILED
        """The attempt's exit status; a failure until the log says how it ended, since the trainer may be killed."""
        self._shown: Any = None
        self._rows = 0
        self._incidents = IncidentBuilder()
        self._redone_by_step: dict[int, int] = {}
        self._redone = self._checkpoint_failures = 0
        self._code = CodeLength()
        for entry in earlier:
            self.show(entry)
        self._shown = shown

    def show(self, entry: Entry) -> None:
        for incident in self._incidents.add(entry):
            self._log(incident.step, {**self._counts(), "run/incident": f"attempt {incident.attempt}: {incident.text}"})
            title = f"{incident.kind.replace('_', ' ')} in attempt {incident.attempt}"
            self._alert(title, incident.text, "INFO" if incident.kind == "preempted" else "WARN")
        if isinstance(entry.event, events.RankPace):
            name = f"pace/{entry.event.node}/rank {entry.rank}"
            self._log(entry.event.step, {name: entry.event.seconds_per_micro_batch})
        if entry.rank != 0:  # of the other ranks only their incidents and their pace count
            return
        self._code.observe(entry.event)
        match entry.event:
            case StepDone() as event:
                self._redone_by_step[event.step] = event.redone
                self._redone += event.redone
                metrics = {
                    "run/attempt": entry.attempt, "train/loss": event.loss, "train/grad_norm": event.grad_norm,
                    "train/learning_rate": event.learning_rate, "exact/redone": self._redone,
                    # The config fixes a step's tokens, so replays count once.
                    "train/tokens": self._parent["tokens"] + (event.step - self._parent["step"]) * event.tokens,
                    "train/tokens_per_second": event.tokens / event.seconds if event.seconds > 0 else None,
                    "exact/flushed": event.flushed, "run/memory_bytes": event.memory_bytes,
                    "train/mfu": self._utilisation(event),
                    "train/code_bits_per_byte": self._code.bits_per_byte_at(event.step),
                }  # fmt: skip
                self._log(event.step, metrics)
            case AttemptStarted(from_step=step, world_size=world_size):
                self._redone_by_step = {n: redone for n, redone in self._redone_by_step.items() if n <= step}
                self._redone = sum(self._redone_by_step.values())
                self._world_size = world_size
                self._log(step, {"run/attempt": entry.attempt, "run/world_size": world_size})
                if not entry.attempt:  # the curves begin at 0, not at the first incident
                    self._log(step, self._counts())
            case events.MembersChanged(step=step, members=members, world_size=ranks):
                self._world_size = ranks or len(members)
                self._log(step, {"run/world_size": self._world_size})
            case EvalDone(step=step, set=name) as event:
                prefix = f"eval/{name}"
                self._log(step, {f"{prefix}/loss": event.loss, f"{prefix}/bits_per_byte": event.bits_per_byte})
            case events.CheckpointSaved(step=step) as event:
                times = {"checkpoint/stall_seconds": event.stall_seconds, "checkpoint/seconds": event.seconds}
                self._log(step, {"checkpoint/failures": self._checkpoint_failures, **times})
            case events.CheckpointFailed(step=step):
                self._checkpoint_failures += 1
                self._log(step, {"checkpoint/failures": self._checkpoint_failures})
            case AttemptEnded(status=status) as event if self._shown is not None:
                if status not in ("finished", "preempted"):
                    self._alert(f"attempt {entry.attempt} failed", event.reason, "ERROR")
                hashes = {"weights_sha256": event.weights_sha256, "state_sha256": event.state_sha256}
                self._shown.summarise(hashes)
                self.exit_status = STATUS_EXIT.get(status, errors.EXIT_FAILED)

    def _utilisation(self, event: StepDone) -> float | None:
        if not self._flops_per_token or not self._peak_flops or event.seconds <= 0:
            return None
        return self._flops_per_token * event.tokens / event.seconds / (self._peak_flops * self._world_size)

    def _counts(self) -> dict[str, float]:
        ends = [incident for incident in self._incidents.incidents if incident.ends_attempt]
        return {
            "run/incidents": len(self._incidents.incidents),
            "run/restarts": len(ends),
            "run/lost_steps": sum(incident.lost_steps or 0 for incident in ends),
            "run/seconds_without_training": sum(incident.seconds or 0.0 for incident in ends),
        }

    def _log(self, step: int | None, metrics: Mapping[str, Any]) -> None:
        """Make a row of the values that are known."""
        if self._shown is not None:
            row = {name: value for name, value in {"step": step, **metrics}.items() if value is not None}
            # Online, W&B knows of rows that a log of another machine may lack.
            self._rows = max(self._rows, self._shown.step)
            self._shown.log(row, step=self._rows, commit=True)
        self._rows += 1

    def _alert(self, title: str, text: str, level: str) -> None:
        if self._shown is not None:
            self._shown.alert(title=title, text=text, level=level, wait_duration=0)
