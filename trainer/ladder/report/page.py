"""A ladder's report as one page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from collections.abc import Sequence
from html import escape

from trainer.ladder.report import sections
from trainer.ladder.report.drawing import decision
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.pictures import Picture
from trainer.show import units
from trainer.show.figure import PALETTE

_LIGHT, _DARK = ("".join(f"--{name}:{shades[dark]};" for name, shades in PALETTE.items()) for dark in (0, 1))
STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1000px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:44px 0 12px}
h3{font-size:.95rem;margin:22px 0 6px}p{margin:6px 0}.text{max-width:75ch}
.soft{color:var(--soft)}.question{font-size:1.05rem;max-width:70ch}
code,.hash{font:.86em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:8px 0}
pre code{overflow-wrap:normal}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0}
dt{color:var(--soft)}dd{margin:0;min-width:0;overflow-wrap:anywhere}
.tally{display:flex;flex-wrap:wrap;gap:8px;margin:18px 0}
.badge{display:inline-block;padding:1px 9px;border-radius:99px;font-size:.86rem;font-weight:600;white-space:nowrap}
.tally .badge{font-size:1rem;padding:4px 14px}
.promote{color:var(--good);background:var(--good-back)}.reject{color:var(--bad);background:var(--bad-back)}
.inconclusive{color:var(--unsure);background:var(--unsure-back)}
.wide{overflow-x:auto;margin:0 -20px;padding:0 20px}
table{border-collapse:separate;border-spacing:0 2px;font-size:.9rem}
th{font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom;padding:2px 18px 2px 0}
td{padding:2px 18px 2px 0;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}td.fixed{white-space:nowrap}
.verdicts{width:100%}.verdicts tbody tr:first-child td{border-top:1px solid var(--line);padding-top:8px}
.verdicts .why td{padding-bottom:8px;max-width:80ch}.arm{font-weight:600}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;background:var(--paper)}
summary{cursor:pointer;padding:8px 14px;list-style:none}
summary::-webkit-details-marker{display:none}summary::before{content:"▸ ";color:var(--soft)}
details[open]>summary::before{content:"▾ "}summary b{font-weight:600}.body{padding:0 14px 14px;overflow-x:auto}
figure{margin:18px 0 26px;overflow-x:auto}figure svg{width:100%;min-width:640px;height:auto;display:block}
figcaption{max-width:80ch;color:var(--soft);font-size:.9rem;margin-top:6px}
ul{margin:4px 0;padding-left:20px}li{margin:2px 0}
@media (max-width:600px){main{padding:20px 14px 60px}.wide{margin:0 -14px;padding:0 14px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{figure{break-inside:avoid}}
"""
)

CAPTIONS = {
    "multiplier": "How many times more compute the baseline would need to reach the arm's loss. Points: each rung by "
    "itself. Line and band: all rungs, extrapolated to the target; dotted, if the arm's loss levels off elsewhere than "
    "the baseline's. A verdict must hold for both.",
    "loss": "Above: means over seeds, each seed faint. Below: the same minus the baseline's curve, arms set side by "
    "side. What has no result leaves a gap.",
    "prediction": "Each row was predicted from the smaller rungs alone, the target from all of them. What lies outside "
    "of its bar, the prediction got wrong.",
    "cost": "What an arm is worth in compute beside what it is worth in time, if steps go on to take as long as "
    "here. Times are those of a run's fastest steps: whoever shares a machine only makes steps slower.",
}


def html(tree: Tree, pictures: Sequence[Picture]) -> str:
    """The whole report as one HTML document."""
    parts = [_head(tree), _verdicts(tree), *(_picture(one) for one in pictures), *sections.of(tree)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tree['name'])}: a ladder</title><style>{STYLE.strip()}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _head(tree: Tree) -> str:
    counts = tree["counts"]
    decided = [one["decision"] for arm in tree["arms"] if (one := decision(tree, arm["name"]))]
    tally = [
        badge(name, f"{decided.count(name)} {name}")
        for name in ("promote", "reject", "inconclusive")
        if decided.count(name)
    ]
    runs = ", ".join(f"{number} {status}" for status, number in counts.items()) or "none"
    facts = [
        ("runs", escape(runs)),
        ("target", escape(_target(tree))),
        ("metric", escape(f"{tree['metric']}, {units.UNITS[tree['unit']]}")),
        ("compute", escape(_compute(tree))),
        *sections.machine(tree),
    ]
    list_ = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    going = sum(number for status, number in counts.items() if status not in ("finished", "missing"))
    still = f"<p><b>Not done:</b> {units.count(going, 'run')} of {sum(counts.values())} still to be made.</p>"
    notices = "".join(f"<p class=soft>{escape(notice)}</p>" for notice in tree["notices"])
    return (
        f"<h1>{escape(tree['name'])}</h1><p class=question>{escape(tree['question'])}</p>"
        f"<div class=tally>{''.join(tally) or badge('inconclusive', 'no verdict')}</div>"
        f"{still if going else ''}{notices}<dl>{list_}</dl>"
    )


def _target(tree: Tree) -> str:
    size, flops = tree["target"]["size"], units.flops(tree["target"]["flops"])
    times = units.times(tree["target"]["flops"] / tree["rungs"][-1]["flops"]) if tree["rungs"] else units.UNKNOWN
    shape = f", {units.amount(size['parameters'])} parameters" if size else ""
    return f"{flops} FLOPs{shape}: {times} the largest rung's compute"


def _compute(tree: Tree) -> str:
    flops = f"{units.flops(tree['flops'] + tree['sweep_flops'])} FLOPs"
    swept = f", {units.flops(tree['sweep_flops'])} of it in learning-rate sweeps" if tree["sweeps"] else ""
    told = tree.get("course", {}).get("time")
    if told is None:
        return flops + swept
    hours = f" in {units.took(told['busy_seconds'])} of runs"
    return f"{flops}{swept}{hours}, {units.took(told['training_seconds'])} of them training steps"


# Verdicts


def _verdicts(tree: Tree) -> str:
    """A body for each arm: its figures, and the sentence why."""
    if not tree["arms"]:
        return "<h2>Verdicts</h2><p>The ladder has no arms.</p>"
    heads = (
        "<th>arm<th>verdict<th class=n>at the target<th class=n>in time there<th>trend<th class=n>crosses 1× at (FLOPs)"
    )
    bodies = "".join(_verdict(tree, arm) for arm in tree["arms"])
    why = "" if tree["no_fit"] is None else f"<p class=text><b>No fit:</b> {escape(tree['no_fit'])}</p>"
    percent = units.share(1 - tree["criterion"]["level"])
    how = (
        f"<p class=soft>Multipliers with their {percent} intervals. The bounds that decide are one-sided and corrected "
        "for the arms and looks, so they may lie further out.</p>"
    )
    return (
        f"<h2>Verdicts</h2>{why}<div class=wide><table class=verdicts><thead><tr>{heads}</tr></thead>{bodies}</table>"
        f"</div>{how if tree['verdicts'] else ''}"
    )


def _verdict(tree: Tree, arm: Tree) -> str:
    one, name = decision(tree, arm["name"]), f"<td class=arm>{escape(arm['name'])}"
    if one is None:
        return (
            f"<tbody><tr>{name}<td>{badge('inconclusive')}{'<td class=n>?' * 2}<td>?<td class=n>?</tr>"
            f"{_row(_changes(arm), 'soft')}{_row('Without a curve of the baseline nothing can be said of it.')}</tbody>"
        )
    crossing = one["crossing"]
    gone = "–" if crossing is None else f"{units.flops(crossing['value'])}{_range(crossing)}"
    cells = (
        f"<td>{badge(one['decision'])}<td class=n>{escape(units.worth(one['multiplier']))}"
        f"<td class=n>{escape(units.worth(one.get('wall_clock')))}"
        f"<td class=fixed>{escape(units.TRENDS[one['trend']])}<td class=n>{escape(gone)}"
    )
    said = escape(one["why"])
    settle = units.remedies(one["remedies"])
    said += f" <b>What would settle it:</b> {escape(settle)}." if settle else ""
    notes = " ".join([*_overruled(tree, one), *one["notes"]])
    return (
        f"<tbody><tr>{name}{cells}</tr>{_row(_changes(arm), 'soft')}{_row(said)}"
        f"{_row(escape(notes), 'soft') if notes else ''}</tbody>"
    )


def _overruled(tree: Tree, one: Tree) -> list[str]:
    """Where time decided."""
    by_losses = next(other["decision"] for other in tree["verdicts"] if other["arm"] == one["arm"])
    return [f"By its losses alone: {by_losses}."] if by_losses != one["decision"] else []


def _row(content: str, how: str = "") -> str:
    return f'<tr class="why {how}"><td colspan=6>{content}</tr>'


def _changes(arm: Tree) -> str:
    changes = ", ".join(f"{key} = {units.value(value)}" for key, value in arm["changes"].items())
    both = f" ({' and '.join(arm['combines'])} together)" if arm["combines"] else ""
    question = f"{escape(arm['question'])} " if arm["question"] else ""
    return f"{question}<code>{escape(changes)}</code>{escape(both)}"


def _range(interval: Tree) -> str:
    if interval["low"] is None or interval["high"] is None:
        return ""
    return f" ({units.flops(interval['low'])} to {units.flops(interval['high'])})"


def badge(name: str, text: str | None = None) -> str:
    return f'<span class="badge {name}">{units.SIGNS[name]} {escape(text or name)}</span>'


def _picture(one: Picture) -> str:
    return (
        f"<figure>{one.svg}<figcaption><b>{escape(one.title)}.</b> {escape(CAPTIONS[one.name])}</figcaption></figure>"
    )
