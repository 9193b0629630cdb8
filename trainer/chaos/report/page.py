"""A campaign's report as one page: show/templates/campaign.html."""

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.faults.fault import KINDS, Fault
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
        timeline_svg=timeline.svg,
        fault_rows=_fault_rows,
        launch_seconds=lambda launch: _seconds(_duration(launch)),
        kinds={name: _kind_facts(KINDS[name]) for name in kinds},
    )


def _fault_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """Yield (the planned fault, the cells of its row) for each time that a fault fired; once if it never did."""
    origin = result.timeline.get("origin")
    for index, fault in enumerate(result.faults):
        fired = [measured for measured in result.measured if measured.get("index") == index]
        if not fired:
            yield fault, _planned(fault), "never", "", "", "", ""
        for measured in fired:
            time, rank, step = measured.get("fired"), measured.get("victim"), measured.get("step")
            # Each part is there only if the fault has it: one on a link hits no rank.
            hit = [f"rank {rank}"] * (rank is not None) + [f"step {step}"] * (step is not None)
            reported = [str(measured.get("detected_as") or "–").replace("_", " ")]
            if measured.get("attributed_correctly") is not None:
                reported.append("correctly" if measured["attributed_correctly"] else "wrongly")
            yield (
                fault, _planned(fault), "?" if time is None or origin is None else f"{time - origin:.1f} s",
                ", ".join(hit) or "–",
                _seconds(measured.get("detect_seconds")), _seconds(measured.get("recover_seconds")),
                ", ".join(reported),
            )  # fmt: skip


def _planned(fault: Mapping[str, Any]) -> str:
    """ "rank 1, step 9, before_commit, bits 2" """
    words = []
    for key, value in fault.items():
        if key != "kind":
            name = {"at_step": "step", "at_seconds": "after s", "phase": ""}.get(key, key.replace("_", " "))
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(word.strip() for word in words)


def _seconds(seconds: float | None) -> str:
    return matrix.seconds(seconds) + ("" if seconds is None else " s")


def _duration(launch: Mapping[str, Any]) -> float | None:
    started, ended = launch.get("started"), launch.get("ended")
    return None if started is None or ended is None else ended - started


def _kind_facts(kind: Fault) -> dict[str, str]:
    where = "by a process beside the run" if kind.from_outside else f"by the rank, {', '.join(kind.phases)}"
    incidents = ", ".join(kind.expected_incidents).replace("_", " ")
    return {
        "imitates": kind.imitates,
        "made": f"{kind.made} ({where})",
        "detected": kind.detected,
        "recovered": kind.recovered,
        "reported as": incidents or "nothing: no incident is expected",
        "needs": ", ".join(kind.needs),
    }
