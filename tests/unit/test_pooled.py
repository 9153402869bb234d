"""Encoder models as reward models: trained by the same trainer, read as a whole by their pooling, no value models."""

from types import SimpleNamespace

import pytest
import torch
from trainer_world import ENCODERS, corpus, distance, make_base, make_encoder_base, make_job, rows_of, run, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit.errors import UserError
from alignkit.models.loading import load_encoder, scorer_from_policy
from alignkit.models.pooled import is_pooled
from alignkit.models.scalar import PooledScalar, ScalarModel, load_scalar, open_scalar, score_sequences
from alignkit.runtime.run import Run
from alignkit.runtime.sharding import Cluster

TURN = [{"role": "user", "content": "why stones?"}]


@pytest.fixture(scope="module")
def cluster():
    made = Cluster.open()
    yield made
    made.close()


@pytest.fixture(scope="module", params=ENCODERS)
def base(request, tmp_path_factory):
    return make_encoder_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def trained(base, cluster, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    job = make_job("reward_model", base, out, every=None, epochs=1.0, learning_rate=0.003)
    return job, run(job, cluster)


def test_an_encoder_is_trained_measured_and_loads_plainly_with_its_tokenizer(base, trained):
    """The start, whose head is new, is the seed's alone; what was trained differs from it."""
    job, result = trained
    assert result["train_pairs"] == 50 and 0 <= result["eval_accuracy"] <= 1 and result["score_std"] > 0
    assert result["eval_loss"] != pytest.approx(rows_of(job)[0]["reward_model/loss"])
    torch.manual_seed(3)
    starts = [scorer_from_policy(base, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert distance(starts[0], starts[1]) == 0.0
    assert distance(starts[0], starts[2]) > 0 and distance(weights_of(job), starts[0]) > 0
    plain = AutoModelForSequenceClassification.from_pretrained(job.out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(job.out / "model")
    encoder, pair = load_encoder(job.out / "model"), corpus().heldout.pairs[0]
    ids = torch.tensor([encoder.pair(pair)[0]])
    assert tokenizer(pair.prompt)["input_ids"] + tokenizer(pair.chosen)["input_ids"][1:] == ids[0].tolist()
    score = score_sequences(load_scalar(job.out / "model", encoder), ids, torch.ones_like(ids).bool())
    torch.testing.assert_close(score, plain(ids).logits[0], rtol=0, atol=1e-6)


def test_a_sequence_has_the_same_score_whatever_the_padding(trained):
    scorer = open_scalar(trained[0].out / "model")
    assert isinstance(scorer, PooledScalar)
    rows = [[2, 7, 9, 3, 11, 3], [2, 3, 8, 3], [2, 5, 3]]
    alone = torch.cat([score_sequences(scorer, torch.tensor([r]), torch.ones(1, len(r)).bool()) for r in rows])
    for before in (0, 2):
        tokens, mask = torch.full((3, 9), 17), torch.zeros(3, 9, dtype=torch.bool)
        for place, row in enumerate(rows):
            tokens[place, before : before + len(row)] = torch.tensor(row)
            mask[place, before : before + len(row)] = True
        torch.testing.assert_close(score_sequences(scorer, tokens, mask), alone, rtol=0, atol=1e-5)


def test_no_value_model_starts_from_one_number_a_sequence(trained):
    with pytest.raises(UserError, match="ForSequenceClassification gives one number a sequence, so no value model can"):
        open_scalar(trained[0].out / "model").absorb_affine(0.0, 1.0)


def test_prompt_and_response_are_parted_and_a_chat_is_plain_words(base):
    encoder = load_encoder(base)
    assert encoder.pooled and is_pooled(base)
    cls, sep = encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id
    prompt, response = encoder.prompt("why stones?"), encoder.response("why stones?", "because")
    assert (prompt[0], prompt[-1], response[-1]) == (cls, sep, sep) and (prompt + response).count(sep) == 2
    assert encoder.prompt("") == [cls]
    chat = encoder.prompt(TURN) + encoder.response(TURN, "because")
    assert (chat[0], chat[-1], chat.count(cls), chat.count(sep)) == (cls, sep, 1, 1)
    words = "[CLS]Human: why stones?\n\nAssistant: because[SEP]"
    assert chat == encoder.tokenizer(words, add_special_tokens=False)["input_ids"]


def test_an_eos_that_is_the_separator_parts_prompt_and_response_too(base):
    """As DeBERTa's and RoBERTa's."""
    encoder = load_encoder(base)
    before = encoder.prompt("why stones?")
    encoder.tokenizer.eos_token = "[SEP]"
    assert encoder.prompt("why stones?") == before


def test_a_decoder_is_read_at_its_last_token_as_before(cluster, tmp_path):
    base = make_base(tmp_path / "llama", "llama")
    assert not is_pooled(base) and not is_pooled(tmp_path / "nowhere")
    scorer_from_policy(base, seed=0).save_pretrained(tmp_path / "scorer")
    assert isinstance(open_scalar(tmp_path / "scorer"), ScalarModel)


def test_an_adapter_on_an_encoder_is_refused(base, cluster, tmp_path):
    with pytest.raises(UserError, match="^peft.method=lora: an encoder is trained whole"):
        run(make_job("reward_model", base, tmp_path, "lora"), cluster)


def test_a_tokenizer_without_a_separator_is_refused(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.sep_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(UserError, match="its tokenizer has no sep_token: set it in tokenizer_config.json"):
        load_encoder(tmp_path)


def start(policy, path):
    fake = Run.__new__(Run)
    model = SimpleNamespace(path=path, revision="main", trust_remote_code=False)
    fake.recipe, fake.purpose = "reward_model", "new"
    fake.config = SimpleNamespace(policy=policy, model=model, reward=SimpleNamespace(path=None))
    return fake.start()


def test_a_model_of_the_hub_is_brought_here_and_known_by_its_bytes(base, monkeypatch):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert start(None, "microsoft/deberta-v3-base") == start(None, str(base))
    assert asked == [("microsoft/deberta-v3-base", "main", True, False)]


def test_a_model_that_cannot_be_had_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^'nobody/nothing' is no folder here and could not be had from") as told:
        start(None, "nobody/nothing")
    assert "\n" not in str(told.value)


def test_a_reward_model_starts_from_policy_or_from_a_model_and_not_from_both(base):
    assert start(None, str(base)).path == base
    assert start(str(base), None).digest == start(None, str(base)).digest
    with pytest.raises(UserError, match="^policy=a and model.path=b: the reward model starts from one of them"):
        start("a", "b")
    with pytest.raises(UserError, match="^policy: missing; alignkit reward_model needs the folder"):
        start(None, None)
