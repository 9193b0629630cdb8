"""One rank of tests/test_equality.py: trains many small cases in one process, because importing torch is the slow part.

Usage: torchrun … -m tests.equality_worker CASES.json RESULTS.json. Rank 0 writes {case: what must be equal}.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainer import config as configs
from trainer import costs, job, loop
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.data import Prepared, prepare
from trainer.islands.members import with_islands
from trainer.islands.state import IslandsState
from trainer.log.events import EvalDone, Event, EventLog, StepDone
from trainer.parallel import world
from trainer.parallel.world import AllRanks
from trainer.step import StepContext, TrainState


def train(case: dict[str, Any], ranks: world.World, directory: Path) -> dict[str, Any]:
    config = configs.load(Path(case["config"]), case["set"])
    job.set_numerics(config, ranks.device)
    prepared = prepared_once(config)
    rows = costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)
    state = job.build_any(config, rows, ranks, lambda rounders: rounders)
    log = EventLog.open(directory, next(attempts), ranks.rank)
    logged: list[Event] = []
    log.subscribe(lambda entry: logged.append(entry.event))
    context = StepContext(config, AllRanks(ranks, config.data.micro_batches), job.batches_of(config, prepared))
    collaborators = loop.Collaborators(
        context, loop.by_main(ranks, log), job.scorer(config, prepared, lambda: ranks), NoCheckpointer()
    )
    if isinstance(state, IslandsState):
        collaborators = with_islands(state, collaborators, log.append)
    loop.train(state, collaborators)
    log.close()
    steps = [event for event in logged if isinstance(event, StepDone)]
    scores = [event for event in logged if isinstance(event, EvalDone)]
    return {
        "weights": state.weights_sha256(),
        "state": state.state_sha256(),
        "losses": [step.loss.hex() for step in steps],
        "norms": [step.grad_norm.hex() for step in steps],
        "samples": [step.samples for step in steps],
        "redone": [step.redone for step in steps],
        "flushed": [step.flushed for step in steps],
        "scores": [(done.step, done.set, done.loss, done.bits_per_byte) for done in scores],
    }


attempts = itertools.count()
prepared: dict[str, Prepared] = {}


def prepared_once(config: configs.Config) -> Prepared:
    """The data of a config, which most cases share: what is not of the text makes no difference to them."""
    data = config.data.model_dump_json(exclude={"micro_batches", "micro_batch_sequences"})
    sets = config.eval.model_dump_json(exclude={"every_steps", "max_tokens"})
    key = f"{data} {sets} {config.model.context}"
    if key not in prepared:
        prepared[key] = prepare(config.data, config.eval, config.model.context)
    return prepared[key]


class NoCheckpointer(Checkpointer):
    """No saves: other tests cover them."""

    def __init__(self) -> None: ...
    def save(self, state: TrainState) -> None: ...
    def poll(self) -> None: ...
    def finish(self, state: TrainState) -> None: ...


def main() -> None:
    cases, results = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = world.connect(torch.device("cpu"), timeout_seconds=60)
    with tempfile.TemporaryDirectory() as directory:
        outcome = {name: train(case, ranks, Path(directory)) for name, case in json.loads(cases.read_text()).items()}
    if ranks.is_main:
        results.write_text(json.dumps(outcome))
    world.disconnect()


if __name__ == "__main__":
    main()
