"""The rules between sections of the configuration, each told with both values and how to mend it."""

from collections.abc import Callable
from typing import Any

from alignkit.algo.shaping import Shaping
from alignkit.stages.settings import PPOSettings

_ALL = ("sft", "reward_model", "ppo")
TRAINS = {  # the stages that a recipe trains models in
    "rlhf": _ALL,
    "frontier": _ALL,
    "overoptimize": _ALL,
    "denoise": ("sft", "reward_model"),
    **{stage: (stage,) for stage in _ALL},
    "evaluate": (),
    "bench": (),
}


def across(parts: dict[str, Any], unknown: Callable[[str, str, list[str]], str]) -> list[str]:
    """Every rule that is broken, one line each. unknown: (path, key, known keys) -> the line about a misspelt key."""
    faults = []
    if parts["name"] and ("/" in parts["name"] or parts["name"].startswith(".")):
        faults.append(f"name={parts['name']}: expected the name of one folder in {parts['runs_dir']}, not a path")
    ppo, launch, sharding, model, ptx = (parts[name] for name in ("ppo", "launch", "sharding", "model", "ptx"))
    ranks = f"launch.processes={launch.processes}"
    if launch.machines > 1:
        ranks += f" times launch.machines={launch.machines}"
    for name in ("sft", "reward_model"):
        if parts[name].batch % launch.ranks:
            faults.append(f"{name}.batch={parts[name].batch} must be a multiple of {ranks}")
    if ppo.minibatch < launch.ranks:
        faults.append(f"ppo.minibatch={ppo.minibatch} must be at least {ranks}")
    if isinstance(sharding.shard_size, int) and launch.ranks % sharding.shard_size:
        faults.append(f"{ranks} must be a multiple of sharding.shard_size={sharding.shard_size}")
    faults += _ppo_faults(ppo, parts["advantage"], parts["shaping"], parts["reward"], parts["kl"])
    faults += _study_faults(parts)
    peft, known = parts["peft"], parts["peft"].known_keys()
    faults += [unknown("peft.settings", key, known) for key in peft.settings if known and key not in known]
    if sharding.offload_frozen and peft.method != "none":
        faults.append(
            f"sharding.offload_frozen=true: with peft.method={peft.method} reference and reward model are the trained "
            "models without their adapters, so there is nothing to offload; set it to false"
        )
    faults += peft.clashes(model.path or parts["policy"], launch.ranks)
    for name in ("sft", "reward_model"):
        if model.path is None and parts[name].max_length > model.context_length:
            lengths = (
                f"{name}.max_length={parts[name].max_length} tokens",
                f"model.context_length={model.context_length}",
            )
            faults.append(" is above ".join(lengths))
    if model.path is None and parts["policy"] is None and ptx.coef and ptx.max_length > model.context_length:
        faults.append(f"ptx.max_length={ptx.max_length} tokens is above model.context_length={model.context_length}")
    if ptx.path and not ptx.coef:
        faults.append(f"ptx.path={ptx.path}: not used while ptx.coef=0; choose ptx=demonstrations or set ptx.coef")
    longest = ppo.max_prompt + parts["rollout"].max_response
    if model.path is None and parts["policy"] is None and longest > model.context_length:
        faults.append(
            f"ppo.max_prompt={ppo.max_prompt} plus rollout.max_response={parts['rollout'].max_response} is "
            f"{longest} tokens, above model.context_length={model.context_length}"
        )
    return faults


def _study_faults(parts: dict[str, Any]) -> list[str]:
    """What the recipes of several runs cannot do with a setting."""
    faults = []
    if parts.get("frontier") is not None and parts["kl"].target is not None:
        faults.append("kl: alignkit frontier sets a coefficient for each run, so nothing may steer it; choose kl=fixed")
    if parts.get("overoptimize") is not None and not hasattr(parts["reward"], "normalise"):
        faults.append("reward: alignkit overoptimize climbs reward models that it trains itself; choose reward=model")
    if parts.get("denoise") is not None and getattr(parts["data"], "denoise", None) is not None:
        faults.append(
            "data.denoise: alignkit denoise says itself how sure the labels are, all of them; set data.denoise=null"
        )
    return faults


def _ppo_faults(ppo: PPOSettings, advantage: Any, shaping: Shaping, reward: Any, kl: Any) -> list[str]:
    """Choices that make no sense together."""
    faults, kind = [], type(advantage).__name__
    if ppo.samples_per_prompt < advantage.min_samples:
        faults.append(
            f"ppo.samples_per_prompt={ppo.samples_per_prompt}: advantage {kind} compares the responses to one prompt, "
            f"so it needs at least {advantage.min_samples}"
        )
    if not advantage.uses_values:
        wrong = {  # what would set it right -> is it wrong
            "ppo.value_warmup=0": ppo.value_warmup > 0,
            "ppo.joint=false": ppo.joint,
            "shaping.score_position=eos": shaping.score_position == "eos_plus_one",
        }
        faults += [
            f"{mend.partition('=')[0]}: advantage {kind} has no value model; set {mend}"
            for mend, is_wrong in wrong.items()
            if is_wrong
        ]
    if kl.target is None and ppo.stop_if.kl_ratio is not None:
        faults.append(f"ppo.stop_if.kl_ratio={ppo.stop_if.kl_ratio}: kl has no target; set ppo.stop_if.kl in nats")
    if kl.target is not None and ppo.stop_if.kl is not None:
        faults.append(f"ppo.stop_if.kl={ppo.stop_if.kl}: kl.target={kl.target}; set ppo.stop_if.kl_ratio")
    horizon = getattr(kl, "horizon", None)
    if horizon is not None and ppo.batch >= 5 * horizon:
        faults.append(
            f"kl.horizon={horizon} must be above a fifth of ppo.batch={ppo.batch} episodes, or the coefficient could "
            "turn negative"
        )
    if shaping.running != "none" and getattr(reward, "normalise", "none") != "none":
        faults.append(
            f"shaping.running={shaping.running} with reward.normalise={reward.normalise}: scores would be normalised "
            "twice; set one of them to none"
        )
    return faults
