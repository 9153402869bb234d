"""One update of PPO: its gradient is that of a plain computation, whatever the micro-batch, order and padding."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from ppo_world import (
    LENGTH,
    PROMPTS,
    ROWS,
    TEXTS,
    config_of,
    cut,
    distance,
    flat,
    iterate,
    minibatch_of,
    padded,
    rollout_of,
    update,
)
from safetensors.torch import load_file

from alignkit.algo.control import AdaptiveKL
from alignkit.algo.types import Minibatch
from alignkit.errors import TrainingError, UserError
from alignkit.models.loading import make_encoder
from alignkit.reward.source import Answers
from alignkit.rollout.compiled import Compiled, Copy
from alignkit.stages import ppo
from alignkit.stages.actors import Actors, logprobs_of, values_of
from alignkit.stages.job import Job
from alignkit.stages.ppo_update import minibatches
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.settings import PtxSettings
from alignkit.stages.state import PPOState


def expected_gradients(actors: Actors, batch: Minibatch) -> tuple[dict, dict]:
    """Row by row without padding, token by token, in the plain models: nothing of alignkit but the numbers."""
    policy, value = actors.plain
    policy.zero_grad(), value.zero_grad()
    count = int(batch.response_mask.sum())
    for row in range(len(batch)):
        ids, length = batch.tokens[row][batch.mask[row]], int(batch.response_mask[row].sum())
        start = len(ids) - length
        logp = (policy(input_ids=ids[None]).logits[0] / 0.9).log_softmax(-1)
        hidden = value.classifier.base_model(input_ids=ids[None]).last_hidden_state
        scalars = value.classifier.score(hidden)[0, :, 0] + value.bias
        loss = torch.zeros((), dtype=logp.dtype)
        for t in range(length):
            advantage, target, held = batch.advantages[row, t], batch.returns[row, t], batch.old_values[row, t]
            ratio = (logp[start + t - 1, ids[start + t]] - batch.old_logprobs[row, t]).exp()
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            v = scalars[start + t - 1]
            near = held + (v - held).clamp(-0.2, 0.2)
            loss = loss + 0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2)
        (loss / count).backward()
    return tuple({name: p.grad.clone() for name, p in model.named_parameters()} for model in (policy, value))


def test_the_gradient_is_that_of_a_plain_computation(exact):
    batch = minibatch_of(exact)
    policy, value, metrics = update(exact, batch, config_of())
    expected_policy, expected_value = expected_gradients(exact, batch)
    assert distance(policy, expected_policy) <= 1e-12
    assert distance(value, expected_value) <= 1e-12
    assert 0.1 < metrics["clip_fraction"] < 0.9 and 0.1 < metrics["value_clip_fraction"] < 0.9


@pytest.mark.parametrize("dtype, limit", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("change", ["44 tokens", "33 tokens", "1 token", "order", "padding"])
def test_the_gradient_depends_on_no_layout(change, dtype, limit, exact, single):
    actors = exact if dtype == "float64" else single
    batch, config = minibatch_of(actors), config_of(microbatch_tokens=88)
    policy, value, metrics = update(actors, batch, config)
    metrics.pop("padding_fraction")
    if "token" in change:
        config = config_of(microbatch_tokens=int(change.split()[0]))
    elif change == "order":
        batch, config = batch.rows(torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])), config_of(microbatch_tokens=33)
    else:
        batch = padded(batch, 3, 2)
    other_policy, other_value, other_metrics = update(actors, batch, config)
    assert 0 <= other_metrics.pop("padding_fraction") < 0.5
    assert distance(other_policy, policy) <= limit
    assert distance(other_value, value) <= limit
    assert other_metrics == pytest.approx(metrics, rel=1e-9 if dtype == "float64" else 1e-4, abs=1e-6)


def test_a_padded_rectangle_that_is_not_trimmed_gives_the_same_log_probabilities_and_values(exact):
    batch = minibatch_of(exact)
    wide = padded(batch, 3, 2)
    rollout = rollout_of(batch)
    narrow = logprobs_of(exact.policy, rollout, exact.rule, cut(rollout, 8))[0]
    for rows in (8, 3, 1):
        micros = cut(rollout_of(wide), rows)
        logprobs, entropy = logprobs_of(exact.policy, rollout_of(wide), exact.rule, micros, entropy=True)
        torch.testing.assert_close(logprobs[:, :LENGTH], narrow, rtol=0, atol=1e-6)
        assert not logprobs[~wide.response_mask].any() and not entropy[~wide.response_mask].any()
        values = values_of(exact.value_model, rollout_of(wide), micros)
        torch.testing.assert_close(
            values[:, :LENGTH], values_of(exact.value_model, rollout, cut(rollout, 8)), atol=1e-6, rtol=0
        )


def test_scoring_equals_each_row_alone_with_the_value_read_before_its_token(exact):
    batch, (policy, value) = minibatch_of(exact), exact.plain
    micros = cut(rollout_of(batch), 3)
    logprobs, entropy = logprobs_of(exact.policy, rollout_of(batch), exact.rule, micros, entropy=True)
    values = values_of(exact.value_model, rollout_of(batch), micros)
    with torch.no_grad():
        scores = exact.reward.score(Answers(rollout_of(batch), [], []), 3)
        for row in range(ROWS):
            ids, length = batch.tokens[row][batch.mask[row]], int(batch.response_mask[row].sum())
            logp = (policy(input_ids=ids[None]).logits[0, -length - 1 : -1] / 0.9).log_softmax(-1)
            hidden = value.classifier.base_model(input_ids=ids[None]).last_hidden_state
            scalars = value.classifier.score(hidden)[0, :, 0] + value.bias
            picked = logp.gather(1, ids[-length:, None])[:, 0]
            torch.testing.assert_close(logprobs[row, :length], picked, rtol=0, atol=1e-11)
            torch.testing.assert_close(entropy[row, :length], -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-11)
            torch.testing.assert_close(values[row, :length], scalars[-length - 1 : -1], rtol=0, atol=1e-11)
            torch.testing.assert_close(scores[row], scalars[-1], rtol=0, atol=1e-11)  # in normalised units, as values


def test_scoring_keeps_the_precision_of_the_model(exact):
    """Otherwise a run in float64 is not exact: the ratio starts at 1 only to 1e-7."""
    rollout = rollout_of(minibatch_of(exact))
    assert logprobs_of(exact.policy, rollout, exact.rule, cut(rollout, 8))[0].dtype == torch.float64
    assert values_of(exact.value_model, rollout, cut(rollout, 8)).dtype == torch.float64
    assert exact.reward.score(Answers(rollout, [], []), 8).dtype == torch.float64


def test_rows_with_nothing_to_learn_change_nothing(exact):
    """A rank with fewer rows is filled up with rows that are not real: same calls, no effect."""
    batch = minibatch_of(exact)
    half = batch.rows(torch.arange(4))
    masked = batch.only(torch.arange(8) < 4)
    policy, value, _ = update(exact, half, config_of())
    other_policy, other_value, _ = update(exact, masked, config_of())
    assert distance(other_policy, policy) <= 1e-12 and distance(other_value, value) <= 1e-12


def test_gradients_are_clipped_to_the_norm_that_is_set(exact):
    batch = minibatch_of(exact)
    free = update(exact, batch, config_of())
    policy, value, metrics = update(exact, batch, config_of(max_grad_norm=1e-3))
    for clipped, whole, name in [(policy, free[0], "policy_grad_norm"), (value, free[1], "value_grad_norm")]:
        assert float(flat(clipped).norm()) == pytest.approx(1e-3, rel=1e-2)
        cosine = torch.nn.functional.cosine_similarity(flat(clipped), flat(whole), dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-12)
        assert metrics[name] == pytest.approx(float(flat(whole).norm()), rel=1e-9), "the norm before clipping is told"
        assert metrics[name.replace("norm", "clip_fraction")] == 1.0
    loose = update(exact, batch, config_of(max_grad_norm=1e6))[2]
    assert loose["policy_grad_clip_fraction"] == loose["value_grad_clip_fraction"] == 0.0
    assert "policy_grad_clip_fraction" not in free[2], "nothing is ever clipped"


def test_ptx_adds_its_coefficient_times_the_mean_negative_log_likelihood(exact):
    coef, batch = 0.7, minibatch_of(exact)
    without, value, _ = update(exact, batch, config_of())
    mixed, other_value, metrics = update(exact, batch, config_of(ptx=coef), PtxBatches(TEXTS, 3, 0))
    policy, count = exact.plain[0], sum(len(ids) - start for ids, start in TEXTS)
    policy.zero_grad()
    total = 0.0
    for ids, start in TEXTS:
        logits = policy(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum") / count
        loss.backward()
        total += loss.item()
    added = {name: without[name] + coef * p.grad for name, p in policy.named_parameters()}
    assert distance(mixed, added) <= 1e-9
    assert distance(mixed, without) > 1e-2
    assert distance(other_value, value) <= 1e-12
    assert metrics["ptx_loss"] == pytest.approx(total, rel=1e-9)


def test_ptx_batches_go_round_and_remember_where_they_are(tiny_tokenizer):
    batches = PtxBatches(TEXTS, 2, seed=0)
    taken = [row for position in range(0, 12, 2) for row in batches.take(position)]
    for start in range(0, 12, 3):
        assert sorted(map(repr, taken[start : start + 3])) == sorted(map(repr, TEXTS))
    assert PtxBatches(TEXTS, 2, seed=0).take(8) == taken[8:10]
    with pytest.raises(UserError, match="no demonstrations"):
        PtxBatches.open(
            [], make_encoder(tiny_tokenizer, None), PtxSettings(coef=0.1, path=None, batch=2, max_length=9), 0
        )


@pytest.mark.parametrize("epochs, minibatch", [(1, 8), (2, 4), (3, 2)])
@pytest.mark.parametrize("tokens", [1, 88])
def test_there_is_one_step_a_minibatch_and_epoch(single, epochs, minibatch, tokens, tmp_path):
    values, samples = iterate(single, config_of(epochs=epochs, minibatch=minibatch, microbatch_tokens=tokens), tmp_path)
    for optimizer in (single.policy_optimizer, single.value_optimizer):
        assert len(optimizer.steps) == epochs * 8 // minibatch
        optimizer.steps.clear()
    assert len(samples) == 8 and all(math.isfinite(value) for value in values.values())


def test_before_the_first_update_the_policy_is_the_reference(single, tmp_path):
    values, samples = iterate(single, config_of(), tmp_path)
    assert values["kl"] == 0.0 and [row["kl"] for row in samples] == [0.0] * 8
    assert values["ratio_error"] <= 1e-5 and values["approx_kl"] <= 1e-10 and values["clip_fraction"] == 0.0
    assert 0 < values["eos_fraction"] < 1 and values["entropy"] > 0


def test_rewards_are_scores_less_the_penalty_for_not_ending(single, tmp_path):
    """At KL 0 the summed reward of a row is its score, less the penalty where no stop token came."""
    values, samples = iterate(single, config_of(shaping={"missing_eos_penalty": 3.0}), tmp_path)
    ended = sum(row["finished"] for row in samples) / 8
    assert values["eos_fraction"] == ended
    assert values["score_mean"] == pytest.approx(sum(row["score"] for row in samples) / 8, rel=1e-6)
    assert values["reward_mean"] == pytest.approx(values["score_mean"] - 3.0 * (1 - ended), rel=1e-5)


def test_the_coefficient_of_the_next_iteration_follows_kl_in_nats_per_sequence(single, tmp_path, monkeypatch):
    kl = AdaptiveKL(coef=0.1, target=6.0, horizon=100, estimator="k1", place="reward")
    monkeypatch.setattr(single, "state", PPOState(kl_coef=0.5))
    values, _ = iterate(single, config_of(kl=kl), tmp_path)
    assert values["kl"] == 0.0 and values["kl_coef"] == 0.5 and values["kl_target"] == 6.0
    assert single.state.kl_coef == pytest.approx(0.5 * (1 - 0.2 * 8 / 100), rel=1e-12)


def test_learning_rates_fall_to_zero_in_a_line(single, tmp_path):
    iterate(single, config_of(), tmp_path, number=1)  # the second of two iterations
    assert single.policy_optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)
    assert single.value_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_the_policy_that_moved_differs_from_the_reference(make_actors, tmp_path):
    """The loop with AdamW, two iterations: KL leaves 0, the reference and the reward model stay what they were."""
    actors = make_actors("llama", torch.float32, optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    before = [actors.cluster.full_state(model) for model in (actors.policy, actors.value_model, actors.reference)]
    frozen = actors.cluster.full_state(actors.reward.model)
    first, _ = iterate(actors, config_of(ptx=0.1), tmp_path, number=0)
    second, _ = iterate(actors, config_of(ptx=0.1), tmp_path, number=1)
    assert first["kl"] == 0.0 and second["kl"] != 0.0 and second["ratio_error"] <= 1e-4
    expected = second["score_mean"] - (1 - second["eos_fraction"]) - 0.1 * second["kl"]
    assert second["reward_mean"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert abs(0.1 * second["kl"]) > 1e-3, "a KL that pays no penalty to speak of would prove nothing"
    after = [actors.cluster.full_state(model) for model in (actors.policy, actors.value_model, actors.reference)]
    moved = [any(not old[name].equal(new[name]) for name in old) for old, new in zip(before, after)]
    assert moved == [True, True, False]
    assert all(value.equal(frozen[name]) for name, value in actors.cluster.full_state(actors.reward.model).items())


def test_a_trained_policy_is_saved_as_it_came_with_its_head_tied(make_actors, tiny_policy, tmp_path):
    actors = make_actors("llama", torch.float32)
    tiny_policy("llama", seed=9).save_pretrained(tmp_path / "in")
    job = Job("ppo", config_of(), {"policy": tmp_path / "in"}, tmp_path, first=True)
    ppo.save_policy(actors, actors.cluster.full_state(actors.policy), job)
    keys = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in keys
    expected = actors.plain[0].state_dict()
    assert all(value.equal(expected[name]) for name, value in keys.items())


def test_old_log_probabilities_of_another_network_stop_the_run(single, tmp_path, monkeypatch):
    genuine = ppo.logprobs_of

    def off(model, rollout, rule, micros, entropy=False):
        logprobs, *rest = genuine(model, rollout, rule, micros, entropy=entropy)
        return [logprobs + 3e-4 * rollout.response_mask, *rest]

    monkeypatch.setattr(ppo, "logprobs_of", off)
    with pytest.raises(TrainingError, match="iteration 1: the ratio of new to old policy is off by 0.0003"):
        iterate(single, config_of(), tmp_path)


def test_dropout_left_on_stops_the_run(make_actors, tmp_path):
    """Scoring in evaluation mode and training with noise is what the check is there to find."""
    actors = make_actors("llama", torch.float32)
    for module in actors.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(TrainingError, match="dropout left on"):
        iterate(actors, config_of(), tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_the_run_and_leaves_its_data(single, bad, tmp_path, monkeypatch):
    class Broken:
        collective = True  # as a reward model's; of other sources see test_reward_sources.py

        def score(self, answers, microbatch):
            scores = torch.zeros(len(answers.responses))
            scores[answers.prompts.index(PROMPTS[3])] = bad
            return scores

    monkeypatch.setattr(single, "reward", Broken())
    monkeypatch.setattr(single.policy_optimizer, "steps", [])
    folder = tmp_path / "state" / "failed-iteration-1"
    with pytest.raises(TrainingError, match="iteration 1: score is not finite") as error:
        iterate(single, config_of(), tmp_path)
    assert str(folder) in str(error.value) and single.policy_optimizer.steps == []
    tensors = load_file(folder / "batch.safetensors")
    assert {field.name for field in fields(Minibatch)} | {"scores"} == tensors.keys()
    assert torch.isfinite(tensors["scores"]).tolist() == [row != 3 for row in range(8)]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS and all("response" in row for row in rows)


def test_a_gradient_that_is_not_finite_stops_before_the_step(exact):
    batch = minibatch_of(exact)
    advantages = batch.advantages.clone()
    advantages[0, 0] = math.inf
    with pytest.raises(TrainingError, match="policy gradient is not finite"):
        update(exact, replace(batch, advantages=advantages), config_of())
    assert exact.policy_optimizer.steps == []
    exact.policy_optimizer.zero_grad()


def test_prompts_that_are_too_long_are_left_out_and_too_few_are_an_error(single, capsys):
    kept = ppo.encode_prompts([*PROMPTS, "the harbour was quiet before the storm " * 3, ""], single, 8, batch=2)
    assert [prompt for prompt, _ in kept] == [text for text in PROMPTS if len(single.encoder.prompt(text)) <= 8]
    assert "prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="an iteration takes 64 prompts"):
        ppo.encode_prompts(PROMPTS, single, 8, batch=64)


def test_minibatches_cover_every_row_once_an_epoch_in_a_fresh_order(exact):
    batch, config = minibatch_of(exact), config_of(minibatch=4, epochs=3)
    keys = [tuple(row[keep].tolist()) for row, keep in zip(batch.tokens, batch.mask)]
    seen = []
    for part in minibatches(batch, config, iteration=2):
        seen += [keys.index(tuple(row[keep].tolist())) for row, keep in zip(part.tokens, part.mask)]
    epochs = [seen[start : start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


# The engine and the network.


def plain_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def compiled(**changes) -> Compiled:
    common = {"temperature": 0.9, "min_response": 0, "max_response": 6, "batch": 64, "unshard": True}
    return Compiled(**{**common, "dtype": "bfloat16", "compile": False, **changes})


@pytest.mark.parametrize("cap", [None, 2.0])
def test_an_engine_in_a_shorter_dtype_may_differ_by_its_rounding(make_actors, tmp_path, cap):
    actors = make_actors("llama", torch.float32, optimizer=plain_sgd)
    config = config_of(importance_cap=cap)
    config.rollout = compiled()
    values, _ = iterate(actors, config, tmp_path)
    assert 1e-5 < values["engine_gap"] < values["engine_gap_max"] and values["engine_gap"] < 0.05
    config.rollout = compiled(dtype="float32")
    values, _ = iterate(actors, config, tmp_path, number=1)
    assert values["engine_gap_max"] < 1e-4


def test_an_engine_with_old_weights_stops_the_run(make_actors, tmp_path, monkeypatch):
    actors = make_actors("llama", torch.float32, optimizer=plain_sgd)
    config = config_of()
    config.rollout = compiled(dtype="float32")
    iterate(actors, config, tmp_path)
    monkeypatch.setattr(Copy, "take", lambda self, model: None)
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.mul_(1.1)
    with pytest.raises(TrainingError, match="the engine that samples is not the policy that is trained"):
        iterate(actors, config, tmp_path, number=1)
    config.ppo = replace(config.ppo, max_engine_gap=100.0)
    iterate(actors, config, tmp_path, number=1)


def test_importance_weighs_the_policy_gradient_of_each_token(exact):
    batch, config = minibatch_of(exact), config_of(clip=0.99, clip_high=1e9)
    plain = update(exact, batch, config)[0]
    weights = torch.full_like(batch.importance, 0.25)
    assert distance(update(exact, replace(batch, importance=weights), config)[0],
                    {name: 0.25 * value for name, value in plain.items()}) <= 1e-12  # fmt: skip
