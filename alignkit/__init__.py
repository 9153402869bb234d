"""alignkit: supervised fine-tuning, pairwise reward models and PPO with KL control, from one command."""

__version__ = "0.1.0"
