"""How near PPO, RLOO and GRPO come to the optimum of KL-regularised reward, on a task that is small enough to know it.

    J(pi) = E_pi[r] - beta KL(pi || ref),   pi*(y) = ref(y) exp(r(y) / beta) / Z,   J* = J(pi*) = beta log Z
    gap = (J* - J(pi)) / (J* - J(ref)):  1 before training, 0 at the optimum;  = KL(pi || pi*) / KL(ref || pi*)

The task: six tokens, one of which ends a response; at most three tokens, so 156 responses; one prompt; a score drawn
from N(0, 1) for each response. Policy and reference are a small random Llama, the loop is alignkit's `ppo_iteration`
with its sampler, value model, advantages and losses. All 156 responses are enumerated, so J is exact.

    python tests/learn/optimum.py --seeds 5 --betas 0.2 0.5 --algorithms ppo rloo grpo --jobs 2 --out optimum.svg

Finished runs are kept in --log, a line each, and are not run again. GRPO is run without division by the standard
deviation: with it, and the KL inside the reward, it would have another optimum.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from gap_report import svg, table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from alignkit.algo.advantage import GAE, GRPO, RLOO
from alignkit.algo.control import FixedKL
from alignkit.algo.sampling import SamplingRule
from alignkit.algo.shaping import Shaping
from alignkit.models.policy import response_logprobs
from alignkit.models.scalar import ScalarModel
from alignkit.rollout.compiled import Compiled
from alignkit.rollout.native import Native
from alignkit.runtime.config import conf_dir
from alignkit.runtime.sharding import Cluster
from alignkit.stages.actors import Actors, adam
from alignkit.stages.job import Job
from alignkit.stages.ppo import ppo_iteration
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.settings import PPOSettings, PtxSettings
from alignkit.stages.state import PPOState

TOKENS, LONGEST, END = 6, 3, 0
PROMPT = END  # the token before a response; a token of its own inside would be one that the network cannot tell apart
RULE = SamplingRule(temperature=1.0, stop_ids=(END,))
ITERATIONS = 200
TUNED = {  # the same for all seeds and betas; whatever is not named is as in conf/
    "ppo": {"batch": 512, "minibatch": 64, "epochs": 2, "learning_rate": 3e-4, "value_learning_rate": 1e-3},
    "rloo": {"batch": 512, "minibatch": 64, "epochs": 2, "learning_rate": 3e-4, "samples_per_prompt": 16},
    "grpo": {"batch": 512, "minibatch": 64, "epochs": 2, "learning_rate": 3e-4, "samples_per_prompt": 16},
}


@dataclass(frozen=True)
class Table:
    """The reward source: scores [6, 6, 6] by token; after the end of a response its index goes on with END = 0."""

    scores: torch.Tensor

    def score(self, answers, microbatch: int) -> torch.Tensor:
        rollout = answers.rollout
        return self.scores[torch.where(rollout.response_mask, rollout.response, END).unbind(dim=1)]


class Silent:
    """An encoder without a tokenizer: responses are scored by their ids, nobody reads them."""

    tokenizer = SimpleNamespace(pad_token_id=END)  # what fills a row does not matter, its mask is False

    def text(self, ids: list[int]) -> str:
        return ""


class Exact:
    """All responses with their scores and log-probabilities under the reference."""

    def __init__(self, reference: torch.nn.Module, scores: torch.Tensor, beta: float) -> None:
        grid = torch.cartesian_prod(*[torch.arange(TOKENS)] * LONGEST)
        ended = (grid == END).long().cumsum(dim=1) - (grid == END).long() > 0
        grid, ended = grid[(~ended | (grid == END)).all(dim=1)], ended[(~ended | (grid == END)).all(dim=1)]
        self.tokens = torch.cat([torch.full((len(grid), 1), PROMPT), grid], dim=1)
        self.real, self.beta, self.reward = ~ended, beta, scores[grid.unbind(dim=1)].double()
        self.reference = self.logprobs(reference)
        self.best = float(beta * (self.reference + self.reward / beta).logsumexp(dim=0))
        self.start = self.objective(reference)

    def logprobs(self, policy: torch.nn.Module) -> torch.Tensor:
        """[156] float64, which sum to 1 as probabilities."""
        mask = torch.cat([torch.ones_like(self.real[:, :1]), self.real], dim=1)
        with torch.no_grad():
            each, _ = response_logprobs(policy, self.tokens, mask, mask[:, -LONGEST:], RULE)
        total = torch.where(self.real, each.double(), 0.0).sum(dim=1)
        assert abs(float(total.exp().sum()) - 1.0) < 1e-5
        return total

    def objective(self, policy: torch.nn.Module) -> float:
        """J(policy)."""
        logp = self.logprobs(policy)
        return float((logp.exp() * (self.reward - self.beta * (logp - self.reference))).sum())

    def gap(self, policy: torch.nn.Module) -> float:
        return (self.best - self.objective(policy)) / (self.best - self.start)


def settings(name: str, **changes) -> dict:
    """The values of conf/<name>.yaml with some changed."""
    values = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text("utf-8"))
    values.pop("_target_", None)
    assert changes.keys() <= values.keys(), changes.keys() - values.keys()
    return {**values, **changes}


def engine_of(name: str) -> Native | Compiled:
    """The rollout engine of that name; `compiled` without its compiler, which changes nothing but the time."""
    kind, more = (Compiled, {"compile": False}) if name == "compiled" else (Native, {})
    return kind(**settings(f"rollout/{name}", temperature=1.0, max_response=LONGEST, batch=4096, **more))


def config_of(
    algorithm: str, beta: float, seed: int, iterations: int, *, engine: str = "native", **changes
) -> SimpleNamespace:
    """What `ppo_iteration` reads of a RunConfig; gamma = lambda = 1, nothing done to scores, KL k1 in the reward."""
    tuned = {**TUNED[algorithm], **changes}
    budget = {"episodes": iterations * tuned["batch"], "microbatch_tokens": 64 * tuned["minibatch"]}
    ppo = settings("ppo/default", **budget, **tuned)
    advantage = {
        "ppo": lambda: GAE(**settings("advantage/gae", gamma=1.0, lam=1.0)),
        "rloo": lambda: RLOO(**settings("advantage/rloo")),
        "grpo": lambda: GRPO(**settings("advantage/grpo", divide_by_std=False)),
    }[algorithm]()
    return SimpleNamespace(
        seed=seed,
        ppo=PPOSettings(**ppo),
        ptx=PtxSettings(**settings("ptx/none")),
        rollout=engine_of(engine),
        shaping=Shaping(**settings("shaping/default", missing_eos_penalty=0.0)),
        advantage=advantage,
        kl=FixedKL(**settings("kl/fixed", coef=beta)),
    )


def network(factory, seed: int, **extra) -> torch.nn.Module:
    """A Llama with random weights, large enough (0.1) that the reference is not uniform."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": TOKENS, "pad_token_id": None, "bos_token_id": None, "eos_token_id": END}
    model = factory(LlamaConfig(**shape, **ids, **extra, max_position_embeddings=8, initializer_range=0.1)).eval()
    model.config.pad_token_id = END
    return model


def open_actors(config: SimpleNamespace, scores: torch.Tensor) -> Actors:
    """Policy = reference; a value model of its own, its head 0."""
    cluster, seed, ppo = Cluster.open(), config.seed, config.ppo
    policy = cluster.shard(network(LlamaForCausalLM, seed), trainable=True)
    value_model = None
    if config.advantage.uses_values:
        value_model = ScalarModel(network(LlamaForSequenceClassification, seed, num_labels=1))
        torch.nn.init.zeros_(value_model.classifier.score.weight)
        value_model = cluster.shard(value_model, trainable=True)
    return Actors(
        cluster=cluster,
        encoder=Silent(),
        rule=RULE,
        policy=policy,
        reference=cluster.shard(network(LlamaForCausalLM, seed), trainable=False),
        value_model=value_model,
        reward=Table(scores),
        policy_optimizer=adam(policy, ppo.learning_rate, ppo),
        value_optimizer=adam(value_model, ppo.value_learning_rate, ppo) if value_model else None,
        state=PPOState(kl_coef=config.kl.coef),
    )


def train(
    algorithm: str, beta: float, seed: int, iterations: int = ITERATIONS, every: int = 10, **changes
) -> list[tuple[int, float]]:
    """(episodes, gap) before training, every so many iterations and at the end; `changes` are of conf/ppo."""
    config = config_of(algorithm, beta, seed, iterations, **changes)
    scores = torch.randn([TOKENS] * LONGEST, generator=torch.Generator().manual_seed(seed))
    actors = open_actors(config, scores)
    exact = Exact(actors.reference, scores, beta)
    job = Job("ppo", config, {}, Path(os.devnull), first=True)
    prompts = [("", [PROMPT])] * config.ppo.batch
    curve = [(0, exact.gap(actors.policy))]
    for done in range(1, iterations + 1):
        ppo_iteration(actors, prompts, PtxBatches([], 1, seed), job, gold=None)
        if done % every == 0 or done == iterations:
            curve.append((done * config.ppo.batch, exact.gap(actors.policy)))
    return curve


def finished_runs(log: Path) -> dict[str, dict]:
    """What was asked -> run, for every line of the log that is whole."""
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    runs = [json.loads(line) for line in lines if line.endswith("]]}")]
    return {key_of(run): run for run in runs}


def key_of(run: dict) -> str:
    """What was asked of a run."""
    return json.dumps({name: run[name] for name in ("algorithm", "beta", "seed", "iterations", "settings")})


def timed(task: dict) -> dict:
    began = time.monotonic()
    torch.set_num_threads(1)
    curve = train(task["algorithm"], task["beta"], task["seed"], task["iterations"])
    return {**task, "gap": curve[-1][1], "seconds": round(time.monotonic() - began, 1), "curve": curve}


def run_all(tasks: list[dict], log: Path, jobs: int) -> list[dict]:
    """Every task's run, from the log where it is there; each new one is appended to it as soon as it is finished."""
    known = finished_runs(log)
    todo = [task for task in tasks if key_of(task) not in known]
    print(f"{len(tasks)} runs, {len(tasks) - len(todo)} of them in {log}", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(timed, task) for task in todo]):
            run = known[key_of(future.result())] = future.result()
            with log.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(run))  # the break first, as the last line may be torn
            what = f"{run['algorithm']} beta={run['beta']} seed={run['seed']}"
            print(f"{what}: gap {run['gap']:.4f} in {run['seconds']} s", flush=True)
    return [known[key_of(task)] for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5], help="0 .. n-1; one n, or one an algorithm")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--algorithms", nargs="+", default=list(TUNED), choices=list(TUNED))
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--log", type=Path, default=Path("optimum.jsonl"), help="finished runs, a line each")
    parser.add_argument("--out", type=Path, help="the learning curves as SVG")
    asked = parser.parse_args()
    tasks = [
        {"algorithm": name, "beta": beta, "seed": seed, "iterations": asked.iterations, "settings": TUNED[name]}
        for name, seeds in zip(asked.algorithms, asked.seeds * (len(asked.algorithms) if len(asked.seeds) == 1 else 1))
        for seed in range(seeds)
        for beta in asked.betas
    ]
    runs = run_all(tasks, asked.log, asked.jobs)
    runs.sort(key=lambda run: (asked.algorithms.index(run["algorithm"]), run["beta"], run["seed"]))
    print(table(runs))
    if asked.out:
        asked.out.write_text(svg(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
