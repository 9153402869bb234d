"""`alignkit export RUN`: a run's model in a folder that others can load, with a model card; to the Hub when asked."""

import argparse
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from alignkit.errors import UserError
from alignkit.models.settings import PROMPT_METHODS, adapter_facts
from alignkit.observe.closing import as_typed
from alignkit.observe.model_card import model_card, scrubbed
from alignkit.observe.run_folder import RunFolder, StageFolder, json_file, read_folder
from alignkit.observe.secrets import redacted
from alignkit.runtime.artifact import damaged_files, file_facts, open_artifact, sync_folder, write_json, write_whole
from alignkit.runtime.compose import as_yaml
from alignkit.runtime.push import open_hub, send
from alignkit.runtime.recipe import report
from alignkit.runtime.resume import HEADER, read_run
from alignkit.runtime.rules import TRAINS

FACTS = "alignkit.json"  # in an exported folder: which stage it is of, in which form, and its files but for the card
LAST = ("ppo", "sft", "reward_model")  # what is exported unless a stage is named: the first of these that is trained


class Words(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"export: {message}; `alignkit export --help` lists what there is")


def export_command(words: list[str], recipes: Mapping[str, Path]) -> int:
    """The words after `alignkit export`. Returns the exit code: 0; 1 it could not be written or sent; 2 a mistake."""
    parser = Words("alignkit export", description="A run's model in plain Hugging Face format.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the folder of a run, or its name in runs/")
    parser.add_argument("--stage", help="the stage to export, by its name in the run; else PPO, SFT or reward model")
    parser.add_argument("--to", metavar="FOLDER", help="where to; else RUN/export/STAGE, or RUN/export/STAGE-adapter")
    parser.add_argument("--form", choices=("merged", "adapter"), default="merged", help="whole weights, or peft's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--push", metavar="OWNER/NAME", help="send it to this repository of the Hub, a private one")
    parser.add_argument("--public", action="store_true", help="a public one")
    try:
        options = parser.parse_args(words)
        if options.public and not options.push:
            raise UserError("export: --public says how to push: add --push=OWNER/NAME, or leave it out")
        recipe, settings = read_run([options.run], recipes, "export")
        run = read_folder(Path(settings["runs_dir"]) / settings["name"])
        stage = chosen(run, recipe, options.stage)
        print(export(run, stage, f"{HEADER}{recipe}\n{as_yaml(redacted(settings))}", options), flush=True)
    except UserError as error:
        return report(str(error), 2)
    except (OSError, SafetensorError) as error:  # no network, or a full disk
        return report(f"export: {error}", 1)
    return 0


def chosen(run: RunFolder, recipe: str, asked: str | None) -> StageFolder:
    """The finished stage that is meant. Raises UserError."""
    shown = shlex.quote(as_typed(run.path))
    done = {stage.label: stage for stage in run.stages if stage.manifest and stage.stage in LAST}
    there = f"finished models are {', '.join(done)}" if done else "no model is finished"
    if asked is not None:
        if asked not in done:
            raise UserError(f"export: --stage={asked}: {shown} has no finished model of that name; {there}")
        return done[asked]
    kind = next((kind for kind in LAST if kind in TRAINS.get(recipe, ())), None)
    found = [stage for stage in done.values() if stage.stage == kind]
    if len(found) == 1:
        return found[0]
    if found or kind is None:
        raise UserError(f"export: which model of {shown}? name it with --stage=NAME; {there}")
    raise UserError(f"export: {kind} of {shown} is not finished: `alignkit resume {shown}` goes on with it; {there}"
                    + ", which --stage=NAME takes as they are" * bool(done))  # fmt: skip


def export(run: RunFolder, stage: StageFolder, settings: str, options: argparse.Namespace) -> str:
    """Write the folder, and push it if asked to. Returns what was done. Raises UserError, OSError, SafetensorError."""
    source, form, dtype = source_of(stage, options.form), options.form, options.dtype
    base, stands_on, licence = bases(source)
    default = run.path / "export" / (stage.label + "-adapter" * (form == "adapter"))
    target = Path(os.path.abspath(Path(options.to).expanduser() if options.to else default))
    facts = {"stage": stage.stage, "digest": stage.manifest["digest"], "form": form, "dtype": dtype}
    there, told = is_there(target, facts), f"export: {as_typed(target)} holds it already, and stays as it is"
    hub = open_hub(options.push, options.public, stands_on) if options.push else None
    if not there:
        from alignkit.models.exporting import export_model

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as aside:
            folder = Path(aside) / "model"
            gap = export_model(source, folder, stage.stage == "reward_model", form, dtype)
            checked = (
                f"{'peft' if form == 'adapter' else 'transformers'} alone reads it with the logits of the stage's "
            )
            checked += f"model (largest difference {gap:.3g})"
            card = model_card(run, stage, form=form, dtype=dtype, base=base, stands_on=stands_on, licence=licence,
                              checked=checked, place=options.push or "path/to/this/folder")  # fmt: skip
            write_whole(folder / "README.md", card)
            write_whole(folder / "config.yaml", scrubbed(settings))
            files = {file.name: file_facts(file) for file in sorted(folder.iterdir()) if file.name != "README.md"}
            write_json(folder / FACTS, {**facts, "files": files})
            sync_folder(folder)
            folder.rename(target)
        told = f"export: {stage.label} ({form}, {dtype}) is in {as_typed(target)}: {checked}; read its model card, "
        told += "README.md, and complete its licence before you share it"
    return told if hub is None else f"{told}\n{send(target, hub, options.push, options.public)}"


def source_of(stage: StageFolder, form: str) -> Path:
    """The folder of a sound stage's model, or of its adapter. Raises UserError if there is none of this form."""
    product, method = open_artifact(str(stage.path)).path, stage.manifest["settings"]["peft"]["method"]
    if form == "merged":
        if method in PROMPT_METHODS:
            raise UserError(f"export: {stage.label} is learnt tokens (peft.method={method}): add --form=adapter")
        return product / "model"
    found = next((product / name for name in ("adapter", "model") if adapter_facts(product / name)), None)
    if found is None:
        raise UserError(f"export: --form=adapter: {stage.label} has no adapter (peft.method={method}): leave it out")
    return found


def is_there(target: Path, facts: Mapping[str, str]) -> bool:
    """Whether the folder is this very export, its card apart. Raises UserError if it holds something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    known = json_file(target / FACTS)
    if facts != {key: known.get(key) for key in facts} or damaged_files(target, known):
        shown = shlex.quote(as_typed(target))
        raise UserError(f"export: {shown} holds something else: remove it, or choose another --to=FOLDER")
    return True


def bases(source: Path) -> tuple[str, str, dict[str, Any]]:
    """What the chain of stages began from and what an adapter stands on, each a Hub id or else a bare name ("": none),
    and what the card of the first says of its licence."""
    from huggingface_hub import hf_hub_download, metadata_load, try_to_load_from_cache

    base = origin(source.parent)
    stands_on = Path((adapter_facts(source) or {}).get("base_model_name_or_path", ""))
    if stands_on.is_absolute():
        stands_on = Path(stands_on.parent.name if stands_on.name == "model" else stands_on.name)
    name, card = Path(os.path.abspath(base)).name if base else "", str(Path(base, "README.md"))
    try:
        if base and not Path(base).exists() and isinstance(try_to_load_from_cache(base, "config.json"), str):
            name, card = base, hf_hub_download(base, "README.md")
        known = metadata_load(card) if base else {}
    except Exception:  # of the Hub or of YAML: a card that cannot be had or read says nothing
        known = {}
    licence = {key: value for key, value in (known or {}).items() if key.startswith("license")}
    return name, str(stands_on) if stands_on.name else "", licence


def origin(product: Path) -> str:
    """The Hub id or folder of the model that the chain up to this stage began from, "" if from random weights."""
    manifest = json_file(product / "manifest.json")
    inputs, given = manifest["inputs"], manifest["settings"]["model"]["path"] or ""
    start = next((Path(inputs[key]["path"]) for key in ("policy", "init") if key in inputs), None)
    if start is None:
        return given
    start = start if start.exists() else product.parent / start.name  # all runs were moved since
    return origin(start) if (start / "manifest.json").is_file() else given or str(start)
