"""Rankings as elements of a batch: TRL's own loss on pairs, that of a ranking by hand, whatever the micro-batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainer_world import corpus, distance, make_base, make_job, ranked_corpus, rows_of, run, weights_of
from trl import RewardConfig, RewardTrainer

from alignkit.data.corpus import Pair
from alignkit.data.rankings import Ranked
from alignkit.models.loading import load_encoder, make_encoder, scorer_from_policy
from alignkit.stages.ranking_trainer import RankingCollator, RankingTrainer, encode_rankings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "llama", "llama")


def encoded(base, pairs, smoothing=0.0):
    return encode_rankings(pairs, load_encoder(base), 64, smoothing)[0]


def trainer_of(base, rows, folder, trainer=RankingTrainer, form="sum", **options):
    model = scorer_from_policy(base, seed=1).double()
    encoder = load_encoder(base)
    config = RewardConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None, remove_unused_columns=False,
        per_device_train_batch_size=8, disable_tqdm=True, **options,
    )  # fmt: skip
    more = {} if trainer is RewardTrainer else {"pad_id": encoder.tokenizer.pad_token_id, "center_form": form}
    data = Dataset.from_list(rows)
    return trainer(model=model, args=config, train_dataset=data, processing_class=encoder.tokenizer, **more)


def loss_of(trainer, rows):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(trainer.data_collator(rows)))
    loss.backward()
    gradient = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    return loss.detach(), gradient, {name: sum(noted) / len(noted) for name, noted in trainer._metrics["train"].items()}


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [None, 0.3])
def test_on_plain_pairs_loss_gradient_and_metrics_are_trls_own(margins, center, base, tmp_path):
    pairs = [
        Pair(p.prompt, p.chosen, p.rejected, 0.25 * number * margins) for number, p in enumerate(corpus().train.pairs)
    ]
    pairs, encoder = pairs[:8], load_encoder(base)
    theirs = [dict(zip(("chosen_ids", "rejected_ids"), encoder.pair(pair))) for pair in pairs]
    theirs = [{**row, "margin": pair.margin} if margins else row for row, pair in zip(theirs, pairs)]
    ours, options = encoded(base, pairs), {"center_rewards_coefficient": center}
    wanted = loss_of(trainer_of(base, theirs, tmp_path, RewardTrainer, **options), theirs)
    found = loss_of(trainer_of(base, ours, tmp_path, **options), ours)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-12)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)
    assert found[2] == pytest.approx(wanted[2], rel=1e-6)


class Stub(torch.nn.Module):
    """Scores by the first token of a row."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.rows = torch.tensor(scores, dtype=torch.float64), 0

    def forward(self, input_ids, attention_mask, use_cache):
        self.rows += len(input_ids)
        return SimpleNamespace(logits=self.scores[input_ids[:, 0]][:, None])


def row(first, pairs, margin=0.0, smoothing=0.0):
    count = 1 + max(number for pair in pairs for number in pair)
    chosen, rejected = map(list, zip(*pairs))
    responses = [[first + number, *range(number)] for number in range(count)]
    rest = {"margin": [margin] * len(pairs), "smoothing": [smoothing] * len(pairs)}
    return {"responses": responses, "chosen_ids": chosen, "rejected_ids": rejected, **rest}


def test_the_loss_of_a_batch_of_rankings_by_hand(base, tmp_path):
    """Scores 2, 1, -1 of a ranking in full order, and 0, 3 of a pair that is in doubt; centring by its squares."""
    rows = [row(0, [(0, 1), (0, 2), (1, 2)], margin=0.5), row(3, [(0, 1)], smoothing=0.2)]
    trainer = trainer_of(
        base, encoded(base, corpus().train.pairs), tmp_path, form="squares", center_rewards_coefficient=0.1
    )
    model = Stub([2.0, 1.0, -1.0, 0.0, 3.0])
    trainer.model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))

    def cost(d):
        return np.log1p(np.exp(-d))

    ranking = (cost(0.5) + cost(2.5) + cost(1.5)) / 3
    pair = 0.8 * cost(-3.0) + 0.2 * cost(3.0)
    centre = ((4 + 1 + 4 + 1 + 1 + 1) / 3 + 9) / 2
    assert loss.item() == pytest.approx((ranking + pair) / 2 + 0.1 * centre, rel=1e-7)
    assert model.rows == 5, "each response goes through the model once"
    noted = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert noted["accuracy"] == 0.5 and noted["margin"] == pytest.approx(((1 + 3 + 2) / 3 - 3) / 2)
    assert noted["mean_reward"] == pytest.approx((2 / 3 + 1.5) / 2) and (noted["min_reward"], noted["max_reward"]) == (
        -1,
        3,
    )


def test_a_batch_is_laid_out_as_trl_lays_out_pairs():
    batch = RankingCollator(9)([row(1, [(0, 1)]), row(3, [(0, 1), (0, 2)]), row(6, [(1, 0)])])
    assert batch["input_ids"][:, 0].tolist() == [1, 3, 6, 2, 4, 7, 5]
    assert batch["input_ids"][-1].tolist() == [5, 0, 1] and batch["input_ids"][0].tolist() == [1, 9, 9]
    assert batch["owner"].tolist() == [0, 1, 2, 0, 1, 2, 1]
    assert batch["chosen"].tolist() == [0, 1, 1, 5] and batch["rejected"].tolist() == [3, 4, 6, 2]
    assert "smoothing" not in batch


def test_rows_hold_each_response_once_and_count_what_is_left_out(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, None)
    ranked = Ranked("why?", ["a lamp", "a stone", "x " * 90, "a storm"], [4, 3, 2, 1], 0.5, "").pairs()
    pairs = [*ranked, Pair("why?", "a lamp", "a stone", smoothing=0.3), Pair("why?", "a lamp", "a lamp")]
    rows, dropped = encode_rankings(pairs, encoder, 60, 0.1)
    assert dropped == {"too long": 3, "the same tokens": 1}
    assert [len(row["responses"]) for row in rows] == [3, 2]
    assert rows[0]["chosen_ids"] == [0, 0, 1] and rows[0]["rejected_ids"] == [1, 2, 2]
    assert rows[0]["margin"] == [0.5] * 3 and rows[0]["smoothing"] == [0.1] * 3
    assert rows[1]["smoothing"] == [0.3], "what is known of the pair wins"
    assert rows[0]["responses"][0] == encoder.pair(pairs[0])[0]


@pytest.fixture(scope="module")
def whole(base, cluster, tmp_path_factory):
    """A run of rankings in one piece a step."""
    job = make_job(
        "reward_model", base, tmp_path_factory.mktemp("whole"), data=ranked_corpus(), microbatch=12, every=None
    )
    return job, run(job, cluster)


def test_rankings_are_trained_alike_whatever_the_micro_batch(base, whole, cluster, tmp_path):
    job = make_job("reward_model", base, tmp_path, data=ranked_corpus(), microbatch=2, every=None)
    run(job, cluster)
    assert distance(weights_of(job), weights_of(whole[0])) < 1e-5
    for ours, theirs in zip(rows_of(job), rows_of(whole[0]), strict=True):
        for name in ours.keys() - {"reward_model/min_reward", "reward_model/max_reward"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "ranking", [{"label_smoothing": 0.2}, {"center_form": "squares"}, {"center_coef": 0.0}], ids=str
)
def test_each_setting_of_the_loss_reaches_it(ranking, base, whole, cluster, tmp_path):
    job = make_job("reward_model", base, tmp_path, data=ranked_corpus(), microbatch=12, every=None, ranking=ranking)
    run(job, cluster)
    assert distance(weights_of(job), weights_of(whole[0])) > 1e-4


def test_the_summary_counts_pairs_and_a_step_counts_rankings(whole):
    job, result = whole
    assert result["train_pairs"] + result["dropped_pairs"] == len(ranked_corpus().train.pairs) > 100
    assert [row["reward_model/step"] for row in rows_of(job) if "reward_model/loss" in row] == list(range(1, 9))


@pytest.mark.parametrize(
    "wrong", [{"label_smoothing": 0.5}, {"center_form": "mean"}, {"patience": 0}, {"evaluate_every": 0.0}], ids=str
)
def test_settings_out_of_range_are_refused(wrong, base, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_job("reward_model", base, tmp_path, ranking=wrong)
