"""A pairwise reward model, started from the model in policy=FOLDER."""

from alignkit.runtime.recipe import recipe


@recipe("reward_model")
def main(run) -> None:
    run.stage("reward_model", init=run.given("policy"))


if __name__ == "__main__":
    main()
