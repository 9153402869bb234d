"""PPO, RLOO and GRPO against the optimum that KL-regularised reward has in closed form; see optimum.py."""

import math
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import optimum
import pytest
import torch
from transformers import LlamaForCausalLM

from alignkit.algo.advantage import GAE, GRPO, RLOO
from alignkit.algo.kl import kl_estimate
from alignkit.algo.shaping import reward_slots, shape_reward


@pytest.fixture(scope="module")
def exact() -> optimum.Exact:
    """The task of seed 0 at beta 0.5, unsharded."""
    scores = torch.randn([6, 6, 6], generator=torch.Generator().manual_seed(0))
    return optimum.Exact(optimum.network(LlamaForCausalLM, 0), scores, beta=0.5)


def test_all_responses_are_there_once_and_the_reference_has_gap_one(exact):
    kept = [tuple(row[real].tolist()) for row, real in zip(exact.tokens[:, 1:], exact.real)]
    assert len(set(kept)) == len(kept) == 1 + 5 + 25 + 125
    assert exact.gap(optimum.network(LlamaForCausalLM, 0)) == pytest.approx(1.0, abs=1e-9)
    star = optimal(exact)
    at_star = float((star.exp() * (exact.reward - exact.beta * (star - exact.reference))).sum())
    assert at_star == pytest.approx(exact.best, abs=1e-9) and exact.start < exact.best


def optimal(exact: optimum.Exact) -> torch.Tensor:
    """log pi* [156]."""
    return exact.reference + (exact.reward - exact.best) / exact.beta


def prefix_logsums(exact: optimum.Exact, each: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(each) over the responses that begin as row i does up to t, [156, 4]; t = 0: over all."""
    columns = []
    for t in range(optimum.LONGEST + 1):
        same = (exact.tokens[:, None, 1 : t + 1] == exact.tokens[None, :, 1 : t + 1]).all(dim=2)
        columns.append(torch.where(same, each[None], -math.inf).logsumexp(dim=1))
    return torch.stack(columns, dim=1)


def test_at_the_optimum_nothing_is_left_to_learn(exact):
    """Reward shaping and advantages of alignkit on all 156 responses at pi*: with the true values every advantage of
    every token is 0, and no response is better than the others of its group."""
    logp, ref = (prefix_logsums(exact, each).diff(dim=1) for each in (optimal(exact), exact.reference))
    values = exact.beta * (
        prefix_logsums(exact, exact.reference + exact.reward / exact.beta) - prefix_logsums(exact, exact.reference)
    )
    penalty = kl_estimate(logp, ref, exact.real)
    slots = reward_slots(exact.real, "eos")
    reward = shape_reward(exact.reward, penalty, penalty, slots, coef=exact.beta)
    still = {"whiten": "none", "clip": None}
    strategies = [GAE(gamma=1.0, lam=lam, **still) for lam in (0.0, 0.95, 1.0)]
    for strategy in [*strategies, RLOO(**still), GRPO(divide_by_std=False, **still)]:
        advantages = strategy(reward, values[:, :-1], exact.real, samples=len(exact.real)).advantages
        assert float(advantages.abs().max()) <= 1e-5, strategy


@pytest.mark.parametrize("engine", ["native", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ppo_comes_near_the_optimum(engine):
    """One seed, beta 0.5, 60 iterations of 256 episodes, 8 steps on each so that the clip has work to do.

    Measured, gap after the last iteration: 0.013, 0.033, 0.020, 0.044, 0.014 for seeds 0 to 4. With seed 0 and
    self_checks off: KL penalty with the wrong sign 0.54, no KL penalty 0.54, score on the first token 0.87, no clip
    0.25, the larger of both terms instead of the smaller 0.51, the clipped term alone 0.085. The bound is 0.06.
    """
    curve = optimum.train("ppo", 0.5, 0, 60, batch=256, minibatch=256, epochs=8, learning_rate=1e-3, engine=engine)
    assert curve[0] == (0, pytest.approx(1.0, abs=1e-6)), "the policy starts as the reference"
    assert curve[-1][0] == 60 * 256
    assert all(gap > 0 for _, gap in curve), "nothing is better than the optimum"
    assert curve[-1][1] < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_reaches_the_optimum_in_a_run_of_full_length(seed):
    """Beta 0.5. Measured for seeds 0 to 4: 0.0029, 0.0056, 0.0030, 0.0028, 0.0030."""
    assert 0 < optimum.train("ppo", 0.5, seed)[-1][1] <= 0.01


@pytest.mark.soak
@pytest.mark.parametrize(
    "algorithm, beta, target",
    [("ppo", 0.2, 0.03), ("ppo", 0.5, 0.01), *((name, beta, 0.05) for name in ("rloo", "grpo") for beta in (0.2, 0.5))],
)
def test_the_mean_gap_over_five_seeds(algorithm, beta, target):
    """A row of the table of `python tests/learn/optimum.py`."""
    gaps = [optimum.train(algorithm, beta, seed, every=50)[-1][1] for seed in range(5)]
    assert math.fsum(gaps) / 5 <= target, gaps


def test_finished_runs_are_kept_and_a_torn_line_is_run_again(tmp_path, monkeypatch, capsys):
    log, asked = tmp_path / "log.jsonl", []

    def stub(task: dict) -> dict:
        asked.append(task["seed"])
        return {**task, "gap": 0.01, "seconds": 1.0, "curve": [(0, 1.0), (512, 0.1), (1024, 0.01)]}

    monkeypatch.setattr(optimum, "timed", stub)
    monkeypatch.setattr(optimum, "ProcessPoolExecutor", lambda jobs, **options: ThreadPoolExecutor(1))
    tasks = [
        {"algorithm": name, "beta": 0.5, "seed": seed, "iterations": 2, "settings": {"batch": 512}}
        for name, seed in [("ppo", 0), ("ppo", 1), ("rloo", 0)]
    ]
    optimum.run_all(tasks[:2], log, jobs=1)
    log.write_text(log.read_text("utf-8")[:-20], encoding="utf-8")
    optimum.run_all(tasks, log, jobs=1)
    assert asked == [0, 1, 1, 0]
    runs = optimum.run_all(tasks, log, jobs=1)
    assert len(asked) == 4 and [run["seed"] for run in runs] == [0, 1, 0]
    assert "ppo         0.5    0.0100   0.0100" in optimum.table(runs)
    figure = ElementTree.fromstring(optimum.svg(runs))
    lines = [element for element in figure.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 and len(lines[0].get("points").split()) == 3
