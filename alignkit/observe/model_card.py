"""README.md of an exported model, as the Hub has it; its words are in model_card.md.jinja."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from alignkit.observe.closing import table
from alignkit.observe.progress import duration
from alignkit.observe.run_folder import RunFolder, StageFolder, json_file
from alignkit.observe.run_report_words import verdict, warnings
from alignkit.observe.secrets import redacted

_PATH = re.compile(r"(?<![\w/:.<~])~?(?:/[\w.@+=%,-]+)+/([\w.@+=%-]*)")


def scrubbed(text: str) -> str:
    """The text without secrets, and with the last name alone of each path of this machine."""
    return _PATH.sub(r"\1", redacted(text))


def model_card(run: RunFolder, stage: StageFolder, **facts: Any) -> str:
    """The whole README.md. facts: form, dtype; base, stands_on: what the training began from and what an adapter goes
    on, each a Hub id, a bare name, or "" for nothing; licence: what the base's own card says of it; checked: what
    reading the weights again gave; place: by what they are loaded."""
    kin = sorted(_kin(run, stage).values(), key=lambda each: each.manifest["finished"])
    lineage = json_file(run.path / "lineage.json")
    words = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("model_card.md.jinja").read_text("utf-8")
    )
    text = words.render(
        {**facts, "run": run, "stage": stage, "kin": kin, "lineage": lineage},
        figures={f"{each.stage}/{key}": value for each in kin for key, value in each.figures.items()},
        places=lineage.get("stages", {}).get(stage.label, {}).get("data", {}).get("places", []),
        warnings=[" ".join(told.split()) for told in warnings(replace(run, stages=kin))],
        table=table,
        verdict=verdict,
        duration=duration,
    )
    return scrubbed(text)


def _kin(run: RunFolder, stage: StageFolder) -> dict[str, StageFolder]:
    """The stage, those of the run that it was made from, and the evaluation that judged it, by label."""
    found = {stage.label: stage}
    sources = {item["digest"] for item in stage.manifest["inputs"].values()}
    for each in run.stages:
        if each.manifest.get("digest") in sources:
            found |= _kin(run, each)
        judged = each.manifest.get("inputs", {}).get("policy", {}).get("digest")
        if each.stage == "evaluate" and judged == stage.manifest["digest"]:
            found[each.label] = each
    return found
