"""Validation on training prompts kept apart: what is evaluated, when training ends, which weights stay, resuming."""

import pytest
import torch
from trainer_world import corpus, distance, make_base, make_job, ranked_corpus, rows_of, run, run_killed, weights_of

from alignkit.data.corpus import Pair
from alignkit.errors import UserError
from alignkit.models.loading import load_encoder
from alignkit.models.scalar import load_scalar, score_sequences
from alignkit.stages import reward_model
from alignkit.stages.early_stopping import EarlyStopping
from alignkit.stages.ranking_trainer import encode_rankings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "gpt2", "gpt2")


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations that find what they are told to, and the head's weights as they were then."""
    found, seen = [], []

    def evaluate(self, model):
        seen.append(model.score.weight.detach().clone())
        return found[len(seen) - 1]

    monkeypatch.setattr(EarlyStopping, "evaluate", evaluate)
    return found, seen


def job_of(base, out, peft="none", **ranking):
    """Three epochs of three steps, too long ones to keep getting better: seven rankings of 50 are kept apart."""
    settings, more = {"patience": 2, "evaluate_every": 0.34, **ranking}, {"epochs": 3.0, "learning_rate": 0.2}
    return make_job("reward_model", base, out, peft, every=1, data=ranked_corpus(), ranking=settings, **more)


def column(job, name):
    return {row["reward_model/step"]: row[name] for row in rows_of(job) if name in row}


@pytest.mark.parametrize("peft", ["none", pytest.param("lora", marks=pytest.mark.slow)])
def test_rankings_over_several_epochs_with_early_stopping_resume_to_the_same_bits(peft, base, cluster, tmp_path):
    """Killed when the best weights are older than the checkpoint that it goes on from."""
    jobs = [job_of(base, tmp_path / name, peft, patience=3) for name in ("straight", "killed")]
    result = run(jobs[0], cluster)
    run_killed(jobs[1], cluster, last=result["best_step"] + 2)
    assert run(jobs[1], cluster) == result
    assert distance(weights_of(jobs[1]), weights_of(jobs[0])) == 0.0 and rows_of(jobs[1]) == rows_of(jobs[0])
    found = column(jobs[0], "reward_model/validation_accuracy")
    assert list(found) == list(range(1, len(found) + 1)) and found[result["best_step"]] == max(found.values())
    assert result["stopped_early"] == 1 and result["validation_accuracy"] == max(found.values())


def test_training_ends_once_patience_does_and_goes_back_to_the_best(base, scripted, cluster, tmp_path, capsys):
    found, seen = scripted
    found += [(0.5, 1.0), (0.7, 0.9), (0.6, 0.1), (0.7, 0.8), (0.7, 0.8), (0.6, 0.7)]
    job = job_of(base, tmp_path)
    result = run(job, cluster)
    assert (result["best_step"], result["stopped_early"], len(seen)) == (4, 1, 6), "of equal ones the lower loss"
    assert (result["validation_accuracy"], result["validation_loss"]) == (0.7, 0.8)
    assert torch.equal(weights_of(job)["score.weight"], seen[3]) and not torch.equal(seen[3], seen[5])
    told = capsys.readouterr().out
    assert "ended early after step 6: 2 evaluations without a better one than that of step 4" in told
    assert column(job, "reward_model/validation_loss") == {n + 1: loss for n, (_, loss) in enumerate(found)}
    steps = {int(place.name.split("-")[1]) for place in (tmp_path / "state").glob("checkpoint-*")}
    assert steps == {4, 5}, "nothing goes on from a training that has ended"


def test_without_an_end_by_patience_the_last_step_is_evaluated_too(base, scripted, cluster, tmp_path):
    found, seen = scripted
    found += [(0.1 * n, 1.0) for n in range(9)]
    job = job_of(base, tmp_path, evaluate_every=0.67)
    result = run(job, cluster)
    assert list(column(job, "reward_model/validation_accuracy")) == [2, 4, 6, 8, 9]
    assert (result["best_step"], result["stopped_early"]) == (9, 0)


def test_accuracy_and_loss_are_means_over_rankings_of_what_the_model_scores(base, cluster, tmp_path):
    job, encoder = make_job("reward_model", base, tmp_path, every=None, epochs=0.5), load_encoder(base)
    run(job, cluster)
    rows, _ = encode_rankings(ranked_corpus().train.pairs[:20], encoder, 64, 0.0)
    stopping = EarlyStopping(rows, encoder.tokenizer.pad_token_id, 3, 1, 1, cluster)
    scorer = load_scalar(tmp_path / "model", encoder)
    accuracy, loss = stopping.evaluate(scorer.classifier)
    expected = []
    for row in rows:
        ids = [torch.tensor([response]) for response in row["responses"]]
        with torch.no_grad():
            scores = torch.cat([score_sequences(scorer, one, torch.ones_like(one).bool()) for one in ids]).double()
        delta = scores[row["chosen_ids"]] - scores[row["rejected_ids"]]
        expected.append([float((delta > 0).double().mean()), float(torch.nn.functional.softplus(-delta).mean())])
    assert [accuracy, loss] == pytest.approx(torch.tensor(expected).mean(dim=0).tolist(), rel=1e-5)
    assert scorer.classifier.training


def test_validation_prompts_are_trained_on_without_patience_alone(base, cluster, tmp_path):
    encoder = load_encoder(base)
    sides = {}
    for patience in (None, 2):
        job = job_of(base, tmp_path, patience=patience)
        training, validation, _ = reward_model.training_rows(ranked_corpus(), encoder, job, cluster)
        sides[patience] = training, validation
    assert sides[None][1] == [] and sides[2][1]
    assert sorted(map(repr, sides[2][0])) != sorted(map(repr, sides[None][0]))
    together = [row["responses"] for row in (*sides[2][0], *sides[2][1])]
    assert sorted(together) == sorted(row["responses"] for row in sides[None][0])
    texts = [[encoder.text(ids) for row in side for ids in row["responses"]] for side in sides[2]]
    heldout = corpus().heldout.pairs
    assert not any(text.startswith(pair.prompt) for side in texts for text in side for pair in heldout)


def test_too_few_prompts_to_validate_by_are_told(base, cluster, tmp_path):
    data = ranked_corpus()
    data.train.pairs[:] = [Pair("why?", "a lamp", "a stone")]
    job = make_job("reward_model", base, tmp_path, data=data, ranking={"patience": 2})
    with pytest.raises(UserError, match="^reward_model.patience=2: no pairs are left to validate by in a tenth"):
        run(job, cluster)
