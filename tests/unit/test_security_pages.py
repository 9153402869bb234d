"""Whatever text stands anywhere in the files that a page is made of: it stays text."""

import copy
import json
from pathlib import Path
from xml.etree import ElementTree

from test_run_report import run  # noqa: F401  a fixture

from alignkit.observe.run_report import write_run_report
from alignkit.observe.sweep_report import write_sweep_report

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)><svg onload="alert(1)">\''


def places(node, path=()):
    """The way to every leaf and every key of a JSON value."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


def spoilt(content, path, key: bool):
    """The value with EVIL in that place, or as the key of it."""
    result = copy.deepcopy(content)
    node = result
    for step in path[:-1]:
        node = node[step]
    if key:
        node[EVIL] = node.pop(path[-1])
    else:
        node[path[-1]] = EVIL
    return result


def elements(file: Path) -> set[str]:
    """The kinds of elements and attributes of a page, which must be whole."""
    tree = ElementTree.fromstring(file.read_text("utf-8").partition("\n")[2])
    return {each.tag.rpartition("}")[2] for each in tree.iter()} | {
        name for each in tree.iter() for name in each.attrib
    }


def attacked(file: Path, write) -> int:
    """Spoil each place of a JSON or JSONL file in turn; each page has nothing that the sound one has not. Returns how
    many pages were written: of a file that is too damaged there is none, and the command says so."""
    text = file.read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    sound, count = elements(write()) | {"p", "class", "details", "summary"}, 0
    for path in places(lines[0]):
        for key in (False, True)[: 1 + isinstance(path[-1], str)]:
            first = spoilt(lines[0], path, key)
            file.write_text("\n".join(map(json.dumps, [first, *lines[1:]])), encoding="utf-8")
            try:
                page = write()
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            assert elements(page) <= sound, (file, path)
            assert page.read_text("utf-8").count("<script") <= 1 and "<img" not in page.read_text("utf-8")
            count += 1
    file.write_text(text, encoding="utf-8")
    return count


def test_a_run_report_shows_hostile_texts_as_texts(run):  # noqa: F811
    ended = {"time": 9e9, "error": "e", "machine": {"host": "h", "GPUs": ["g"]}, "versions": {"torch": "2"}}
    (run / "ended.json").write_text(json.dumps(ended))
    files = [file for file in run.rglob("*.json*") if file.name not in ("metrics.jsonl",)]
    assert sum(attacked(file, lambda: write_run_report(run)) for file in files) > 80


def test_a_run_report_of_hostile_names_and_settings(run):  # noqa: F811
    sound = elements(write_run_report(run))
    (run / "config.yaml").write_text(f"# alignkit {EVIL}\n")
    (run / "sft").rename(run / EVIL.replace("/", ""))
    (run / 'a"onerror="b.svg').write_text("<svg/>")
    page = write_run_report(run, EVIL, [(EVIL, EVIL, EVIL)])
    assert elements(page) - sound <= {"img", "alt", "src", "p", "class"}
    tree = ElementTree.fromstring(page.read_text("utf-8").partition("\n")[2])
    assert [each.attrib["src"][:26] for each in tree.iter("img")] == ["data:image/svg+xml;base64,"]


def test_a_sweep_report_shows_hostile_texts_as_texts(tmp_path):
    jobs = [
        {"number": n, "name": f"a-{n}", "run": str(tmp_path), "changes": {"seed": str(n)}, "status": status,
         "objective": [0.5 + n], "seconds": 1.0, "log": "no", "error": error, "summary": {"ppo/kl": 1.0 + n}}
        for n, (status, error) in enumerate([("done", None), ("done", None), ("failed", "why")])
    ]  # fmt: skip
    board = {"name": "a", "recipe": "rlhf", "objective": ["x"], "lower_is_better": [False], "jobs": jobs}
    (tmp_path / "leaderboard.json").write_text(json.dumps(board))
    assert attacked(tmp_path / "leaderboard.json", lambda: write_sweep_report(tmp_path)) > 30
