"""A campaign's report as one page: show/templates/campaign.html."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.faults.fault import KINDS
from trainer.show import page, timeline


def html(report: Report) -> str:
    """Return the whole report as one HTML document."""
    # By identity: two runs may have equal results.
    numbers = {id(result): number for number, result in enumerate(report.results)}
    kinds = dict.fromkeys(kind for result in report.results for kind in result.kinds if kind in KINDS)
    return page.render(
        "campaign.html",
        report=report,
        matrix=matrix,
        anchor=lambda result: f"run-{numbers[id(result)]}",
        timeline_svg=lambda values, name: _drawn(json.dumps(values), name),
        fault_rows=_fault_rows,
        kinds={name: KINDS[name] for name in kinds},
    )


@functools.lru_cache(maxsize=1024)
def _drawn(values: str, name: str) -> str:
    """Draw a timeline, once: the page is written anew after each of a campaign's runs, with those of all before."""
    return timeline.svg(json.loads(values), name)


def _fault_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """Yield (the planned fault, the cells of its row) for each time that a fault fired; once if it never did."""
    origin = result.timeline.get("origin")
    for index, fault in enumerate(result.faults):
        fired = [measured for measured in result.measured if measured.get("index") == index]
        if not fired:
            yield fault, _planned(fault), "never", "", "", "", ""
        for measured in fired:
            time, rank, step = (measured.get(key) for key in ("fired", "victim", "step"))
            # Each part is there only if the fault has it: one on a link hits no rank.
            hit = [f"rank {rank}"] * (rank is not None) + [f"step {step}"] * (step is not None)
            reported = [str(measured.get("detected_as") or "–").replace("_", " ")]
            if measured.get("attributed_correctly") is not None:
                reported.append("correctly" if measured["attributed_correctly"] else "wrongly")
            seconds = [measured.get(key) for key in ("detect_seconds", "recover_seconds")]
            yield (
                fault, _planned(fault), "?" if time is None or origin is None else f"{time - origin:.1f} s",
                ", ".join(hit) or "–", *("–" if s is None else f"{matrix.seconds(s)} s" for s in seconds),
                ", ".join(reported),
            )  # fmt: skip


def _planned(fault: Mapping[str, Any]) -> str:
    """ "rank 1, step 9, before_commit, bits 2" """
    names = {"at_step": "step", "at_seconds": "after s", "phase": ""}
    words = []
    for key, value in fault.items():
        name = names.get(key, key.replace("_", " "))
        words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(word.strip() for key, word in zip(fault, words, strict=True) if key != "kind")
