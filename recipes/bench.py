"""Speed, memory and shares of the machine's limits of PPO, SFT or reward training, also against another system's."""

from alignkit.runtime.recipe import recipe


@recipe("bench")
def main(run) -> None:
    stage = run.config.bench.stage
    policy = run.given("policy") if stage == "ppo" else None
    reward = run.given("reward.path") if stage == "ppo" and run.needs_reward_model else None
    init = run.start() if stage == "reward_model" else None
    run.stage("bench", policy=policy, reward=reward, init=init)


if __name__ == "__main__":
    main()
