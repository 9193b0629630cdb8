"""Runs that did not pass, as a campaign file that does exactly the same again."""

from collections.abc import Iterable, Sequence

from trainer import tomlfile
from trainer.chaos.plan import Campaign
from trainer.chaos.results import Result


def text(campaign: Campaign, results: Iterable[Result]) -> str:
    """A campaign file, to lie anywhere. Of runs with one name and strategy, only the first: they are repeats."""
    ours = _pairs(campaign.overrides)
    first = {(result.name, result.strategy): result for result in reversed(list(results))}
    head = [
        f"config = {tomlfile.text(str(campaign.config_path.absolute()))}",
        f"timeout_seconds = {tomlfile.text(campaign.timeout_seconds)}",
        f"restarts = {campaign.restarts}",
        "\n[set]",
        *(f"{key} = {value}" for key, value in ours.items()),
    ]
    return "\n".join([*head, *(_run(result, ours) for result in reversed(first.values()))])


def _run(result: Result, ours: dict[str, str]) -> str:
    """A [[runs]] table that makes exactly these faults. All else that the run was given stands in its own `set`."""
    own = {key: value for key, value in _pairs(result.overrides).items() if ours.get(key) != value}
    own.pop("parallel.strategy", None)
    lines = [
        f"\n# {result.outcome}: {' '.join(result.why.split())}",
        "[[runs]]",
        f"name = {tomlfile.text(result.name)}",
        f"ranks = {result.ranks}",
        f"nodes = {result.nodes}",
        f"strategy = {tomlfile.text(result.strategy)}",
        *(f"set.{key} = {value}" for key, value in own.items()),
    ]
    for fault in result.faults:
        lines += ["", "[[runs.faults]]", *tomlfile.lines(fault)]
    return "\n".join(lines) + "\n"


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    """{key: value as TOML} of "key=value"; of several with one key the last, as it is with --set."""
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}
