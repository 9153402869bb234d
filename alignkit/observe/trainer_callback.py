"""Hugging Face trainers report through our tracker: their own W&B callback overwrites config and step axes."""

from typing import Any

from transformers import TrainerCallback

from alignkit.observe.tracking import Tracker


def make_callback(tracker: Tracker) -> TrainerCallback:
    """A callback for a trainer with `report_to="none"`. The tracker writes on the main process only."""
    return _Reporter(tracker)


class _Reporter(TrainerCallback):
    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Names stay as the trainer has them ("loss", "eval_loss"); the last row's totals of the run are no series."""
        values = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and name != "total_flos" and not name.startswith("train_")
        }
        if values:
            self.tracker.log(values, step=state.global_step)
