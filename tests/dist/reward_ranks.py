"""What each rank does for test_rewards_two_ranks.py: sources that fail on one of two ranks only."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import torch
from reward_world import PROMPTS, RESPONSES, answers_of, other_tokenizer, save_reward_model, scored

from alignkit.errors import TrainingError, UserError
from alignkit.models.loading import make_encoder
from alignkit.models.tokenizer import learn_tokenizer
from alignkit.reward.model import RewardModel
from alignkit.reward.outside import OutsideSource
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave

TEXTS = [" ".join(prompt if isinstance(prompt, str) else turn["content"] for turn in prompt) for prompt in PROMPTS]


def attempt(call):
    """What comes out, or what is raised."""
    try:
        scores, failures = call()
    except (TrainingError, UserError) as error:
        return str(error)
    return [scores.tolist(), failures]


def main(out):
    torch.set_num_threads(1)
    cluster, out = Cluster.open(), Path(out)
    encoder = make_encoder(learn_tokenizer([*TEXTS, *RESPONSES], 280), None)
    answers = answers_of(encoder)

    def ask(prompts, responses, finished):
        if cluster.rank == 1:
            raise ValueError("only here")
        return [len(response) for response in responses]

    results = {
        how: attempt(lambda: scored(OutsideSource("it", ask, 64, how), answers, cluster, out))  # noqa: B023
        for how in ("stop", "mean")
    }
    if cluster.is_main:
        save_reward_model(out / "reward", other_tokenizer())
    cluster.barrier()
    foreign = RewardModel(path=None, normalise="none").open(out / "reward", encoder, cluster)
    results["foreign"] = attempt(lambda: scored(foreign, answers, cluster, out))
    long = answers_of(encoder, ["the", "a"], ["the lamp", "the lamp " * 40], [True, True])  # one on each rank
    results["too long"] = attempt(lambda: scored(foreign, long, cluster, out))
    (out / f"rank{cluster.rank}.json").write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
