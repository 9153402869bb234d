"""The peer: PPOTrainer of TRL 1.12.0, the last release that has one, timed on given models and prompts.

It needs an environment of its own, beside alignkit's:

    python -m venv peer
    peer/bin/pip install torch trl==1.12.0 transformers accelerate datasets
    peer/bin/python recipes/bench/trl_ppo.py --policy work/policy --reward work/reward --prompts work/prompts.jsonl \
        --out trl.json

Run as its makers meant it, and fairly: policy, reference, reward and value model loaded in the precision that is
computed in (its own bf16 switch does nothing by itself), one mini-batch of the whole batch, generation in one batch,
no evaluation, no samples, nothing saved. The first update warms up and does not count. Responses end at EOS.
"""

import argparse
import json
import platform
import resource
import time
from statistics import median

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True, help="folder of the causal LM, also the reference")
    parser.add_argument("--reward", required=True, help="folder of the one-label classifier, also the value model")
    parser.add_argument("--prompts", required=True, help='file of rows {"prompt": TEXT}')
    parser.add_argument("--updates", type=int, default=3, help="in all, the first of which warms up")
    parser.add_argument("--batch", type=int, default=32, help="sequences an update")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences a forward and backward")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-prompt", type=int, default=128, help="tokens; longer prompts are left out")
    parser.add_argument("--max-response", type=int, default=64, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the policy, which PPOTrainer omits")
    parser.add_argument("--out", help="file for the JSON, which is printed too")
    return parser.parse_args()


class Clock:
    """Stands in for the trainer's `batch_generation`: when each update began, and what generation took and gave."""

    def __init__(self, inner, pad_id: int) -> None:
        self.inner, self.pad_id = inner, pad_id
        self.began: list[tuple[float, float]] = []  # by the clock, and of the CPU
        self.generation: list[float] = []
        self.tokens: list[int] = []

    def __call__(self, *args, **kwargs):
        now = time.perf_counter()
        self.began.append((now, time.process_time()))
        result = self.inner(*args, **kwargs)
        synchronize()
        self.generation.append(time.perf_counter() - now)
        self.tokens.append(int((result[0] != self.pad_id).sum()))
        return result


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(options: argparse.Namespace) -> PPOTrainer:
    """Four models and a trainer that makes `batch` sequences an update and one optimizer step an epoch."""
    kind = {"dtype": getattr(torch, options.dtype), "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(options.policy, padding_side="left", trust_remote_code=False)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(options.policy, use_safetensors=True, **kind) for _ in range(2)
    )
    scorer = AutoModelForSequenceClassification
    reward, value = (
        scorer.from_pretrained(options.reward, num_labels=1, use_safetensors=True, **kind) for _ in range(2)
    )
    if options.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    with open(options.prompts, encoding="utf-8") as lines:
        rows = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines if line.strip()]
    rows = [ids for ids in rows if len(ids) <= options.max_prompt]
    # In the last batch of a pass over the data the trainer takes a step after every micro-batch, so no pass may end.
    rows *= 1 + options.batch * (options.updates + 2) // len(rows)
    data = Dataset.from_list([{"input_ids": ids} for ids in rows])
    config = PPOConfig(
        output_dir="trl_ppo_out",
        report_to=[],
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        num_mini_batches=1,
        num_ppo_epochs=options.epochs,
        total_episodes=options.batch * options.updates,
        local_rollout_forward_batch_size=options.batch,
        response_length=options.max_response,
        stop_token="eos",
        temperature=1.0,
        missing_eos_penalty=1.0,
        learning_rate=options.learning_rate,
        bf16=options.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
    )
    few = data.select(range(options.batch))
    return PPOTrainer(config, tokenizer, policy, reference, reward, data, value, eval_dataset=few)


def main() -> None:
    options = arguments()
    if options.batch % options.micro_batch:
        raise SystemExit(f"error: --batch={options.batch} must be a multiple of --micro-batch={options.micro_batch}")
    if options.updates < 2:
        raise SystemExit(f"error: --updates={options.updates}: the first one warms up, so there must be 2 or more")
    trainer = make_trainer(options)
    clock = ppo_trainer.batch_generation = Clock(ppo_trainer.batch_generation, trainer.processing_class.pad_token_id)
    trainer.train()
    synchronize()
    moments = [*clock.began, (time.perf_counter(), time.process_time())][1:]  # the first update warms up
    seconds, cpu = ([end[i] - begin[i] for begin, end in zip(moments, moments[1:])] for i in (0, 1))
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "system": f"trl {trl.__version__} PPOTrainer",
        "stage": "ppo",
        "seconds_per_update": median(seconds),
        "all_seconds": seconds,
        "cpu_seconds_per_update": median(cpu),
        "generation_seconds": median(clock.generation[1:]),
        "all_generation_seconds": clock.generation[1:],
        "sequences_per_second": options.batch / median(seconds),
        "tokens_per_second": median(count / s for count, s in zip(clock.tokens[1:], seconds)),
        "non_pad_tokens_per_update": sum(clock.tokens[1:]) / len(seconds),
        "peak_bytes": peak,
        "settings": vars(options),
        "hardware": {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps(found)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
