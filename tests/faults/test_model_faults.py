"""Faults of a model that is given by its folder: what is wrong with it, and the one line that is said before anything
is trained. What transformers would take without a word (a tensor drawn at random, embeddings of another tokenizer,
NaN) is refused by name. No product is left, the earlier ones stay."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fault_world import EARLIER, SMALL
from safetensors.torch import load_file, save_file

from alignkit.errors import UserError

AGAIN = "copy or download the model again"


def changed(file: str, change):
    """Change one JSON file of the folder."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def tensors(change):
    """Change the tensors of the folder."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def text(file: str, content: str):
    return lambda folder: (folder / file).write_text(content)


def sharded(folder: Path) -> None:
    """In two files with an index, of which the second is not there."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file(dict(list(held.items())[:5]), folder / files[0], metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[i >= 5] for i, name in enumerate(held)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def put(name: str, value: float):
    return lambda held: held[name].view(-1).__setitem__(3, value)


def without_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("token*"), *folder.glob("*.jinja")):
        file.unlink()


def three_labels(folder: Path) -> None:
    labels = {str(i): f"L{i}" for i in range(3)}
    changed("config.json", lambda held: held.update(id2label=labels, label2id={v: k for k, v in labels.items()}))(
        folder
    )
    tensors(lambda held: held.update({"score.weight": torch.ones(3, 32)}))(folder)


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
FILES = {  # what is wrong with `policy`, told before a folder is made -> the line
    "a shard that is missing": (sharded, "{policy}/model.safetensors.index.json: model-00002-of-00002.safetensors "
                                         "is not "
                                f"there (1 of 2 files missing); {AGAIN}"),
    "pickled weights": (pickled, "'policy': expected weights in .safetensors files, got pytorch_model.bin, which "
                                 "may run "
                        "code when it is read: save it again with save_pretrained of transformers"),
    "weights cut off": (cut, "{policy}/model.safetensors: expected {size:,} bytes, got 5,000; " + AGAIN),
    "weights that are none": (text("model.safetensors", "<html>404</html>"), "{policy}/model.safetensors: expected a "
                              f".safetensors file, got something else; {AGAIN}"),
    "no bytes at all": (text("model.safetensors", ""), "{policy}/model.safetensors: expected a .safetensors file, got "
                        f"something else; {AGAIN}"),
    "a config cut off": (text("config.json", '{"a": '), "{policy}/config.json: expected JSON, got a fault "
                                                        "(Expecting value: "
                         f"line 1 column 7 (char 6)); {AGAIN}"),
    "a config of another kind": (text("config.json", "[1]"), "{policy}/config.json: expected a JSON object, got list; "
                                 f"{AGAIN}"),
    "generation settings cut off": (text("generation_config.json", "{"), "{policy}/generation_config.json: expected "
        "JSON, "
                                    "got a fault (Expecting property name enclosed in double quotes: line 1 column "
                                    "2 (char 1)); "
                                    f"{AGAIN}"),
    "a tokenizer cut off": (text("tokenizer.json", ""), "{policy}/tokenizer.json: expected JSON, got a fault "
                                                        "(Expecting "
                            f"value: line 1 column 1 (char 0)); {AGAIN}"),
    "an adapter without its settings": (text("adapter_config.json", "{"), "'{policy}/adapter_config.json': expected "
        "JSON, got "
                                        "a fault (Expecting property name enclosed in double quotes: line 1 column "
                                        "2 (char 1)); "
                                        "copy the adapter again"),
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "'{policy}' has neither "
        "manifest.json "
                        "(a finished stage) nor config.json (a Hugging Face model)"),
    "a stage cut off": (lambda folder: [(folder / "config.json").unlink(), (folder / "manifest.json").write_text("{")],
                        "'{policy}' is damaged: manifest.json is missing, cut off or changed; make it again"),
    "no folder": (shutil.rmtree, "'{policy}' does not exist: expected the folder of a finished stage or of a "
                                 "Hugging Face "
                  "model"),
}  # fmt: skip


def placed(whole: Path, here: Path, spoil=None, name: str = "policy") -> dict[str, str]:
    """Both folders in the working folder, one of them spoilt: what the lines name."""
    for each in ("policy", "reward"):
        shutil.copytree(whole / each, here / each)
    size = (here / name / "model.safetensors").stat().st_size
    if spoil:
        spoil(here / name)
    return {"policy": f"./{name}", "folder": str(here / name), "size": size}


@pytest.mark.parametrize("spoil, line", FILES.values(), ids=FILES)
def test_a_fault_of_the_files_is_told_before_a_folder_is_made(run, refused, no_stage, whole, here, spoil, line):
    known = placed(whole, here, spoil)
    words = line.format(**known).replace("./policy/", "policy/")
    refused(lambda: run("sft", **{**SMALL, "policy": None, "model.path": "./policy"}), f"model.path=./policy: {words}")


WEIGHTS = {  # what is wrong with `policy`, told where it is loaded -> the line
    "NaN in a tensor": (tensors(put(UP, float("nan"))), f"'{{folder}}': {UP} holds NaN or infinity: this model "
                                                        f"cannot be "
                        "used; take an earlier one"),
    "infinity in a tensor": (tensors(put(NORM, float("inf"))), f"'{{folder}}': {NORM} holds NaN or infinity: this "
        f"model "
                             "cannot be used; take an earlier one"),
    "a tensor that is missing": (tensors(lambda held: held.pop(UP)), f"'{{folder}}' has no weights for {UP} (1 "
        f"missing in "
                                 "all): it is cut off, or of another kind"),
    "a tensor of another shape": (tensors(lambda held: held.update({NORM: torch.ones(7)})), "no model could be "
        "loaded from "
                                  f"'{{folder}}': {NORM} has the shape (7,) in the file, (32,) by config.json; "
                                  f"{AGAIN}"),
    "an architecture that is unknown": (changed("config.json", lambda held: held.update(model_type="zzz")), "policy="
        "policy: its config cannot be read: The checkpoint you are trying to load has model "
                                        "type "
                                        "`zzz` but Transformers does not recognize this architecture. This could be "
                                        "because "
                                        "of an issue with the checkpoint, or because your version of Transformers "
                                        "is out of "
                                        "date."),
    "a size that is no number": (changed("config.json", lambda held: held.update(hidden_size="many")), "policy="
        "policy: its config cannot be read: Validation error for field 'hidden_size': TypeError: "
                                 "Field "
                                 "'hidden_size' expected int, got str (value: 'many')"),
    "no tokenizer": (without_tokenizer, "policy=policy: '{folder}' holds no tokenizer: expected "
                                        "tokenizer.json or tokenizer.model "
                                        "beside the "
                     "weights"),
    "another tokenizer": (changed("config.json", lambda held: held.update(vocab_size=200)), "policy=policy: "
                          "'{folder}': its tokenizer has "
                          "280 tokens, its model embeddings of 200: they do not belong together; put the model's own "
                          "tokenizer there"),
    "a template that does not parse": (text("chat_template.jinja", "{% for %}"), "policy: the model's chat "
                                       "template refuses turns of "
                                       "user: Expected an expression, got 'end of statement block'"),
}  # fmt: skip
SCORERS = {  # what is wrong with `reward` -> the line
    "three labels": (three_labels, "reward.path=reward: has 3 labels; a reward model has one score (num_labels: 1)"),
    "a policy": (tensors(lambda held: held.pop("score.weight")), "reward.path=reward: holds no weights of "
        "a score, which would be random: it is no reward model"),
    "NaN in the head": (tensors(put("score.weight", float("nan"))), "'{folder}': score.weight holds NaN or "
        "infinity: this "
                        "model cannot be used; take an earlier one"),
}  # fmt: skip


def check_nothing_is_lost(here: Path) -> None:
    for name, content in EARLIER.items():
        assert (here / "runs" / name).read_text() == content
    assert not list((here / "runs").rglob("model/*.safetensors")), "no product"


CASES = [("policy", *case) for case in WEIGHTS.values()] + [("reward", *case) for case in SCORERS.values()]


@pytest.mark.parametrize("name, spoil, line", CASES, ids=[*WEIGHTS, *SCORERS])
def test_a_fault_of_the_weights_is_told_before_the_first_step(run, whole, here, name, spoil, line):
    known = placed(whole, here, spoil, name)
    code, told = run("ppo", **SMALL, **{"reward.path": "reward", "name": "a"})
    assert (code, told) == (2, [f"error: {line.format(**known)}"])
    assert not list((here / "runs").rglob("metrics.jsonl")), "no step"
    check_nothing_is_lost(here)


@pytest.mark.parametrize("recipe, key", [("sft", "model.path"), ("reward_model", "policy")])
def test_the_other_stages_refuse_nan_too(run, whole, here, recipe, key):
    placed(whole, here, tensors(put(UP, float("nan"))))
    code, told = run(recipe, **{**SMALL, "policy": None, "reward.normalise": "none", key: "policy"})
    assert code == 2 and len(told) == 1
    assert told[0].endswith(f"policy': {UP} holds NaN or infinity: this model cannot be used; take an earlier one")
    check_nothing_is_lost(here)


def test_a_fresh_head_may_be_missing_and_nothing_else(whole, here):
    from alignkit.models.loading import scorer_from_policy

    placed(whole, here)
    assert scorer_from_policy(here / "policy", seed=0).score.weight.isfinite().all()
    tensors(lambda held: held.pop(UP))(here / "policy")
    with pytest.raises(UserError, match=f"has no weights for {UP} "):
        scorer_from_policy(here / "policy", seed=0)
