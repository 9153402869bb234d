"""Preflight: all that can be known of a run before anything is trained, in seconds. No GPU is taken, no weights are
loaded, nothing is written; torch is imported only where a model is named, or a large one is to be built."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from alignkit.data.corpus import Corpus
from alignkit.errors import UserError
from alignkit.observe.run_folder import PREFLIGHT
from alignkit.observe.secrets import without_secrets
from alignkit.reward.source import chain_key
from alignkit.runtime.artifact import write_json
from alignkit.runtime.config import RunConfig
from alignkit.runtime.inputs import named_models, num_parameters
from alignkit.runtime.rules import TRAINS


@dataclass(frozen=True)
class Finding:
    """level: error (the run cannot end well), warning (it may not), fact (what was looked at, and is as it should be).
    where: the setting, file or package; what: is found there; why: it matters; mend: what to do."""

    level: Literal["error", "warning", "fact"]
    where: str
    what: str
    why: str = ""
    mend: str = ""

    @property
    def line(self) -> str:
        """As it is told."""
        return f"{self.where}: {self.what}" + f": {self.why}" * bool(self.why) + f"; {self.mend}" * bool(self.mend)


error, warning, fact = (partial(Finding, level) for level in ("error", "warning", "fact"))


class Checked(Exception):
    """All that comes before the first stage was done, and no more was asked for."""


def preflight(recipe: str, config: RunConfig, mode: str, corpus: Corpus | None) -> list[Finding]:
    """Everything that was found. mode: of W&B; corpus: None where the data or a model cannot be read at all, of which
    is told elsewhere."""
    from alignkit.runtime.check_data import check_data  # which import what is above
    from alignkit.runtime.check_machine import check_disk, check_memory, check_tracking, check_versions

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


def lines(findings: Sequence[Finding], level: str) -> list[str]:
    """The lines of one level, each once."""
    return list(dict.fromkeys(finding.line for finding in findings if finding.level == level))


def refuse(findings: Sequence[Finding]) -> None:
    """Raise UserError with every error there is."""
    if errors := lines(findings, "error"):
        raise UserError("\n".join(errors))


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
