"""Where a run is tracked."""

from typing import Annotated, Literal

from alignkit.observe.alerts import Limits
from alignkit.schema import section, settings


@settings
class TrackingSettings:
    """`metrics.jsonl`, `samples.jsonl` and `summary.json` are always written; these settings are about W&B.

    mode:    auto (online where an API key is at hand, else offline) | online | offline | disabled.
    project: W&B project of all runs.
    entity:  W&B user or team; null is the default of the account.
    tags:    labels of every run, to filter by.
    notes:   a sentence about the run, shown beside it; null for none.
    artifacts: models and data in W&B, with the lines between them: none | reference (where they lie, nothing is sent) |
             upload (the models).
    alerts:  what is told, once a stage and kind, in the terminal, in summary.json and by W&B.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    tags: list[str]
    notes: str | None
    artifacts: Literal["none", "reference", "upload"]
    alerts: Annotated[Limits, section(Limits)]
