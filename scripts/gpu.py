"""One command that shows what toprope does on a GPU: which promises hold there, how fast it is, what a kill costs.

Each part runs in a process of its own, within a limit of time, and writes OUT/parts/PART.json; a part that cannot run
is skipped with the reason. Given again, the command makes the parts that are missing. OUT/report.json has everything,
OUT/table.md what matters. See scripts/gpu.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts import gpu_parts

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 470.0
LEAST_SECONDS = 15.0  # a part is not begun with less


def code_digest() -> str:
    """Digest of all code that a figure may depend on."""
    sources = sorted([*(ROOT / "trainer").rglob("*.py"), *(ROOT / "scripts").glob("gpu*.py")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def main() -> int:
    chosen = arguments()
    # Else torch looks for GPUs by CUDA itself, and no process forked after that could use one.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    on_gpu = torch.cuda.is_available() and not chosen.tiny
    out: Path = chosen.out
    (out / "parts").mkdir(parents=True, exist_ok=True)
    began, deadline = time.monotonic(), time.monotonic() + chosen.seconds
    place = gpu_parts.Place(on_gpu, chosen.tiny or not on_gpu, out / "scratch")
    place.scratch.mkdir(exist_ok=True)
    os.environ["TOPROPE_CACHE"] = str(place.scratch / "cache")
    key = f"{code_digest()}, torch {torch.__version__}, {'tiny' if place.tiny else 'full'}"
    missing = [
        name
        for name in gpu_parts.PARTS
        if not (chosen.parts and name not in chosen.parts) and not done(out / "parts" / f"{name}.json", key)
    ]

    def attempt(name: str) -> None:
        seconds, part = gpu_parts.PARTS[name]
        file, left = out / "parts" / f"{name}.json", deadline - time.monotonic()
        print(f"gpu: {name}, at {time.monotonic() - began:.0f} s", flush=True)
        if left < LEAST_SECONDS:
            reason = f"{left:.0f} s of {chosen.seconds:.0f} were left; give the command again"
            save(file, {"key": key, "skipped": reason})
            return
        run(part, place, file, key, min(seconds, left))

    # What is not timed runs side by side, where there are CPUs for that.
    together = [name for name in missing if name in gpu_parts.UNTIMED] if on_gpu else []
    threads = [threading.Thread(target=attempt, args=(name,)) for name in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in missing:
        if name not in together:
            attempt(name)
    found = {path.stem: json.loads(path.read_text()) for path in sorted((out / "parts").glob("*.json"))}
    report = {"about": about(place), "parts": {name: found[name] for name in gpu_parts.PARTS if name in found}}
    save(out / "report.json", report)
    table = gpu_parts.table(report)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    shutil.rmtree(place.scratch, ignore_errors=True)
    return int(any("error" in part for part in report["parts"].values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(gpu_parts.PARTS)}; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: tries the command itself")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS)
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.parts if name not in gpu_parts.PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; the parts are {', '.join(gpu_parts.PARTS)}")
    return chosen


def done(file: Path, key: str) -> bool:
    """True if this part was made to its end by this code with this torch."""
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    return found.get("key") == key and not {"skipped", "error"} & found.keys()


Part = Callable[[gpu_parts.Place], dict[str, Any]]


def run(part: Part, place: gpu_parts.Place, file: Path, key: str, limit: float) -> None:
    """Make a part in a child that is forked before anything has touched the GPU, and write its file."""
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=make, args=(part, place, file, key))
    child.start()
    child.join(limit)
    if child.is_alive():
        with contextlib.suppress(ProcessLookupError):
            assert child.pid
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started
        child.join()
        save(file, {"key": key, "error": f"it took more than {limit:.0f} s and was ended"})
    elif not file.exists() or child.exitcode:
        save(file, {"key": key, "error": f"its process ended with {child.exitcode}"})
    found = json.loads(file.read_text())
    save(file, found | {"seconds": round(time.monotonic() - began, 1)})
    for word in ("skipped", "error"):
        if word in found:
            print(f"gpu:   {word}: {found[word]}", flush=True)


def make(part: Part, place: gpu_parts.Place, file: Path, key: str) -> None:
    os.setsid()
    try:
        found = part(place)
    except gpu_parts.SkippedError as reason:
        found = {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    save(file, {"key": key, **found})


def save(file: Path, tree: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    partial.replace(file)


def about(place: gpu_parts.Place) -> dict[str, Any]:
    import torch

    missing = []
    for name in ("datasets", "wandb", "pytest"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            continue
        missing.append(name)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "device": place.device, "tiny": place.tiny, "commit": commit.stdout.strip(), "missing_packages": missing,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
