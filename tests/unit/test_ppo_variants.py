"""Every published variant does what its formula says: gradients against a plain computation, steps, state, averages."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ppo_world import PROMPTS, TEXTS, config_of, distance, flat, iterate, minibatch_of, padded, update

from alignkit.algo.advantage import GAE, GRPO, RLOO, ReinforcePlusPlus
from alignkit.algo.control import AdaptiveKL, FixedKL
from alignkit.errors import TrainingError
from alignkit.runtime.sharding import Cluster
from alignkit.stages import ppo
from alignkit.stages.job import Job
from alignkit.stages.ppo_report import guards
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.state import AveragedWeights, PPOState

TIMES = ("seconds", "tokens_per_second")


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.0, **options})


@pytest.fixture
def moving(make_actors):
    """Actors in float32 whose optimizers move the weights."""
    return make_actors("llama", torch.float32, optimizer=adamw)


def plain_policy_gradient(actors, batch, loss_of_token, row_weight):
    """Row by row, token by token: sum of row_weight(length) * loss_of_token(row, t, logits' log-softmax)."""
    policy = actors.plain[0]
    policy.zero_grad()
    for row in range(len(batch)):
        ids, length = batch.tokens[row][batch.mask[row]], int(batch.response_mask[row].sum())
        start = len(ids) - length
        logp = (policy(input_ids=ids[None]).logits[0] / 0.9).log_softmax(-1)
        at = [(logp[start + t - 1], ids[start + t]) for t in range(length)]
        (row_weight(length) * sum(loss_of_token(row, t, *at[t]) for t in range(length))).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def surrogate(batch, row, t, logp, token, low=0.2, high=0.2):
    advantage, ratio = batch.advantages[row, t], (logp[token] - batch.old_logprobs[row, t]).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def test_kl_in_the_loss_adds_the_square_of_the_log_ratio_whichever_estimator_is_shown(exact):
    batch = minibatch_of(exact)
    tokens = int(batch.response_mask.sum())
    exact.state.kl_coef = 0.3

    def loss(row, t, logp, token):
        x = logp[token] - batch.ref_logprobs[row, t]
        return surrogate(batch, row, t, logp, token) + 0.3 * 0.5 * x**2

    expected = plain_policy_gradient(exact, batch, loss, lambda _: 1 / tokens)
    for estimator in ("k2", "k3"):
        kl = FixedKL(coef=0.3, estimator=estimator, place="loss")
        policy, _, metrics = update(exact, batch, config_of(kl=kl))
        assert distance(policy, expected) <= 1e-12
        assert metrics["kl_loss"] > 0


def test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy(exact):
    batch = minibatch_of(exact)
    tokens = int(batch.response_mask.sum())

    def loss(row, t, logp, token):
        return surrogate(batch, row, t, logp, token) + 0.05 * (logp.exp() * logp).sum()

    expected = plain_policy_gradient(exact, batch, loss, lambda _: 1 / tokens)
    assert distance(update(exact, batch, config_of(entropy_coef=0.05))[0], expected) <= 1e-12


def test_two_clip_ranges_and_the_dual_clip(exact):
    batch = minibatch_of(exact)
    tokens = int(batch.response_mask.sum())

    def loss(row, t, logp, token):
        value = surrogate(batch, row, t, logp, token, low=0.1, high=0.4)
        advantage = batch.advantages[row, t]
        return torch.minimum(value, -1.05 * advantage) if advantage < 0 else value

    expected = plain_policy_gradient(exact, batch, loss, lambda _: 1 / tokens)
    config = config_of(clip=0.1, clip_high=0.4, dual_clip=1.05)
    policy, _, _ = update(exact, batch, config)
    assert distance(policy, expected) <= 1e-12
    for without in (config_of(clip=0.1, clip_high=0.4), config_of(clip=0.1, dual_clip=1.05)):
        assert distance(update(exact, batch, without)[0], expected) > 1e-2


@pytest.mark.parametrize("tokens", [88, 33, 1])
def test_the_mean_of_response_means_weighs_every_response_alike(exact, tokens):
    batch = minibatch_of(exact)
    expected = plain_policy_gradient(
        exact, batch, lambda row, t, logp, token: surrogate(batch, row, t, logp, token), lambda n: 1 / (8 * n)
    )
    config = config_of(loss_aggregation="seq_mean_token_mean", microbatch_tokens=tokens)
    assert distance(update(exact, padded(batch, 2, 3), config)[0], expected) <= 1e-12
    assert distance(update(exact, batch, config_of(microbatch_tokens=tokens))[0], expected) > 1e-2


def test_joint_takes_one_norm_over_both_models_and_weighs_the_value_loss(exact):
    batch = minibatch_of(exact)
    policy, value, _ = update(exact, batch, config_of())
    value = {name: 0.1 * gradient for name, gradient in value.items()}
    norm = float(torch.cat([flat(policy), flat(value)]).norm())
    config = config_of(joint=True, value_coef=0.1, max_grad_norm=norm / 4)
    joint_policy, joint_value, metrics = update(exact, batch, config)
    for got, free in ((joint_policy, policy), (joint_value, value)):
        assert distance(got, {name: gradient / 4 for name, gradient in free.items()}) <= 1e-5  # torch adds 1e-6 to it
    assert metrics["policy_grad_norm"] == metrics["value_grad_norm"] == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_step_of_adamw_depends_on_no_layout(make_actors, dtype, limit):
    """The weights alone would hide a step that is wrong by a percent: the step itself is compared."""
    steps = []
    for tokens, sides, order in ((88, (0, 0), range(8)), (1, (3, 2), [5, 2, 7, 0, 1, 6, 3, 4])):
        actors = make_actors("gpt_neox", dtype, optimizer=adamw)
        batch = minibatch_of(actors).rows(torch.tensor(list(order)))
        before = [actors.cluster.full_state(model) for model in (actors.policy, actors.value_model)]
        ppo.train_on(actors, padded(batch, *sides), PtxBatches(TEXTS, 3, 0), one_step(tokens))
        after = [actors.cluster.full_state(model) for model in (actors.policy, actors.value_model)]
        steps.append([{name: new[name] - old[name] for name in old} for old, new in zip(before, after)])
    for other, expected in zip(*steps):
        trained = {name: value for name, value in expected.items() if value.any()}
        assert distance({name: other[name] for name in trained}, trained) <= limit


def one_step(tokens):
    return config_of(ptx=0.1, minibatch=8, epochs=1, microbatch_tokens=tokens, self_checks=False)


@pytest.mark.parametrize("epochs, minibatch", [(1, 8), (2, 4), (3, 2)])
def test_every_iteration_takes_epochs_times_minibatches_steps(moving, tmp_path, epochs, minibatch):
    config = config_of(epochs=epochs, minibatch=minibatch, episodes=24)
    for number in range(3):
        values, _ = iterate(moving, config, tmp_path, number=number)
        assert values["policy_steps"] == values["value_steps"] == epochs * 8 / minibatch
    assert moving.state.policy_steps == 3 * epochs * 8 / minibatch


def weights(model):
    """All weights, whole. (After a forward without backward the root's parameters are not shards.)"""
    return torch.cat([value.flatten() for value in Cluster.full_state(SimpleNamespace(is_main=True), model).values()])


def test_in_the_value_warm_up_only_the_value_model_learns_and_the_coefficient_waits(moving, tmp_path):
    kl = AdaptiveKL(coef=0.5, target=6.0, horizon=100, estimator="k1", place="reward")
    config = config_of(kl=kl, value_warmup=1)
    policy, value = weights(moving.policy), weights(moving.value_model)
    moving.state.kl_coef = 0.5
    first, _ = iterate(moving, config, tmp_path, number=0)
    assert weights(moving.policy).equal(policy) and not weights(moving.value_model).equal(value)
    assert (first["policy_steps"], first["value_steps"], moving.state.kl_coef) == (0, 4, 0.5)
    second, _ = iterate(moving, config, tmp_path, number=1)
    assert not weights(moving.policy).equal(policy) and second["kl"] == 0.0
    assert moving.state.kl_coef < 0.5


def test_stop_kl_ends_the_iteration_before_the_step_that_would_go_further(moving, tmp_path):
    config = config_of(epochs=4, stop_kl=1e-12)
    values, _ = iterate(moving, config, tmp_path)
    assert values["policy_steps"] == 1, "the first step sees a policy that has not moved"
    values, _ = iterate(moving, config_of(epochs=4, stop_kl=1e9), tmp_path)
    assert values["policy_steps"] == 8


def test_learning_rates_follow_their_schedule(moving, tmp_path):
    config = config_of(schedule="cosine", warmup=1, episodes=40)
    iterate(moving, config, tmp_path, number=0)
    assert moving.policy_optimizer.param_groups[0]["lr"] == 1e-3
    iterate(moving, config, tmp_path, number=3)
    assert moving.value_optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_averaged_weights_follow_every_policy_step_and_are_swapped_in_and_out(make_actors, tmp_path):
    actors = make_actors("llama", torch.float32, optimizer=adamw)
    actors.ema = AveragedWeights(actors.policy, decay=0.9)
    expected, seen = weights(actors.policy).double(), []
    genuine = actors.policy_optimizer.step
    actors.policy_optimizer.step = lambda: (genuine(), seen.append(weights(actors.policy).double()))
    iterate(actors, config_of(ema=0.9), tmp_path)
    assert len(seen) == 4
    for after in seen:
        expected = 0.9 * expected + 0.1 * after
    last = weights(actors.policy)
    actors.ema.swap(actors.policy)
    torch.testing.assert_close(weights(actors.policy).double(), expected, rtol=1e-6, atol=1e-7)
    actors.ema.swap(actors.policy)
    assert weights(actors.policy).equal(last)


CRITIC_FREE = [
    (RLOO(whiten="none", clip=None), 2),
    (GRPO(divide_by_std=True, whiten="none", clip=None), 4),
    (ReinforcePlusPlus(gamma=1.0, whiten="batch", clip=None), 1),
]


@pytest.mark.parametrize("advantage, samples", CRITIC_FREE)
def test_advantages_without_values_need_no_value_model(moving, tmp_path, advantage, samples):
    moving.value_model = moving.value_optimizer = None
    config = config_of(advantage=advantage, samples_per_prompt=samples)
    prompts = [(text, moving.encoder.prompt(text)) for text in PROMPTS[: 8 // samples] for _ in range(samples)]
    before = weights(moving.policy)
    values, rows = ppo.ppo_iteration(
        moving, prompts, PtxBatches([], 1, 0), Job("ppo", config, {}, tmp_path, first=True), None
    )
    assert values["value_steps"] == 0 and values["policy_steps"] == 4
    assert "explained_variance" not in values and "value_loss" not in values
    assert not weights(moving.policy).equal(before)
    if samples > 1:
        assert rows[0]["prompt"] == rows[1]["prompt"] and rows[0]["response"] != rows[1]["response"]


def test_a_score_after_the_stop_token_has_a_slot_and_a_value_of_its_own(moving, tmp_path, monkeypatch):
    seen = {}
    genuine = ppo.train_on

    def train_on(actors, batch, *rest):
        seen["b"] = batch
        return genuine(actors, batch, *rest)

    monkeypatch.setattr(ppo, "train_on", train_on)
    values, rows = iterate(moving, config_of(shaping={"score_position": "eos_plus_one"}), tmp_path)
    batch = seen["b"]
    extra = batch.value_mask & ~batch.response_mask
    lengths, ended = batch.response_mask.sum(dim=1), [row["finished"] for row in rows]
    assert extra.sum(dim=1).tolist() == [int(length < 6) for length in lengths]
    assert any(ended) and not all(ended)
    shaped_sum = values["reward_mean"]
    assert shaped_sum == pytest.approx(values["score_mean"] - (1 - values["eos_fraction"]), rel=1e-5)
    assert batch.old_values.shape == batch.value_mask.shape
    for row in extra.any(dim=1).nonzero().flatten().tolist():
        ids = batch.tokens[row][batch.mask[row]][None]  # without padding, the last one is the stop token
        assert int(ids[0, -1]) in moving.rule.stop_ids
        with torch.no_grad():  # of the value model as it was before the update
            expected = moving.plain[1](ids, torch.ones_like(ids, dtype=torch.bool))[0]
        got = batch.old_values[row, int(lengths[row])]
        torch.testing.assert_close(got, expected[-1], rtol=0, atol=1e-5)
        assert float((expected[-2] - got).abs()) > 1e-3, "the value one token earlier would pass too"


def test_running_normalisation_counts_every_score_of_the_run(moving, tmp_path):
    scores = []
    for number in range(3):
        values, rows = iterate(moving, config_of(shaping={"running": "shift_scale"}), tmp_path, number=number)
        scores += [row["score"] for row in rows]
        seen = torch.tensor(scores, dtype=torch.float64)
        assert values["score_running_mean"] == pytest.approx(float(seen.mean()), rel=1e-6)
        assert values["score_running_std"] == pytest.approx(float(seen.std(correction=0)), rel=1e-6)


def test_whitening_may_be_over_the_minibatch_and_is_then_clipped(moving, tmp_path, monkeypatch):
    from alignkit.stages import ppo_update

    seen = []
    genuine = ppo_update.ppo_update

    def update_once(actors, batch, *rest, **named):
        seen.append(batch)
        return genuine(actors, batch, *rest, **named)

    monkeypatch.setattr(ppo_update, "ppo_update", update_once)
    iterate(moving, config_of(advantage=GAE(gamma=1.0, lam=0.95, whiten="minibatch", clip=None)), tmp_path)
    for batch in seen:
        picked = batch.advantages[batch.response_mask].double()
        assert abs(float(picked.mean())) < 1e-6 and float(picked.std(correction=0)) == pytest.approx(1, rel=1e-5)
    seen.clear()
    iterate(moving, config_of(advantage=GAE(gamma=1.0, lam=0.95, whiten="minibatch", clip=0.5)), tmp_path)
    assert max(float(batch.advantages.abs().max()) for batch in seen) == 0.5


def test_a_run_that_goes_on_from_its_saved_state_is_the_run_that_never_stopped(make_actors, tmp_path):
    """Coefficient, moments, schedule, noise, prompts and ptx cursor all come back from one object."""
    kl = AdaptiveKL(coef=0.5, target=0.01, horizon=20, estimator="k1", place="reward")
    config = config_of(kl=kl, ptx=0.1, shaping={"running": "scale"}, episodes=32)
    whole = make_actors("llama", torch.float32, optimizer=adamw)
    parts = make_actors("llama", torch.float32, optimizer=adamw)
    job = Job("ppo", config, {}, tmp_path, first=True)

    def go_on(actors):
        prompts = [(text, actors.encoder.prompt(text)) for text in PROMPTS]
        values, rows = ppo.ppo_iteration(actors, prompts, PtxBatches(TEXTS, 3, 0), job, None)
        return {name: v for name, v in values.items() if not name.startswith(TIMES)}, [row["response"] for row in rows]

    for number in range(4):
        if number == 2:
            parts.state = PPOState.from_state_dict(json.loads(json.dumps(parts.state.state_dict())))
        assert go_on(parts) == go_on(whole)
    assert parts.state == whole.state and whole.state.iteration == 4 and whole.state.ptx_rows == 4 * 4 * 3
    assert whole.state.kl_coef != 0.5


def test_a_reference_that_is_not_the_policy_stops_the_run_before_its_first_step(moving, tmp_path):
    with torch.no_grad():
        next(moving.reference.parameters()).add_(0.05)
    with pytest.raises(TrainingError, match="reference. is not 0 before the first step.*different folders"):
        iterate(moving, config_of(), tmp_path)
    moving.state.policy_steps = 1  # of a run that goes on, the policy has long moved
    iterate(moving, config_of(), tmp_path, number=1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: replace(r, mask=torch.ones_like(r.mask)), "attention mask counts .* response tokens"),
        (lambda r: replace(r, finished=~r.finished), "a response goes on after a stop token"),
        (lambda r: gap(r), "a response is empty or has a gap"),
    ],
)
def test_masks_that_disagree_stop_the_run(moving, tmp_path, monkeypatch, change, message):
    genuine = ppo.sample

    def sample(*arguments):
        return change(genuine(*arguments))

    monkeypatch.setattr(ppo, "sample", sample)
    with pytest.raises(TrainingError, match=message):
        iterate(moving, config_of(), tmp_path)


def gap(rollout):
    """The second token of a long response is masked out, in both masks alike."""
    row = int(rollout.response_mask.sum(dim=1).argmax())
    response, mask = rollout.response_mask.clone(), rollout.mask.clone()
    response[row, 1] = mask[row, rollout.prompt_width + 1] = False
    return replace(rollout, response_mask=response, mask=mask)


def test_a_score_in_the_wrong_place_stops_the_run(moving, tmp_path, monkeypatch):
    genuine = ppo.shape_reward

    def late(*arguments, **named):
        shaped = genuine(*arguments, **named)
        return replace(shaped, per_token=shaped.per_token.roll(1, dims=1))

    monkeypatch.setattr(ppo, "shape_reward", late)
    with pytest.raises(TrainingError, match="the score is not where the response ends.*PAD equal to EOS"):
        iterate(moving, config_of(), tmp_path)
    iterate(moving, config_of(self_checks=False), tmp_path)  # a check that was switched off


def test_a_value_clip_that_is_small_against_the_spread_of_returns_is_told():
    settings = config_of(value_clip=0.2).ppo
    assert not guards({"return_std": 1.9}, settings)
    assert not guards({"return_std": 9.0}, replace(settings, value_clip=None))
    assert not guards({}, settings), "an advantage without values has no spread of returns"
    told = guards({"return_std": 2.1}, settings)
    assert list(told) == ["value_clip"]
    assert "returns spread by 2.1 (standard deviation), but ppo.value_clip=0.2" in told["value_clip"]


def test_a_log_ratio_that_is_cut_is_told():
    settings = config_of(value_clip=0.2).ppo
    assert not guards({"ratio_cut_fraction": 0.0}, settings)
    told = guards({"ratio_cut_fraction": 0.025}, settings)
    assert list(told) == ["log_ratio"]
    assert told["log_ratio"].startswith("new and old policy differ by over 20 nats at 2.5% of the tokens")
