"""A judge at work: which of two responses to a prompt is better, by scores or by being asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.data.corpus import Corpus, Prompt
from alignkit.data.tokens import Encoder
from alignkit.errors import TrainingError
from alignkit.models.settings import stage_folder
from alignkit.reward.judge import FromData
from alignkit.reward.outside import why
from alignkit.reward.source import Answers, CombinedSource, RewardSource, opened
from alignkit.stages.responses import Responses
from alignkit.stages.scoring import reward_scores

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

NAMES = {"RewardModel": "model", "Http": "http", "Function": "function", "ChatJudge": "chat"}  # in tables
Scorer = Callable[[list[Prompt], Responses], Tensor]


@dataclass(frozen=True)
class Judge:
    """name; score: (prompts, responses) -> [n] float64, None for a judge that only compares; ask: (prompts, first,
    second texts) -> [n] of 1, 0.5 and 0, None for one that scores; optimised: it is what PPO climbs."""

    name: str
    score: Scorer | None
    ask: Callable[[list[Prompt], list[str], list[str]], Tensor] | None = None
    optimised: bool = False


@dataclass(frozen=True)
class Judgement:
    """outcomes [n]: 1 where ours is better, 0.5 for a tie, 0; scores of both sides where the judge gives any."""

    outcomes: Tensor
    ours: Tensor | None
    theirs: Tensor | None


def compare(
    judge: Judge, prompts: list[Prompt], ours: Responses, theirs: Responses, known: Tensor | None = None
) -> Judgement:
    """Judge each pair of responses; known: the judge's scores of `theirs`, where it has given them already."""
    if judge.score is None:
        assert judge.ask is not None
        return Judgement(judge.ask(prompts, ours.texts, theirs.texts), None, None)
    mine, other = judge.score(prompts, ours), judge.score(prompts, theirs) if known is None else known
    return Judgement(outcomes_of(mine, other), mine, other)


def outcomes_of(ours: Tensor, theirs: Tensor) -> Tensor:
    """Scores to outcomes: 1, 0.5 or 0, elementwise with broadcasting, float64."""
    return (ours > theirs).double() + 0.5 * (ours == theirs).double()


def open_judge(
    job: Job, corpus: Corpus, reward: RewardSource | CombinedSource, encoder: Encoder, cluster: Cluster
) -> Judge:
    """The judge that the settings name; `reward`: what PPO climbs, for data that brings no other judge."""
    choice = job.config.judge
    if isinstance(choice, FromData):
        known = choice.open(corpus)
        if known is None:
            return Judge("reward_model", scorer_of(reward, job, cluster), optimised=True)
        return Judge(known.name, lambda prompts, responses: known.score(prompts, responses.texts))
    source = opened(choice, job.inputs.get("judge"), encoder, cluster)
    name = NAMES.get(type(choice).__name__, type(choice).__name__)
    if hasattr(source, "compare"):
        return Judge(name, None, asker_of(source, cluster))
    return Judge(name, scorer_of(source, job, cluster, "judge"), optimised=is_climbed(choice, job.config.reward, job))


def is_climbed(judge: Any, reward: Any, job: Job) -> bool:
    """Whether the judge (settings) is the reward that PPO climbs, or a part of it."""
    if members := getattr(reward, "members", None):
        return judge == reward or any(is_climbed(judge, member, job) for member in members.values())
    if not (hasattr(judge, "path") and hasattr(reward, "path")):
        return judge == reward
    path = job.inputs.get("reward") if reward.path is None else stage_folder(reward.path)
    return path is not None and stage_folder(path) == stage_folder(job.inputs["judge"])


def asker_of(source: Any, cluster: Cluster) -> Callable[[list[Prompt], list[str], list[str]], Tensor]:
    """A source that compares as (prompts, first, second) -> outcomes, each rank asking for its share. Raises
    TrainingError on every rank alike if it fails on one."""

    def ask(prompts: list[Prompt], first: list[str], second: list[str]) -> Tensor:
        hand, reason = cluster.deal(torch.tensor([len(a) + len(b) for a, b in zip(first, second)])), ""
        outcomes = torch.full((len(hand.rows),), 0.5, dtype=torch.float64)
        mine = [(place, row) for place, row in enumerate(hand.rows.tolist()) if hand.real[place]]
        try:
            found = source.compare(*([side[row] for _, row in mine] for side in (prompts, first, second)))
            outcomes[[place for place, _ in mine]] = torch.tensor(found, dtype=torch.float64)
        except Exception as error:  # told on every rank, as the others wait for this one's outcomes
            reason = why(error)
        reasons = [told for told in cluster.gather_objects(reason) if told]
        if reasons:
            raise TrainingError(f"judge: {reasons[0]}")
        return cluster.collect(outcomes.to(cluster.device), hand).cpu()

    return ask


def scorer_of(source: RewardSource | CombinedSource, job: Job, cluster: Cluster, name: str = "reward") -> Scorer:
    """A reward source as (prompts, responses) -> scores, the work dealt over the ranks; name: its setting."""

    def score(prompts: list[Prompt], responses: Responses) -> Tensor:
        hand = cluster.deal(responses.rollout.mask.sum(dim=1))
        mine = hand.rows.tolist()
        part = responses.rollout.take(hand.rows.to(responses.rollout.tokens.device))
        with torch.no_grad():
            answers = Answers(part, [prompts[i] for i in mine], [responses.texts[i] for i in mine])
            scores, _ = reward_scores(source, answers, hand, cluster, job.config.ppo.microbatch_tokens, job.out, name)
        return scores.double().cpu()

    return score
