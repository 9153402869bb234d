"""report.html of a run and of a sweep: what it says of a whole run, of half a run, of texts that would be markup."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from alignkit.observe.closing import closing_words
from alignkit.observe.run_folder import ENDED
from alignkit.observe.run_report import Change, write_run_report
from alignkit.observe.sweep_report import write_sweep_report

SUMMARY = {
    "sft/eval_loss": 0.758, "sft/eval_perplexity": 2.134, "sft/train_rows": 1200,
    "reward_model/eval_accuracy": 0.902, "reward_model/eval_accuracy_low": 0.881,
    "reward_model/eval_accuracy_high": 0.919, "reward_model/eval_accuracy_bag_of_words": 0.875,
    "reward_model/eval_pairs": 812,
    "ppo/score_first": -0.04, "ppo/score_mean": 1.55, "ppo/kl": 5.77, "ppo/kl_target": 6.0,
    "evaluate/win_rate": 0.88, "evaluate/win_rate_low": 0.811, "evaluate/win_rate_high": 0.926,
    "evaluate/prompts": 100, "evaluate/judge": "gold", "evaluate/judge_is_the_reward": False,
    "seconds/total": 262.0,
}  # fmt: skip
HOSTILE = '<script>alert(1)</script> & "quotes" \x00\ud800'


def write(file, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def stage(folder, name: str, number: int, **manifest) -> None:
    facts = {"stage": name, "alignkit": "0.1.0", "finished": 1e9 + number, "metrics": {"seconds": 60.0 + number}}
    write(folder / name / "manifest.json", facts | manifest)
    write(folder / name / "job.json", {"stage": name, "run": folder.name})


def ppo_rows(count: int, kl: float = 5.77) -> list[dict]:
    return [
        {"ppo/episodes": 16 * i, "ppo/kl": kl * min(1, i / 10), "ppo/kl_coef": 0.1, "ppo/kl_target": 6.0,
         "ppo/score_mean": 1.55 * i / count, "ppo/gold_mean": 0.7 * i / count + 0.01 * (i % 2), "ppo/entropy": 2.0,
         "ppo/clip_fraction": 0.1, "ppo/value_clip_fraction": 0.2, "ppo/explained_variance": 0.5,
         "ppo/response_length": 20.0, "ppo/seconds/rollout": 0.3, "ppo/seconds/iteration": 0.6}
        for i in range(1, count + 1)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished run of SFT, reward model, PPO and evaluation, written by hand."""
    folder = tmp_path / "a"
    for number, name in enumerate(("sft", "reward_model", "ppo", "evaluate")):
        stage(folder, name, number)
    (folder / "config.yaml").write_text("# alignkit rlhf\nseed: 0\n")
    write(folder / "summary.json", SUMMARY)
    write(folder / "sft" / "metrics.jsonl", [{"sft/step": i, "sft/loss": 3 / i} for i in range(1, 9)])
    write(folder / "reward_model" / "report.json", {"gate": {"passes": True}, "warnings": ["it likes length"]})
    write(folder / "ppo" / "metrics.jsonl", ppo_rows(40))
    responses = [
        {"prompt": f"prompt {i}", "baseline": "before", "policy": f"after {i}", "reward_policy": float(i % 7),
         "reward_baseline": 0.5, "kl": 1.5, "length_policy": 10 + i, "length_baseline": 9, "outcome": 1.0}
        for i in range(5)
    ]  # fmt: skip
    write(folder / "evaluate" / "responses.jsonl", [{**responses[0], "policy": HOSTILE}, *responses[1:]])
    return folder


def text_of(file) -> str:
    return file.read_text("utf-8")


def plain(file) -> str:
    """The page's text without markup; that it can be parsed says that its markup is whole."""
    tree = ElementTree.fromstring(text_of(file).partition("\n")[2])
    return " ".join("".join(tree.find("body").itertext()).split())


def test_every_stage_has_its_verdict(run):
    shown = plain(write_run_report(run))
    assert "Held-out loss 0.758 nats a token, a perplexity of 2.134, after 1,200 texts" in shown
    assert "It orders 90.2% of 812 held-out pairs rightly (95% 88.1% to 91.9%), better than a bag of words" in shown
    assert "passed the gate" in shown and "Reward model: it likes length" in shown
    assert "The score went from -0.04 to 1.55" in shown and "near its target of 6" in shown
    assert (
        "PPO is better than its start: it wins 88.0% of 100 held-out prompts (95% 81.1% to 92.6%; judge gold" in shown
    )
    assert "SFT → Reward model → PPO → Evaluation" in shown and "4 min 22 s" in shown


def test_the_target_of_the_kl_is_drawn(run):
    page = text_of(write_run_report(run))
    (picture,) = re.findall(r"<svg[^>]*>(?:(?!</svg>).)*KL; the dashed line.*?</svg>", page, re.S)[:1]
    assert 'class="guide"' in picture and "target 6" in picture
    for name in ("KL coefficient", "explained variance", "Score against KL", "Seconds of an iteration", "gold score"):
        assert name in page


def test_texts_of_models_stay_texts(run):
    write(run / "evaluate" / "report.json", {"warnings": ["<img src=x onerror=alert(1)>"]})
    page = text_of(write_run_report(run, error="<script>bad()</script>"))
    assert "alert(1)" in page and page.count("<script") == 1 and "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quotes&quot; \ufffd\ufffd" in page
    assert "script-src 'sha256-" in page and "default-src 'none'" in page
    plain(run / "report.html")


def test_nothing_is_loaded_and_links_lead_to_files_of_the_run(run):
    page = text_of(write_run_report(run))
    assert not re.search(r"""(src|href)=["'](https?:|//)|@import|url\(|<link|<img|<iframe""", page)
    links = [target for target in re.findall(r'href="([^"]*)"', page) if not target.startswith("#")]
    assert "sft/metrics.jsonl" in links and "config.yaml" in links
    assert all((run / target).exists() for target in links)


def test_the_best_the_worst_and_the_longest_are_marked_and_come_first(run):
    page = text_of(write_run_report(run))
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page.partition('<table class="sorted">')[2].partition("</table>")[0])
    tags = [re.findall(r'class="tag">(\w+)<', row) for row in rows[1:]]
    assert tags == [["best", "longest"], ["worst"], [], [], []]
    assert 'data-value="4"' in rows[1] and 'data-value="14"' in rows[1]


def test_settings_and_machine_are_told(run):
    write(run / ENDED, {"time": 9e9, "machine": {"host": "here", "GPUs": ["H200"]}, "versions": {"torch": "2.13"}})
    shown = plain(write_run_report(run, None, [Change("kl.target", "6.0", "3.0")]))
    assert "kl.target6.03.0" in shown and "H200" in shown and "torch 2.13" in shown
    assert "None." in plain(write_run_report(run, None, []))


def test_a_run_that_failed_says_what_there_is(run, tmp_path):
    (run / "evaluate" / "manifest.json").unlink()
    (run / "ppo" / "manifest.json").unlink()
    (run / "evaluate" / "responses.jsonl").unlink()
    (run / "summary.json").unlink()
    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"ppo/episodes": 656, "ppo/kl": 1')  # torn
    write(run / ENDED, {"time": 9e9, "error": "ppo: the loss is not finite"})
    shown = plain(write_run_report(run))
    assert "This run did not reach its end: ppo: the loss is not finite" in shown
    assert "Not finished: its last row of metrics is at ppo/episodes 640." in shown
    write(run / ENDED, {"time": 1.0, "error": "of an earlier attempt"})
    assert "earlier attempt" not in plain(write_run_report(run))


def test_stages_and_files_that_are_missing_or_damaged_are_left_out(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no stage was begun" in plain(write_run_report(empty, "stopped by SIGTERM"))
    stage(empty, "sft", 0)
    (empty / "summary.json").write_text("{")
    (empty / "sft" / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"sft/step": 1, "sft/loss": null}\n')
    shown = plain(write_run_report(empty))
    assert "Finished." in shown and "Samples" not in shown
    write(empty / "sft" / "report.json", {"warnings": 3})
    assert "damaged or of another version" in plain(write_run_report(empty))


def test_a_long_run_stays_small(run):
    write(run / "ppo" / "metrics.jsonl", ppo_rows(10_000))
    long = {"prompt": "<" * 9000, "baseline": "&" * 9000, "policy": "'" * 9000, "reward_policy": 1.0}
    write(run / "evaluate" / "responses.jsonl", [long] * 1000)
    page = write_run_report(run)
    assert page.stat().st_size < 3e6
    longest = max(text_of(page).split('d="'), key=lambda d: d.count("L"))
    assert longest.partition('"')[0].count("L") < 300


def test_what_went_wrong_is_warned_of(run):
    rows = ppo_rows(50, kl=20.0)
    for number, row in enumerate(rows):
        row["ppo/gold_mean"] = 0.5 + 0.5 * math.sin(math.pi * number / 40) + 0.001 * (number % 2)
    rows[3]["nonfinite"] = ["ppo/value_loss"]
    write(run / "ppo" / "metrics.jsonl", rows)
    shown = plain(write_run_report(run))
    assert "far above its target of 6" in shown and "over-optimised" in shown and "in ppo/value_loss" in shown


@pytest.fixture
def sweep(tmp_path, run):
    """A sweep of three jobs: two done, one failed."""
    write_run_report(run)
    jobs = [
        {"number": number, "name": f"s-{number}", "run": str(run), "changes": {"kl.coef": coef, "kl": "fixed"},
         "status": "done" if rate else "failed", "objective": [rate] if rate else None, "seconds": 41.2,
         "log": str(tmp_path / "log"), "error": None if rate else "ppo: <b>NaN</b>",
         "summary": {"ppo/kl": 5.0, "evaluate/win_rate_low": 0.8, "evaluate/win_rate_high": 0.9} if rate else {}}
        for number, coef, rate in ((1, "0.05", 0.88), (0, "0.2", 0.81), (2, "1e-3", None))
    ]  # fmt: skip
    folder = tmp_path / ".sweeps" / "s"
    board = {
        "name": "s",
        "recipe": "rlhf",
        "objective": ["evaluate/win_rate"],
        "lower_is_better": [False],
        "jobs": jobs,
    }
    write(folder / "leaderboard.json", board)
    return folder


def test_a_sweep_has_leaderboard_coordinates_and_frontier(sweep):
    file = write_sweep_report(sweep)
    page, shown = text_of(file), plain(file)
    assert "Best is job 1 (kl.coef=0.05 kl=fixed): evaluate/win_rate 0.88 (0.800 to 0.900)" in shown
    assert "3 jobs: 2 done, 1 failed" in shown
    assert "job 2 (kl.coef=1e-3 kl=fixed): ppo: <b>NaN</b>" in shown and "<b>" not in page
    assert 'href="../../a/report.html"' in page and (sweep / "../../a/report.html").is_file()
    assert "parallel coordinates" in page and "<title>job 0: kl.coef=0.2 kl=fixed</title>" in page
    assert ">frontier</text>" in page and page.count('<table class="sorted">') == 1


def test_a_sweep_without_results_says_so(sweep):
    board = json.loads((sweep / "leaderboard.json").read_text())
    waiting = {"status": "waiting", "objective": None, "seconds": None, "error": None, "summary": {}}
    board["jobs"] = [job | waiting for job in board["jobs"]]
    write(sweep / "leaderboard.json", board)
    shown = plain(write_sweep_report(sweep))
    assert "No job has come to its objective yet. 3 jobs: 3 waiting." in shown and "Frontier" not in shown


def test_the_verb_finds_runs_and_sweeps(sweep, monkeypatch, capsys):
    from alignkit.cli import main

    monkeypatch.chdir(sweep.parents[1])
    for words, code in (([str(sweep)], 0), (["nothing"], 2), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["alignkit", "report", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    told = capsys.readouterr()
    assert told.out.strip() == str(sweep / "report.html")
    assert "'nothing' is not the folder of a run" in told.err and "of which run?" in told.err


def test_changes_are_those_against_the_recipe_and_hydra_stays_as_it_was():
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from alignkit.runtime.config import conf_dir
    from alignkit.runtime.report_run import changes

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        mine = compose("rlhf", ["name=a", "kl.target=3", "kl.place=loss", "+peft.settings.r=8"])
        before = GlobalHydra.instance().hydra
        found = changes("rlhf", OmegaConf.to_container(mine))
        assert GlobalHydra.instance().hydra is before
    assert Change("kl.target", "6.0", "3") in found and Change("peft.settings.r", "", "8") in found
    assert {change.key for change in found} == {"kl.target", "kl.place", "peft.settings.r"}


def test_the_closing_words_name_the_report(tmp_path):
    write(tmp_path / "evaluate" / "report.json", {"warnings": []})
    told = closing_words({"seconds/total": 3.0}, tmp_path, ["sft"], "report in runs/a/report.html")
    assert "\nreport in runs/a/report.html\n" in told
