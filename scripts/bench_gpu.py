"""The table of BENCHMARKS.md about GPUs, from reports of scripts/gpu: docs/gpu/*.json, one for each card."""

import json
from pathlib import Path
from typing import Any

from scripts import gpu_parts

REPORTS = Path(__file__).resolve().parent.parent / "docs" / "gpu"
SPEEDS = {
    "speed": "16 sequences a micro-batch, compiled", "speed-64": "64 sequences, compiled",
    "speed-eager": "16 sequences, not compiled", "speed-billion": "1.1 billion parameters, 8 sequences, compiled",
    "speed-bf16-residual": "16 sequences, compiled, bf16 between blocks",
    "speed-fp8-head": "the same, and the head in 8 bits",
}  # fmt: skip
SIDES = ("exact", "same kernels", "any kernels", "plain")


def reports() -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(REPORTS.glob("*.json"))]


def tables() -> list[str]:
    """Lines of Markdown: for each card, the targets and the speeds."""
    lines = ["", "## GPUs", ""]
    lines += [
        "By `scripts/gpu`: `configs/gpt2_124m.toml` (124 M parameters, context 1,024, bf16), steps of 4 micro-batches,",
        "or of 2 with 64 sequences and with a billion parameters; toprope as CUDA graphs. *Same kernels*: plain sums,",
        "deterministic kernels. *Any kernels*: plain sums, cuDNN's attention. *Plain*: the loop that a user of PyTorch",
        "would write, with any kernels. MFU against the data sheet's dense bf16 peak (H200: 989 TFLOP/s).",
    ]
    for report in reports():
        lines += ["", *_table(report)]
    return lines


def _table(report: dict[str, Any]) -> list[str]:
    about, parts = report["about"], report["parts"]
    lines = [f"### {about['device']}, torch {about['torch']}, {about['date']}", ""]
    lines += ["| | measured | target | |", "|---|---|---|---|", *gpu_parts.target_rows(report)]
    lines += ["", f"| tokens/s (MFU) | {' | '.join(SIDES)} | peak of memory, exact |", "|---|---|---|---|---|---|"]
    for name, what in SPEEDS.items():
        if name in parts and "exact" in parts[name]:
            cells = [_rate(parts[name].get(side)) for side in SIDES]
            lines.append(f"| {what} | {' | '.join(cells)} | {parts[name]['peak_gib']['exact']:.1f} GiB |")
    micro = parts.get("micro", {})
    if "accumulate_seconds" in micro:
        ms = {name: 1e3 * seconds for name, seconds in micro.items() if name.endswith("seconds") and name != "seconds"}
        added, rounded = ms["accumulate_seconds"], ms["round_and_accumulate_seconds"]
        head, compiled = ms["head_and_loss_seconds"], ms["compiled_head_and_loss_seconds"]
        lines += [
            "",
            f"Adding the gradients of a micro-batch up takes {added:.2f} ms, rounding and adding {rounded:.2f}.",
            f"Head and loss of 16 sequences, with their gradients, take {head:.1f} ms, compiled {compiled:.1f} ms.",
        ]
    if note := about.get("note"):
        lines += ["", note]
    return lines


def _rate(found: dict[str, Any] | None) -> str:
    if not found:
        return "–"
    mfu = "" if found["mfu"] is None else f" ({found['mfu']:.3f})"
    return f"{found['tokens_per_second']:,.0f}{mfu}"
