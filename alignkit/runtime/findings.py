"""What a preflight finds: errors, warnings and facts, each a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from alignkit.errors import UserError


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


def lines(findings: Sequence[Finding], level: str) -> list[str]:
    """The lines of one level, each once."""
    return list(dict.fromkeys(finding.line for finding in findings if finding.level == level))


def refuse(findings: Sequence[Finding]) -> None:
    """Raise UserError with every error there is."""
    if errors := lines(findings, "error"):
        raise UserError("\n".join(errors))
