"""What is known to go wrong in other systems of this kind, row by row, and what keeps it from happening here.

PEERS: defects found in the code of other systems; TRL: those of its last PPOTrainer. Each row has the tests that pin
our behaviour (in tests/unit unless a folder is named), or the reason why there is none, or why they are not all.
"""

import ast
import copy
import re
import weakref
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from ppo_world import (
    LENGTH,
    PROMPTS,
    config_of,
    cut,
    flat,
    iterate,
    minibatch_of,
    padded,
    prompts_of,
    rollout_of,
    update,
)
from torch.distributed.tensor import DTensor
from trl import RewardTrainer

import alignkit
from alignkit.algo.control import AdaptiveKL
from alignkit.algo.types import Rollout, ScoredRollout
from alignkit.errors import UserError
from alignkit.models import policy as policy_module
from alignkit.models.loading import load_causal, load_scorer, scorer_from_policy
from alignkit.reward.source import Answers
from alignkit.stages import ppo
from alignkit.stages.actors import logprobs_of, sample, values_of
from alignkit.stages.ppo_report import iteration_metrics
from alignkit.stages.ppo_update import train_on
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.state import PPOState
from alignkit.stages.trainer import trainer_arguments

UNIT = Path(__file__).parent
RESUMED = "test_ppo_variants.py::test_a_run_that_goes_on_from_its_saved_state_is_the_run_that_never_stopped"
ON_EOS = "test_shaping.py::test_the_score_sits_on_the_stop_token_itself"
OWN_PAD = "test_models.py::test_pad_equal_to_eos_is_parted_once_and_stays_parted"
STEPS = "test_ppo_variants.py::test_every_iteration_takes_epochs_times_minibatches_steps"
LAYOUT = "test_ppo_update.py::test_the_gradient_depends_on_no_layout"
PADDING = "test_known_defects.py::test_what_is_told_of_an_iteration_does_not_depend_on_padding"
WHOLE = "test_known_defects.py::test_weights_are_gathered_once_and_no_scores_are_kept_while_sampling"
STEP = "test_known_defects.py::test_a_step_computes_what_it_needs_and_holds_one_graph_at_a_time"
FLOAT32 = "test_known_defects.py::test_models_of_any_dtype_are_computed_in_float32"
TWO = "recipes/test_processes.py::test_two_processes_run_the_chain_and_give_the_metrics_of_one"
DEALT = "dist/test_two_ranks.py::test_rows_are_dealt_and_joined_in_order"
CHECKPOINT = "test_checkpoint.py::test_going_on_after_any_iteration_ends_with_the_same_bits"

PEERS = [
    ("DeepSpeed-Chat: old log-probabilities are taken with dropout on",
     "test_ppo_update.py::test_before_the_first_update_the_policy_is_the_reference",
     "test_ppo_update.py::test_dropout_left_on_stops_the_run",
     "test_models.py::test_training_mode_computes_what_evaluation_mode_computes"),
    ("DeepSpeed-Chat: PAD = EOS hides EOS from the loss, or the score lies behind it", ON_EOS, OWN_PAD,
     "test_known_defects.py::test_the_ids_that_were_sampled_are_those_that_are_trained"),
    ("DeepSpeed-Chat: greedy decoding where do_sample is not set", "test_rollout.py::test_sampling_explores",
     "test_rollout.py::test_first_tokens_follow_the_models_probabilities",
     "test_known_defects.py::test_samples_of_one_prompt_differ"),
    ("DeepSpeed-Chat: short answers are dropped, empty ones replaced by the batch before",
     "test_known_defects.py::test_answers_of_nothing_but_a_stop_token_are_kept"),
    ("trlX: responses are decoded to text and encoded again",
     "test_known_defects.py::test_the_ids_that_were_sampled_are_those_that_are_trained"),
    ("trlX: whitening counts padding", "test_masked.py::test_padding_changes_nothing",
     "test_masked.py::test_whitening_equals_numpy_over_the_real_entries"),
    ("trlX: the controller's KL has the prompt in it, by another estimator, averaged in the wrong order",
     "test_known_defects.py::test_the_controller_sees_the_kl_of_response_tokens_alone",
     "test_kl.py::test_kl_of_a_policy_with_itself_is_zero_at_every_token",
     "test_control.py::test_the_step_is_the_same_whatever_estimator_is_paid_for"),
    ("N+: the placeholder on padding leaks into entropy, approx_kl and clip fraction", PADDING, LAYOUT),
    ("OpenRLHF: the controller is fed KL per token, and its coefficient is not saved",
     "test_control.py::test_the_coefficient_follows_kl_per_sequence",
     "test_ppo_update.py::test_the_coefficient_of_the_next_iteration_follows_kl_in_nats_per_sequence", RESUMED),
    ("verl: no checkpoint within the value warm-up, KL state lost", RESUMED,
     "test_schedule.py::test_the_share_depends_on_the_iteration_alone", CHECKPOINT),
    ("verl: a resume at the end of a pass over the data takes 0 steps",
     "test_batching.py::test_the_sequence_does_not_depend_on_how_it_is_cut", RESUMED, CHECKPOINT),
    ("MOSS: running reward moments are in no checkpoint and differ by rank",
     "test_known_defects.py::test_running_moments_survive_a_file",
     "test_ppo_variants.py::test_running_normalisation_counts_every_score_of_the_run", RESUMED, DEALT),
    ("MOSS: the pairwise loss is flat for very wrong pairs",
     "test_known_defects.py::test_the_pairwise_loss_that_trains_pulls_at_very_wrong_pairs",
     "test_losses.py::test_the_pairwise_loss_is_exact_for_pairs_that_are_very_wrong"),
    ("safe-rlhf: score and KL penalty are clipped together",
     "test_known_defects.py::test_the_clip_of_the_score_leaves_the_kl_penalty_alone",
     "test_shaping.py::test_the_score_is_clipped_after_scaling_and_before_what_is_taken_off"),
    ("open-instruct, vLLM: sampler and trainer disagree on log-probabilities",
     "test_rollout.py::test_training_gives_the_log_probabilities_that_the_sampler_saw",
     "test_ppo_update.py::test_old_log_probabilities_of_another_network_stop_the_run"),
    ("TRL, DeepSpeed: sharded weights are gathered for every token", WHOLE,
     "dist/test_two_ranks.py::test_after_sampling_the_policy_is_sharded_again_and_computes_the_same"),
]  # fmt: skip
TRL = [
    ("the number of minibatches does not change the number of steps",
     "test_ppo_update.py::test_there_is_one_step_a_minibatch_and_epoch", STEPS),
    ("metrics are divided by the number of minibatches",
     "test_known_defects.py::test_metrics_do_not_depend_on_the_number_of_minibatches"),
    ("at the end of each pass over the data every micro-batch is a step", STEPS),
    ("the update depends on the split into micro-batches", LAYOUT,
     "test_ppo_variants.py::test_the_step_of_adamw_depends_on_no_layout",
     "test_losses.py::test_micro_batches_add_up_to_the_whole_whatever_the_split"),
    ("gradients are never clipped", "test_ppo_update.py::test_gradients_are_clipped_to_the_norm_that_is_set"),
    ("bf16=True does nothing",
     "dist/test_any_number_of_ranks.py::test_bf16_computes_while_weights_and_gradients_stay_in_float32", FLOAT32,
     "conf/test_config.py::test_every_field_is_read_somewhere"),
    ("sampler, reference and reward compute in another dtype than the training forward", FLOAT32,
     "test_ppo_update.py::test_scoring_keeps_the_precision_of_the_model"),
    ("gradient checkpointing is never switched on",
     "dist/test_any_number_of_ranks.py::test_three_iterations_in_float64_do_not_depend_on_ranks_layout_or_micro_batch",
     "test_plan_command.py::test_each_setting_makes_smaller_what_it_is_there_for_and_nothing_larger"),
    ("training computes logits of the prompt, keeps all hidden states and a cache", STEP),
    ("entropy over the vocabulary is computed in every update for the log alone", STEP),
    ("scores [B, T, V] of a rollout are kept, twice", WHOLE),
    ("activations of policy and value model live together", STEP),
    ("everything is padded to the longest row",
     "test_types.py::test_rows_of_a_rollout_are_trimmed_to_the_longest_prompt_and_response_among_them",
     "test_batching.py::test_micro_batches_hold_no_more_than_their_budget",
     "test_policy.py::test_what_padding_holds_is_not_computed",
     "test_policy.py::test_packed_rows_give_what_padded_rows_give"),
    ("sampling waits for the longest row of a chunk; no other engine",
     "test_rollout.py::test_rows_that_leave_the_batch_change_no_other_row",
     "engine_vllm/test_engine.py::test_engine_and_trainer_agree_after_every_parameter_has_moved"),
    ("the value model is gathered for sampling too", WHOLE),
    ("sampling fails under FSDP2",
     "dist/test_two_ranks.py::test_sampling_gives_the_same_tokens_on_any_number_of_ranks"),
    ("saving fails on several ranks, and for tied weights",
     "dist/test_two_ranks.py::test_whole_weights_come_back_from_the_shards", TWO,
     "test_ppo_update.py::test_a_trained_policy_is_saved_as_it_came_with_its_head_tied"),
    ("adapters on several ranks fail",
     "dist/test_adapters_two_ranks.py::test_gradients_of_a_sharded_adapter_are_those_of_one_process_and_the_base_has_none",
     "dist/test_adapters_two_ranks.py::test_whole_weights_and_adapter_files_come_back_from_the_shards"),
    ("no resume, value weights in no checkpoint", RESUMED, CHECKPOINT),
    ("evaluation and early stopping are settings that nobody reads",
     "conf/test_config.py::test_every_field_is_read_somewhere",
     "test_ppo_variants.py::test_stop_kl_ends_the_iteration_before_the_step_that_would_go_further",
     "not yet: evaluation within PPO (it is a stage of its own) and early stopping on a metric"),
    ("fewer prompts than a batch: an endless loop",
     "recipes/test_chain.py::test_fewer_prompts_than_a_batch_is_an_error_and_no_hang",
     "test_known_defects.py::test_fewer_training_rows_than_a_batch_are_an_error"),
    ("the adapter covers the policy, the value model is trained whole",
     "test_ppo_adapters.py::test_each_base_is_in_memory_once",
     "test_adapters.py::test_value_and_reward_model_share_one_set_of_base_weights"),
    ("PAD is added without a row in the embeddings", OWN_PAD),
    ("with PAD = EOS the decision to stop gets no gradient", OWN_PAD,
     "test_known_defects.py::test_the_decision_to_stop_gets_gradient"),
    ("the score is paid on PAD after EOS, but on the last token without EOS", ON_EOS,
     "test_shaping.py::test_the_score_of_eos_plus_one_reaches_the_stop_token_through_lambda"),
    ("whitening is per rank", DEALT, TWO,
     "test_masked.py::test_the_moments_of_two_ranks_merge_into_those_of_one_batch"),
    ("metrics are averaged over padding or of one rank, the score has the penalty in it", PADDING, LAYOUT, TWO,
     "test_metrics.py::test_ranks_and_micro_batches_equal_one_batch",
     "test_ppo_update.py::test_rewards_are_scores_less_the_penalty_for_not_ending"),
    ("the reward must be a network of one kind with the policy's tokens",
     "recipes/test_own_model.py::test_a_reward_of_the_users_own_is_one_file_and_one_yaml"),
    ("missing: steering KL, stop by KL, ptx, entropy bonus, value warm-up, reward scaling, dual clip, two rates",
     "test_control.py::test_the_coefficient_follows_kl_per_sequence",
     "test_ppo_variants.py::test_stop_kl_ends_the_iteration_before_the_step_that_would_go_further",
     "test_ppo_update.py::test_ptx_adds_its_coefficient_times_the_mean_negative_log_likelihood",
     "test_ppo_variants.py::test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy",
     "test_ppo_variants.py::test_in_the_value_warm_up_only_the_value_model_learns_and_the_coefficient_waits",
     "test_against_numpy.py::test_the_scores_that_are_paid",
     "test_ppo_variants.py::test_two_clip_ranges_and_the_dual_clip",
     "test_ppo_variants.py::test_learning_rates_follow_their_schedule",
     "does not apply: prompts that are too long are left out, not cut; top-p and the like would need their own ratio"),
    ("caches are emptied in inner loops", "test_known_defects.py::test_no_cache_is_emptied"),
]  # fmt: skip
FURTHER = [
    ("TRL: the penalty for a missing end knows one stop token",
     "test_rollout.py::test_masks_and_finished_flags_follow_the_stop_token",
     "test_models.py::test_every_stop_token_reaches_the_saved_folder"),
]  # fmt: skip


def exists(name: str) -> bool:
    """Whether `test_file.py::test_name` (in tests/unit, or `folder/...` in tests) is a test."""
    path, _, test = name.partition("::")
    file = (UNIT.parent if "/" in path else UNIT) / path
    return file.is_file() and test in {getattr(node, "name", None) for node in ast.parse(file.read_text("utf-8")).body}


def test_every_row_has_tests_that_exist_or_a_reason():
    assert (len(PEERS), len(TRL)) == (16, 30), "a row of the study is missing"
    for defect, *pinned in PEERS + TRL + FURTHER:
        tests = [entry for entry in pinned if "::" in entry]
        reasons = [entry for entry in pinned if "::" not in entry]
        assert pinned and [test for test in tests if not exists(test)] == [], defect
        assert all(reason.startswith(("not yet: ", "does not apply: ")) for reason in reasons), defect


def spy(monkeypatch, module, name: str) -> list[tuple[tuple, object]]:
    """Arguments and result of every call of module.name from now on."""
    calls, genuine = [], getattr(module, name)

    def call(*arguments, **named):
        calls.append((arguments, genuine(*arguments, **named)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, call)
    return calls


# Sampling.


def test_the_ids_that_were_sampled_are_those_that_are_trained(single, tmp_path, monkeypatch):
    sampled, trained = spy(monkeypatch, ppo, "sample"), spy(monkeypatch, ppo, "train_on")
    iterate(single, config_of(), tmp_path)
    single.policy_optimizer.steps.clear(), single.value_optimizer.steps.clear()
    rollout, batch = sampled[0][1], trained[0][0][1]
    changed, stops = 0, torch.tensor(single.rule.stop_ids)
    for row, (_, prompt) in enumerate(prompts_of(single)):
        real = rollout.response_mask[row]
        ids = rollout.response[row][real]
        assert batch.tokens[row][batch.mask[row]].tolist() == prompt + ids.tolist()
        assert bool(rollout.finished[row]) is bool(torch.isin(ids[-1], stops)) and not torch.isin(ids[:-1], stops).any()
        changed += single.encoder.response("", single.encoder.text(ids.tolist()))[:-1] != ids.tolist()
    assert changed > 0, "text that encodes to the same ids would prove nothing"
    assert batch.value_mask.equal(batch.response_mask) and rollout.finished.any()


def test_samples_of_one_prompt_differ(single):
    ids = single.encoder.prompt(PROMPTS[0])
    rollout = sample(single.policy, [ids] * 16, 0, config_of(), single.rule, single.cluster, 0)
    logprobs, entropy = logprobs_of(single.policy, rollout, single.rule, cut(rollout, 16), entropy=True)
    assert len({tuple(row.tolist()) for row in rollout.response}) >= 12
    assert float(entropy[rollout.response_mask].min()) > 0 and float(logprobs[rollout.response_mask].mean()) < -1


def test_answers_of_nothing_but_a_stop_token_are_kept(make_actors, tiny_tokenizer, tmp_path, monkeypatch):
    actors = make_actors("llama", torch.float32, stops=tuple(range(len(tiny_tokenizer))))
    trained = spy(monkeypatch, ppo, "train_on")
    values, rows = iterate(actors, config_of(), tmp_path)
    assert [row["prompt"] for row in rows] == PROMPTS and [row["length"] for row in rows] == [1] * 8
    assert trained[0][0][1].response_mask.sum(dim=1).tolist() == [1] * 8 and values["policy_steps"] == 4
    assert values["eos_fraction"] == values["response_length"] == 1.0 and values["policy_grad_norm"] > 0


def test_weights_are_gathered_once_and_no_scores_are_kept_while_sampling(make_actors):
    """The policy stays whole from token to token, the value model sharded; of the logits the last position is
    computed, and those of earlier tokens are gone."""
    actors, earlier, seen = make_actors("llama", torch.float32), [], []

    def sharded(model):
        return {isinstance(parameter, DTensor) for parameter in model.parameters()}

    def after(module, inputs, output):
        alive = sum(logits() is not None for logits in earlier)
        seen.append((output.logits.shape[1], alive <= 1, sharded(actors.policy), sharded(actors.value_model)))
        earlier.append(weakref.ref(output.logits))

    handle = actors.policy.register_forward_hook(after)
    ids = [ids for _, ids in prompts_of(actors)]
    rollout = sample(actors.policy, ids, 0, config_of(), actors.rule, actors.cluster, 0)
    handle.remove()
    assert len(seen) == 6 and all(step == (1, True, {False}, {True}) for step in seen)
    assert all(logits() is None for logits in earlier)
    assert max(getattr(rollout, field.name).dim() for field in fields(Rollout)) == 2
    assert sharded(actors.policy) == {True}


# Rewards, KL and what is told of them.


def test_the_controller_sees_the_kl_of_response_tokens_alone(make_actors, tmp_path, monkeypatch):
    actors = make_actors("llama", torch.float32, optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    config = config_of(kl=AdaptiveKL(coef=0.5, target=0.05, horizon=100, estimator="k3", place="reward"))
    iterate(actors, config, tmp_path)
    moved, coef = copy.deepcopy(actors.plain[0]), actors.state.kl_coef
    moved.load_state_dict(actors.cluster.full_state(actors.policy))
    trained = spy(monkeypatch, ppo, "train_on")
    values, _ = iterate(actors, config, tmp_path, number=1)
    batch, parts = trained[0][0][1], torch.zeros(8, 2)
    for row in range(8):
        ids, length = batch.tokens[row][batch.mask[row]], int(batch.response_mask[row].sum())
        with torch.no_grad():
            logp, ref = ((m(input_ids=ids[None]).logits[0] / 0.9).log_softmax(-1) for m in (moved, actors.plain[0]))
        x = (logp - ref)[:-1].gather(1, ids[1:, None])[:, 0]
        parts[row] = torch.stack([x[-length:].sum(), x.sum()])
    response, whole = parts.mean(dim=0).tolist()
    assert values["kl"] == pytest.approx(response, rel=1e-3) and abs(whole - response) > 0.01 * abs(response)
    expected = config.kl.next(coef, observed=response, episodes=8)
    assert actors.state.kl_coef == pytest.approx(expected, rel=1e-5) and actors.state.kl_coef != coef


def test_the_clip_of_the_score_leaves_the_kl_penalty_alone():
    mask, far = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), -30.0)
    rollout = Rollout(
        torch.zeros(1, 4, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.bool),
        mask,
        mask[:, 0],
        torch.zeros(mask.shape),
    )
    scored = ScoredRollout(torch.zeros(1, 3), far, torch.zeros(1, 3), torch.tensor([100.0]))
    config = config_of(shaping={"clip": 0.5})
    shaped, _ = ppo.shape(SimpleNamespace(state=PPOState(kl_coef=2.0)), rollout, scored, config)
    assert shaped.per_token.tolist() == [[-60.0, -60.0, -59.5]]


def test_what_is_told_of_an_iteration_does_not_depend_on_padding(exact, monkeypatch):
    config = config_of(shaping={"running": "shift_scale"})
    told = []
    for batch in (minibatch_of(exact), padded(minibatch_of(exact), 3, 2)):
        monkeypatch.setattr(exact, "state", PPOState(kl_coef=0.1))
        rollout = replace(rollout_of(batch), finished=torch.arange(8) % 2 == 0)
        logprobs, entropy = logprobs_of(exact.policy, rollout, exact.rule, cut(rollout, 3), entropy=True)
        scores = exact.reward.score(Answers(rollout, [], []), 3).detach()
        scored = ScoredRollout(
            logprobs, batch.ref_logprobs, values_of(exact.value_model, rollout, cut(rollout, 3)), scores
        )
        shaped, _ = ppo.shape(exact, rollout, scored, config)
        target = config.advantage(shaped, scored.values, rollout.response_mask, 1)
        told.append(iteration_metrics(rollout, scored, shaped, target, entropy, [], exact, config))
    assert {"entropy", "kl", "response_length", "explained_variance", "score_running_std"} <= told[0].keys()
    assert told[1] == pytest.approx(told[0], rel=1e-9) and told[0]["entropy"] > 0 and told[0]["kl"] != 0


def test_running_moments_survive_a_file(tmp_path):
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) + 1e3
    whole, resumed = PPOState(kl_coef=0.1), PPOState(kl_coef=0.1)
    for part in scores:
        torch.save(resumed.state_dict(), tmp_path / "state.pt")
        resumed = PPOState.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert resumed.add_scores(part).equal(whole.add_scores(part))
    assert resumed == whole and whole.score_moments[0] == 24


# The update.


def test_metrics_do_not_depend_on_the_number_of_minibatches(exact):
    """With optimizers that move nothing, two or four steps see what one step sees."""
    told = []
    for minibatch in (8, 4, 2):
        config = config_of(minibatch=minibatch, epochs=1, self_checks=False)
        values = train_on(exact, minibatch_of(exact), PtxBatches([], 1, 0), config).values()
        told.append({name: value for name, value in values.items() if "grad_norm" not in name})
        told[-1].pop("padding_fraction")
    exact.policy_optimizer.steps.clear(), exact.value_optimizer.steps.clear()
    assert {"policy_loss", "value_loss", "approx_kl", "clip_fraction"} <= told[0].keys()
    assert told[1] == pytest.approx(told[0], rel=1e-9) and told[2] == pytest.approx(told[0], rel=1e-9)


def test_the_decision_to_stop_gets_gradient(exact):
    batch, stop = minibatch_of(exact), exact.rule.stop_ids[0]
    last = batch.response_mask & (batch.response_mask.cumsum(dim=1) == batch.response_mask.sum(dim=1, keepdim=True))
    tokens = batch.tokens.clone()
    tokens[:, -LENGTH:][last] = stop
    batch = replace(batch, tokens=tokens, advantages=last.double())
    assert float(flat(update(exact, batch, config_of(clip=0.99, clip_high=1e9))[0]).norm()) > 1e-3
    without = replace(batch, response_mask=batch.response_mask & ~last)
    assert float(flat(update(exact, without, config_of())[0]).norm()) == 0.0


def test_a_step_computes_what_it_needs_and_holds_one_graph_at_a_time(exact, monkeypatch):
    """No logits of the prompt, no hidden states, no cache, no entropy that nobody asked for; and whenever a forward
    begins, the graph of the one before is gone: policy and value model never hold activations together."""
    batch, saved, held, seen = minibatch_of(exact), weakref.WeakSet(), [], []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            saved.add(self)
            held.append(len(saved))

    def after(module, inputs, output):
        assert output.past_key_values is None and output.hidden_states is None

    def read(logits, targets):
        seen.append(len(targets))
        return genuine(logits, targets)

    def before(module, inputs):
        assert len(saved) == 0, "the graph of an earlier forward is still there"

    genuine, backbone = policy_module.token_logprobs, exact.policy.base_model
    handles = [model.register_forward_pre_hook(before) for model in (backbone, exact.value_model)]
    handles.append(backbone.register_forward_hook(after))
    monkeypatch.setattr(policy_module, "token_entropy", None)
    monkeypatch.setattr(policy_module, "token_logprobs", read)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda packed: packed.tensor):
        update(exact, batch, config_of(microbatch_tokens=33, joint=True))
    for handle in handles:
        handle.remove()
    assert len(seen) >= 3 and sum(seen) == int(batch.response_mask.sum()) and max(held) > 10


# Around it.


def test_the_pairwise_loss_that_trains_pulls_at_very_wrong_pairs():
    """TRL's, on chosen and rejected scores 50 and 500 apart the wrong way: - 1 / pairs and + 1 / pairs."""
    scores = torch.tensor([[-50.0], [-500.0], [0.0], [0.0]], requires_grad=True)
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = None
    trainer.accelerator.gather = lambda tensor: tensor
    inputs = {"attention_mask": torch.ones(4, 1)}
    RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs).backward()
    torch.testing.assert_close(scores.grad[:, 0], torch.tensor([-0.5, -0.5, 0.5, 0.5]), rtol=0, atol=1e-6)


def test_models_of_any_dtype_are_computed_in_float32(tiny_policy, tmp_path):
    tiny_policy("llama").bfloat16().save_pretrained(tmp_path / "policy")
    scorer = scorer_from_policy(tmp_path / "policy", seed=0)
    copy.deepcopy(scorer).bfloat16().save_pretrained(tmp_path / "reward")
    for model in (scorer, load_causal(tmp_path / "policy"), load_scorer(tmp_path / "reward")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_fewer_training_rows_than_a_batch_are_an_error():
    for stage in ("sft", "reward_model"):
        with pytest.raises(UserError, match=f"{stage}.batch=8 is more than the 7 training rows .* lower {stage}.batch"):
            trainer_arguments(SimpleNamespace(stage=stage), SimpleNamespace(batch=8), None, 7)


def test_no_cache_is_emptied():
    """But once in a TRL stage, where the trained model makes room for the saved one, and before a second vLLM."""
    for file in Path(alignkit.__file__).parent.rglob("*.py"):
        calls = re.findall(r"empty_cache|gc\.collect", file.read_text("utf-8"))
        assert calls == (["gc.collect"] if file.name in ("trainer.py", "vllm.py") else []), file
