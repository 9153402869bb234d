"""What the source must not do, and the places that may, each with its reason."""

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import alignkit

PACKAGE = Path(alignkit.__file__).parent
ROOT = PACKAGE.parent
FOLDERS = [place for place in (PACKAGE, ROOT / "recipes") if place.is_dir()]
SOURCES = {str(file.relative_to(ROOT)): file.read_text("utf-8") for f in FOLDERS for file in sorted(f.rglob("*.py"))}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "xml", "telnetlib", "ftplib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load",
                   "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "os.chmod", "os.umask"}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "unpack_archive"}
WITHOUT_CODE = ("GenerationConfig", "PeftConfig", "PeftModel", "model")  # these know no code of a model
LOADERS_OF_WEIGHTS = ("factory", "AutoModel", "PeftModel")
ALLOWED = {  # (file, what) -> why
    ("alignkit/runtime/checkpoint_reader.py", "import pickle"): "to read what torch writes, by a list of classes",
    ("alignkit/models/adapters.py", "weights PeftModel.from_pretrained"): "the line before asks for safetensors",
}


def names(node: ast.AST) -> str:
    """`torch.load` of a call's function; "" for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{names(node.value) or '?'}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def findings(text: str) -> set[str]:
    """What a file does that it must not."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {f"import {name}" for name in modules if name.split(".")[0] in FORBIDDEN_IMPORTS}
        if not isinstance(node, ast.Call):
            continue
        name, words = names(node.func), {word.arg: word.value for word in node.keywords}
        said = {key: getattr(value, "value", None) for key, value in words.items()}
        found |= {f"call {name}"} if name in FORBIDDEN_CALLS or name.split(".")[-1] in FORBIDDEN_METHODS else set()
        found |= {"shell"} if said.get("shell") else set()
        if name == "torch.load" and said.get("weights_only") is not True:
            found.add("torch.load")
        if name.endswith("dcp.load") and "storage_reader" not in words:
            found.add("dcp.load")
        if name.endswith(".from_pretrained"):
            owner = name.rpartition(".")[0]
            if owner.startswith(LOADERS_OF_WEIGHTS) and said.get("use_safetensors") is not True:
                found.add(f"weights {name}")
            asks = not {"trust_remote_code", None} & {*words} and not owner.startswith(WITHOUT_CODE)
            if said.get("trust_remote_code") is True or asks:  # left out, transformers asks the terminal
                found.add(f"remote code {name}")
        if name.endswith("load_dataset") and "trust_remote_code" in words:
            found.add("remote code load_dataset")
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_no_file_does_what_lets_data_run(path):
    assert {what for what in findings(SOURCES[path]) if (path, what) not in ALLOWED} == set()


def test_each_place_that_may_is_there():
    assert [place for place in ALLOWED if place[1] not in findings(SOURCES[place[0]])] == []


GUILTY = {
    "import pickle": "import pickle", "from pickle import loads": "import pickle", "import dill.x": "import dill.x",
    "eval(x)": "call eval", "exec('a')": "call exec", "os.system('a')": "call os.system",
    "yaml.load(x, Loader=yaml.Loader)": "call yaml.load", "tar.extractall('x')": "call tar.extractall",
    "subprocess.run('a', shell=True)": "shell", "torch.load(x)": "torch.load",
    "torch.load(x, weights_only=False)": "torch.load", "dcp.load(x, checkpoint_id=y)": "dcp.load",
    "AutoModel.from_pretrained(x, **y)": "weights AutoModel.from_pretrained",
    "factory.from_pretrained(x, use_safetensors=False, **y)": "weights factory.from_pretrained",
    "AutoConfig.from_pretrained(x)": "remote code AutoConfig.from_pretrained",
    "AutoConfig.from_pretrained(x, trust_remote_code=True)": "remote code AutoConfig.from_pretrained",
    "datasets.load_dataset(x, trust_remote_code=y)": "remote code load_dataset",
}  # fmt: skip
INNOCENT = ["model.eval()", "re.compile(x)", "torch.compile(f)", "yaml.safe_load(x)",
            "AutoConfig.from_pretrained(x, trust_remote_code=y)",
            "PeftModel.from_pretrained(x, use_safetensors=True)", "torch.load(x, weights_only=True)"]  # fmt: skip


@pytest.mark.parametrize("text", [*GUILTY, *INNOCENT])
def test_the_check_sees_what_it_is_for(text):
    assert findings(text) == ({GUILTY[text]} if text in GUILTY else set())


# -------------------------------------------------------------------------------------------------------- dependencies

OPEN = {  # what has no upper bound, and why
    "tqdm": "a line of progress; its call has not changed in ten years",
    "pyarrow": "a major version every quarter; what is called (ParquetFile.iter_batches) has not changed since 4",
    "pytest": "of the tests", "ruff": "of the tests", "build": "of the tests", "coverage": "of the tests",
    "hypothesis": "of the tests", "types-PyYAML": "of the tests",
}  # fmt: skip


def requirements() -> dict[str, Requirement]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {line: Requirement(line) for line in lines}


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="an installed wheel has no pyproject.toml")
def test_what_may_break_us_has_an_upper_bound():
    found = {
        each.name: any(part.operator in ("<", "<=", "~=", "==") for part in each.specifier)
        for each in requirements().values()
    }
    assert {name for name, bound in found.items() if not bound} == set(OPEN)
