"""The experiments at real scale, run as their users would, but on a random model of the same architecture with two
layers, two PPO iterations, and rows that have the columns of the published data: SFT, reward model, PPO, evaluation."""

import json

import pytest
from test_chain import alignkit, rows

pytestmark = pytest.mark.slow

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALL = [
    *("launch=inline", "launch.processes=1", "tracking=none", "data.heldout=0.2", "compute_dtype=float32"),
    *("sft.batch=8", "sft.microbatch=8", "sft.epochs=1", "reward_model.batch=8", "reward_model.microbatch=8"),
    *("reward_model.epochs=1", "reward_model.gate=warn", "reward_model.sft_samples=4"),
    *("reward_model.reference_responses=16", "ppo.episodes=32", "ppo.batch=16", "ppo.minibatch=8", "ppo.warmup=0"),
    *("ppo.microbatch_tokens=2048", "rollout.max_response=20", "rollout.batch=16"),
    *("evaluate.prompts=8", "evaluate.best_of_samples=0"),
]
COUNT = 60
TOPICS = ("my cat", "the harbour", "a small lamp", "three letters", "the street", "an old boat")
GOOD, BAD = "It is quiet and kind to everyone", "no idea why you ask"


def post(number):
    topic = TOPICS[number % 6]
    return {
        "id": f"t3_{number}",
        "subreddit": "pets",
        "title": f"What to do about {topic}?",
        "post": f"For {number} days I looked after {topic}.\n\nNow it is gone and I miss it.",
    }


def hh(number, answer):
    asked = f"\n\nHuman: Tell me about {TOPICS[number % 6]} {number}\n\nAssistant: Sure.\n\nHuman: Go on"
    return f"{asked}\n\nAssistant: {answer}"


def tldr(number):
    return {**post(number), "summary": f"{TOPICS[number % 6]} is gone.", "query": "made from these by the authors"}


def comparison(number):
    texts = [f" {TOPICS[number % 6]} is gone, I am sad.", f" {number} days"]
    kept = [{"text": text, "policy": "sup4", "note": None} for text in (texts if number % 2 else texts[::-1])]
    info = {**post(number + 20), "site": None, "article": None}
    extra = {"worker": "w", "batch": f"batch{3 + number % 2}", "split": "train", "extra": {"confidence": None}}
    made = {"chosen": texts[0] + "<|endoftext|>", "rejected": texts[1] + "<|endoftext|>"}
    return {"info": info, "summaries": kept, "choice": 1 - number % 2, **extra, **made}


def dialogue(number):
    return {"chosen": hh(number, GOOD), "rejected": hh(number, BAD)}


def feedback(number):
    prompt = f"Write about {TOPICS[number % 6]}, in {number} words"
    sides = [[{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}] for answer in (GOOD, BAD)]
    scores = {"score_chosen": 8.5, "score_rejected": 4.0}
    return {
        "prompt": prompt,
        "prompt_id": "0f",
        "chosen": sides[0],
        "rejected": sides[1],
        "messages": sides[0],
        **scores,
    }


def review(number):
    words = "a warm and lovely film" if number % 2 else "a dull and noisy mess"
    seen = " ".join(f"{topic} and" for topic in TOPICS)
    return {
        "text": f"I saw film {number} with {seen} others,<br /><br />and found it {words} from start to end.",
        "label": number % 2,
    }


def alpaca_zh(number):
    return {
        "instruction": f"介绍{number}种常见的动物。",
        "input": "" if number % 2 else "用中文回答",
        "output": "猫和狗都很友好。",
    }


def sharegpt_zh(number):
    asked = [{"from": "human", "value": f"请写{number}句关于海港的话。"}]
    return {
        "conversations": asked,
        "chosen": {"from": "gpt", "value": "海港很安静。"},
        "rejected": {"from": "gpt", "value": "不知道"},
    }


def write(file, row):
    file.parent.mkdir(exist_ok=True)
    made = (json.dumps(row(number), ensure_ascii=False) + "\n" for number in range(COUNT))
    file.write_text("".join(made), encoding="utf-8")
    return str(file)


def on_the_hub(folder, row, split="train"):
    """A folder with a card and a split, as the data set has it on the Hub."""
    write(folder / "rows.jsonl", row)
    card = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n"
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return str(folder)


@pytest.fixture
def pretrained(tmp_path, tiny_policy):
    """Factory of a random model in a folder, its tokenizer learnt from the rows: of a base model without PAD and chat
    template, of Qwen3 with both."""
    from transformers import PreTrainedTokenizerFast

    from alignkit.models.tokenizer import learn_tokenizer

    def build(architecture, row):
        learnt = learn_tokenizer((json.dumps(row(number), ensure_ascii=False) for number in range(COUNT)), 480)
        special = {"eos_token": "<|end|>", "pad_token": None}
        if architecture == "qwen3":
            special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt.backend_tokenizer, **special)
        place = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
        known = {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
            place: 1024,
        }
        tiny_policy(architecture, **known).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Factory: the experiment's run folder and what it told."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()

    def start(recipe, *words, name="a"):
        code = alignkit(monkeypatch, recipe, *SMALL, *words, f"name={name}")
        told = capsys.readouterr()
        assert code == 0, told.err
        return tmp_path / "runs" / name, told.out

    return start


def check(folder, architecture):
    """All four stages ended, PPO started at the reference, moved, and its product is of that architecture."""
    logged = rows(folder / "ppo" / "metrics.jsonl")
    assert [row["ppo/episodes"] for row in logged] == [16, 32]
    assert abs(logged[0]["ppo/kl"]) < 1e-4 and logged[1]["ppo/kl"] != 0
    assert {row["ppo/ratio_error"] < 1e-4 for row in logged} == {True}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= {"sft/eval_loss", "reward_model/eval_accuracy", "evaluate/win_rate"}
    assert json.loads((folder / "ppo" / "model" / "config.json").read_text())["model_type"] == architecture
    return logged, summary


def test_tldr_pythia(run, pretrained, tmp_path):
    """Post and comparison of one id share their prompt, though they come from two data sets."""
    paths = [on_the_hub(tmp_path / "sft", tldr), on_the_hub(tmp_path / "pairs", comparison)]
    model = pretrained("gpt_neox", comparison)
    folder, told = run("rlhf", "experiment=tldr_pythia_1b", f"data.path=[{','.join(paths)}]", f"model.path={model}")
    assert "sft[train]: 60 rows read as subreddit+title+post+summary (summaries of posts)" in told
    assert "pairs[train]: 60 rows read as info+summaries+choice (compared summaries of posts)" in told
    check(folder, "gpt_neox")
    sample = rows(folder / "ppo" / "samples.jsonl")[0]
    assert sample["prompt"].startswith("SUBREDDIT: r/pets\n\nTITLE: ") and sample["prompt"].endswith("\n\nTL;DR:")
    subsets = json.loads((folder / "reward_model" / "report.json").read_text())["subsets"]
    assert "batch3" in json.dumps(subsets) and "batch4" in json.dumps(subsets)


def test_hh_qwen3(run, pretrained, tmp_path):
    path, model = on_the_hub(tmp_path / "hh", dialogue), pretrained("qwen3", dialogue)
    folder, told = run("rlhf", "experiment=hh_qwen3", f"data.path={path}", f"model.path={model}")
    assert "hh[train]: 60 rows read as chosen+rejected" in told
    check(folder, "qwen3")


def test_ultrafeedback_llama(run, pretrained, tmp_path):
    path, model = on_the_hub(tmp_path / "uf", feedback, "train_prefs"), pretrained("llama", feedback)
    folder, told = run("rlhf", "experiment=ultrafeedback_llama", f"data.path={path}", f"model.path={model}")
    assert "uf[train_prefs]: 60 rows read as prompt+chosen+rejected" in told
    assert "the model has no chat template" in told
    check(folder, "llama")


def test_ultrafeedback_qwen3_with_lora(run, pretrained, tmp_path):
    path, model = on_the_hub(tmp_path / "uf", feedback, "train_prefs"), pretrained("qwen3", feedback)
    words = ["experiment=ultrafeedback_qwen3_lora", f"data.path={path}", f"model.path={model}"]
    folder, told = run("rlhf", *words)
    assert "ppo: weights on this rank: reference shared, policy" in told
    check(folder, "qwen3")
    adapters = [
        json.loads((folder / stage / "adapter" / "adapter_config.json").read_text()) for stage in ("sft", "ppo")
    ]
    assert {(adapter["peft_type"], adapter["r"]) for adapter in adapters} == {("LORA", 16)}


def test_gpt2_sentiment(run, pretrained, tmp_path):
    path, model = on_the_hub(tmp_path / "imdb", review), pretrained("gpt2", review)
    words = ["experiment=gpt2_sentiment", f"data.path={path}", f"model.path={model}", "data.prompt_words=[6,10]"]
    folder, told = run("rlhf", *words, "rollout.min_response=8", "kl.horizon=400")
    assert "imdb[train]: 60 rows read as text+label (labelled texts)" in told
    logged, summary = check(folder, "gpt2")
    assert summary["evaluate/judge"] == "bag_of_words" and summary["ppo/kl_target"] == 6.0
    assert logged[1]["ppo/kl_coef"] != logged[0]["ppo/kl_coef"], "the coefficient is steered"


def test_chinese(run, tmp_path):
    paths = [write(tmp_path / "zh" / "alpaca.jsonl", alpaca_zh), write(tmp_path / "zh" / "dpo.jsonl", sharegpt_zh)]
    sizes = ["model.hidden_size=32", "model.num_layers=2", "model.vocab_size=480"]
    folder, told = run("rlhf", "experiment=chinese", f"data.path=[{','.join(paths)}]", *sizes)
    assert "alpaca.jsonl: 60 rows read as instruction+output (Alpaca demonstrations)" in told
    assert "dpo.jsonl: 60 rows read as conversations+chosen+rejected (ShareGPT preference pairs)" in told
    check(folder, "llama")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo" / "model")
    ids = tokenizer("请写3句关于海港的话。", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "请写3句关于海港的话。" and len(ids) < 11, "less than a token a character"


def test_from_scratch(run, tmp_path):
    """Its two commands: all text first, then the chain on HH from that model."""
    texts = write(tmp_path / "texts" / "reviews.jsonl", lambda number: {"text": review(number)["text"]})
    chats = write(tmp_path / "texts" / "hh.jsonl", dialogue)
    others = [write(tmp_path / "texts" / f"{row.__name__}.jsonl", row) for row in (alpaca_zh, sharegpt_zh)]
    sizes = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=480"]
    words = ["experiment=from_scratch", f"data.path=[{','.join([texts, *others, chats])}]", *sizes]
    _, told = run("sft", *words, "data.on_bad_row=stop", name="base")
    assert "60 rows read as text (texts for language modelling)" in told
    words = ["experiment=from_scratch", "model.path=runs/base/sft/model", f"data.path={chats}"]
    folder, _ = run("rlhf", *words, name="hh")
    check(folder, "llama")
