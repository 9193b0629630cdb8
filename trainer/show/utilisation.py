"""Model FLOPs utilisation: the share of its devices' peak that a run uses (Chowdhery et al. 2022, PaLM, appendix B)."""

import re
from collections.abc import Mapping
from typing import Any

PEAK_FLOPS: Mapping[str, Mapping[str, float]] = {
    "B200": {"bf16": 2.25e15, "fp32": 8e13},
    "H200": {"bf16": 9.89e14, "fp32": 6.7e13},
    "H100 PCIe": {"bf16": 7.56e14, "fp32": 5.1e13},
    "H100": {"bf16": 9.89e14, "fp32": 6.7e13},
    "A100": {"bf16": 3.12e14, "fp32": 1.95e13},
    "L40S": {"bf16": 3.62e14, "fp32": 9.16e13},
    "L4": {"bf16": 1.21e14, "fp32": 3.03e13},
    "A10": {"bf16": 1.25e14, "fp32": 3.12e13},
}
"""Dense peaks of NVIDIA's data sheets by a part of the device's name, the longer names first; fp32 without TF32."""


def known(about: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return (FLOPs per token, peak FLOPs per second of one device) of a run by its config.json; None: unknown.

    The peak of a CPU is not known: it depends on its clock, and on which of its units the kernels use.
    """
    device = str((about.get("computes_with") or {}).get("device model", ""))
    precision = ((about.get("config") or {}).get("numerics") or {}).get("precision", "")
    peak = next((peaks.get(precision) for name, peaks in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device)), None)
    return about.get("flops_per_token"), peak
