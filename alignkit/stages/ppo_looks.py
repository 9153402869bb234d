"""PPO's looks at itself: every so many iterations the policy answers held-out prompts, and a judge that it does not
train on compares it with its start. By these looks the best policy is kept and a run that gets worse ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from alignkit.algo.comparison import win_rate
from alignkit.data.corpus import Corpus, Prompt
from alignkit.stages.judging import Judge, Scorer, compare, open_judge, scorer_of
from alignkit.stages.responses import Responses, heldout_prompts, respond

if TYPE_CHECKING:
    from alignkit.stages.actors import Actors
    from alignkit.stages.job import Job


@dataclass(frozen=True)
class Looks:
    """prompts: those of every look, which the last evaluation leaves out; before: what the start answered to them with
    the same noise; judged: the judge's scores of that, if it gives any; reward: what PPO climbs; gold: the true score,
    where the data knows it; start: what these say of the start, on average."""

    prompts: list[tuple[Prompt, list[int]]]
    before: Responses
    judge: Judge
    judged: Tensor | None
    reward: Scorer
    gold: Callable[[Prompt, str], float] | None
    start: dict[str, float]

    @classmethod
    def open(cls, actors: Actors, corpus: Corpus, job: Job) -> Looks | None:
        """None where the settings ask for none."""
        settings, main = job.config.ppo, actors.cluster.is_main
        if settings.evaluate_every is None:
            return None
        prompts = heldout_prompts(corpus, actors.encoder, job.config, settings.evaluate_prompts, "validation", main)
        judge = open_judge(job, corpus, actors.reward, actors.encoder, actors.cluster)
        if main and judge.optimised:
            print(
                "ppo: warning: the judge of the looks is the very reward that PPO climbs, so it cannot see "
                "over-optimisation; set judge=model judge.path=FOLDER, judge=http or another"
            )
        before = respond(actors.reference, None, prompts, actors.encoder, job.config, actors.cluster)
        texts, reward = [prompt for prompt, _ in prompts], scorer_of(actors.reward, job, actors.cluster)
        start = {"reward": float(reward(texts, before).mean())}
        judged = None if judge.score is None else judge.score(texts, before)
        if judged is not None:
            start["judge"] = float(judged.mean())
        if corpus.gold is not None:
            start["gold"] = mean_gold(corpus.gold, texts, before)
        return cls(prompts, before, judge, judged, reward, corpus.gold, start)

    def look(self, actors: Actors, job: Job) -> dict[str, float]:
        """Metrics of the policy as it would be saved now; the best one so far is kept, and the state knows since when
        there was none. KL in nats a sequence."""
        settings, state = job.config.ppo, actors.state
        if state.iteration % (settings.evaluate_every or 1) and state.iteration != settings.iterations:
            return {}
        if actors.ema is not None:
            actors.ema.swap(actors.policy)
        texts = [prompt for prompt, _ in self.prompts]
        ours = respond(actors.policy, actors.reference, self.prompts, actors.encoder, job.config, actors.cluster)
        assert ours.kl is not None
        verdict = compare(self.judge, texts, ours, self.before, self.judged)
        rate = win_rate(verdict.outcomes)
        found = {"eval_win_rate": rate.share, "eval_win_rate_low": rate.low, "eval_win_rate_high": rate.high}
        found |= {"eval_kl": float(ours.kl.mean()), "eval_reward_mean": float(self.reward(texts, ours).mean())}
        found |= {f"eval_{name}_start": value for name, value in self.start.items()}
        if self.gold is not None:
            found["eval_gold_mean"] = mean_gold(self.gold, texts, ours)
        if verdict.ours is not None:
            found["eval_judge_mean"] = float(verdict.ours.mean())
        gain = found.get("eval_judge_mean", rate.share)
        if state.take_look(gain, start=self.start.get("judge", 0.5)) and actors.best is not None:
            actors.best.take(actors.policy)
        if actors.ema is not None:
            actors.ema.swap(actors.policy)
        return {**found, "eval_best_iteration": state.best_iteration}


def mean_gold(gold: Callable[[Prompt, str], float], prompts: list[Prompt], responses: Responses) -> float:
    """The true score of the responses, on average."""
    return sum(map(gold, prompts, responses.texts)) / len(prompts)
