"""PPO with KL control on the model in policy=FOLDER, rewarded by the reward model in reward.path=FOLDER."""

from alignkit.runtime.recipe import recipe


@recipe("ppo")
def main(run) -> None:
    policy, reward = run.given("policy"), run.given("reward.path")
    tuned = run.stage("ppo", policy=policy, reward=reward)
    run.stage("evaluate", policy=tuned, baseline=policy, reward=reward)


if __name__ == "__main__":
    main()
