"""A campaign file that repeats failed runs, with exactly the same faults."""

from collections.abc import Iterable, Sequence

from trainer import tomlfile
from trainer.chaos.plan import Campaign
from trainer.chaos.results import Result


def text(campaign: Campaign, results: Iterable[Result]) -> str:
    """Return the text of a campaign file, with absolute paths. Repeats of a run are written once."""
    campaign_settings = _split(campaign.overrides)
    firsts: dict[tuple[str, str], Result] = {}
    for result in results:
        firsts.setdefault((result.name, result.strategy), result)
    head = [
        f"config = {tomlfile.text(str(campaign.config_path.absolute()))}",
        f"timeout_seconds = {tomlfile.text(campaign.timeout_seconds)}",
        f"restarts = {campaign.restarts}",
        "\n[set]",
        *(f"{key} = {value}" for key, value in campaign_settings.items()),
    ]
    return "\n".join([*head, *(_run(result, campaign_settings) for result in firsts.values())])


def _run(result: Result, campaign_settings: dict[str, str]) -> str:
    """A [[runs]] table with exactly these faults; its `set` holds the settings that the campaign does not have."""
    every = _split(result.overrides)
    own_settings = {key: value for key, value in every.items() if campaign_settings.get(key) != value}
    own_settings.pop("parallel.strategy", None)
    lines = [
        f"\n# {result.outcome}: {' '.join(result.why.split())}",
        "[[runs]]",
        f"name = {tomlfile.text(result.name)}",
        f"ranks = {result.ranks}",
        f"nodes = {result.nodes}",
        f"strategy = {tomlfile.text(result.strategy)}",
        *(f"set.{key} = {value}" for key, value in own_settings.items()),
    ]
    for fault in result.faults:
        lines += ["", "[[runs.faults]]", *tomlfile.lines(fault)]
    return "\n".join(lines) + "\n"


def _split(overrides: Sequence[str]) -> dict[str, str]:
    """Split "key=value" into {key: value as TOML}. The last value of a key counts, as with --set."""
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}
