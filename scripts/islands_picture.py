"""Draw what travels between islands over a minute, and their loss, beside a synchronous run's.

    python -m scripts.islands_picture SYNCHRONOUS ISLANDS   draw docs/islands.png of two finished runs
    python -m scripts.islands_picture                       draw it again, of docs/islands.json
    … --out DIR                                             into another directory

Both runs have the same config but for [islands], and at least two ranks. What the islands send is in their log. What
the synchronous run sends is computed: one all-reduce of its gradients in float32 after each step.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from scripts.readme_picture import digest
from trainer import files
from trainer.log import events
from trainer.log.history import History
from trainer.log.summary import summarise
from trainer.show import figure
from trainer.show.curves import smooth

ROOT = Path(__file__).resolve().parent.parent
NAME = "islands"
SHOWN_SECONDS = 60.0
BYTES_OF_GRADIENT = 4
COLOURS = figure.SERIES[0], figure.SERIES[1]
LABELS = {"synchronous": "synchronous", "islands": "islands"}


def measure(synchronous: Path, islands: Path) -> dict[str, Any]:
    """Read the picture's numbers. Raises ValueError unless both runs finished, and the second one exchanged changes."""
    summaries = {"synchronous": summarise(synchronous), "islands": summarise(islands)}
    exchanged = summaries["islands"]["islands"]
    if summaries["synchronous"]["islands"] or not exchanged or not exchanged["bytes"]:
        raise ValueError(f"{synchronous} and {islands} are not a run without islands and one whose clusters exchange")
    if any(summary["status"] != "finished" for summary in summaries.values()):
        raise ValueError(f"{synchronous} or {islands} has not finished")
    of_step = BYTES_OF_GRADIENT * summaries["synchronous"]["parameters"]
    steps = [(entry.time, of_step) for entry, _ in _of_last_attempt(synchronous, events.StepDone)]
    changes = [(entry.time, event.bytes) for entry, event in _of_last_attempt(islands, events.ChangesApplied)]
    config = json.loads((islands / "config.json").read_text(encoding="utf-8"))["config"]["islands"]
    return {
        "sent": {"synchronous": _of_a_minute(steps), "islands": _of_a_minute(changes)},
        "loss": {name: _losses(run) for name, run in (("synchronous", synchronous), ("islands", islands))},
        "config": config,
    }


def _of_last_attempt(run: Path, kind: type[Any]) -> list[tuple[events.Entry, Any]]:
    found = list(events.select(events.read(run), kind))
    last = max((entry.attempt for entry, _ in found), default=0)
    return [(entry, event) for entry, event in found if entry.attempt == last]


def _of_a_minute(sent: list[tuple[float, int]]) -> list[list[float]]:
    """[seconds, bytes so far] of the minute in the middle, without the start."""
    if not sent:
        return []
    middle = (sent[0][0] + sent[-1][0]) / 2
    begin = max(sent[0][0], middle - SHOWN_SECONDS / 2)
    chosen = [(at - begin, amount) for at, amount in sent if begin <= at <= begin + SHOWN_SECONDS]
    totals = itertools.accumulate(amount for _, amount in chosen)
    return [[round(at, 3), total] for (at, _), total in zip(chosen, totals, strict=True)]


def _losses(run: Path) -> list[list[float]]:
    """[tokens, loss] of the steps."""
    newest = {event.step: event for _, event in History.read(run).steps}
    tokens = itertools.accumulate(event.tokens for _, event in sorted(newest.items()))
    return [[total, event.loss] for total, (_, event) in zip(tokens, sorted(newest.items()), strict=True)]


def title(shown: dict[str, Any]) -> str:
    """Bytes of both in the same time, as a ratio."""
    synchronous, islands = (shown["sent"][name] for name in LABELS)
    span = min(synchronous[-1][0], islands[-1][0])
    ours, theirs = (max(total for at, total in sent if at <= span) for sent in (islands, synchronous))
    return f"Islands send {theirs / ours:,.0f} times fewer bytes in the same time"


def draw(shown: dict[str, Any]) -> bytes:
    with figure.style():
        drawn = figure.new_figure(9, 5.4, layout="none")
        drawn.text(0.02, 0.945, title(shown), fontsize=15, weight="bold")
        sent, losses = (drawn.add_axes((0.075, bottom, 0.905, 0.34)) for bottom in (0.525, 0.09))
        for (name, label), colour in zip(LABELS.items(), COLOURS, strict=True):
            seconds, totals = zip(*shown["sent"][name], strict=True)
            sent.plot(seconds, [total / 1e6 for total in totals], color=colour, drawstyle="steps-post", label=label)
            tokens, values = zip(*shown["loss"][name], strict=True)
            losses.plot([count / 1e6 for count in tokens], smooth(values), color=colour, label=label)
        sent.set(yscale="log", xlabel="seconds", ylabel="MB sent by one cluster, so far")
        losses.set(xlabel="million tokens", ylabel="training loss (nats per token)")
        settings = shown["config"]
        words = f"{settings['count']} islands, H = {settings['inner_steps']}, {settings['quantise']}"
        drawn.text(0.02, 0.9, words, fontsize=9, color=figure.SOFT)
        sent.legend(loc="lower right")
        return figure.png(drawn, digest(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a synchronous run, and one with islands")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    if len(given.runs) not in (0, 2):
        parser.error("give two runs, or none to draw what is stored")
    store = given.out / f"{NAME}.json"
    shown = measure(*given.runs) if given.runs else json.loads(store.read_text(encoding="utf-8"))
    files.write(store, json.dumps(shown, sort_keys=True) + "\n")
    files.write(store.with_suffix(".png"), draw(shown))
    print(store.with_suffix(".png"))


if __name__ == "__main__":
    main()
