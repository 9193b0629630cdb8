"""A campaign's report as one page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from trainer.chaos.report import matrix
from trainer.chaos.results import Report, Result
from trainer.faults.kinds import KINDS, Kind
from trainer.show import timeline
from trainer.show.units import clock

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2127;--soft:#667085;--line:#e4e7ec;--panel:#f7f8fa;--link:#2f6690;
--pass:#1a7343;--pass-back:#e6f4ea;--fail:#b3261e;--fail-back:#fce8e6;--undetected:#86349b;--undetected-back:#f6e8fa;
--unknown:#855b00;--unknown-back:#fdf3d7;--skipped:#667085;--skipped-back:#f1f2f5}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e6e9ee;--soft:#98a2b3;--line:#2c323b;--panel:#1b1f26;
--link:#7fb2dc;--pass:#7fd09a;--pass-back:#173324;--fail:#ff9a90;--fail-back:#43201d;--undetected:#dda0ee;
--undetected-back:#381f40;--unknown:#ecc35c;--unknown-back:#392e12;--skipped:#98a2b3;--skipped-back:#22272f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1000px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.2rem;margin:44px 0 12px}
h3{font-size:.95rem;margin:22px 0 6px}p{margin:6px 0}a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}.soft{color:var(--soft)}.question{font-size:1.05rem;max-width:70ch}
code,.hash{font:.86em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0}
dt{color:var(--soft)}dd{margin:0;min-width:0}
.tally{display:flex;flex-wrap:wrap;gap:8px;margin:18px 0}
.badge{display:inline-block;padding:1px 9px;border-radius:99px;font-size:.86rem;font-weight:600;white-space:nowrap}
.tally .badge{font-size:1rem;padding:4px 14px}
.pass{color:var(--pass);background:var(--pass-back)}.fail{color:var(--fail);background:var(--fail-back)}
.undetected{color:var(--undetected);background:var(--undetected-back)}
.unknown{color:var(--unknown);background:var(--unknown-back)}.skipped{color:var(--skipped);background:var(--skipped-back)}
.wide{overflow-x:auto;margin:0 -20px;padding:0 20px}
table{border-collapse:separate;border-spacing:0 2px;font-size:.9rem}
th{font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom;padding:2px 12px 2px 0}
td{padding:2px 12px 2px 0;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}
.matrix th.i{padding:0 0 6px;width:28px}.matrix th.i span{writing-mode:vertical-rl;transform:rotate(180deg);
white-space:nowrap;font-size:.82rem}
.matrix td{vertical-align:middle}.matrix td.i{width:28px;padding:0;text-align:center;font-weight:700;
border-left:2px solid var(--paper);border-radius:5px}
.matrix td.none{color:var(--soft);font-weight:400}.matrix tbody th{padding-top:16px;color:var(--ink);font-weight:600}
.matrix td:first-child{position:sticky;left:-20px;background:var(--paper);padding-left:2px}
.fixed{white-space:nowrap}.matrix td.i+td.n,.matrix th.i+th.n{padding-left:12px}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;background:var(--paper)}
summary{cursor:pointer;padding:8px 14px;display:flex;flex-wrap:wrap;gap:4px 12px;align-items:baseline;list-style:none}
summary::-webkit-details-marker{display:none}summary::before{content:"▸";color:var(--soft)}
details[open]>summary::before{content:"▾"}summary b{font-weight:600}
.body{padding:0 14px 14px;scroll-margin-top:64px}.picture{overflow-x:auto;margin:8px 0}
.picture svg{min-width:680px;max-width:100%;height:auto;display:block}
ul{margin:4px 0;padding-left:20px}li{margin:2px 0}
@media (max-width:600px){main{padding:20px 14px 60px}.wide{margin:0 -14px;padding:0 14px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}.matrix td:first-child{left:-14px}}
@media print{.matrix td:first-child{position:static}}
"""


def html(report: Report) -> str:
    """The whole report as one HTML document."""
    title = escape(f"{report.campaign}: {len(report.results)} runs with faults on purpose")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE.strip()}</style></head>\n<body><main>\n"
        f"{_head(report)}\n{_matrix(report)}\n{_runs(report)}\n{_catalogue(report)}\n</main></body></html>\n"
    )


def _head(report: Report) -> str:
    counts = matrix.counts(report.results)
    tally = "".join(_badge(outcome, f"{n} {outcome}") for outcome, n in counts.items())
    reference, facts = (
        report.reference,
        {"config": f"<code>{escape(report.config)}</code>", "machine": escape(report.machine)},
    )
    if reference.get("weights_sha256"):
        about = f"{_known(reference.get('steps'))} steps in {clock(reference.get('seconds'))}"
        facts["reference run"] = (
            f'{about}<br><span class="hash">weights_sha256 {escape(str(reference["weights_sha256"]))}</span>'
        )
        if not reference.get("exact"):
            facts["reference run"] += "<br>Its sums are not exact: whether a run equals it is unknown."
    else:
        facts["reference run"] = "none: whether a run equals it is unknown"
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.started))
    facts["took"] = f"{clock(report.seconds)} from {began}"
    list_ = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    stopped = "<p><b>Interrupted:</b> what stands here had ended by then; the rest was not run.</p>"
    return (
        f"<h1>{escape(report.campaign)}</h1><p class=question>{escape(report.question)}</p>"
        f"<div class=tally>{tally or _badge('unknown', 'no run has ended')}</div>"
        f"{stopped if report.interrupted else ''}{_honest(report.results)}<dl>{list_}</dl>"
    )


def _honest(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(result.name for result in results if result.outcome == "undetected"))
    if not names:
        return ""
    meaning = "the run ended with other weights than the reference run, and nothing told of it"
    return f"<p><b>Undetected</b>, {meaning}: {escape(', '.join(names))}.</p>"


def _matrix(report: Report) -> str:
    results = report.results
    if not results:
        return ""
    asked = matrix.invariants(results)
    heads = "<th>fault<th>outcome" + "".join(f"<th class=i><span>{escape(name)}</span>" for name in asked)
    heads += "<th class=n>detect s<th class=n>recover s<th>ranks"
    bodies = "".join(
        f"<tbody><tr><th colspan={5 + len(asked)}>{escape(group)}</th></tr>"
        + "".join(_row(result, results, asked) for result in members)
        + "</tbody>"
        for group, members in matrix.groups(results).items()
    )
    signs = " &ensp; ".join(
        f"<b>{matrix.SIGNS[name]}</b> {matrix.MEANINGS[name]}" for name in ("pass", "fail", "undetected", "unknown")
    )
    return (
        f"<h2>What held</h2><div class=wide><table class=matrix><thead><tr>{heads}</tr></thead>{bodies}</table></div>"
        f'<p class="soft">{signs} &ensp; <b>{matrix.NOT_ASKED}</b> not asked, not measured. '
        "Seconds are the worst of the run's faults.</p>"
    )


def _row(result: Result, results: Sequence[Result], asked: Sequence[str]) -> str:
    name = escape(matrix.label(result, results))
    link = name if result.outcome == "skipped" else f'<a href="#{_anchor(result, results)}">{name}</a>'
    start = f"<tr><td>{link}<td>{_badge(result.outcome)}"
    if result.outcome == "skipped":
        why = escape(result.why.removeprefix(f"{result.name}: "))
        return f"{start}<td class=soft colspan={3 + len(asked)}>{why}</tr>"
    figures = (matrix.worst(result, name) for name in ("detect_seconds", "recover_seconds"))
    times = "".join(f"<td class=n>{matrix.seconds(value)}" for value in figures)
    given = matrix.answers(result)
    cells = "".join(_cell(name, given.get(name)) for name in asked)
    return f'{start}{cells}{times}<td class="soft fixed">{escape(matrix.world(result))}</tr>'


def _cell(invariant: str, answer: tuple[str, str] | None) -> str:
    if answer is None:
        return f'<td class="i none" title="{escape(invariant)}: not asked">{matrix.NOT_ASKED}'
    told, why = answer
    title = f"{invariant}: {told}" + (f". {why}" if why else "")
    return f'<td class="i {_class(told)}" title="{escape(title)}">{matrix.SIGNS.get(told, "?")}'


def _runs(report: Report) -> str:
    ran = [result for result in report.results if result.outcome != "skipped"]
    return "<h2>Run by run</h2>" + "".join(_run(result, report.results) for result in ran) if ran else ""


def _run(result: Result, results: Sequence[Result]) -> str:
    """Open where there is something to look into."""
    attempts = len(result.timeline.get("attempts", []))
    kinds = list(dict.fromkeys(result.kinds))
    known = (
        [] if kinds == [result.name] else [", ".join(kinds[:6]) + (f" and {len(kinds) - 6} more" * (len(kinds) > 6))]
    )
    known += [matrix.world(result), f"{attempts} attempt{'' if attempts == 1 else 's'}", clock(result.seconds)]
    about = " · ".join(known)
    why = f"<p>{escape(result.why)}</p>" if result.outcome != "pass" and result.why else ""
    parts = (_faults(result), _incidents(result), _answers(result), _launches(result))
    anchor = _anchor(result, results)
    return (
        f"<details{'' if result.outcome == 'pass' else ' open'}><summary><b>{escape(matrix.label(result, results))}</b>"
        f"{_badge(result.outcome)}<span class=soft>{escape(about)}</span></summary>"
        f'<div class=body id="{anchor}">{why}'
        f"<div class=picture>{timeline.svg(result.timeline, anchor)}</div>{''.join(parts)}</div></details>\n"
    )


def _faults(result: Result) -> str:
    origin = result.timeline.get("origin")
    rows = []
    for index, fault in enumerate(result.faults):
        fired = [one for one in result.measured if one.get("index") == index]
        rows += [_fault_row(fault, one, origin) for one in fired or [None]]
    if not rows:
        return ""
    heads = "<th>fault<th>planned<th class=n>fired<th>hit<th class=n>detected<th class=n>recovered<th>told as"
    return f"<h3>Faults</h3><div class=wide><table><thead><tr>{heads}</tr></thead>{''.join(rows)}</table></div>"


def _fault_row(fault: Mapping[str, Any], fired: Mapping[str, Any] | None, origin: float | None) -> str:
    kind = str(fault.get("kind"))
    link = f'<a href="#kind-{escape(kind)}">{escape(kind)}</a>' if kind in KINDS else escape(kind)
    start = f"<tr><td>{link}<td>{escape(_planned(fault))}"
    if fired is None:
        return f"{start}<td class=n>never<td><td><td><td>"
    at, victim, step = fired.get("fired"), fired.get("victim"), fired.get("step")
    when = "?" if at is None or origin is None else f"{at - origin:.1f} s"
    hit = ", ".join([f"rank {victim}"] * (victim is not None) + [f"step {step}"] * (step is not None))
    figures = "".join(f"<td class=n>{_after(fired.get(name))}" for name in ("detect_seconds", "recover_seconds"))
    rightly = {True: "rightly", False: "wrongly"}.get(fired.get("attributed_correctly"), "")  # pyright: ignore
    told = ", ".join(word for word in (str(fired.get("detected_as") or "–").replace("_", " "), rightly) if word)
    return f"{start}<td class=n>{when}<td>{escape(hit or '–')}{figures}<td>{escape(told)}"


def _planned(fault: Mapping[str, Any]) -> str:
    """ "rank 1, step 9, before_commit, bits 2" """
    words = []
    for key, value in fault.items():
        if key == "kind":
            continue
        name = {"at_step": "step", "at_seconds": "after s", "phase": ""}.get(key, key.replace("_", " "))
        words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(word.strip() for word in words)


def _after(seconds: float | None) -> str:
    return matrix.seconds(seconds) + ("" if seconds is None else " s")


def _incidents(result: Result) -> str:
    told = result.timeline.get("incidents", [])
    if not told:
        return "<h3>Incidents, as the run told them</h3><p class=soft>none</p>"
    lines = "".join(
        f"<li><b>{escape(one['kind'].replace('_', ' '))}</b> in attempt {_known(one.get('attempt'))}: "
        + escape(one["text"])
        for one in told
    )
    return f"<h3>Incidents, as the run told them</h3><ul>{lines}</ul>"


def _answers(result: Result) -> str:
    """What held in one line, the rest with its reason."""
    held = [escape(answer.invariant) for answer in result.answers if answer.answer == "pass"]
    rest = [answer for answer in result.answers if answer.answer != "pass"]
    lines = [f"<li>{_badge(one.answer)} <b>{escape(one.invariant)}</b>: {escape(one.why)}" for one in rest]
    lines += [f"<li>{_badge('pass')} {', '.join(held)}"] if held else []
    return f"<h3>Answers</h3><ul>{''.join(lines)}</ul>" if lines else ""


def _launches(result: Result) -> str:
    times = [
        f"exit status {_known(one.get('status'))} after {_after(_between(one.get('started'), one.get('ended')))}"
        for one in result.launches
    ]
    return f"<h3>The command was given {_times(len(times))}</h3><p>{escape('; '.join(times))}</p>" if times else ""


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _between(started: float | None, ended: float | None) -> float | None:
    return None if started is None or ended is None else ended - started


def _catalogue(report: Report) -> str:
    named = dict.fromkeys(kind for result in report.results for kind in result.kinds)
    shown = [KINDS[name] for name in named if name in KINDS]
    return "<h2>The faults</h2>" + "".join(map(_kind, shown)) if shown else ""


def _kind(kind: Kind) -> str:
    where = "by a process beside the run" if kind.hand == "nemesis" else f"by the rank, {', '.join(kind.phases)}"
    facts: Iterable[tuple[str, str]] = (
        ("imitates", kind.imitates),
        ("made", f"{kind.made} ({where})"),
        ("detected", kind.detected),
        ("recovered", kind.recovered),
        ("told as", ", ".join(kind.expected_incidents).replace("_", " ") or "nothing: it passes without an incident"),
        ("needs", ", ".join(kind.needs)),
    )
    list_ = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts if value)
    return (
        f"<details><summary><b>{escape(kind.name)}</b><span class=soft>{escape(kind.imitates)}</span></summary>"
        f'<div class=body id="kind-{escape(kind.name)}"><dl>{list_}</dl></div></details>\n'
    )


def _badge(outcome: str, text: str | None = None) -> str:
    return f'<span class="badge {_class(outcome)}">{matrix.SIGNS.get(outcome, "?")} {escape(text or outcome)}</span>'


def _class(outcome: str) -> str:
    return outcome if outcome in matrix.SIGNS else "unknown"


def _anchor(result: Result, results: Sequence[Result]) -> str:
    return f"run-{next(number for number, other in enumerate(results) if other is result)}"


def _known(value: Any) -> str:
    return "?" if value is None else escape(str(value))
