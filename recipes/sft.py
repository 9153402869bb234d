"""Supervised fine-tuning on demonstrations."""

from alignkit.runtime.recipe import recipe


@recipe("sft")
def main(run) -> None:
    run.stage("sft")


if __name__ == "__main__":
    main()
