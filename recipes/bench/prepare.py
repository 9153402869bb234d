"""Models and prompts for a measurement: random weights of a given size, a tokenizer, and prompts of HH-RLHF.

    python recipes/bench/prepare.py --data hh_harmless.jsonl.gz --out work                 # 5.5 M parameters
    python recipes/bench/prepare.py --data hh_harmless.jsonl.gz --out work --ends-early    # responses of all lengths
    python recipes/bench/prepare.py --data hh_harmless.jsonl.gz --out work --architecture qwen3_0_6b

Writes OUT/policy (a causal language model, also the reference), OUT/reward (a classifier of one label on the same
architecture, from which the value model starts) and OUT/prompts.jsonl, rows {"prompt": TEXT}. Speed does not depend on
what the weights say, but for the lengths of responses: random weights hardly ever end one. --ends-early therefore
plants a probability of ending into the policy's weights, alike at every position: lengths are then geometric, cut off
at the longest, of mean 20 by default. PPO would move it within a few steps, since ending early pays, and two systems
not alike: measure such a model with compare.py --learning-rate 1e-9, at which it stays.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.data.files import read_rows
from alignkit.models.loading import model_config
from alignkit.models.settings import ModelSettings
from alignkit.models.tokenizer import learn_tokenizer
from alignkit.runtime.compose import read_option

TURN = "\n\nAssistant:"
SMALL = {
    "path": None, "hidden_size": 256, "intermediate_size": 768, "num_layers": 4, "num_heads": 4, "vocab_size": 8192,
    "context_length": 1024,
}  # fmt: skip
SMALL_PARAMETERS = 5_507_328
CONTEXTS, RESPONSE = 8, 64  # prompts, and tokens after each, over which the planted probability is set
SHARE = 4.0  # length of the planted direction in an embedding, in lengths of its random part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="hh_harmless.jsonl.gz, or other rows of chosen and rejected")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--architecture", help="a file of conf/model for its sizes, as qwen3_0_6b; without: 5.5 M")
    parser.add_argument("--vocabulary", type=int, help="rows of the embeddings; without: those of the architecture")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the BPE vocabulary that is learnt at most")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="without: float32 for 5.5 M, else bfloat16")
    parser.add_argument("--ends-early", action="store_true", help="plant a probability of ending a response")
    parser.add_argument("--mean-length", type=float, default=20.0, help="tokens, with --ends-early, before the cut")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [row.content for row in read_rows(options.data)]
    prompts = list(dict.fromkeys(prompt_of(row["chosen"]) for row in rows))
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    (options.out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")

    base = read_option("model", options.architecture or "tiny")
    spec = ModelSettings(**{**base, **({} if options.architecture else SMALL)})
    vocabulary = options.vocabulary or spec.vocab_size
    texts = (text for row in rows for text in (row["chosen"], row["rejected"]))
    tokenizer = learn_tokenizer(texts, min(vocabulary, options.tokens))
    few = [tokenizer(prompt)["input_ids"] for prompt in prompts[:200]]
    few = [ids for ids in few if len(ids) <= 128][:CONTEXTS]
    policy, reward = build(spec, vocabulary, tokenizer, few, options)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
    count = sum(p.numel() for p in policy.parameters())
    if not (options.architecture or options.vocabulary or count == SMALL_PARAMETERS):
        raise SystemExit(f"error: {count} parameters instead of {SMALL_PARAMETERS}: conf/model/tiny.yaml has changed")
    print(f"{options.out}: {count:,} parameters, {len(tokenizer):,} tokens, {len(prompts):,} prompts")


def prompt_of(transcript: str) -> str:
    """A transcript up to where the assistant's last turn begins."""
    before, turn, _ = transcript.rpartition(TURN)
    return before + turn


def build(
    spec: ModelSettings, vocabulary: int, tokenizer, prompts: list[list[int]], options: argparse.Namespace
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Policy and reward model with random weights. prompts: after which the planted probability is set."""
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.architecture else "float32"))
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = model_config(spec, vocab_size=vocabulary, **ids)
    torch.manual_seed(options.seed)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    if options.ends_early:
        mean, spread = plant_end(policy, prompts, tokenizer.eos_token_id, 1.0 / options.mean_length)
        print(f"planted: a response ends at each token with probability {mean:.4f} (standard deviation {spread:.4f})")
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return policy.to(dtype), reward.to(dtype)


@torch.no_grad()
def plant_end(policy: torch.nn.Module, prompts: list[list[int]], end: int, wanted: float) -> tuple[float, float]:
    """Make the policy end a response with this probability at each token; returns the mean that was reached over
    random responses to these prompts, and its standard deviation.

    Every embedding gets the same vector u added, which the residual stream carries to the last norm, so that the final
    state h has a large constant part along u. In the head all words then have nearly the same share of it, but for END,
    whose row is b u: its logit is b (h u), and b is found by halving until the mean probability is `wanted`.
    """
    embeddings, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    length = embeddings.float().norm(dim=1).mean()
    direction = torch.randn(embeddings.shape[1])
    direction *= SHARE * length / direction.norm()
    for matrix in {id(m): m for m in (embeddings, head)}.values():  # one matrix where they are tied
        matrix += direction
    states = torch.cat([last_states(policy, ids, RESPONSE) for ids in prompts])
    others = states @ head.float().T
    others[:, end] = float("-inf")
    rest, along = others.logsumexp(dim=1), states @ direction

    def ends(b: float) -> torch.Tensor:
        return torch.sigmoid(b * along - rest)

    low, high = 0.0, 1.0
    while float(ends(high).mean()) < wanted and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = math.fsum((low, high)) / 2
        low, high = (middle, high) if float(ends(middle).mean()) < wanted else (low, middle)
    head[end] = high * direction
    return float(ends(high).mean()), float(ends(high).std())


def last_states(policy: torch.nn.Module, prompt: list[int], count: int) -> torch.Tensor:
    """Final states [count, d] at which a response of random tokens to the prompt is chosen."""
    words = policy.get_input_embeddings().weight.shape[0]
    ids = torch.cat([torch.tensor(prompt), torch.randint(8, words, (count,))])
    return policy(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0, -count:].float()


if __name__ == "__main__":
    main()
