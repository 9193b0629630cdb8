"""Holds every call of an operator against its reference, while the mode is entered. Costs several times the step.

An operator is accused only of what no order of its additions explains, so a check needs no threshold of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trainer.sentinel.operators import REFERENCES, WITHOUT_VALUE, Expected

COMPUTED_IN = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex64: torch.float32,
    torch.complex128: torch.float64}  # fmt: skip
"""Precision in which an operator computes, by that of its result, where they differ."""


COMPARISONS = frozenset({"eq", "ge", "gt", "le", "lt", "ne"})


@dataclass(frozen=True)
class Failure:
    """A call that returned what it may not return."""

    operator: str
    """With its overload, e.g. aten.sum.dim_IntList."""
    excess: float
    """Largest error divided by its tolerance: above 1, or infinite."""
    place: tuple[int, ...]
    """Index of the worst entry."""
    found: Any
    expected: Any
    wrong: int
    """Number of entries beyond their tolerance."""
    entries: int
    shape: str
    """Shapes, strides and types of the arguments."""
    where: str
    """Place that computed it: `OperatorCheck.where` at the call."""
    arguments: tuple[Any, ...]
    """As they were before the call; tensors on the CPU with the strides that they had."""
    keywords: dict[str, Any]
    argument: int | None
    """Number of the argument that holds the wrong output; None if the operator returned it."""
    part: int | None
    """Number of the wrong output in that argument or in what was returned, if that is a list."""
    right: np.ndarray
    """The reference of the wrong output."""
    tolerance: np.ndarray


@dataclass
class Tally:
    """Counts of one operator's calls and errors."""

    calls: int = 0
    failed: int = 0
    worst: float = 0.0
    """Largest error of a call divided by its tolerance."""
    shapes: Counter[str] = field(default_factory=Counter)
    failed_shapes: Counter[str] = field(default_factory=Counter)
    failed_places: Counter[str] = field(default_factory=Counter)
    """Wrong calls by `OperatorCheck.where`."""


class OperatorCheck(TorchDispatchMode):
    """While entered, compares what operators return with their references.

    What `replace` names returns its reference instead. `only` restricts both to some operators, by full name. A mode
    that was entered before counts as a part of the machine: it is what is checked.
    """

    def __init__(self, replace: Collection[str] = (), only: Collection[str] | None = None, keep: int = 4) -> None:
        super().__init__()
        self.tallies: dict[str, Tally] = {}
        self.failures: list[Failure] = []
        """The worst `keep` calls of each operator."""
        self.where = ""
        """Set by who computes under the check, e.g. the rank that is played."""
        self.unchecked: Counter[tuple[str, str]] = Counter()
        """Number of calls by (operator, why they were not checked)."""
        self._replace, self._only, self._keep = frozenset(replace), only, keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords, name = kwargs or {}, str(func)
        if only_views(func) or (self._only is not None and name not in self._only):
            return func(*args, **keywords)
        expected, why, before = None, "", ([], {})
        with _disable_current_modes(), np.errstate(all="ignore"):
            reference = reference_of(func)
            if isinstance(reference, str):
                why = reference
            else:
                before = as_numpy(list(args)), as_numpy(keywords)
                plain = {key: value for key, value in before[1].items() if key != "out"}
                try:
                    found = reference(*_as_compared(func, args, before[0]), **plain)
                    expected = found if isinstance(found, list) else [found]
                except (IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
                    why = f"its reference does not cover this call ({str(error).splitlines()[0][:80]})"
        result = func(*args, **keywords)
        places = _places(func, args, keywords, result)
        outputs = [output for output, _, _ in places]
        if expected is None:
            if any(isinstance(output, Tensor) for output in outputs):
                self.unchecked[name, why] += 1
            return result
        with _disable_current_modes(), np.errstate(all="ignore"):
            try:
                self._compare(name, args, keywords, before, places, expected)
            except ValueError:
                self.tallies[name].calls -= 1
                self.unchecked[name, "its reference has another shape"] += 1
                return result
            if name in self._replace:
                return _replaced(result, outputs, expected)
        return result

    def _compare(
        self, name: str, args: Any, keywords: Any, before: Any, places: Sequence[Any], expected: Sequence[Any]
    ) -> None:
        tally = self.tallies.setdefault(name, Tally())
        shape = described([*args, *keywords.values()])
        tally.calls += 1
        tally.shapes[shape] += 1
        coarsest = max((_unit(t.dtype) for t in tensors_in([*args, *(p[0] for p in places)])), default=0.0)
        worst: tuple[Any, ...] | None = None
        for place, right in zip(places, expected, strict=False):
            if right is None:
                continue
            dtype = getattr(place[0], "dtype", None)
            found = as_numpy(place[0])
            excess = excesses(found, right, dtype, coarsest)
            if excess.size and (worst is None or excess.max() > worst[0]):
                worst = float(excess.max()), place, excess, found, right, tolerances(right, dtype, coarsest)
        if worst is None:
            return
        tally.worst = max(tally.worst, worst[0])
        if worst[0] <= 1:
            return
        tally.failed += 1
        tally.failed_shapes[shape] += 1
        tally.failed_places[self.where] += 1
        self._keep_failure(name, args, keywords, before, worst, shape)

    def _keep_failure(self, name: str, args: Any, keywords: Any, before: Any, worst: Any, shape: str) -> None:
        kept = sorted((f for f in self.failures if f.operator == name), key=lambda f: f.excess)
        if len(kept) >= self._keep:
            if kept[0].excess >= worst[0]:
                return
            self.failures.remove(kept[0])
        highest, (_, argument, part), excess, found, right, tolerance = worst
        place = np.unravel_index(int(excess.argmax()), excess.shape)
        wanted = np.broadcast_to(np.asarray(right.value), excess.shape)
        arguments = tuple(_rebuilt(list(args), before[0]))
        kept_keywords = {key: _rebuilt(keywords[key], value) for key, value in before[1].items()}
        self.failures.append(
            Failure(
                operator=name, excess=highest, place=tuple(map(int, place)),
                found=np.asarray(found)[place].item(), expected=wanted[place].item(), wrong=int((excess > 1).sum()),
                entries=excess.size, shape=shape, where=self.where, arguments=arguments, keywords=kept_keywords,
                argument=argument, part=part, right=np.array(wanted),
                tolerance=np.array(np.broadcast_to(tolerance, excess.shape)),
            )
        )  # fmt: skip


def reference_of(func: Any) -> Callable[..., Any] | str:
    """The reference of an operator, or why there is none."""
    space, _, name = func._schema.name.partition("::")
    name = name.removesuffix("_") if not name.startswith("__") else name
    if space != "aten":
        return "it is none of aten's operators"
    if name in WITHOUT_VALUE:
        return "its result is random, or memory that nothing was written to"
    if name in REFERENCES:
        return REFERENCES[name]
    one = REFERENCES.get(name.removeprefix("_foreach_"))
    if name.startswith("_foreach_") and one is not None:
        return lambda *arguments, **more: _each(one, arguments, more)
    return "there is no reference for it"


def _each(one: Callable[..., Any], arguments: Sequence[Any], more: dict[str, Any]) -> list[Expected]:
    """Apply a reference to lists of tensors: an operator for each."""
    return [
        one(*(x[number] if isinstance(x, list) else x for x in arguments), **more)
        for number in range(len(arguments[0]))
    ]


def excesses(found: Any, right: Expected, dtype: torch.dtype | None, coarsest: float = 0.0) -> np.ndarray:
    """Error of each entry divided by its tolerance. `coarsest` is the unit of the coarsest type among the arguments."""
    found = np.asarray(found)
    value = np.broadcast_to(np.asarray(right.value), found.shape)
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
        cut = np.trunc(value) if value.dtype.kind == "f" and found.dtype.kind == "i" else value
        return np.where((found == cut) | ((found != found) & (value != value)), 0.0, np.inf)
    limits = torch.finfo(dtype)
    with np.errstate(all="ignore"):
        error = np.abs(found - value) / tolerances(right, dtype, coarsest)
    same = (found == value) | (np.isnan(found) & np.isnan(value))
    # What is too large for the type becomes infinite.
    with np.errstate(all="ignore"):
        same |= np.isinf(found) & (np.real(value) * np.sign(found.real) > limits.max * (1 - limits.eps))
    return np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))


def tolerances(right: Expected, dtype: torch.dtype | None, coarsest: float) -> Any:
    """The error that each entry may have: none where a result is no floating-point number."""
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    rounding = right.roundings * _unit(COMPUTED_IN.get(dtype, dtype)) + right.stored * coarsest
    underflow = torch.finfo(dtype).smallest_normal * (1 + right.roundings)
    with np.errstate(all="ignore"):
        return _unit(dtype) * np.abs(right.value) + rounding * np.abs(right.scale) + underflow


def as_numpy(value: Any) -> Any:
    """Copy tensors into numpy arrays of float64, complex128, int64 or bool, also inside of lists."""
    if isinstance(value, list | tuple):
        return [as_numpy(part) for part in value]
    if isinstance(value, dict):
        return {key: as_numpy(part) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    tensor = value.detach()
    tensor = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).cpu()
    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return (bits << 16).view(np.float32).astype(np.float64)
    array = tensor.numpy(force=True)
    kind = {"f": np.float64, "c": np.complex128, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind]
    return array.astype(kind)  # a copy


def described(arguments: Sequence[Any]) -> str:
    """Types, shapes and, where they are not contiguous, strides of all tensors among arguments."""

    def one(tensor: Tensor) -> str:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        strides = "" if local.is_contiguous() else f" strides {list(local.stride())}"
        return f"{str(local.dtype).removeprefix('torch.')}{list(local.shape)}{strides}"

    tensors = list(tensors_in(arguments))
    shown = ", ".join(map(one, tensors[:6]))
    return f"{shown} and {len(tensors) - 6} more" if len(tensors) > 6 else shown


def _unit(dtype: torch.dtype) -> float:
    """Half of the distance from 1 to the next number: the largest relative error of a rounding. 0 for integers."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point or dtype.is_complex else 0.0


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors of a call's arguments, lists of tensors included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


Place = tuple[Any, int | None, int | None]
"""An output, the number of the argument that holds it (None: it was returned), its number in there (None: alone)."""


def _parts(value: Any, argument: int | None) -> list[Place]:
    if isinstance(value, list | tuple):
        return [(part, argument, number) for number, part in enumerate(value)]
    return [(value, argument, None)]


def _places(func: Any, args: Any, keywords: Any, result: Any) -> list[Place]:
    """Return what an operator computed: the arguments that it changes, or else what it returns."""
    changed: list[Place] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else keywords.get(argument.name)
            changed += [] if value is None else _parts(value, number if number < len(args) else None)
    return changed or _parts(result, None)


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of tensors, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _as_compared(func: Any, args: Any, before: list[Any]) -> list[Any]:
    """Arguments with the plain number of a comparison as the kernel sees it: in the type of the tensor."""
    if func._schema.name.removeprefix("aten::").rstrip("_") not in COMPARISONS or isinstance(args[1], Tensor):
        return before
    number = torch.scalar_tensor(args[1], dtype=torch.result_type(args[0], args[1]))
    return [before[0], as_numpy(number), *before[2:]]


def only_views(func: Any) -> bool:
    """True if an operator returns its argument in another shape, and computes nothing."""
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _replaced(result: Any, outputs: Sequence[Any], expected: Sequence[Expected | None]) -> Any:
    """Write the references into the outputs; return the result of the call."""
    for output, right in zip(outputs, expected, strict=False):
        if right is not None and isinstance(output, Tensor):
            value = np.array(np.broadcast_to(np.asarray(right.value), tuple(output.shape)))
            output.detach().copy_(torch.from_numpy(value))
    if not isinstance(result, Tensor | list | tuple) and result is not None:
        assert expected[0] is not None
        return type(result)(expected[0].value)
    return result


def _rebuilt(original: Any, before: Any) -> Any:
    """Tensors with the numbers of `before`, and the types and strides of `original`, on the CPU."""
    if isinstance(original, list | tuple):
        return [_rebuilt(one, then) for one, then in zip(original, before, strict=True)]
    if not isinstance(original, Tensor):
        return original
    local = original.to_local() if isinstance(original, DTensor) else original
    # An axis that is expanded has one number in memory.
    taken = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in local.stride())
    values = torch.from_numpy(np.array(before[taken]))
    made = torch.empty_strided(values.shape, local.stride(), dtype=local.dtype)
    return made.copy_(values).expand(local.shape)
