"""README and the pages of docs/ as the tests see them: their commands, links, names of settings and quoted output."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text("utf-8")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]
}
GENERATED = "docs/pages/reference.md"


def fences(text: str, *languages: str) -> list[str]:
    """What stands between ``` and ```, of these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if language in languages]


def spans(text: str) -> list[str]:
    """Inline code, outside of fences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def commands(text: str) -> list[str]:
    """Every `alignkit ...` of a page that is meant to work, without its comment."""
    lines = [line for body in fences(text, "bash") for line in re.sub(r"\\\n *", "", body).splitlines()] + spans(text)
    return [line.split("  #")[0].strip() for line in lines if line.startswith("alignkit ")]


def sessions(text: str) -> list[tuple[str, str]]:
    """(command, what it prints) of the blocks that show both: `$ alignkit ...` and lines below it."""
    found = []
    for body in fences(text, ""):
        parts = re.split(r"^\$ (alignkit .*)\n", body, flags=re.M)
        found += list(zip(parts[1::2], parts[2::2]))
    return found


def anchors(text: str) -> set[str]:
    """The places of a page that a link may name: headings as MkDocs and GitHub slug them, and ids."""
    bare = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    headings = [re.sub(r"[^\w\s-]", "", line.lower()).strip() for line in re.findall(r"^#+ (.*)$", bare, re.M)]
    return {re.sub(r"[\s-]+", "-", heading) for heading in headings} | set(re.findall(r'<span id="([^"]+)"', text))


def links(text: str) -> list[str]:
    """Targets of all links and pictures that stay in the repository."""
    bare = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", bare) if "://" not in target]
