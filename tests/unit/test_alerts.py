"""What is told of a run that goes wrong, and what ends it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from stub_stage import composed

from alignkit.errors import NotFinite, UserError
from alignkit.observe.alerts import EARLY, Limits, Watch
from alignkit.observe.closing import closing_words
from alignkit.observe.run_report import write_run_report
from alignkit.observe.tracking import Tracker
from alignkit.runtime.artifact import stage_digest
from alignkit.runtime.config import load
from alignkit.stages.ppo_stop import Stop

LIMITS = Limits(kl_ratio=4.0, kl=100.0, entropy=0.1, explained_variance=-2.0, value_loss=20.0, nan=True)
NOTHING = Limits(kl_ratio=None, kl=None, entropy=None, explained_variance=None, value_loss=None, nan=False)
USUAL = {"kl": 5.0, "entropy": 1.0, "explained_variance": 0.5, "value_loss": 0.2, "score_mean": 1.0}


def watch(target: float | None = 6.0, limits: Limits = LIMITS, rows: int = EARLY) -> Watch:
    made = Watch(limits, target)
    for _ in range(rows):
        assert made.look(USUAL) == {}
    return made


@pytest.mark.parametrize(
    "target, figures, kind, words",
    [
        (6.0, {"kl": 24.1}, "kl", "KL of 24.1 nats is above 4 times kl.target=6"),
        (None, {"kl": 101.0}, "kl", "KL of 101 nats is above 100"),
        (6.0, {"entropy": 0.0999}, "entropy", "entropy of 0.0999 nats a token is below 0.1 of the first iteration's 1"),
        (6.0, {"explained_variance": -2.1}, "value", "explained variance of -2.1 is below -2"),
        (6.0, {"value_loss": 4.1}, "value", "value loss of 4.1 is above 20 times the first iterations' 0.2"),
        (6.0, {"score_mean": math.nan}, "nan", "score_mean: not finite (NaN or infinity)"),
        (6.0, {"kl": math.inf}, "nan", "kl: not finite (NaN or infinity)"),
    ],
)
def test_each_kind_is_found_beyond_its_limit_and_left_out_by_null(target, figures, kind, words):
    assert watch(target).look({**USUAL, **figures}) == {kind: words}
    assert watch(target, NOTHING).look({**USUAL, **figures}) == {}


@pytest.mark.parametrize(
    "target, figures",
    [(6.0, {"kl": 24.0}), (None, {"kl": 100.0}), (6.0, {"entropy": 0.1}), (6.0, {"explained_variance": -2.0}),
     (6.0, {"value_loss": 4.0})],
)  # fmt: skip
def test_nothing_is_found_at_the_limit(target, figures):
    assert watch(target).look({**USUAL, **figures}) == {}


def test_a_value_model_may_begin_badly():
    early = watch(rows=EARLY - 1)
    assert early.look({**USUAL, "explained_variance": -50.0, "value_loss": 90.0}) == {}
    assert set(early.look({**USUAL, "explained_variance": -50.0})) == {"value"}


def test_rows_that_lack_figures_or_begin_with_nan_are_no_trouble():
    bare = Watch(LIMITS)
    for _ in range(EARLY + 1):
        assert set(bare.look({"value_loss": math.nan})) == {"nan"}
    assert bare.look({"loss": 3.0}) == bare.look({}) == {}


@pytest.mark.parametrize(
    "change, words",
    [({"kl_ratio": 1.0}, "greater than 1"), ({"kl": 0.0}, "greater than 0"), ({"entropy": 1.0}, "less than 1"),
     ({"explained_variance": 0.0}, "less than 0"), ({"value_loss": 0.5}, "greater than 1"), ({"nan": 1}, "boolean"),
     ({"kl_rato": 2.0}, "kl_rato")],
)  # fmt: skip
def test_limits_are_checked(change, words):
    with pytest.raises(ValidationError, match=words):
        Limits(**{**vars(NOTHING), **change})


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}


def test_an_alert_is_a_line_a_field_and_a_message_once(tmp_path, capsys):
    told = []
    sink = SimpleNamespace(
        log=lambda row: None, alert=lambda *words: told.append(words), summarise=lambda figures: None
    )
    tracker = Tracker(tmp_path, "ppo", True, sink, Watch(LIMITS, 6.0))
    for step, kl in enumerate([5.0, 30.0, 40.0, 5.0, 50.0], start=1):
        tracker.log({**USUAL, "kl": kl}, step=64 * step)
    text = "KL of 30 nats is above 4 times kl.target=6, at ppo/episodes=128"
    assert capsys.readouterr().out == f"ppo: alert: {text}\n"
    assert told == [("ppo: kl", text)]
    assert summary(tmp_path) == {"ppo/alert_kl": text} and tracker.alerts() == {"alert_kl": text}
    Tracker(tmp_path, "ppo", True, sink, Watch(LIMITS, 6.0)).log({**USUAL, "kl": 60.0}, step=384)
    assert len(told) == 1, "not again after a resume"


def test_other_ranks_are_silent_and_other_stages_know_only_nan(tmp_path, capsys):
    other = Tracker(tmp_path / "other", "ppo", False, None, Watch(LIMITS, 6.0))
    other.log({"kl": 900.0}, step=1)
    assert other.alerts() == {} and capsys.readouterr().out == ""
    tracker = Tracker(tmp_path / "sft", "sft", True)
    tracker.log({"loss": 2.0, "entropy": 4.0}, step=1)
    tracker.log({"loss": 2.0, "entropy": 0.01}, step=2)
    assert summary(tmp_path / "sft") == {}
    tracker.log({"loss": math.nan}, step=3)
    assert summary(tmp_path / "sft") == {"sft/alert_nan": "loss: not finite (NaN or infinity), at sft/step=3"}


def test_a_resumed_stage_is_judged_by_its_own_first_rows(tmp_path):
    first = Tracker(tmp_path, "ppo", True, None, Watch(LIMITS, 6.0))
    first.log(USUAL, step=64)
    position = first.position()
    again = Tracker(tmp_path, "ppo", True, None, Watch(LIMITS, 6.0))
    again.rewind(position)
    again.log({**USUAL, "entropy": 0.05}, step=128)
    assert set(again.alerts()) == {"alert_entropy"}


def test_a_run_that_does_not_want_to_hear_of_nan_does_not(tmp_path, capsys):
    tracker = Tracker(tmp_path, "ppo", True, None, Watch(NOTHING))
    tracker.log({"kl": math.nan}, step=1)
    tracker.alert("nan", "gradient is not finite")
    assert capsys.readouterr().out == "" and tracker.alerts() == {}


def stop_of(tmp_path, **limits) -> Stop:
    config = SimpleNamespace(
        ppo=SimpleNamespace(stop_if=replace(NOTHING, **limits)),
        kl=SimpleNamespace(target=6.0),
    )
    tracker = Tracker(tmp_path, "ppo", True)
    return Stop(config, SimpleNamespace(share=int, is_main=True), tracker)


def test_a_run_stops_beyond_a_limit_that_was_set_and_says_so(tmp_path, capsys):
    stop = stop_of(tmp_path, kl_ratio=5.0)
    stop.look({**USUAL, "kl": 29.0})
    assert stop.reason == ""
    stop.look({**USUAL, "kl": 31.0})
    assert stop.reason == "KL of 31 nats is above 5 times kl.target=6"
    assert capsys.readouterr().out == f"ppo: stopped by ppo.stop_if: {stop.reason}\n"
    never = stop_of(tmp_path)
    never.cluster.share = None  # nothing crosses the ranks where nothing was asked for
    never.look({**USUAL, "kl": 9e9})
    assert never.reason == ""


def test_every_rank_obeys_rank_0(tmp_path):
    stop = stop_of(tmp_path, entropy=0.1)
    stop.cluster = SimpleNamespace(share=lambda value: 1, is_main=False)
    stop.look(USUAL)
    assert stop.reason


def test_nan_fails_a_run_unless_it_is_to_end_it(tmp_path):
    error = NotFinite("gradient is not finite")
    with pytest.raises(NotFinite):
        stop_of(tmp_path, kl_ratio=2.0).catch(error, iterations=3)
    with pytest.raises(NotFinite):
        stop_of(tmp_path, nan=True).catch(error, iterations=0)
    stop = stop_of(tmp_path, nan=True)
    stop.catch(error, iterations=3)
    assert stop.reason == "gradient is not finite" == stop.tracker.alerts()["alert_nan"]


# ------------------------------------------------------------------------------------------------------- the settings


def settings_with(**changes) -> dict:
    raw = composed("rlhf")
    for name, value in changes.items():
        raw[name] = {**raw[name], **value}
    return raw


def stopping(**limits) -> dict:
    return {"stop_if": {**vars(NOTHING), **limits}}


def test_nothing_stops_a_run_by_default_and_its_product_is_as_before_there_was_such_a_setting():
    raw = composed("rlhf")
    assert load(raw).ppo.stop_if == NOTHING
    without = {**raw, "ppo": {name: value for name, value in raw["ppo"].items() if name != "stop_if"}}
    inputs = {"policy": "a", "reward": "b"}
    for stage in ("ppo", "evaluate"):
        assert stage_digest(stage, raw, "d", inputs) == stage_digest(stage, without, "d", inputs)
        stopped = settings_with(ppo=stopping(nan=True))
        assert stage_digest(stage, raw, "d", inputs) != stage_digest(stage, stopped, "d", inputs)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ppo": stopping(kl=9.0)}, "ppo.stop_if.kl=9.0: kl.target=6.0; set ppo.stop_if.kl_ratio"),
        ({"ppo": stopping(kl_ratio=0.5)}, "ppo.stop_if: kl_ratio: expected greater than 1, got 0.5"),
        ({"ppo": stopping(kl_rato=2.0)}, "ppo.stop_if: kl_rato: unknown key"),
        ({"ppo": {"stop_if": {"nan": True}}}, "ppo.stop_if: kl_ratio: missing"),
        ({"tracking": {"alerts": {**vars(LIMITS), "entropy": 2.0}}}, "tracking.alerts: entropy: expected less than 1"),
        ({"tracking": {"artifacts": "copy"}}, "tracking.artifacts: expected 'none', 'reference' or 'upload'"),
    ],
)
def test_a_wrong_limit_is_told_with_its_path(changes, words):
    with pytest.raises(UserError) as told:
        load(settings_with(**changes))
    assert words in str(told.value)


def test_a_fixed_coefficient_has_no_target_to_be_a_multiple_of():
    raw = settings_with(ppo=stopping(kl_ratio=2.0))
    raw["kl"] = {"_target_": "alignkit.algo.control.FixedKL", "coef": 0.1, "estimator": "k1", "place": "reward"}
    with pytest.raises(UserError, match="kl has no target; set ppo.stop_if.kl in nats"):
        load(raw)
    raw["ppo"] |= stopping(kl=50.0)
    assert load(raw).ppo.stop_if.kl == 50.0


def test_the_last_words_and_the_report_repeat_what_was_told(tmp_path):
    summary = {
        "ppo/alert_kl": "KL is 40.0, 8.0 times its target",
        "ppo/stopped": "entropy has collapsed",
        "ppo/kl": 40.0,
    }
    told = closing_words(summary, tmp_path, ["ppo"])
    assert "PPO: warning: KL is 40.0, 8.0 times its target" in told
    assert "PPO: warning: ended early: entropy has collapsed" in told
    (tmp_path / "config.yaml").write_text("# alignkit ppo\n{}\n")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "manifest.json").write_text(json.dumps({"stage": "ppo", "metrics": {}}))
    page = write_run_report(tmp_path).read_text("utf-8")
    assert "PPO: KL is 40.0, 8.0 times its target" in page and "PPO: ended early: entropy has collapsed" in page
