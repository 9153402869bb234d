"""alignkit from Python: the settings of a recipe, its run, a reward model's scores, and PPO in a loop of your own."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import UserError
from alignkit.reward.outside import OutsideSource
from alignkit.runtime.artifact import open_artifact
from alignkit.runtime.compose import composed
from alignkit.runtime.config import RunConfig
from alignkit.runtime.recipe import checked
from alignkit.runtime.report_run import report_at_end
from alignkit.runtime.run import Run
from alignkit.runtime.serve import load_scorer_of_texts
from alignkit.runtime.shipped import find_recipes
from alignkit.runtime.worker import quiet_libraries

if TYPE_CHECKING:
    from alignkit.data.corpus import Prompt
    from alignkit.reward.model import Normalise

Score = Callable[[list["Prompt"], list[str]], Sequence[float]]


def load_config(recipe: str, *settings: str, config_dir: str | Path | None = None) -> RunConfig:
    """The checked settings of a recipe, as the command line has them: load_config("ppo", "kl=fixed", "kl.coef=0.05").

    config_dir: a folder with options of your own. The result is frozen; `dataclasses.replace(config, advantage=Mine())`
    puts an object in the place of a strategy (data, rollout, reward, advantage, kl, judge), and
    `config.data.load(config.seed)` is its data. Raises UserError with a line for every mistake. Imports no torch.
    """
    return checked(recipe, composed(recipe, settings, config_dir))


def run(recipe: str, *settings: str, config_dir: str | Path | None = None) -> Run:
    """Run a recipe to its end on this machine, as `alignkit RECIPE SETTINGS` does: run("rlhf", "kl.target=3").

    Returns the run: its `folder` (`folder / "ppo" / "model"` is a model in Hugging Face format), and as `summary` what
    is in summary.json. Stages run in processes of their own, which find modules of yours in the working folder, and are
    reused if they were made before. Raises UserError for a mistake, alignkit.errors.StageFailed if a stage failed.
    """
    raw = composed(recipe, settings, config_dir)
    chain = runpy.run_path(str(find_recipes()[recipe]), run_name="alignkit.recipe")["main"].chain
    chain(result := Run(recipe, checked(recipe, raw), raw))
    print(report_at_end(result.folder, recipe, raw, ""), flush=True)
    return result


def load_reward_model(folder: str | Path, normalise: Normalise = "none", batch: int = 32) -> Score:
    """A reward model as a function score(prompts, responses) -> list of numbers, higher is better.

    folder: a finished reward_model stage, or a Hugging Face classifier of one output; prompts: texts or lists of chat
    messages; normalise: as in reward=model; batch: responses at once, memory only. Raises UserError.
    """
    scorer = load_scorer_of_texts(open_artifact(str(folder), ("reward_model",)).path, normalise, batch)
    return lambda prompts, responses: scorer(prompts, responses, [True] * len(responses))


class PPO:
    """PPO with KL control, one iteration at a time: for a loop of your own over prompts of your choice.

        ppo = PPO(load_config("ppo", "ppo.batch=32", "ppo.episodes=640"), "runs/mine/sft", score)
        metrics, samples = ppo.iterate(prompts)

    config: of the recipe `ppo`; its data and launch are not looked at. policy: the folder of the model that it starts
    from and is held to, a finished stage or any Hugging Face model with a PAD token of its own. score(prompts,
    responses) -> list of numbers is the reward; without it config.reward is. folder: where `save` writes. Under
    torchrun every rank does the same. `actors` has models, optimizers and `state`. Raises UserError.
    """

    def __init__(
        self, config: RunConfig, policy: str | Path, score: Score | None = None, folder: str | Path = "runs/loop"
    ) -> None:
        from transformers import set_seed

        from alignkit.runtime.sharding import Cluster
        from alignkit.stages.actors import load_actors
        from alignkit.stages.job import Job
        from alignkit.stages.ptx import PtxBatches

        if score is not None:
            ask = OutsideSource("score", lambda prompts, texts, _: score(prompts, texts), config.ppo.batch, "stop")
            config = replace(config, reward=ask)
        named = {"policy": policy, "reward": getattr(config.reward, "path", None)}
        inputs = {key: open_artifact(str(path)).path for key, path in named.items() if path}
        quiet_libraries()
        set_seed(config.seed)
        self.job = Job("ppo", config, inputs, Path(folder), first=True)
        self.actors = load_actors(self.job, Cluster.of(config))
        self.ptx = PtxBatches.open([], self.actors.encoder, config.ptx, config.seed)

    def iterate(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample ppo.samples_per_prompt responses to each prompt, score them, and train on them for ppo.epochs.

        prompts: ppo.batch / ppo.samples_per_prompt of them, texts or lists of chat messages; one that is longer than
        ppo.max_prompt tokens is left out. Returns what metrics.jsonl has of an iteration, without "ppo/" (score_mean;
        kl in nats a sequence; seconds/update, ...) and a row for each response (prompt, response, score, kl, length in
        tokens). Raises UserError, or alignkit.errors.TrainingError with the place of the batch that failed.
        """
        from alignkit.stages.ppo import encode_prompts, ppo_iteration

        settings = self.job.config.ppo
        each, asked = settings.samples_per_prompt, settings.batch // settings.samples_per_prompt
        if self.actors.state.iteration >= settings.iterations:
            raise UserError(f"ppo.episodes={settings.episodes} are done, and with them the learning rate: raise it")
        rows = encode_prompts(list(prompts), self.actors, settings.max_prompt, asked)
        return ppo_iteration(self.actors, [row for row in rows[:asked] for _ in range(each)], self.ptx, self.job, None)

    def save(self) -> Path:
        """Write the policy as it is now (of ppo.ema the average) to `model/` in `folder`, in Hugging Face format with
        its tokenizer, and return that place."""
        from alignkit.stages.ppo import save_policy

        actors = self.actors
        swap = actors.ema.swap if actors.ema else lambda model: None
        swap(actors.policy)
        state = actors.cluster.full_state(actors.policy)
        swap(actors.policy)
        if state is not None:
            save_policy(actors, state, self.job)
        actors.cluster.barrier()
        return self.job.out / "model"
