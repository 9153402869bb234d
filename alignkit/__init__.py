"""alignkit: supervised fine-tuning, pairwise reward models and PPO with KL control, from one command, or from Python.

`from alignkit import load_config, run, PPO`: each public name is imported when it is first asked for, so that `import
alignkit` itself stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.algo.advantage import AdvantageEstimator
    from alignkit.algo.types import Advantages
    from alignkit.data.corpus import Corpus, DataSource, Demonstration, Pair
    from alignkit.errors import UserError
    from alignkit.reward.source import RewardSource
    from alignkit.runtime.python import PPO, load_config, load_reward_model, run

__version__ = "0.1.0"
__all__ = ["load_config", "run", "PPO", "load_reward_model", "DataSource", "Corpus", "Demonstration", "Pair"]
__all__ += ["RewardSource", "AdvantageEstimator", "Advantages", "UserError"]

_NAMES = {
    "runtime.python": ["load_config", "run", "PPO", "load_reward_model"],
    "data.corpus": ["DataSource", "Corpus", "Demonstration", "Pair"],
    "reward.source": ["RewardSource"],
    "algo.advantage": ["AdvantageEstimator"],
    "algo.types": ["Advantages"],
    "errors": ["UserError"],
}
_HOME = {name: f"alignkit.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
