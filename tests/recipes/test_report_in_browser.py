"""Reports in a browser: they open without a complaint and without a network, and a click on a header sorts."""

import json
import re
import shutil
import subprocess

import pytest

from alignkit.observe.run_report import write_run_report
from alignkit.observe.sweep_report import write_sweep_report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"),
]
PROBE = """
<script>
const column=name=>[...document.querySelectorAll(".sorted th")].find(th=>th.textContent===name);
const rows=()=>[...document.querySelectorAll(".sorted tbody tr")];
const cells=name=>rows().map(row=>row.cells[column(name).cellIndex].textContent);
const told={};
for(const name of NAMES){const click=()=>column(name).querySelector("button").click();
click();told[name]=[cells(name)];click();told[name].push(cells(name));}
told.loaded=performance.getEntriesByType("resource").map(entry=>entry.name);
const out=document.createElement("pre");out.id="told";out.textContent=JSON.stringify(told);document.body.append(out);
</script>
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


def browse(page, folder) -> tuple[str, list[str]]:
    """The page's DOM once its scripts have run, and what the browser's console says."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def clicked(page, names: list[str], folder) -> dict:
    """What the columns hold after one click and after two. A copy runs the probe, which the page itself forbids."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", PROBE.replace("NAMES", json.dumps(names)) + "</body>"), encoding="utf-8")
    dom, complaints = browse(copy, folder)
    assert complaints == []
    found = re.search(r'<pre id="told">(.*?)</pre>', dom, re.S)
    assert found, "the probe did not reach its end"
    return json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture
def run(tmp_path):
    """A run of which there are PPO's metrics and an evaluation's responses."""
    folder = tmp_path / "a"
    for stage in ("ppo", "evaluate"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "manifest.json").write_text(json.dumps({"stage": stage, "finished": 1.0, "metrics": {}}))
    rows = [{"ppo/episodes": i, "ppo/kl": i / 9, "ppo/kl_target": 6.0, "ppo/score_mean": i / 50} for i in range(1, 80)]
    (folder / "ppo" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = ["pear", "<script>window.bad = 1; throw Error('ran')</script>", "apple"]
    responses = [
        {"prompt": text, "baseline": "b", "policy": text, "reward_policy": score, "kl": kl, "length_policy": 3}
        for text, score, kl in zip(texts, (9.5, -10.25, 100.0), (2.0, None, 11.0))
    ]
    (folder / "evaluate" / "responses.jsonl").write_text("\n".join(map(json.dumps, responses)))
    return folder


def test_a_report_opens_and_sorts(run, tmp_path):
    page = write_run_report(run, error="<img src='http://127.0.0.1:9/x'>")
    dom, complaints = browse(page, tmp_path)
    assert complaints == [] and "Samples" in dom, complaints
    told = clicked(page, ["score PPO", "KL", "PPO"], tmp_path)
    assert told["score PPO"] == [["100.00", "9.50", "\u221210.25"], ["\u221210.25", "9.50", "100.00"]]
    assert told["KL"] == [["11.00", "2.00", ""], ["2.00", "11.00", ""]], "what is not known comes last either way"
    assert [text[:5] for text in told["PPO"][0]] == ["<scri", "apple", "pear"]
    assert told["loaded"] == []


def test_the_page_lets_no_other_script_run(run, tmp_path):
    page = write_run_report(run)
    text = page.read_text("utf-8").replace("</body>", "<script>document.title = 'ran'</script></body>")
    page.write_text(text, encoding="utf-8")
    dom, complaints = browse(page, tmp_path)
    assert "<title>ran" not in dom and any("Content Security Policy" in line for line in complaints)


def test_a_sweep_opens_and_sorts(tmp_path):
    jobs = [
        {"number": number, "name": f"s-{number}", "run": str(tmp_path / str(number)), "changes": {"ppo.lr": rate},
         "status": "done", "objective": [0.9 - number / 10], "seconds": 40.0, "log": str(tmp_path / "log"),
         "error": None, "summary": {"ppo/kl": 5.0 + number}}
        for number, rate in enumerate(("2e-6", "1e-5", "3e-7"))
    ]  # fmt: skip
    board = {
        "name": "s",
        "recipe": "rlhf",
        "objective": ["evaluate/win_rate"],
        "lower_is_better": [False],
        "jobs": jobs,
    }
    (tmp_path / "leaderboard.json").write_text(json.dumps(board))
    page = write_sweep_report(tmp_path)
    told = clicked(page, ["ppo.lr", "rank"], tmp_path)
    assert told["ppo.lr"][0] == ["1e-5", "2e-6", "3e-7"] and told["rank"][1] == ["1", "2", "3"]
