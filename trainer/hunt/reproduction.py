"""One wrong call as a script of its own: the smallest arguments that still go wrong, and numpy's result beside them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import files
from trainer.job import Machine
from trainer.sentinel.operator_check import Failure, OperatorCheck, tensors_in

SCRIPT, CALL, PLANTED = "reproduce.py", "call.pt", "planted.py"
PLANTED_LINES = "import planted  # what is wrong on purpose\n\nplanted.{}().__enter__()\n"
TRIALS = 300  # calls to make a failing one small

TEMPLATE = '''"""{operator} returns a wrong result. Found by `hunt` in {where}."""
import pathlib

import torch

here = pathlib.Path(__file__).resolve().parent
{planted}torch.set_num_threads({threads})
call = torch.load(here / "{call}", weights_only=False)  # arguments with their strides; numpy's result and its tolerance
result = torch.ops.{name}(*call["arguments"], **call["keywords"])
found = result if call["argument"] is None else call["arguments"][call["argument"]]
found = found if call["part"] is None else found[call["part"]]
error = (torch.as_tensor(found).double() - call["expected"]).abs()
wrong = ~(error <= call["tolerance"]) & ~(torch.as_tensor(found) == call["expected"])
print(f"{{int(wrong.sum())}} of {{wrong.numel()}} entries are wrong; the worst is off by {{error.max().item():.4g}}, "
      f"where {{call['tolerance'][wrong].max().item() if wrong.any() else 0:.4g}} is allowed")
raise SystemExit(1 if wrong.any() else 0)
'''


def write(failures: Sequence[Failure], where: str, machine: Machine, out: Path) -> dict[str, Any]:
    """Write the script and its files to `out`; return what it shows.

    The smallest of the failures is taken, and made smaller while it still goes wrong on `machine`. Operators of it that
    are wrong on purpose are written beside the script, since torch alone is right.
    """
    failure = min((f for f in failures if f.excess > 1), key=lambda f: sum(t.numel() for t in tensors_in(f.arguments)))
    fails = _tester(failure.operator, machine)
    again = fails(failure.arguments, failure.keywords)
    arguments = shrunk(failure.arguments, lambda tried: fails(tried, failure.keywords) is not None) if again else ()
    shown = fails(arguments, failure.keywords) if again else None
    if shown is None:
        return {"script": None, "why": "the call alone is right: what is wrong is around it", "shape": failure.shape}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "arguments": list(_copies(arguments)),
            "keywords": failure.keywords,
            "argument": shown.argument,
            "part": shown.part,
            "expected": torch.from_numpy(np.array(shown.right)),
            "tolerance": torch.from_numpy(np.array(shown.tolerance)),
        },
        out / CALL,
    )
    planted = [type(operator).__name__ for operator in machine.active]
    text = TEMPLATE.format(
        operator=failure.operator, where=where, threads=torch.get_num_threads(), call=CALL, name=failure.operator,
        planted=PLANTED_LINES.format(planted[0]) if planted else "",
    )  # fmt: skip
    if planted:
        files.write(out / PLANTED, Path(inspect.getfile(type(machine.active[0]))).read_text())
    files.write(out / SCRIPT, text)
    return {
        "script": str(out / SCRIPT), "text": text, "lines": text.count("\n"), "shape": shown.shape,
        "from": failure.shape, "found": f"{shown.found:.9g}", "expected": f"{shown.expected:.9g}",
    }  # fmt: skip


def _tester(operator: str, machine: Machine) -> Callable[..., Failure | None]:
    """Return a function that calls the operator on `machine`, and returns its failure, or None if it is right."""
    packet, overload = operator.removeprefix("aten.").rsplit(".", 1)
    call = getattr(getattr(torch.ops.aten, packet), overload)

    def fails(arguments: Sequence[Any], keywords: dict[str, Any]) -> Failure | None:
        check = OperatorCheck(keep=1)
        try:
            with machine, check:
                call(*_copies(arguments), **keywords)
        except (RuntimeError, IndexError, ValueError):  # such arguments do not go together
            return None
        return next((failure for failure in check.failures if failure.operator == operator), None)

    return fails


def shrunk(arguments: Sequence[Any], fails: Callable[[Sequence[Any]], bool]) -> Sequence[Any]:
    """Return arguments that still fail, with axes as short as can be found by halving. Strides stay as they are."""
    trials, smaller = 0, True
    while smaller and trials < TRIALS:
        smaller = False
        for tried in _halves(arguments):
            trials += 1
            if trials >= TRIALS:
                break
            if fails(tried):
                arguments, smaller = tried, True
                break
    return arguments


def _halves(arguments: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield the arguments with one axis, or all axes of one length, halved; the longest first. Then cut by one."""
    axes = [(n, d) for n, x in enumerate(arguments) if isinstance(x, Tensor) for d in range(x.ndim) if x.shape[d] > 1]
    groups: dict[tuple[tuple[int, int], ...], int] = {}
    for n, d in axes:
        length = arguments[n].shape[d]
        same = tuple(axis for axis in axes if arguments[axis[0]].shape[axis[1]] == length)
        aligned = tuple(axis for axis in same if axis[1] == d)
        for group in (((n, d),), aligned, same):
            groups[group] = length
    for group, length in sorted(groups.items(), key=lambda item: -item[1]):
        half = length // 2
        for start, kept in ((0, half), (half, length - half), (0, length - 1), (1, length - 1)):
            tried = list(arguments)
            for n, d in group:
                tried[n] = tried[n].narrow(d, start, kept)
            yield tried


def _copies(values: Sequence[Any]) -> list[Any]:
    """Copies of tensors with their strides and no more memory than they need, also inside of lists."""

    def copy(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return _copies(value)
        if not isinstance(value, Tensor):
            return value
        if 0 in value.stride():
            return value.clone()
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

    return [copy(value) for value in values]
