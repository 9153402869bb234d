"""Preflight: all that can be known of a run before anything is trained, in seconds. No GPU is taken, no weights are
loaded, nothing is written; torch is imported only where a model is named, or a large one is to be built."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from alignkit.data.corpus import Corpus
from alignkit.observe.run_folder import PREFLIGHT
from alignkit.observe.secrets import without_secrets
from alignkit.reward.source import chain_key
from alignkit.runtime.artifact import write_json
from alignkit.runtime.check_data import check_data
from alignkit.runtime.check_machine import check_disk, check_memory, check_tracking, check_versions
from alignkit.runtime.config import RunConfig
from alignkit.runtime.findings import Finding, lines, refuse
from alignkit.runtime.inputs import named_models, num_parameters
from alignkit.runtime.rules import TRAINS


class Checked(Exception):
    """All that comes before the first stage was done, and no more was asked for."""


def preflight(recipe: str, config: RunConfig, mode: str, corpus: Corpus | None) -> list[Finding]:
    """Everything that was found. mode: of W&B; corpus: None where the data or a model cannot be read at all, of which
    is told elsewhere."""
    found: list[Finding] = []
    stages = [config.bench.stage] if config.bench else TRAINS[recipe]
    named = named_models(stages, config)
    numbers = None if named else num_parameters({}, vars(config.model))
    if corpus is not None:
        scored = recipe == "reward_model" or chain_key(config.reward) is not None
        found += check_data(recipe, config, corpus, "reward_model" in TRAINS[recipe] and scored)
    if corpus is not None and named:
        from alignkit.runtime.check_models import check_models

        of_models, numbers = check_models(named, stages, config, corpus)
        found += of_models
    found += check_disk(recipe, config, numbers)
    if not lines(found, "error"):
        found += check_memory(recipe, config, numbers)
    found += [*check_tracking(config.tracking.mode, mode), *check_versions()]
    return [Finding(each.level, *map(without_secrets, (each.where, each.what, each.why, each.mend))) for each in found]


def settle(findings: Sequence[Finding], begins: bool) -> None:
    """Raise Checked where nothing is to begin, else UserError with every error there is; say each warning."""
    if not begins:
        raise Checked
    refuse(findings)
    for line in lines(findings, "warning"):
        print(f"warning: {line}", flush=True)


def keep(findings: Sequence[Finding], folder: Path) -> None:
    """Write everything that was found into the run's folder."""
    write_json(folder / PREFLIGHT, {"findings": [asdict(finding) | {"line": finding.line} for finding in findings]})
