"""What the stages of a run are made from, besides each other: the model, the judge, the reward model from outside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.data.corpus import Corpus
from alignkit.errors import UserError
from alignkit.models.settings import adapter_facts
from alignkit.reward.judge import FromData
from alignkit.runtime.artifact import Artifact, fetch, open_artifact
from alignkit.runtime.config import RunConfig
from alignkit.runtime.rules import TRAINS
from alignkit.stages.bench_report import read_against, read_prompts


def model_digest(raw: dict[str, Any]) -> dict[str, str]:
    """What SFT starts from: the digest of a local model's files, or a Hub id (a branch may move: set revision)."""
    path = raw["model"]["path"]
    if path is None:
        return {}
    return {"model": open_artifact(path).digest if is_place(path) else path}


def start_of_reward_model(config: RunConfig, whole: bool = True) -> Artifact | None:
    """The model in `model.path`, a folder or Hub id, which is fetched here; None where `policy` is to be taken. whole:
    false reads and fetches no weights. Raises UserError if both are set."""
    path, policy = config.model.path, config.policy
    if path is None:
        return None
    if policy is not None:
        raise UserError(
            f"policy={policy} and model.path={path}: the reward model starts from one of them; leave out the other"
        )
    if config.model.trust_remote_code:
        raise UserError("model.trust_remote_code=true: a reward model starts from transformers' own classes alone")
    if not whole and not is_place(path):
        return Artifact(Path(path), "", {})
    place = path if is_place(path) else str(fetch(path, config.model.revision))
    return open_artifact(place, ("sft", "ppo"), whole)


def is_place(path: str) -> bool:
    """Whether it is a folder, there or not, and no Hub id, which has at most one slash."""
    return Path(path).expanduser().exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1


def named_models(stages: Sequence[str], config: RunConfig) -> list[tuple[str, str, Any]]:
    """Setting and folder (or Hub id) of each model that the user names, the one that is trained first, and the reward
    or judge that loads it (None: a stage does). stages: what the recipe trains."""
    starts = {"model.path": config.model.path} if "sft" in stages or "reward_model" in stages else {}
    starts |= {"policy": config.policy} if "sft" not in stages else {}
    found = [(key, path, None) for key, path in starts.items() if path]
    scorers = {"reward": config.reward, "judge": config.judge} if "ppo" in stages else {}
    while scorers:
        key, source = scorers.popitem()
        members = getattr(source, "members", None) or {}
        scorers |= {f"{key}.members.{name}": member for name, member in members.items()}
        if path := getattr(source, "path", None):
            found.append((f"{key}.path", path, source))
    return found


def judge_of(name: str, raw: dict[str, Any]) -> dict[str, Artifact]:
    """The model that judges, an input of the stages that have a judge, where it is one."""
    path = raw["judge"].get("path")
    looks = name == "ppo" and raw["ppo"]["evaluate_every"] is not None
    needed = looks or name in ("evaluate", "preferences")
    return {"judge": open_artifact(path, ("reward_model",))} if needed and path else {}


def check_judge(recipe: str, config: RunConfig, corpus: Corpus) -> None:
    """Raise UserError before anything is trained for a judge that could not judge at the end."""
    if recipe == "overoptimize" or not (recipe == "evaluate" or "ppo" in TRAINS[recipe]):
        return  # there the gold model judges, or nobody
    if isinstance(config.judge, FromData):
        config.judge.kind(corpus)
    elif hasattr(config.judge, "path"):
        if config.judge.path is None:
            raise UserError("judge.path: missing; give the folder of a reward model, as in judge.path=runs/NAME/gold")
        open_artifact(config.judge.path, ("reward_model",))


def check_bench(config: RunConfig) -> None:
    """Raise UserError before anything is made for a measurement that could not be made or compared."""
    bench, ppo = config.bench, config.ppo
    if bench is None:
        return
    read_against(bench.against)
    if bench.stage == "ppo":
        count, needed = len(read_prompts(bench.prompts)), ppo.batch // ppo.samples_per_prompt
        if count < needed:
            raise UserError(
                f"bench.prompts={bench.prompts}: {count} prompts are too few, an iteration takes {needed} (ppo.batch / "
                "ppo.samples_per_prompt): give more or lower ppo.batch"
            )
    elif bench.prompts is not None:
        raise UserError(f"bench.prompts={bench.prompts}: not used by bench.stage={bench.stage}, which reads data=...")
    elif bench.stage == "sft" and config.policy is not None:
        raise UserError(f"policy={config.policy}: not used by bench.stage=sft; give the model as model.path=FOLDER")


def num_parameters(inputs: dict[str, Artifact], model: dict[str, Any]) -> int | None:
    """About how large the models are, for the choice of threads; None where it cannot be told without a network."""
    folders = [item.path for item in inputs.values()]
    if not folders and model["path"] is None:
        return model["vocab_size"] * model["hidden_size"] + 12 * model["num_layers"] * model["hidden_size"] ** 2
    folders = folders or [Path(model["path"])]
    facts = [adapter_facts(place) for folder in folders for place in (folder, folder / "model")]
    folders = folders + [Path(adapter["base_model_name_or_path"]) for adapter in facts if adapter]
    weights = [file for folder in folders for file in folder.rglob("*.safetensors")]
    return max((file.stat().st_size for file in weights), default=0) // 4 or None
