"""The figures of scripts/bench about saving, loading, and recovery after a kill."""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer import checkpoint, costs, job, optim
from trainer import config as configs
from trainer import model as models
from trainer.checkpoint import memory
from trainer.checkpoint.neighbours import Machines
from trainer.data import prepare
from trainer.launch.agent import Agent
from trainer.launch.cluster import Cluster
from trainer.log import events
from trainer.parallel import elastic, world

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = ROOT / "configs" / "gpt_tiny.toml"
EVERY = 20
ENDLESS = [
    "budget.steps=100000", "checkpoint.keep_last=2", "eval.every_steps=0",
    'wandb.mode="disabled"', 'eval.sets=["val"]',
]  # fmt: skip


def saving_worker(make: Callable[[world.World, Path], Any]) -> None:
    """One of two ranks: saves beside steps, against a plain copy and a plain write of the same bytes.

    `make` gives a trainer of steps: called with a number of steps, and its `state` and `config`.
    """
    ranks = world.connect(torch.device("cpu"), 120)
    directory = Path(ranks.from_main(tempfile.mkdtemp))
    our_loop = make(ranks, directory)
    our_loop(2)
    identity = {"fingerprint": "bench", "run_id": "bench"}
    saver = checkpoint.Saver(directory, ranks, identity, configs.Checkpoint(keep_last=1))
    rows: list[dict[str, Any]] = []
    sources: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for round_ in range(21):
        before = _seconds(lambda: our_loop(1))
        saver.begin(our_loop.state.step, our_loop.state.tensors())
        if round_ == 0:
            saver.finish()  # makes the buffers and the plan
            layout = saver._plan  # pyright: ignore[reportPrivateUsage]
            assert layout is not None
            names = list(layout._buffers)  # pyright: ignore[reportPrivateUsage]
            tensors = our_loop.state.tensors()
            sources = [t.to_local() if isinstance(t := tensors[name], DTensor) else t for name in names]
            copies = [torch.empty_like(source).zero_() for source in sources]
            continue
        beside = _seconds(lambda: our_loop(1))
        (saved,) = [event for event in saver.finish() if isinstance(event, events.CheckpointSaved)]
        usual = (before + _seconds(lambda: our_loop(1))) / 2  # just before and just after, as the machine drifts
        with torch.no_grad():
            plain_copy = _seconds(lambda: torch._foreach_copy_(copies, sources))  # noqa: B023
        started = time.perf_counter()
        saver.begin(our_loop.state.step, our_loop.state.tensors())
        stall = time.perf_counter() - started
        (alone,) = [event for event in saver.finish() if isinstance(event, events.CheckpointSaved)]
        ranks.agree(lambda: None)
        blob = b"".join(copy.numpy().tobytes() for copy in copies)
        plain_write = _seconds(lambda: _write(directory / f"plain-{ranks.rank}", blob))  # noqa: B023
        rows.append(
            {
                "stall": stall, "plain_copy": plain_copy, "beside": beside, "usual": usual,
                "bytes": saved.bytes, "own_bytes": len(blob), "save_beside": saved.seconds, "save_alone": alone.seconds,
                "plain_write": plain_write,
            }
        )  # fmt: skip
    loads = [
        _seconds(lambda: checkpoint.restore(directory, our_loop.state.tensors(), ranks, "bench", lambda event: None))
        for _ in range(5)
    ]
    every_rank = zip(*ranks.agree(lambda: rows), strict=True)
    slowest = [{key: max(row[key] for row in of_ranks) for key in of_ranks[0]} for of_ranks in every_rank]
    saver.close()
    if ranks.is_main:
        print("RESULT " + json.dumps({"rows": slowest, "loads": loads}))
        subprocess.run(["rm", "-r", str(directory)], check=True)
    world.disconnect()


def copies_worker(make: Callable[[world.World, Path], Any], steps: int, rounds: int) -> None:
    """One of two ranks: steps with copies of the state into memory beside them, against the same without.

    Also as on two machines, each of which sends the other what it has copied, over loopback.
    """
    ranks = world.connect(torch.device("cpu"), 120)
    directory = Path(ranks.from_main(tempfile.mkdtemp))
    our_loop, place = make(ranks, directory), memory.place(directory, "bench")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in our_loop.state.tensors().values())
    assert ranks.from_main(lambda: memory.prepare(place, directory, needed)) is None
    identity = {"fingerprint": "bench", "run_id": "bench"}
    saver = checkpoint.Saver(place, ranks, identity, configs.Checkpoint(keep_last=1), read_back=False)
    own_place = memory.place(directory / str(ranks.rank), "bench")
    assert memory.prepare(own_place, directory, needed) is None
    machines = Machines(tuple(range(ranks.size)))
    to_neighbour = checkpoint.Saver(
        own_place, ranks, identity, configs.Checkpoint(keep_last=1), read_back=False, machines=machines
    )

    def block(every: int, saver: checkpoint.Saver = saver) -> float:
        """Seconds of a step; before every so many of them a copy is begun, without one if `every` is 0."""
        ranks.agree(lambda: None)
        started = time.perf_counter()
        for step in range(steps):
            if every and step % every == 0:
                saver.begin(our_loop.state.step, our_loop.state.tensors())
            our_loop(1)
        saver.finish()
        return (time.perf_counter() - started) / steps

    block(1)
    block(1, to_neighbour)
    rows = []
    kinds = [("without", 0, saver), ("each", 1, saver), ("one", steps, saver), ("machines", 1, to_neighbour)]
    for number in range(rounds):
        rows.append({name: block(every, which) for name, every, which in (kinds if number % 2 else reversed(kinds))})
    started = time.perf_counter()
    saver.begin(our_loop.state.step, our_loop.state.tensors())
    (saved,) = [event for event in saver.finish() if isinstance(event, events.CheckpointSaved)]
    load = _seconds(
        lambda: checkpoint.restore(
            directory, our_loop.state.tensors(), ranks, "bench", lambda event: None, memory=place
        )
    )
    saver.close()
    to_neighbour.close()
    memory.discard(own_place)
    if ranks.is_main:
        alone = time.perf_counter() - started - load
        sizes = {"bytes": saved.bytes, "steps": steps}
        print("RESULT " + json.dumps({"rows": rows, "alone": alone, "load": load, **sizes}))
        memory.discard(place)
        subprocess.run(["rm", "-r", str(directory)], check=True)
    world.disconnect()


def copies(result: dict[str, Any]) -> dict[str, Any]:
    """The figures from the rows of rank 0."""
    rows = result.pop("rows")
    ratio = {name: [row[name] / row["without"] for row in rows] for name in ("each", "one", "machines")}
    return {**result, **ratio, "step_seconds": statistics.median(row["without"] for row in rows)}


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def saving(result: dict[str, Any]) -> dict[str, Any]:
    """The figures from the workers' rows: in each row, the slower rank counts."""
    rows = result["rows"]
    of = lambda top, bottom: [row[top] / row[bottom] for row in rows]  # noqa: E731
    return {
        "stall_over_copy": of("stall", "plain_copy"),
        "step_beside_over_usual": of("beside", "usual"),
        "write_over_save_alone": of("plain_write", "save_alone"),
        **{f"{key}_seconds": statistics.median(row[key] for row in rows)
           for key in ("stall", "plain_copy", "beside", "usual", "save_beside", "save_alone", "plain_write")},
        "load_seconds": statistics.median(result["loads"]),
        "bytes": rows[0]["bytes"],
        "bytes_a_rank": rows[0]["own_bytes"],
    }  # fmt: skip


def cluster(directory: str, run: Path, ranks: int, nodes: int = 1, every: int = EVERY) -> Cluster:
    """A job of gpt_tiny that does not end by itself."""
    overrides = [*ENDLESS, f"checkpoint.every_steps={every}"]
    return Cluster(
        TINY, run, overrides, ranks=ranks, nodes=nodes, restarts=100, directory=Path(directory) / "job",
        environment=ENVIRONMENT,
    )  # fmt: skip


def _log(run: Path) -> list[events.Entry]:
    return events.read(run) if (run / "events").exists() else []


def _await(run: Path, found: Callable[[list[events.Entry]], Any], what: str, patience: float = 90) -> Any:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if (value := found(_log(run))) is not None:
            return value
        time.sleep(0.05)
    raise SystemExit(f"{what}: not within {patience:.0f} s")


def _first_new_step(log: list[events.Entry], since: float) -> tuple[events.Entry, int, list[events.Entry]] | None:
    """(AttemptStarted of rank 0, steps replayed, its StepDone entries up to the first new one)."""
    done = [entry for entry in log if isinstance(entry.event, events.StepDone)]
    for start in log:
        if isinstance(start.event, events.AttemptStarted) and start.rank == 0 and start.time > since:
            before = max((e.event.step for e in done if e.attempt < start.attempt), default=0)  # pyright: ignore
            own = [entry for entry in done if entry.attempt == start.attempt]
            new = next((n for n, entry in enumerate(own) if entry.event.step > before), None)  # pyright: ignore
            if new is not None:
                return start, new, own[: new + 1]
    return None


def killed(repeats: int = 9) -> dict[str, Any]:
    """Seconds from SIGKILL of one of two workers to the next new step, by part."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        with cluster(directory, run, ranks=2) as job_:
            job_.start()
            reached = 0
            for _ in range(repeats + 1):
                reached = _await(run, lambda log, past=reached + 7: _steps_past(log, past), "training")
                at = time.time()
                job_.send(job_.workers()[1], signal.SIGKILL)
                start, replayed, steps = _await(run, lambda log, at=at: _first_new_step(log, at), "coming back")
                assert isinstance(start.event, events.AttemptStarted)
                inside = start.event.startup_seconds
                usual = statistics.median(e.event.seconds for e in _log(run) if isinstance(e.event, events.StepDone))
                rows.append(
                    {
                        "noticing and restart": start.time - sum(inside.values()) - at,
                        **inside,
                        "steps": steps[-1].time - start.time - replayed * usual,
                        "all": steps[-1].time - at - replayed * usual,
                        "replayed": replayed,
                        "replay seconds": replayed * usual,
                    }
                )
    rows = rows[1:]
    return {
        "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "low": min(row["all"] for row in rows),
        "high": max(row["all"] for row in rows),
        "repeats": repeats,
    }


def _steps_past(log: list[events.Entry], past: int) -> int | None:
    done = max((entry.event.step for entry in log if isinstance(entry.event, events.StepDone)), default=0)
    return done if done >= past else None


def nodes(repeats: int = 5) -> dict[str, Any]:
    """One of two nodes is killed, and another joins: seconds to the next new step. A save every 5 steps."""
    gains, losses = [], []
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        with cluster(directory, run, ranks=1, nodes=2, every=5) as job_:
            job_.start()
            _await(run, lambda log: _steps_past(log, 5), "training")
            for _ in range(repeats):
                lost = time.time()
                job_.nodes[-1].kill()
                losses.append(_await(run, lambda log, at=lost: _of_size(log, at, 1), "losing a node") - lost)
                time.sleep(2)
                joined = time.time()
                job_.add_node()
                gains.append(_await(run, lambda log, at=joined: _of_size(log, at, 2), "gaining a node") - joined)
                time.sleep(2)
    return {"gain": gains, "loss": losses}


def _of_size(log: list[events.Entry], since: float, size: int) -> float | None:
    found = _first_new_step(log, since)
    return found[2][-1].time if found and found[0].event.world_size == size else None  # pyright: ignore


SECONDS, PERIOD = 180, 30


def goodput() -> dict[str, Any]:
    """Three minutes with a worker killed every 30 s: ours, and a plain job with a plain torch.save."""
    with tempfile.TemporaryDirectory() as directory:
        run, plain = Path(directory) / "run", Path(directory) / "plain"
        plain.mkdir()
        with cluster(directory, run, ranks=2) as job_:
            started = time.time()
            job_.start()
            ours = {"kills": _harass(job_, started)}
        steps = [entry for entry in _log(run) if isinstance(entry.event, events.StepDone)]
        ours |= _useful([(entry.event.step, entry.time, entry.attempt) for entry in steps], started)  # pyright: ignore
        options = ["--standalone", "--max-restarts=100", "--nproc-per-node=2"]
        worker = ["scripts/bench_survival.py", "--worker", "plain", str(plain)]
        stock = [sys.executable, "-m", "torch.distributed.run"]
        known_trap = {elastic.SHARED_STORE: "1"}  # without it torch's own torchrun may not survive the first kill
        started = time.time()
        with Agent([*options, *worker], plain / "log.txt", launch=stock, environment=ENVIRONMENT | known_trap,
                 directory=ROOT) as job_:  # fmt: skip
            theirs = {"kills": _harass(job_, started)}
        lines = [json.loads(line) for line in (plain / "steps.jsonl").read_text().splitlines()]
        theirs |= _useful([tuple(line) for line in lines], started)
    return {"ours": ours, "plain": theirs, "seconds": SECONDS, "period": PERIOD, "every": EVERY}


def _harass(job_: Cluster | Agent, started: float) -> int:
    """Kill rank 1 every so often until time is up; the number of times that a process was killed."""
    kills = 0
    for number in range(1, SECONDS // PERIOD):
        time.sleep(max(0, started + number * PERIOD - time.time()))
        kills += any(job_.send(pid, signal.SIGKILL) for rank, pid in job_.workers().items() if rank == 1)
    time.sleep(max(0, started + SECONDS - time.time()))
    if kills < SECONDS // PERIOD - 2:  # one may fall into a restart
        raise SystemExit(f"only {kills} kills found their rank: that is no comparison")
    return kills


def _useful(steps: list[tuple[int, float, int]], started: float) -> dict[str, Any]:
    """From (step, time, attempt): the furthest step, an undisturbed step's duration, and the share of time in steps."""
    inside = [row for row in steps if row[1] <= started + SECONDS]
    furthest = max(step for step, _, _ in inside)
    between = [
        b[1] - a[1] for a, b in itertools.pairwise(inside) if a[2] == b[2] and b[0] == a[0] + 1
    ]  # fmt: skip
    usual = statistics.median(between)
    return {"steps": furthest, "step_seconds": usual, "goodput": furthest * usual / SECONDS, "computed": len(inside)}


def plain_worker(directory: str) -> None:
    """One of two ranks of the job a PyTorch user would write: DDP, fused AdamW, torch.save every n steps."""
    config = configs.load(TINY, ENDLESS)
    elastic.name_process()  # by which it is found to be killed
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    place = Path(directory)
    prepared = prepare(config.data, config.eval, config.model.context)
    batches = job.batches_of(config, prepared)
    gpt = models.construct(config.model, costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size))
    models.initialise(gpt, config.model, config.seed)
    adamw = torch.optim.AdamW(gpt.parameters(), lr=config.optim.learning_rate, fused=True)
    step, saved = 0, place / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        gpt.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])
        step = state["step"]
    ddp = DistributedDataParallel(gpt)
    own = range(rank, config.data.micro_batches, size)
    with (place / "steps.jsonl").open("a") as log:
        while True:
            for group in adamw.param_groups:
                factor = optim.learning_rate_factor(step, config.optim, config.budget.steps)
                group["lr"] = config.optim.learning_rate * factor
            for index in own:
                batch = batches.micro_batch(step, index)
                with contextlib.nullcontext() if index == own[-1] else ddp.no_sync():
                    result = ddp(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
                    (result.objective / len(own)).backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.optim.clip_norm)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            step += 1
            if rank == 0:
                log.write(json.dumps([step, time.time(), os.getpid()]) + "\n")
                log.flush()
                if step % EVERY == 0:
                    state = {"model": gpt.state_dict(), "optimizer": adamw.state_dict(), "step": step}
                    torch.save(state, saved.with_suffix(".new"))
                    saved.with_suffix(".new").replace(saved)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", choices=["plain"], required=True)
    parser.add_argument("directory")
    plain_worker(parser.parse_args().directory)


if __name__ == "__main__":
    main()
