"""The stored run of a planned one: under its key, or under that of the same run whose text lay at another place.

A key names the place of the text, so that reading a ladder's runs needs no text. Where the pool has no run of that key,
a run is taken that differs in places alone and was trained and scored on the text that is there now.
"""

import functools
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer.config import Config, Eval
from trainer.data import EvalWindows, prepare, sha256_of_text
from trainer.errors import TopropeError
from trainer.fleet.run_store import StoredRun
from trainer.ladder.plan.ladder import PlannedRun, key_of
from trainer.log import events, rundir


def stored(pool: Path, planned: PlannedRun) -> StoredRun:
    """Return the directory of a run that has no members; it need not be there yet."""
    own = StoredRun(pool / planned.key)
    # The config of a run that is taught is complete only where its teachers are: it is found under its key alone.
    if own.directory.exists() or planned.teachers or not pool.is_dir():
        return own
    wanted = configs.mathematics(planned.config)
    others = map(StoredRun, sorted(pool.iterdir()))
    return next((other for other in others if _is_same(other, planned, wanted)), own)


@functools.lru_cache(maxsize=4096)
def _about(run: Path, _changed: int) -> dict[str, Any]:
    """Contents of config.json, which was written at this time: a ladder asks for them once for each of its runs."""
    return rundir.read(run)


def _is_same(other: StoredRun, planned: PlannedRun, wanted: dict[str, Any]) -> bool:
    """True if `other` is the planned run, whose mathematics are `wanted`, but for the places of texts."""
    if not rundir.is_run(other.run):
        return False
    try:
        changed = rundir.config_path(other.run).stat().st_mtime_ns
    except OSError:
        return False
    try:
        about = _about(other.run, changed)
        if not configs.same_but_for_places(about["mathematics"], wanted):
            return False
        # The key tells by which code it was computed, which config.json tells of the newest attempt alone.
        scored = rundir.config_of(other.run).eval
        if other.directory.name != key_of(about["fingerprint"], scored, planned.tree):
            return False
        config = planned.config
        if _without_places(scored) != _without_places(config.eval):
            return False
        if about["data_sha256"] != sha256_of_text(config.data, config.eval):
            return False
        moved = [name for name, place in config.eval.sources.items() if scored.sources[name] != place]
        # An unfinished one would be resumed with the new places in its config.json, and its key would not fit any more.
        return not moved or (other.has_finished() and _was_scored_on(other.run, config, moved))
    except TopropeError:  # the text is not here, or that run cannot be read
        return False


def _without_places(scored: Eval) -> dict[str, Any]:
    return scored.model_dump() | {"sources": sorted(scored.sources)}


def _was_scored_on(run: Path, config: Config, sets: list[str]) -> bool:
    """True if a run has a score on each of these held-out sets, and their tokens are those of now."""
    model, data = config.model, config.data
    now = prepare(data, config.eval, model.context).eval_sets
    found = {event.set: event.digest for _, event in events.select(events.read(run), events.EvalDone)}
    return all(
        found.get(name)
        == EvalWindows(
            now[name].tokens, context=model.context, sequences=data.micro_batch_sequences,
            max_tokens=config.eval.max_tokens,
        ).digest
        for name in sets
    )  # fmt: skip
