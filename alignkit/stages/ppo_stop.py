"""`ppo.stop_if`: a run that is beyond hope ends at once, and well: its policy is saved and what follows still runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.observe.alerts import EARLY, Watch

if TYPE_CHECKING:
    from alignkit.errors import NotFinite
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster


class Stop:
    """Why PPO ends before its last iteration, if it does: `reason` in words, the same on every rank, else ""."""

    def __init__(self, config: RunConfig, cluster: Cluster, tracker: Tracker) -> None:
        self.limits, self.cluster, self.tracker, self.reason = config.ppo.stop_if, cluster, tracker, ""
        self._watch = Watch(self.limits, config.kl.target, [*tracker.history()[:EARLY]])

    def look(self, values: dict[str, float]) -> None:
        """Judge the iteration that has just ended. Rank 0 decides for all, as it alone has the rows so far."""
        if not any(vars(self.limits).values()):
            return
        found = self._watch.look(values)
        if self.cluster.share(int(bool(found))):
            self._end("; ".join(found.values()))

    def catch(self, error: NotFinite, iterations: int) -> None:
        """End on a number that is not finite, with the weights as they were before it; raises it again unless that was
        asked for, and in the first iteration, which has learnt nothing that could be judged."""
        if not (self.limits.nan and iterations):
            raise error
        self.tracker.alert("nan", str(error))
        self._end(str(error).replace(".partial/", "/"))  # which is where its data will be

    def _end(self, reason: str) -> None:
        self.reason = reason or "ppo.stop_if"
        if self.cluster.is_main:
            print(f"ppo: stopped by ppo.stop_if: {reason}", flush=True)
