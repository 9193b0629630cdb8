"""The report of a hunt: a page, JSON, and lines for a terminal."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import files
from trainer.hunt.search import PAGE, PICTURE, REPORT
from trainer.show import figure, page
from trainer.show.figure import BAD, GREY, SERIES, SILENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_SUSPECTS = 8
_CONFIRMED = {
    (True, True): "confirmed", (False, True): "not gone ", (True, False): "changed  ", (False, False): "the same ",
}  # fmt: skip
"""By (the symptom went or the value changed, the log shows a symptom)."""


def write(tree: Mapping[str, Any], out: Path) -> None:
    """Write OUT/hunt.html and OUT/hunt.json, and OUT/hunt.svg where somebody is accused. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / REPORT, json.dumps(tree, indent=1))
    pictures = {"timeline": _timeline(tree), "evidence": _evidence(tree) if tree["suspects"] else ""}
    files.write(out / PAGE, page.render("hunt.html", tree=tree, pictures=pictures))
    if tree["suspects"]:
        files.write(out / PICTURE, _picture(tree))
    else:
        (out / PICTURE).unlink(missing_ok=True)  # of an earlier hunt


def lines(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report in lines."""
    yield tree["summary"]
    for symptom in tree["symptoms"]:
        yield f"{'looked at' if symptom['kind'] == 'sample' else 'symptom  '} {symptom['text']}"
    sampled = any(symptom["kind"] == "sample" for symptom in tree["symptoms"])
    for suspect in tree["suspects"][:SHOWN_SUSPECTS]:
        number = f"{len(suspect['explains'])} of {len(tree['symptoms'])}"
        yield (
            f"suspect   {suspect['operator']}: error / tolerance {_times(suspect['excess'])}, "
            f"{f'wrong in {number} looked at' if sampled else f'explains {number}'}; {'; '.join(suspect['conditions'])}"
        )
    for found in tree["confirmations"]:
        yield f"{_CONFIRMED[found['gone'], _is_shown(found)]} {found['what']}: {found['before']} → {found['after']}"
    script = tree["reproduction"]
    if script is not None:
        yield f"script    {script['script'] or script['why']}"
    for line in tree["not_checked"]:
        yield f"unchecked {line}"


def _is_shown(symptom: Mapping[str, Any]) -> bool:
    """True if the log shows it; False for steps that were chosen or asked for."""
    return symptom["kind"] not in ("sample", "asked")


def _times(excess: float | None) -> str:
    return "infinite" if excess is None else f"{excess:.3g}"


def _timeline(tree: Mapping[str, Any]) -> str:
    """Loss and gradient norm by step, with the symptoms and the steps that were checked."""
    with figure.style():
        drawn = figure.new_figure(9, 4.2)
        _draw_timeline(drawn.subplots(2, 1, sharex=True, height_ratios=[2, 1.4]), tree)
        return figure.svg(drawn, "timeline", "Loss and gradient norm, with symptoms and checked steps")


def _evidence(tree: Mapping[str, Any]) -> str:
    """Error over tolerance of each suspect, on a logarithmic axis."""
    with figure.style():
        drawn = figure.new_figure(9, 0.7 + 0.34 * len(_rows(tree)))
        _draw_evidence(drawn.subplots(), tree)
        return figure.svg(drawn, "evidence", "Error over tolerance by operator")


def _picture(tree: Mapping[str, Any]) -> str:
    """Both in one, for pages that are not this one."""
    with figure.style():
        drawn = figure.new_figure(9, 4.4 + 0.34 * len(_rows(tree)))
        *panels, last = drawn.subplots(3, 1, height_ratios=[2, 1.4, 0.3 + 0.34 * len(_rows(tree))])
        _draw_timeline(panels, tree)
        _draw_evidence(last, tree)
        return figure.standalone(figure.svg(drawn, "hunt", tree["summary"]))


def _draw_timeline(panels: "Sequence[Axes]", tree: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    series = tree["series"]
    for axes, name, label in zip(panels, ("loss", "grad_norm"), ("loss", "gradient norm"), strict=True):
        points = [(s, v) for s, v in zip(series["steps"], series[name], strict=True) if v is not None]
        axes.plot([s for s, _ in points], [v for _, v in points], color=SERIES[0], linewidth=1.4)
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        failed = {one["step"]: bool(one["failed"]) for one in tree["checked"]}
        for step, wrong in failed.items():
            axes.axvspan(step - 0.5, step + 0.5, color=SILENT if wrong else GREY, alpha=0.25, linewidth=0)
    panels[1].sharex(panels[0])
    seen: dict[int, int] = {}
    for number, symptom in enumerate(tree["symptoms"], start=1):
        height = seen[symptom["step"]] = seen.get(symptom["step"], 0) + 1
        panels[0].axvline(symptom["step"], color=BAD, linewidth=0.8, linestyle=":")
        panels[0].annotate(
            str(number), (symptom["step"], 1.0), xycoords=("data", "axes fraction"), ha="center",
            xytext=(0, 11 * height - 8), textcoords="offset points", color=BAD, fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
    panels[1].set_xlabel("step (red numbers: as in the table; shaded: every call checked; purple: wrong calls)")


def _draw_evidence(axes: "Axes", tree: Mapping[str, Any]) -> None:
    rows = _rows(tree)
    names = [name.removeprefix("aten.") for name, _, _ in rows]
    bars = axes.barh(names, [value for _, value, _ in rows], color=[c for _, _, c in rows], height=0.6)
    told = [_times(suspect["excess"]) for suspect in tree["suspects"][:SHOWN_SUSPECTS]]
    axes.bar_label(bars, told + [""] * (len(rows) - len(told)), padding=4)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color=BAD, linewidth=1)
    axes.set_xlabel("error / tolerance of the worst call (right of the line: no rounding explains it)")
    axes.grid(visible=False, axis="y")


def _rows(tree: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(operator, error over tolerance, colour) of the suspects, and of the operators next to them."""
    shown = tree["suspects"][:SHOWN_SUSPECTS]
    most = 10 * max((s["excess"] for s in shown if s["excess"] is not None), default=10.0)
    rows = [(s["operator"], s["excess"] or most, SILENT) for s in shown]
    return rows + [(r["operator"], r["worst"], GREY) for r in tree["runners_up"]]
