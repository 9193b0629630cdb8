"""Numbers as words, written alike on pages, terminals and pictures. Unknown values (None) read "?".

Intervals are JSON objects {value, low, high}; each of the three may be None.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "?"
LOSS_UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
SHORT_LOSS_UNITS = {"nats_per_token": "nats", "bits_per_byte": "bits"}
SIGNS = {
    "promote": "✓", "reject": "✗", "inconclusive": "?", "noise floor": "·",
    "pass": "✓", "fail": "✗", "undetected": "!", "unknown": "?", "skipped": "–",
    "not applicable": "–",
}  # fmt: skip
"""Signs of a ladder's decisions and of a campaign's outcomes."""
TRENDS = {
    "none": "no gain", "persists": "persists", "shrinks": "shrinks", "reverses": "reverses", "grows": "grows",
    "unknown": UNKNOWN, "noise floor": "–",
}  # fmt: skip


def known(value: Any, style: str = "") -> str:
    """The value as text, formatted in this style; "?" for None."""
    return UNKNOWN if value is None else format(value, style)


def scientific(value: float | None) -> str:
    """3.2e12 as "3.2·10¹²"."""
    if value is None:
        return UNKNOWN
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(_SUPERSCRIPTS)}"


def ratio(value: float | None) -> str:
    """1.15 as "1.15×"."""
    if value is None:
        return UNKNOWN
    return f"{value:.3g}×" if value >= 10 or value < 0.1 else f"{value:.2f}×"


def loss(value: float | None, digits: int = 4) -> str:
    """2.9132 as "2.9132"."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def interval(found: Mapping[str, Any] | None, number: Callable[..., str], *digits: int) -> str:
    """ "1.15× (1.08 to 1.22)", numbers as the function `number` writes them; without brackets if no end is known."""
    if found is None or found["value"] is None:
        return UNKNOWN
    value, low, high = (number(found[key], *digits) for key in ("value", "low", "high"))
    return value if low == high == UNKNOWN else f"{value} ({low.rstrip('×')} to {high.rstrip('×')})"


def bounds(found: Mapping[str, Any], number: Callable[..., str], *digits: int) -> str:
    """ "15.4 (9.1 to ?)": as `interval`, but an end that the data do not bound is always shown."""
    value, low, high = (number(found[key], *digits) for key in ("value", "low", "high"))
    return f"{value} ({low.rstrip('×')} to {high.rstrip('×')})"


def mean_and_sd(noise: Mapping[str, Any]) -> str:
    """ "2.9132 ± 0.0040": mean and standard deviation over seeds, the latter only if there are two seeds."""
    return loss(noise["mean"]) + ("" if noise["sd"] is None else f" ± {loss(noise['sd'])}")


def signed(value: float | None, digits: int = 4) -> str:
    """0.0031 as "+0.0031", -0.012 as "−0.0120"."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def amount(number: float | None) -> str:
    """34800 as "34.8k", 2290000 as "2.29M"."""
    if number is None:
        return UNKNOWN
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def tokens_per_second(rate: float | None) -> str:
    """12345.6 as "12,346 tok/s"."""
    return f"{UNKNOWN if rate is None else f'{rate:,.0f}'} tok/s"


def megabytes(size: int | None) -> str:
    """A size in bytes as "1,234.5 MB"."""
    return UNKNOWN if size is None else f"{size / 1e6:,.1f} MB"


def clock(seconds: float | None) -> str:
    """245 s as "4:05", 3723 s as "1:02:03"."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float | None) -> str:
    """A duration as "48 s", "12.5 min" or "3.2 h"."""
    if seconds is None or seconds < 90:
        return UNKNOWN if seconds is None else f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def date(seconds: float | None) -> str:
    """Unix time as "2026-11-27 07:14 UTC"."""
    return UNKNOWN if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def percent(share: float | None) -> str:
    """0.95 as "95 %"."""
    return UNKNOWN if share is None else f"{100 * share:.3g} %"


def p_value(p: float | None) -> str:
    """ "0.31", "< 0.001"."""
    return UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def plural(number: int, noun: str) -> str:
    """ "1 run", "3 runs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def words(incident: Mapping[str, Any]) -> str:
    """An incident as "rank 1 lost" or "save failed"; a simulated one by its cause."""
    if cause := incident.get("cause"):
        return cause
    kind, rank = incident["kind"], incident["rank"]
    short = {"worker_lost": "lost", "checkpoint_rejected": "damaged checkpoint"}
    text: str = short.get(kind) or kind.replace("_", " ")
    if rank is not None and kind in ("worker_lost", "hung"):  # others carry the rank that wrote them down
        return f"rank {rank} {text}"
    return f"workers {text}" if kind == "worker_lost" else text


def setting(value: Any) -> str:
    """A config value as its TOML file has it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def remedies(found: Sequence[Mapping[str, Any]], unit: str = "FLOPs") -> str:
    """ "3 more seeds at every rung (62 %, 3.1·10¹⁵ FLOPs), or a further rung …"; "" if there are none."""
    return ", or ".join(remedy(one, unit) for one in found)


def remedy(found: Mapping[str, Any], unit: str = "FLOPs") -> str:
    """One of further runs in words, with the probability that it settles the question and the compute it takes."""
    if found["what"] == "rung":
        what = f"a further rung of {scientific(found['flops'])} {unit} with {plural(found['seeds'], 'seed')}"
    else:
        what = f"{plural(found['seeds'], 'more seed')} at {found.get('rung') or 'every rung'}"
    if found.get("probability") is None:  # reports from before these were estimated have none
        return what
    return f"{what} ({found['probability']:.0%}, {scientific(found['total_flops'])} {unit})"
