"""Draw the README's first picture: a run without faults and one with faults over one another, and four figures.

    python -m scripts.readme_picture                        draw docs/same-bits.png again, of what is stored beside it
    python -m scripts.readme_picture CALM STORM             … of two finished runs, as scripts/demo makes them
    python -m scripts.readme_picture CALM STORM --out DIR   … into another directory, leaving the README alone

docs/same-bits.json holds what was measured in the two runs and the rows of BENCHMARKS.json that are quoted. Its digest
lies in the PNG, so a test sees when picture, JSON, README and BENCHMARKS.json disagree.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from trainer import files
from trainer.log.events import FaultFired, select
from trainer.log.history import History
from trainer.log.summary import summarise
from trainer.show import figure
from trainer.show.curves import smooth

ROOT = Path(__file__).resolve().parent.parent
NAME = "same-bits"
BENCHMARKS = ("soak", "killed", "throughput_12m")
WORDS = {"sigkill": "rank {} is killed", "no_space": "the disk is full", "stopped": "rank {} hangs",
         "flip_weights": "a bit of rank {} flips", "nan_gradient": "a gradient is NaN"}  # fmt: skip
CALM, STORM = figure.SERIES[0], figure.SERIES[1]


def measure(calm: Path, storm: Path) -> dict[str, Any]:
    """Read the picture's numbers from two runs. Raises ValueError unless both finished and the second had faults."""
    histories, summaries = [History.read(run) for run in (calm, storm)], [summarise(run) for run in (calm, storm)]
    if not all(summary["weights_sha256"] for summary in summaries) or not histories[1].fired:
        raise ValueError(f"{calm} and {storm} are not a finished run without faults and a finished one with faults")
    losses = [[[event.step, event.loss] for _, event in history.steps] for history in histories]
    fired = [event for _, event in select(histories[1].fired, FaultFired)]
    return {
        "weights_sha256": [summary["weights_sha256"] for summary in summaries],
        "calm": losses[0],
        "storm": losses[1],
        "faults": [[event.step, WORDS.get(event.fault, event.fault).format(event.victim)] for event in fired],
        "lost": [[i["step"] - i["lost_steps"], i["step"]] for i in summaries[1]["incidents"] if i["lost_steps"]],
    }


def contents(measured: dict[str, Any]) -> dict[str, Any]:
    """Everything in the picture: what was measured in the runs, and what BENCHMARKS.json holds today."""
    benchmarks = json.loads((ROOT / "BENCHMARKS.json").read_text(encoding="utf-8"))
    return {**measured, "benchmarks": {name: benchmarks[name] for name in BENCHMARKS}}


def headlines(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Four times (figure, what it counts)."""
    soak, killed, speed = (shown["benchmarks"][name] for name in BENCHMARKS)
    kills = soak["kills"]
    of_calm = dict(shown["calm"])
    equal = sum(of_calm.get(step) == loss for step, loss in shown["storm"])
    return [
        (f"{equal} of {len(shown['storm'])}", "losses computed under faults equal those without, to the last bit"),
        (f"{soak['equal']} of {soak['runs']}", f"runs under {kills} random kills end with the weights of a calm one"),
        (f"{killed['median']['all']:.2f} s", "from the kill of one of two workers to the next new step"),
        (f"{speed['ratio']['median']:.2f}×", "the speed of a plain training loop, exact sums included"),
    ]  # fmt: skip


def title(shown: dict[str, Any]) -> str:
    is_equal = len(set(shown["weights_sha256"])) == 1
    number = {2: "Two", 3: "Three", 4: "Four", 5: "Five"}.get(len(shown["faults"]), len(shown["faults"]))
    return f"{number} faults in one run, and {'the same bits' if is_equal else 'OTHER BITS'} at its end"


def caption(shown: dict[str, Any]) -> str:
    """The picture and its figures, as the README has them."""
    figures = "; ".join(f"**{number}** {words}" for number, words in headlines(shown))
    return f"![{title(shown)}](docs/{NAME}.png)\n\n{figures} ([BENCHMARKS.md](BENCHMARKS.md)).\n"


def digest(shown: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def draw(shown: dict[str, Any]) -> bytes:
    with figure.style():
        drawn = figure.new_figure(9, 5.6, layout="none")
        drawn.text(0.02, 0.955, title(shown), fontsize=15, weight="bold")
        axes = drawn.add_axes((0.065, 0.295, 0.915, 0.535))
        for name, label, sha, style in zip(
            ("calm", "storm"), ("without", "   with"), shown["weights_sha256"],
            ({"color": CALM, "linewidth": 6, "alpha": 0.35}, {"color": STORM, "linewidth": 1.3}), strict=True,
        ):  # fmt: skip
            steps, losses = zip(*sorted(dict(shown[name]).items()), strict=True)  # of a replayed step, the last value
            axes.plot(steps, smooth(losses), label=f"{label} faults, weights_sha256 {sha}", **style)
        for number, (begin, end) in enumerate(shown["lost"]):
            label = "" if number else "steps computed again after a restart"
            axes.axvspan(begin, end, color=figure.BAD, alpha=0.1, linewidth=0, label=label)
        axes.set(xlabel="step", ylabel="training loss (nats per token)")
        axes.margins(x=0.01)
        for number, (step, words) in enumerate(shown["faults"]):
            axes.axvline(step, color=figure.BAD, linewidth=0.9, linestyle=":")
            height = 0.55 if number % 2 else 0.62  # neighbours would write over one another
            axes.annotate(
                words, (step, height), (4, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                color=figure.BAD, fontsize=9,
            )  # fmt: skip
        drawn.legend(loc="upper left", bbox_to_anchor=(0.055, 0.938), borderpad=0, labelspacing=0.25,
                     prop={"family": "DejaVu Sans Mono", "size": 8})  # fmt: skip
        for number, (value, words) in enumerate(headlines(shown)):
            left = 0.02 + 0.245 * number
            drawn.text(left, 0.125, value, fontsize=17, weight="bold", color=figure.INK)
            lines = re.findall(r"\S.{0,28}(?= |$)", words)
            drawn.text(left, 0.1, "\n".join(lines), fontsize=8.6, color=figure.SOFT, va="top", linespacing=1.25)
        return figure.png(drawn, digest(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a finished run, and one with faults")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    if len(arguments.runs) not in (0, 2):
        parser.error("give two runs, or none to draw what is stored")
    store = arguments.out / f"{NAME}.json"
    shown = contents(measure(*arguments.runs) if arguments.runs else json.loads(store.read_text(encoding="utf-8")))
    files.write(store, json.dumps(shown, sort_keys=True) + "\n")
    files.write(store.with_suffix(".png"), draw(shown))
    if arguments.out == ROOT / "docs":
        readme = ROOT / "README.md"
        text = re.sub(
            rf"!\[[^\n]*\]\(docs/{NAME}\.png\)\n\n[^\n]*\n", lambda _: caption(shown), readme.read_text("utf-8")
        )
        files.write(readme, text)
    print(store.with_suffix(".png"))


if __name__ == "__main__":
    main()
