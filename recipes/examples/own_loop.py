"""PPO in a loop of your own: an SFT model by the recipe `sft`, then every iteration of PPO by hand, under a reward
function of yours, with prompts of your choice. Under a minute on a CPU, no network:

python recipes/examples/own_loop.py
"""

import random

from alignkit import PPO, load_config, run


def score(prompts, responses):
    """A point for each "you", up to three."""
    return [min(text.lower().count("you"), 3) for text in responses]


def main():
    small = ["tracking=none", "model.hidden_size=32", "data.num_demonstrations=600", "data.num_pairs=64"]
    sft = run("sft", *small, "sft.epochs=2").folder / "sft"
    steps = ["ppo.episodes=768", "ppo.epochs=4", "ppo.learning_rate=5e-3", "ppo.value_learning_rate=5e-3"]
    config = load_config("ppo", *small, *steps, "rollout.max_response=16", "kl=fixed", "kl.coef=0.02")
    prompts = config.data.load(config.seed).train.prompts
    ppo, choice, scores = PPO(config, sft, score), random.Random(0), []
    for number in range(config.ppo.iterations):
        metrics, samples = ppo.iterate(choice.sample(prompts, config.ppo.batch))
        print(f"{number}  score {metrics['score_mean']:.2f}  KL {metrics['kl']:.2f}  {samples[0]['response']}")
        scores.append(metrics["score_mean"])
    print(f"the policy is in {ppo.save()}")
    return scores


if __name__ == "__main__":
    main()
