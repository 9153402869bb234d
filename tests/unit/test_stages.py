"""What the stages do around TRL: rows as token ids, nothing dropped in silence, accuracy over all held-out pairs."""

import pytest
import torch

from alignkit.data.corpus import Demonstration, Pair, Split
from alignkit.errors import UserError
from alignkit.observe.closing import table
from alignkit.observe.progress import Progress, duration
from alignkit.stages.common import encode_demonstrations
from alignkit.stages.heldout import score_heldout, usable
from alignkit.stages.reward_report import accuracy_metrics

TURN = [{"role": "user", "content": "why?"}]


def test_sft_learns_the_response_and_its_end_but_not_the_prompt(encoder):
    (row,), _ = encode_demonstrations([Demonstration(TURN, "a lamp")], encoder, 100)
    prompt = encoder.prompt(TURN)
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert row["input_ids"][-1] == encoder.end_id


def test_sft_counts_what_it_cuts_and_what_it_leaves_out(encoder):
    rows = [Demonstration(TURN, "a lamp"), Demonstration(TURN, "a lamp " * 30), Demonstration("why " * 60, "a lamp")]
    encoded, counts = encode_demonstrations(rows, encoder, 40)
    assert [len(row["input_ids"]) for row in encoded][1] == 40 and len(encoded) == 2
    assert counts == {"responses were cut short": 1, "prompts were left out": 1}


def test_pairs_that_are_too_long_or_equal_are_counted(encoder):
    pairs = [Pair(TURN, "a lamp", "a stone"), Pair(TURN, "a lamp", "x " * 90), Pair(TURN, "a lamp", "a lamp")]
    ((pair, chosen, rejected),), dropped = usable(pairs, encoder, 60)
    assert dropped == {"too long": 1, "the same tokens": 1}
    assert (pair, (chosen, rejected)) == (pairs[0], encoder.pair(pairs[0]))


def test_accuracy_is_over_the_whole_held_out_set_with_its_interval(encoder):
    words = ["lamp", "stone", "storm", "street"]
    both = [(chosen, rejected) for chosen in words for rejected in words if chosen != rejected]
    pairs = [Pair(f"why {number}?", *texts) for number, texts in enumerate(both)]

    def length(rows):  # a scorer that prefers more tokens
        return torch.tensor([float(len(row)) for row in rows])

    metrics = accuracy_metrics(score_heldout(Split([], pairs, []), encoder, 60, length, 0))
    assert metrics["eval_accuracy"] == 0.5  # each pair is there both ways round
    assert metrics["eval_pairs"] == 12
    assert metrics["eval_accuracy_low"] == pytest.approx(0.25378, abs=1e-5)  # Wilson, 6 of 12


def test_labelled_texts_are_compared_each_with_each(encoder):
    split = Split([], [Pair("", "storm", "a")], [], contrast=(["a lamp in a street", "storm"], ["a", "lamp in"]))

    def length(rows):
        return torch.tensor([float(len(row)) for row in rows])

    metrics = accuracy_metrics(score_heldout(split, encoder, 60, length, 0))
    texts = [[len(encoder.response("", text)) for text in side] for side in split.contrast]
    expected = sum((p > n) + 0.5 * (p == n) for p in texts[0] for n in texts[1]) / 4
    assert metrics["eval_accuracy"] == expected and metrics["eval_pairs"] == 4


def test_no_held_out_pair_left_is_an_error(encoder):
    with pytest.raises(UserError, match="no held-out preference pairs are left"):
        score_heldout(Split([], [], []), encoder, 60, None, 0)


def test_table_shows_what_the_run_has():
    lines = table(
        {"ppo/kl": 5.987, "evaluate/win_rate": 0.8, "evaluate/win_rate_low": 0.7, "evaluate/win_rate_high": 0.9}
    )
    assert len(lines) == 2
    assert lines[0].endswith("5.99") and lines[1].endswith("0.800  (95% 0.700 to 0.900)")


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_progress_says_how_far_and_how_long_is_left(monkeypatch, capsys):
    monkeypatch.setenv("ALIGNKIT_TERMINAL", "0")
    progress = Progress("ppo", 4, active=True)
    progress.began -= 30.0
    progress.shown -= 30.0
    progress.update(3, "KL 1.00")
    progress.update(3)  # too soon for another line
    assert capsys.readouterr().out == "ppo 3/4  KL 1.00  10 s left\n"
