"""What the tests of security share: pickles and models that leave a file where something of them is run."""

import json
import pickle
from pathlib import Path

import torch


class Evil:
    """Unpickled, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def works(folder: Path) -> None:
    """Raise AssertionError if the attack would not work where nothing stops it: then no test could fail."""
    pickle.loads(pickle.dumps(Evil(folder / "works")))
    torch.save(Evil(folder / "works too"), folder / "evil.bin")
    torch.load(folder / "evil.bin", weights_only=False)
    assert (folder / "works").exists() and (folder / "works too").exists()


def remote(folder: Path, mark: Path) -> None:
    """Give a model folder code of its own, which makes the file `mark` when it is imported."""
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModelForSequenceClassification": "own.M"}
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n")
    for file, changes in {
        "config.json": {"auto_map": names, "model_type": "own"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.T", "own.T"]}, "tokenizer_class": "T"},
    }.items():
        known = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps({**known, **changes}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "own.py").read_text())
