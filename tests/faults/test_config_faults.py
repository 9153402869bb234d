"""Faults of the command line and of settings, beside those of tests/conf/test_errors.py and test_rewards.py: what is
typed, and all that is said. Code 2, nothing made, nothing lost."""

import pytest

UNREADABLE = "cannot be read: write KEY=VALUE, and quote what has blanks or signs in it: 'name=\"a b\"'"
FAULTS = {
    "a word without a value": (["seed"], f"'seed' {UNREADABLE}"),
    "a quote that is not closed": (["name='a"], f'"name=\'a" {UNREADABLE}'),
    "a list that is not closed": (["trusted=["], f"'trusted=[' {UNREADABLE}"),
    "a number of 5,000 digits": (["seed=" + "1" * 5000], "a number on the command line has more than 4,300 digits"),
    "a number that is too large for a float": (
        ["kl.target=1e400"],
        "kl.target: expected a finite number, got inf; set it with kl.target=VALUE",
    ),
    "an environment variable that is not there": (
        ["name=${oc.env:NO_SUCH_VARIABLE}"],
        "KeyError raised while resolving interpolation: \"Environment variable 'NO_SUCH_VARIABLE' not found\"",
    ),
    "a sweep without -m": (["seed=range(3)"], "Sweep parameters 'seed=range(3)' requires --multirun"),
    "a sweep whose name is a number": (
        ["-m", "seed=1,2", "name=1"],
        "name: expected a text, got 1; quote it: 'name=\"1\"'",
    ),
    "a folder of Hydra's that cannot be made": (
        ["hydra.run.dir=/proc/x"],
        "/proc/x: cannot be written: No such file or directory",
    ),
    "a list where one text is wanted": (
        ["runs_dir=[a]"],
        "runs_dir: expected a valid string, got ['a']; set it with runs_dir=VALUE",
    ),
    "a key that is no text": (
        ["+ppo.stop_if={1:2}"],
        "ppo.stop_if: 1: unknown key",
    ),
    "a control character": (
        ["kl.target='\x1b[31m'"],
        "kl.target: expected a valid number, got '\\x1b[31m'; set it with kl.target=VALUE",
    ),
    "a sign that does not print": (["na\x1bme=1"], f"'na\\x1bme=1' {UNREADABLE}"),
    "half of a surrogate pair": (["name=\ud83d"], f"'name=\\ud83d' {UNREADABLE}"),
    "a letter that wants quotes": (["name=ü"], f"'name=ü' {UNREADABLE}"),
    "a group in place of a value": (
        ["+seed.x=1"],
        "seed: expected a valid integer, got {'x': 1}; set it with seed=VALUE",
    ),
    "an option twice": (["+kl=fixed"], "Multiple values for kl. To override a value use 'override kl: fixed'"),
    "the name of a folder and of a file": (
        ["data=jsonl", "data.path=runs"],
        "data.path=runs: expected a file, got a folder; name its files, as in runs/*.jsonl",
    ),
}


@pytest.mark.parametrize("words, line", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_settings(typed, refused, no_stage, words, line):
    refused(lambda: typed("rlhf", *words), line)


def test_a_flag_that_there_is_not(typed, here):
    code, told = typed("rlhf", "--zzz")
    assert code == 2 and told[-1] == "alignkit rlhf: error: unrecognized arguments: --zzz"


def test_what_does_not_print_is_spelt_out():
    from alignkit.errors import UserError
    from alignkit.runtime.config import load

    with pytest.raises(UserError) as told:
        load({"a\n\x1b[31m\ud83d": 1})
    assert "a\\n\\x1b[31m\\ud83d: unknown key; known keys: name" in str(told.value)
