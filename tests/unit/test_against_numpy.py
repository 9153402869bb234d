"""Every formula of the package against `reference`, on 200 random ragged batches with garbage in the padding.

Inputs are drawn as float32 numbers, so that both dtypes compute on the very same ones and the float64 reference is
exact for both. An error is measured against the size of the numbers that were added up to get there (`scale`): in
float32 no arithmetic can do better.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from alignkit.algo.advantage import GAE, GRPO, RLOO, ReinforcePlusPlus, normalise
from alignkit.algo.control import AdaptiveKL, FixedKL
from alignkit.algo.kl import kl_estimate, kl_loss
from alignkit.algo.losses import aggregate, clipped_policy_loss, clipped_value_loss
from alignkit.algo.masked import merge_moments, moments, whiten
from alignkit.algo.schedule import learning_rate_share
from alignkit.algo.sequence import token_entropy, token_logprobs
from alignkit.algo.shaping import Shaping, reward_slots, shape_reward
from alignkit.algo.types import ShapedReward

BATCHES = 200
DTYPES = {"float64": (torch.float64, 1e-9), "float32": (torch.float32, 1e-5)}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 7.0])

dtypes = pytest.mark.parametrize("dtype, tolerance", DTYPES.values(), ids=DTYPES)


@dataclass(frozen=True)
class Batch:
    """Ragged rows of numbers, by name; `slots` are the lengths with the slot of eos_plus_one, where it applies."""

    number: int
    width: int
    lengths: list[int]
    slots: list[int]
    samples: int
    rows: dict[str, list[list[float]]]
    slot_rows: dict[str, list[list[float]]]
    scores: list[float]
    finished: list[bool]
    pick: np.random.Generator  # of options

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """[B, R], the rows of that name, and garbage where they end."""
        rows = self.rows[name] if name in self.rows else self.slot_rows[name]
        filled = np.random.default_rng([self.number, *name.encode()]).choice(GARBAGE, size=(len(rows), self.width))
        for i, row in enumerate(rows):
            filled[i, : len(row)] = row
        return torch.tensor(filled, dtype=dtype)

    def mask(self, lengths: list[int] | None = None) -> Tensor:
        return torch.tensor([[t < n for t in range(self.width)] for n in lengths or self.lengths])

    def option(self, *choices):
        """One of the choices, evenly over the batches and independently of other options."""
        return choices[int(self.pick.integers(len(choices)))]


def draw(number: int) -> Batch:
    rng = np.random.default_rng(number)
    width, samples = int(rng.integers(1, 17)), int(rng.integers(2, 6))
    count = samples * int(rng.integers(1, 4))
    lengths = [int(n) for n in rng.integers(1, width + 1, size=count)]
    position_has_slot = number % 2 == 1
    slots = [min(n + 1, width) if position_has_slot else n for n in lengths]

    def ragged(sizes: list[int], spread: float, centre: float = 0.0) -> list[list[float]]:
        return [np.float32(rng.normal(centre, spread, size=n)).tolist() for n in sizes]

    rows = {"new": ragged(lengths, 1.0, -2.0), "advantages": ragged(lengths, 2.0)}
    for name, spread in (("old", 0.3), ("ref", 0.8)):  # near the new ones, so that both sides of a clip are seen
        near = ragged(lengths, spread)
        rows[name] = [np.float32(np.add(a, b)).tolist() for a, b in zip(rows["new"], near)]
    slot_rows = {"values": ragged(slots, 1.0), "returns": ragged(slots, 1.0)}
    moved = ragged(slots, 0.3)
    slot_rows["old values"] = [np.float32(np.add(a, b)).tolist() for a, b in zip(slot_rows["values"], moved)]
    return Batch(
        number=number,
        width=width,
        lengths=lengths,
        slots=slots,
        samples=samples,
        rows=rows,
        slot_rows=slot_rows,
        scores=np.float32(rng.normal(1.0, 2.0, size=count)).tolist(),
        finished=(rng.random(count) < 0.7).tolist(),
        pick=np.random.default_rng([number, 99]),
    )


def batches():
    """Fresh options each time, the same numbers each time."""
    for number in range(BATCHES):
        batch = drawn(number)
        yield Batch(**{**vars(batch), "pick": np.random.default_rng([number, 99])})


drawn = functools.cache(draw)


def check(got: Tensor, rows: list[list[float]], tolerance: float, scale: float = 1.0) -> None:
    """The rows within tolerance * scale, and exact zeros where they end."""
    assert got.shape[0] == len(rows)
    expected = np.zeros(tuple(got.shape))
    real = np.zeros(tuple(got.shape), dtype=bool)
    for i, row in enumerate(rows):
        expected[i, : len(row)] = row
        real[i, : len(row)] = True
    found = got.double().numpy()
    assert not found[~real].any(), "padding is not 0"
    error = np.abs(found - expected)
    allowed = tolerance * (np.abs(expected) + scale)
    assert (error <= allowed).all(), f"off by {error.max():.3g}, allowed {allowed[error > allowed].min():.3g}"


def largest(rows: list[list[float]]) -> float:
    return max(abs(x) for row in rows for x in row)


def test_the_batches_are_as_ragged_as_they_should_be():
    seen = [drawn(number) for number in range(BATCHES)]
    assert {b.width for b in seen} == set(range(1, 17)) and {b.samples for b in seen} == {2, 3, 4, 5}
    assert {min(b.lengths) for b in seen} >= {1, 2, 3}
    assert any(b.slots != b.lengths for b in seen)
    garbage = torch.cat([b.tensor("old", torch.float64)[~b.mask()] for b in seen])
    assert garbage.isnan().any() and garbage.isinf().any() and garbage.isfinite().any()


@dtypes
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(estimator, dtype, tolerance):
    for batch in batches():
        kl = kl_estimate(batch.tensor("new", dtype), batch.tensor("ref", dtype), batch.mask(), estimator=estimator)
        expected = [reference.kl(p, q, estimator) for p, q in zip(batch.rows["new"], batch.rows["ref"])]
        check(kl, expected, tolerance)


@dtypes
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_values_of_the_kl_losses(estimator, dtype, tolerance):
    for batch in batches():
        loss = kl_loss(batch.tensor("new", dtype), batch.tensor("ref", dtype), batch.mask(), estimator=estimator)
        expected = [reference.kl(p, q, estimator) for p, q in zip(batch.rows["new"], batch.rows["ref"])]
        squares = [reference.kl(p, q, "k2") for p, q in zip(batch.rows["new"], batch.rows["ref"])]
        check(loss, expected, tolerance, scale=1 + largest(squares))  # k3 is added to k2 and k2 taken off again


@dtypes
def test_the_scores_that_are_paid(dtype, tolerance):
    """Over two iterations, so that the running moments are not those of the batch."""
    for batch in batches():
        before = np.random.default_rng([batch.number, 5]).normal(-1.0, 3.0, size=batch.option(1, 7, 50)).tolist()
        options = {
            "running": batch.option("none", "scale", "shift_scale"),
            "clip": batch.option(None, 0.3, 2.0),
            "missing_eos": batch.option("subtract", "replace"),
            "missing_eos_penalty": batch.option(0.0, 1.0, 2.5),
            "length_penalty": batch.option(0.0, 0.01, 0.5),
        }
        scores = torch.tensor(batch.scores, dtype=dtype)
        earlier = torch.tensor([before], dtype=torch.float64)
        parts = [moments(x, torch.ones_like(x, dtype=torch.bool)) for x in (earlier, scores[None])]
        shaping = Shaping(**options, score_position="eos", whiten=False)
        paid = shaping.scores(
            scores, torch.tensor(batch.finished), torch.tensor(batch.lengths), merge_moments(torch.stack(parts))
        )
        expected = [
            reference.paid_score(score, finished=end, length=n, history=before + batch.scores, **options)
            for score, end, n in zip(batch.scores, batch.finished, batch.lengths)
        ]
        assert paid.dtype == dtype
        check(paid[:, None], [[x] for x in expected], tolerance, scale=max(map(abs, batch.scores)))


def shaped(batch: Batch, dtype: torch.dtype) -> tuple[ShapedReward, list[list[float]]]:
    """Rewards of the batch by both implementations; odd batches have the slot of eos_plus_one."""
    position = "eos_plus_one" if batch.number % 2 else "eos"
    estimator, coef = batch.option("k1", "k2", "k3"), batch.option(0.0, 0.05, 0.4)
    mask, new, ref = batch.mask(), batch.tensor("new", dtype), batch.tensor("ref", dtype)
    found = shape_reward(
        torch.tensor(batch.scores, dtype=dtype),
        kl_estimate(new, ref, mask),
        kl_estimate(new, ref, mask, estimator=estimator),
        reward_slots(mask, position),
        coef=coef,
    )
    expected = [
        reference.rewards(score, reference.kl(p, q, estimator), coef=coef, position=position, width=batch.width)
        for score, p, q in zip(batch.scores, batch.rows["new"], batch.rows["ref"])
    ]
    return found, expected


@dtypes
def test_the_reward_of_each_token_and_its_slots(dtype, tolerance):
    for batch in batches():
        found, expected = shaped(batch, dtype)
        assert found.mask.equal(batch.mask(batch.slots)) and [len(row) for row in expected] == batch.slots
        check(found.per_token, expected, tolerance)
        check(found.kl, [reference.kl(*pair, "k1") for pair in zip(batch.rows["new"], batch.rows["ref"])], tolerance)


@dtypes
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean, dtype, tolerance):
    for batch in batches():
        rows = batch.rows["advantages"]
        found = whiten(batch.tensor("advantages", dtype), batch.mask(), shift_mean=shift_mean)
        check(found, reference.whiten(rows, shift_mean=shift_mean), tolerance)


@dtypes
@pytest.mark.parametrize("kind, over", [("none", "batch"), ("batch", "batch"), ("minibatch", "minibatch")])
def test_whitening_and_then_clipping(kind, over, dtype, tolerance):
    for batch in batches():
        plain = whiten(batch.tensor("advantages", dtype), batch.mask(), shift_mean=False)  # 0 on padding
        rows = reference.whiten(batch.rows["advantages"], shift_mean=False)
        clip = batch.option(None, 0.12, 1.0)
        expected = rows if kind == "none" else reference.whiten(rows)
        expected = expected if clip is None else reference.clip_all(expected, clip)
        check(normalise(plain, batch.mask(), kind, clip, over=over), expected, tolerance)


@dtypes
def test_gae(dtype, tolerance):
    for batch in batches():
        reward, expected_rewards = shaped(batch, dtype)
        gamma, lam = batch.option(1.0, 0.9, 0.0), batch.option(1.0, 0.95, 0.5, 0.0)
        strategy = GAE(gamma=gamma, lam=lam, whiten="none", clip=None)
        found = strategy(reward, batch.tensor("values", dtype), batch.mask(), samples=1)
        both = [reference.gae(r, v, gamma=gamma, lam=lam) for r, v in zip(expected_rewards, batch.slot_rows["values"])]
        scale = largest(expected_rewards) + largest(batch.slot_rows["values"])
        check(found.advantages, [a[:n] for (a, _), n in zip(both, batch.lengths)], tolerance, scale)
        check(found.returns, [r for _, r in both], tolerance, scale)


@dtypes
@pytest.mark.parametrize("kind", ["rloo", "grpo", "grpo without std"])
def test_advantages_against_the_other_responses(kind, dtype, tolerance):
    for batch in batches():
        reward, rows = shaped(batch, dtype)
        sums, size = [sum(row) for row in rows], largest(rows) * batch.width
        strategy, formula = {
            "rloo": (RLOO(whiten="none", clip=None), reference.rloo),
            "grpo": (
                GRPO(divide_by_std=True, whiten="none", clip=None),
                functools.partial(reference.grpo, divide_by_std=True),
            ),
            "grpo without std": (
                GRPO(divide_by_std=False, whiten="none", clip=None),
                functools.partial(reference.grpo, divide_by_std=False),
            ),
        }[kind]
        found = strategy(reward, torch.full(reward.mask.shape, math.nan), batch.mask(), batch.samples)
        for start in range(0, len(sums), batch.samples):
            group = slice(start, start + batch.samples)
            expected = [[a] * n for a, n in zip(formula(sums[group]), batch.lengths[group])]
            # what rounding the sums does is magnified by the division
            scale = size / (np.std(sums[group]) + 1e-4) if kind == "grpo" else size
            check(found.advantages[group], expected, tolerance, scale)
        assert not found.returns.any()


@dtypes
def test_reinforce_plus_plus(dtype, tolerance):
    for batch in batches():
        if batch.number % 2:  # a slot of its own for the score needs a value model
            continue
        reward, rows = shaped(batch, dtype)
        gamma = batch.option(1.0, 0.9, 0.0)
        strategy = ReinforcePlusPlus(gamma=gamma, whiten="batch", clip=None)
        found = strategy(reward, torch.full(reward.mask.shape, math.nan), batch.mask(), samples=1)
        check(found.advantages, [reference.reinforce_pp(row, gamma=gamma) for row in rows], tolerance, largest(rows))


@dtypes
@pytest.mark.parametrize("clip_high", [None, 0.28])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_policy_loss(clip_high, dual_clip, dtype, tolerance):
    options = {"clip": 0.2, "clip_high": clip_high, "dual_clip": dual_clip}
    agree = tokens = 0
    for batch in batches():
        names = ("new", "old", "advantages")
        loss, clipped = clipped_policy_loss(*(batch.tensor(name, dtype) for name in names), batch.mask(), **options)
        both = [reference.policy_loss(*row, **options) for row in zip(*(batch.rows[name] for name in names))]
        check(loss, [row for row, _ in both], tolerance)
        flags = [flag for _, row in both for flag in row]
        agree += (clipped[batch.mask()].numpy() == flags).sum()
        tokens += len(flags)
        assert not clipped[~batch.mask()].any()
    assert agree >= (tokens if dtype == torch.float64 else 0.9999 * tokens)  # float32 may round a ratio to its limit


@dtypes
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss(clip, dtype, tolerance):
    agree = tokens = 0
    for batch in batches():
        names, mask = ("values", "old values", "returns"), batch.mask(batch.slots)
        loss, clipped = clipped_value_loss(*(batch.tensor(name, dtype) for name in names), mask, clip=clip)
        both = [reference.value_loss(*row, clip=clip) for row in zip(*(batch.slot_rows[name] for name in names))]
        check(loss, [row for row, _ in both], tolerance, scale=largest(batch.slot_rows["returns"]))
        flags = [flag for _, row in both for flag in row]
        agree += (clipped[mask].numpy() == flags).sum()
        tokens += len(flags)
        assert not clipped[~mask].any()
    # float32 may call a value within the clip clipped: see test_losses
    assert agree >= (tokens if dtype == torch.float64 else 0.997 * tokens)


@dtypes
@pytest.mark.parametrize("how", ["token_mean", "seq_mean_token_mean"])
def test_both_aggregations(how, dtype, tolerance):
    for batch in batches():
        per_token, _ = clipped_policy_loss(
            *(batch.tensor(name, dtype) for name in ("new", "old", "advantages")), batch.mask(), clip=0.2
        )
        rows = [
            reference.policy_loss(*row, clip=0.2, clip_high=None, dual_clip=None)[0]
            for row in zip(*(batch.rows[name] for name in ("new", "old", "advantages")))
        ]
        found = aggregate(per_token, batch.mask(), how, tokens=sum(batch.lengths), rows=len(rows))
        assert found.shape == () and found.dtype == dtype
        assert abs(float(found) - reference.aggregate(rows, how)) <= tolerance * largest(rows)


@dtypes
def test_entropies_and_log_probabilities(dtype, tolerance):
    for batch in batches():
        rng = np.random.default_rng([batch.number, 7])
        logits = np.float32(rng.normal(0.0, 3.0, size=(2, 3, int(rng.integers(2, 12)))))
        logits[..., 0] = batch.option(-np.inf, 0.0)  # a token that cannot be sampled
        tokens = torch.tensor(rng.integers(1, logits.shape[-1], size=(2, 3)))
        given = torch.tensor(logits, dtype=dtype)
        expected = [[reference.log_softmax(p)[t] for p, t in zip(*pair)] for pair in zip(logits.tolist(), tokens)]
        check(token_logprobs(given, tokens), expected, tolerance, scale=10.0)
        check(token_entropy(given), [[reference.entropy(p) for p in row] for row in logits.tolist()], tolerance)


def test_kl_controllers():
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        coef, observed = float(rng.uniform(0.001, 1.0)), float(rng.normal(6.0, 6.0))
        target, horizon, episodes = (
            float(rng.uniform(0.1, 12.0)),
            int(rng.integers(500, 20_000)),
            2 ** int(rng.integers(10)),
        )
        adaptive = AdaptiveKL(coef=0.2, target=target, horizon=horizon, estimator="k1", place="reward")
        expected = reference.adaptive_kl(coef, observed=observed, target=target, episodes=episodes, horizon=horizon)
        assert adaptive.next(coef, observed=observed, episodes=episodes) == pytest.approx(expected, rel=1e-12)
        fixed = FixedKL(coef=0.2, estimator="k1", place="reward")
        assert fixed.next(coef, observed=observed, episodes=episodes) == reference.fixed_kl(coef)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_learning_rates(schedule):
    rng = np.random.default_rng(1)
    for _ in range(BATCHES):
        iterations = int(rng.integers(1, 60))
        warmup = int(rng.integers(0, iterations))
        for iteration in range(iterations):
            expected = reference.learning_rate_share(schedule, iteration + 1, iterations, warmup)
            assert learning_rate_share(schedule, iteration, iterations, warmup) == pytest.approx(expected, rel=1e-12)
