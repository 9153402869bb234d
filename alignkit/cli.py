"""The command `alignkit <recipe> [overrides]`: finds the recipe's file and runs it."""

import ast
import os
import runpy
import sys
from pathlib import Path

from alignkit import __version__
from alignkit.runtime.shipped import find_recipes

USAGE = """alignkit {version}: alignment of language models from human preferences

  alignkit RECIPE [KEY=VALUE ...]       run a recipe
  alignkit RECIPE --cfg job             print all its settings, each with its value
  alignkit RECIPE --info defaults-tree  print where they come from
  alignkit RECIPE -m KEY=A,B,C          run once for each value
  alignkit RECIPE --config-dir FOLDER   add your own options to its groups
  alignkit check RECIPE [KEY=VALUE ...] what can be known before anything is trained: models, data, disk, memory, W&B
  alignkit plan RECIPE [KEY=VALUE ...] [--gpu-memory=GIB]
                                        what it takes of each GPU's memory, and whether that fits
  alignkit resume RUN                   go on with a run that was interrupted, wherever it was
  alignkit report RUN                   write the report of a run, or of a sweep, anew: a page for any browser
  alignkit evaluate RUN [KEY=VALUE ...] judge a finished run once more, as in judge=model judge.path=FOLDER
  alignkit export RUN [--to=FOLDER] [--push=OWNER/NAME]
                                        its model for others, with a model card: Hugging Face format, merged or adapter
  alignkit serve-reward FOLDER [--port=8321]
                                        a reward model behind HTTP, for reward=http
  alignkit sync RUN                     send to W&B what was tracked offline, and draw what came from what
  alignkit explain [KEY [RECIPE]]       what a setting or a group of them means and which presets change it
  alignkit recipes                      all recipes, experiments and sweeps with one line each
  alignkit dashboard [--project=P] [--entity=E] [--out=FILE]
                                        a W&B workspace for your runs, made or brought up to date
  eval "$(alignkit -sc install=bash)"   tab completion in this shell; keep it in ~/.bashrc

recipes:
{recipes}

examples:
  alignkit rlhf                                              the embedded default: no network, no GPU
  alignkit rlhf name=mine seed=1 kl.target=3                 settings are written group.key=value
  alignkit rlhf experiment=movie_reviews data.path=movie_reviews.jsonl.gz
  alignkit rlhf model.path=Qwen/Qwen3-0.6B data=jsonl data.path=pairs.jsonl launch.processes=8
  alignkit ppo policy=runs/mine/sft reward.path=runs/mine/reward_model kl=fixed kl.coef=0.05
"""


def main() -> None:
    """Entry point of the console script."""
    try:
        command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has left, as in `alignkit explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def command(words: list[str]) -> None:
    """What a line of words after `alignkit` asks for."""
    recipes = find_recipes()
    if words[:1] == ["--version"]:
        print(f"alignkit {__version__}")
        return
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(len(name) for name in recipes)
        listed = "\n".join(f"  {name:<{width}}  {_summary(file)}" for name, file in recipes.items())
        print(USAGE.format(version=__version__, recipes=listed))
        return
    if words[0] == "-sc":
        words = _completion(words, list(recipes))
    if not words:
        return
    name = words[0]
    if (code := _verb(name, words[1:], recipes)) is not None:
        sys.exit(code)
    if name not in recipes:
        print(f"error: no recipe '{name}'; recipes: {', '.join(recipes)} (alignkit --help)", file=sys.stderr)
        sys.exit(2)
    sys.argv = ["alignkit" if "-sc" in words else f"alignkit {name}", *words[1:]]
    runpy.run_path(str(recipes[name]), run_name="alignkit.recipe")["main"]()


def _verb(name: str, words: list[str], recipes: dict[str, Path]) -> int | None:
    """The exit code of a command that is no recipe; None: it is none of these. Each imports only what it needs."""
    if name == "check":
        from alignkit.runtime.recipe import check_command

        return check_command(words, recipes)
    if name == "plan":
        from alignkit.runtime.plan_text import plan_command

        return plan_command(words, recipes)
    if name == "resume":
        from alignkit.runtime.resume import resume

        return resume(words, recipes)
    if name == "report":
        from alignkit.runtime.report_command import report_command

        return report_command(words, recipes)
    if name == "evaluate":
        from alignkit.runtime.evaluate_run import evaluate

        return evaluate(words, recipes)
    if name == "export":
        from alignkit.runtime.export import export_command

        return export_command(words, recipes)
    if name == "serve-reward":
        from alignkit.runtime.serve import serve_command

        return serve_command(words)
    if name in ("explain", "recipes"):
        from alignkit.runtime.explain import explain_command

        return explain_command(words, {name: _summary(file) for name, file in recipes.items()})
    if name == "sync":
        from alignkit.runtime.sync import sync_command

        return sync_command(words)
    if name == "dashboard":
        from alignkit.runtime.dashboard import dashboard_command

        return dashboard_command(words)
    return None


def _completion(words: list[str], recipes: list[str]) -> list[str]:
    """What bash asks with the line typed so far: prints the recipes, or gives the words that ask the line's recipe."""
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()[1:]
    if words[1:2] != ["query=bash"]:
        return [recipes[0], *words]
    if not typed or (len(typed) == 1 and not line.endswith(" ")):
        print(" ".join(recipes))
        return []
    os.environ["COMP_LINE"] = line.replace(f" {typed[0]}", "", 1)
    return [typed[0], *words] if typed[0] in recipes else []


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n")[0]
