"""Numbers as words: what page, terminal and pictures write alike."""

import time
from collections.abc import Mapping
from typing import Any

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNKNOWN = "?"
UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
SHORT_UNITS = {"nats_per_token": "nats", "bits_per_byte": "bits"}
SIGNS = {"promote": "✓", "reject": "✗", "inconclusive": "?"}
TRENDS = {
    "none": "no gain", "persists": "persists", "shrinks": "shrinks", "reverses": "reverses", "grows": "grows",
    "unknown": UNKNOWN,
}  # fmt: skip


def scientific(value: float) -> str:
    """ "3.2·10¹²" """
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(_RAISED)}"


def times(ratio: float | None) -> str:
    """ "1.15×" """
    return UNKNOWN if ratio is None else f"{_ratio(ratio)}×"


def _ratio(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio >= 10 or ratio < 0.1 else f"{ratio:.2f}"


def between(interval: Mapping[str, Any] | None) -> str:
    """ "1.08 to 1.22", an end that is not known left open; "" where nothing is."""
    if interval is None or (interval["low"] is None and interval["high"] is None):
        return ""
    low, high = (UNKNOWN if interval[end] is None else _ratio(interval[end]) for end in ("low", "high"))
    return f"{low} to {high}"


def worth(interval: Mapping[str, Any] | None) -> str:
    """ "1.15× (1.08 to 1.22)" """
    if interval is None or interval["value"] is None:
        return UNKNOWN
    ends = between(interval)
    return f"{times(interval['value'])} ({ends})" if ends else times(interval["value"])


def loss(value: float | None, digits: int = 4) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def losses(interval: Mapping[str, Any] | None, digits: int = 4) -> str:
    """ "2.9132 (2.9051 to 2.9211)" """
    if interval is None or interval["value"] is None:
        return UNKNOWN
    low, high = (loss(interval[end], digits) for end in ("low", "high"))
    known = interval["low"] is not None or interval["high"] is not None
    return f"{loss(interval['value'], digits)} ({low} to {high})" if known else loss(interval["value"], digits)


def spread(noise: Mapping[str, Any]) -> str:
    """ "2.9132 ± 0.0040": mean and standard deviation over seeds, the latter where there are two."""
    return loss(noise["mean"]) + ("" if noise["sd"] is None else f" ± {loss(noise['sd'])}")


def signed(value: float | None, digits: int = 4) -> str:
    """ "+0.0031", "−0.0120" """
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def flops(value: float | None) -> str:
    """ "3.2·10¹²" """
    return UNKNOWN if value is None else scientific(value)


def amount(number: float | None) -> str:
    """ "34.8k", "2.29M" """
    if number is None:
        return UNKNOWN
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def took(seconds: float | None) -> str:
    """ "48 s", "12.5 min", "3.2 h" """
    if seconds is None:
        return UNKNOWN
    if seconds < 90:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def date(seconds: float | None) -> str:
    """Of Unix time."""
    return UNKNOWN if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.3g} %"


def chance(p: float | None) -> str:
    """ "0.31", "< 0.001" """
    return UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def count(number: int, what: str) -> str:
    """ "1 run", "3 runs" """
    return f"{number} {what}{'' if number == 1 else 's'}"


def value(of: Any) -> str:
    """A setting as a file has it."""
    return str(of).lower() if isinstance(of, bool) else f'"{of}"' if isinstance(of, str) else str(of)


def remedies(of: list[dict[str, Any]]) -> str:
    """ "3 more seeds at every rung, or 3 seeds of a run of 2.1·10¹³ FLOPs"; "" without any."""
    said = [
        f"{count(one['seeds'], 'more seed')} at every rung"
        if one["what"] == "seeds"
        else f"a further rung of {flops(one['flops'])} FLOPs with {count(one['seeds'], 'seed')}"
        for one in of
    ]
    return ", or ".join(said)


def tokens_per_second(rate: float | None) -> str:
    return "? tok/s" if rate is None else f"{rate:,.0f} tok/s"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def clock(seconds: float | None) -> str:
    """h:mm:ss, or "?" for unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
