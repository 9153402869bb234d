"""Training that ends once validation no longer improves, and goes back to where it was best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from alignkit.algo.losses import mean_by_ranking, preference_loss
from alignkit.models.scalar import PooledScalar
from alignkit.stages.actors import score_all
from alignkit.stages.optimizer import trained
from alignkit.stages.ranking_trainer import lay_out_rankings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alignkit.runtime.sharding import Cluster


class EarlyStopping(TrainerCallback):
    """Scores rankings that are not trained on, every `every` steps and after the last one; keeps a copy of the trained
    weights (this rank's shards, in the CPU's memory) where accuracy was best, of equal ones where the loss was least;
    after `patience` evaluations without a better one training ends.

    All that it remembers goes into the checkpoints: `facts` and `tensors` to be saved, `restore` to go on.
    """

    def __init__(
        self, rows: list[dict[str, Any]], pad_id: int, batch: int, every: int, patience: int, cluster: Cluster
    ) -> None:
        self.responses, self.index = lay_out_rankings(rows)
        self.pad_id, self.batch, self.every, self.patience, self.cluster = pad_id, batch, every, patience, cluster
        self.best: dict[str, float] | None = None
        self.weights: dict[str, Tensor] = {}
        self.waited = 0
        self.stopped = False
        self.unwritten: dict[str, float] = {}  # until the trainer writes its next row

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate where it is time to, before the step's row and checkpoint are written."""
        last = state.global_step == state.max_steps
        if state.global_step % self.every and not last:
            return
        accuracy, loss = self.evaluate(model)
        self.unwritten = {"validation_accuracy": accuracy, "validation_loss": loss}
        if self.best is None or (accuracy, -loss) > (self.best["validation_accuracy"], -self.best["validation_loss"]):
            self.best, self.waited = {"best_step": state.global_step, **self.unwritten}, 0
            self.weights = {name: _copy(weight) for name, weight in trained(model).items()}
            return
        self.waited += 1
        if self.waited >= self.patience and not last:
            self.stopped = control.should_training_stop = True
            if self.cluster.is_main:
                told = f"{self.patience} evaluations without a better one than that of step {self.best['best_step']}"
                print(f"\nreward_model: ended early after step {state.global_step}: {told}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what was found to the row that is about to be written; so this goes before the callback that writes."""
        logs.update(self.unwritten)
        self.unwritten = {}

    def evaluate(self, model: PreTrainedModel) -> tuple[float, float]:
        """Share of pairs in the right order and Bradley-Terry loss, means over rankings, of the whole set."""
        model.eval()
        scores = score_all(PooledScalar(model), self.responses, self.pad_id, self.batch, self.cluster).double()
        self.cluster.rest(model)
        model.train()
        chosen, rejected = scores[self.index["chosen"]], scores[self.index["rejected"]]
        order = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        ranking = self.index["owner"][self.index["chosen"]]
        means = (mean_by_ranking(per_pair, ranking) for per_pair in (order, preference_loss(chosen, rejected)))
        accuracy, loss = (float(mean.total / mean.count) for mean in means)
        return accuracy, loss

    def put_back(self, model: nn.Module) -> dict[str, float]:
        """Give the model its best weights; returns what is told of them."""
        for name, weight in trained(model).items():
            _local(weight.detach()).copy_(_local(self.weights[name]))
        return {**(self.best or {}), "stopped_early": int(self.stopped)}

    def tensors(self) -> dict[str, Any]:
        """The best weights, sharded as they are."""
        return {"best": self.weights} if self.weights else {}

    def facts(self) -> dict[str, Any]:
        """Plain numbers, which JSON keeps to the last bit."""
        return {"best": self.best, "waited": self.waited, "unwritten": self.unwritten}

    def restore(self, facts: dict[str, Any], model: nn.Module) -> None:
        """The inverse of `facts`; of `tensors` it makes the room, into which a checkpoint is then read."""
        self.best, self.waited, self.unwritten = facts["best"], facts["waited"], facts["unwritten"]
        self.weights = {name: _copy(weight) for name, weight in trained(model).items()} if self.best else {}


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().clone().to("cpu")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
