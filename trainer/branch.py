"""Branching: a run that begins from a state of another run, its parent, instead of from initial weights.

The state keeps its step, so learning rate and data go on from there as the new run's own config says. The new run is a
function of (config, state of the parent): the state's digest is in its fingerprint, the parent in its config.json.
"""

from pathlib import Path
from typing import Any

from trainer import checkpoint, model
from trainer.checkpoint import Saved, loading
from trainer.config import Config
from trainer.errors import ConfigError, NoCheckpointError, RunDirectoryError, TopropeError
from trainer.log import rundir
from trainer.step import TrainState, sha256_of

Record = dict[str, Any]
"""A parent, as config.json holds it: {run, run_id, step, state_sha256, fingerprint, tokens, tokenizer_sha256}, and
moments_from: {parameter: step after which its moments began at zero}, for those that did so at a branch."""
WEIGHTS = "model."
OF_ISLANDS = "islands.model."
"""Weights of all islands, one entry each along the first dim (islands/state.py)."""


def find(name: str, config: Config | None = None) -> Saved:
    """Return the checkpoint that RUN or RUN@STEP names; without a step, the newest intact one.

    Raises TopropeError if there is no such run or checkpoint, if it is damaged, or if `config` ends before it.
    """
    run, step = _split(name)
    rundir.read(Path(run))
    saved = checkpoint.committed(Path(run))
    if step:
        listed = ", ".join(str(one.step) for one in reversed(saved)) or "none"
        saved = [one for one in saved if one.step == int(step)][:1]
        if not saved:
            remedy = "Name one of these, or none for the newest. checkpoint.keep_every_steps keeps more of a run."
            raise NoCheckpointError(f"{run} has no checkpoint of step {step}; it has {listed}.\n  {remedy}")
    if not saved:
        raise NoCheckpointError(f"{run} has no checkpoint.\n  A run begins from a saved state of its parent.")
    found = _intact(saved, run)
    if config is not None and config.budget.steps <= found.step:
        raise ConfigError(
            [
                f"budget.steps = {config.budget.steps} leaves no step after step {found.step} of {run}.\n"
                "  A run that begins from a state goes on counting from its step. Set budget.steps above it."
            ]
        )
    return found


def _split(name: str) -> tuple[str, str]:
    run, at, step = name.rpartition("@")
    # A directory may be called a@1.
    return (run, step) if at and step.isdecimal() and not rundir.is_run(Path(name)) else (name, "")


def _intact(candidates: list[Saved], run: str) -> Saved:
    problems: list[str] = []
    for saved in candidates:
        checkpoint.refuse_newer(saved)
        found = checkpoint.verify(saved)
        if not found:
            return saved
        problems += found
    remedy = f"`python -m trainer verify {run}` lists all damage."
    raise NoCheckpointError(f"{run} has no intact checkpoint to begin from: {problems[0]}.\n  {remedy}")


def origin(run: Path, config: Config, name: str) -> Record | None:
    """Return the parent of the run in directory `run`, which `name` (RUN or RUN@STEP) may give; None if it has none.

    A run keeps the parent that it began from. Raises TopropeError if `name` gives another one than before, or if the
    state is not there any more though the run has not saved one of its own.
    """
    if not rundir.is_run(run):
        return _record(find(name, config), config) if name else None
    before = rundir.read(run).get("parent")
    if name:
        _check_same(run, before, name)
    if before is not None and not checkpoint.committed(run):
        again = _record(find(shown(before), config), config)
        if again["state_sha256"] != before["state_sha256"]:
            raise RunDirectoryError(
                f"{before['run']} has another state at step {before['step']} than when {run} began from it.\n"
                "  A run is a function of the state it began from. Put that back, or give a new --run."
            )
    return before


def _check_same(run: Path, before: Record | None, name: str) -> None:
    given, step = _split(name)
    if before is None:
        raise RunDirectoryError(
            f"{run} began without a parent, not from {name}.\n  Leave --from out, or give a new --run."
        )
    try:
        is_same = rundir.read(Path(given))["run_id"] == before["run_id"]
    except TopropeError:  # the parent may be gone: the run has a state of its own, or `origin` says that it has none
        is_same = Path(given).resolve() == Path(before["run"])
    if not is_same or int(step or before["step"]) != before["step"]:
        raise RunDirectoryError(
            f"{run} began from {shown(before)}, not from {name}.\n"
            "  A run is a function of the state it began from. Leave --from out to resume it, or give a new --run."
        )


def _record(saved: Saved, config: Config) -> Record:
    run = saved.path.parent.parent.resolve()
    about = rundir.read(run)
    earlier = about.get("parent") or {"step": 0, "tokens": 0}
    return {
        "run": str(run),
        "run_id": about["run_id"],
        "step": saved.step,
        "state_sha256": sha256_of(loading.read(saved)),
        "fingerprint": about["fingerprint"],
        "tokens": earlier["tokens"] + (saved.step - earlier["step"]) * about["tokens_per_step"],
        "tokenizer_sha256": about.get("tokenizer_sha256"),
        "moments_from": _moments_from(saved, moments_from(about.get("parent")), config),
    }


def moments_from(parent: Record | None) -> dict[str, int]:
    """{parameter: step after which its moments began at zero}, which AdamW counts from.

    Empty for a run that began before that was recorded: its counts went on from the run's step, and still do.
    """
    return (parent or {}).get("moments_from", {})


def _moments_from(saved: Saved, earlier: dict[str, int], config: Config) -> dict[str, int]:
    """Return those of a run of `config` that begins from `saved`; `earlier` are those of the parent."""
    found: dict[str, int] = {}
    stored, prefix = loading.shapes(saved), OF_ISLANDS.removesuffix(WEIGHTS) if config.islands.count else ""
    for name in (name.removeprefix(WEIGHTS) for name in stored if name.startswith(WEIGHTS)):
        held = f"{prefix}optim.{name}."
        began = earlier.get(name, 0) if f"{held}exp_avg" in stored else saved.step
        stays_with_muon = config.optim.optimizer == "muon" and f"{held}momentum_buffer" in stored
        if began and not stays_with_muon and not config.optim.class_:  # an optimizer of one's own keeps its own counts
            found[name] = began
    return found


def check(parent: Record, config: Config, vocab_size: int, tokenizer_sha256: str) -> None:
    """Raise ConfigError if the parent's weights do not fit the model, or its token ids mean other text."""
    where = shown(parent)
    if parent["tokenizer_sha256"] not in (None, tokenizer_sha256):
        raise ConfigError(
            [
                f"data.tokenizer = {config.data.tokenizer!r} gives another tokenizer than that of {where}.\n"
                "  Its weights know tokens by their ids. Set "
                f'data.tokenizer = "{rundir.tokenizer_path(Path(parent["run"]))}".'
            ]
        )
    stored = loading.shapes(_saved(parent))
    built = model.construct(config.model, vocab_size, "meta")
    own = {f"{WEIGHTS}{name}": parameter.shape for name, parameter in built.named_parameters()}
    _check_islands(where, [shape[0] for name, (shape, _) in stored.items() if name.startswith(OF_ISLANDS)], config)
    other = [name for name in own.keys() & stored.keys() if own[name] != stored[name][0]]
    other += own.keys() ^ {name for name in stored if name.startswith(WEIGHTS)}
    if other:
        name = min(other)
        both = (stored.get(name, (None,))[0], own.get(name))
        shapes = ["none" if shape is None else tuple(shape) for shape in both]
        raise ConfigError(
            [
                f"The weights of {where} do not fit the model: {name.removeprefix(WEIGHTS)} is {shapes[0]} there and "
                f"{shapes[1]} here"
                + (f"; {len(other)} differ in all" if len(other) > 1 else "")
                + ".\n  A state is taken over with all its weights. Set [model] as in the parent's config.json."
            ]
        )


def _check_islands(where: str, counts: list[int], config: Config) -> None:
    wanted = config.islands.count
    if counts and wanted and counts[0] != wanted:
        raise ConfigError(
            [
                f"islands.count = {wanted}, but {where} holds the state of {counts[0]} islands.\n"
                "  An island's moments and its share of the data are its own. Set "
                f"islands.count = {counts[0]}, or leave [islands] out to go on from the weights that they share."
            ]
        )


def begin(parent: Record, state: TrainState) -> list[str]:
    """Load the parent's state, on every rank for itself; return the names of moments and grids that it does not hold.

    Those stay as they are in a new run: another optimizer has other moments. Islands then begin from the weights.
    """
    saved, tensors = _saved(parent), state.tensors()
    stored = loading.shapes(saved)
    # The grids' segments are those of all parameters in order, which `check` has compared by name and shape.
    taken = {name: t for name, t in tensors.items() if stored.get(name) == (t.shape, t.dtype)}
    checkpoint.load(saved, taken)
    missing = sorted(tensors.keys() - taken.keys())
    state.restored(saved.step, missing)
    return [name for name in missing if not name.startswith(OF_ISLANDS)]


def _saved(parent: Record) -> Saved:
    saved = checkpoint.committed(Path(parent["run"]))
    return next((one for one in saved if one.step == parent["step"]), None) or find(shown(parent))


def shown(parent: Record) -> str:
    return f"{parent['run']}@{parent['step']}"
