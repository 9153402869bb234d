"""A page that is one file: its own style, pictures inside, nothing to load; nothing runs but what sorts a table."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ddd;--soft:#666;--alarm:#b3261e;--alarm-paper:#fdf1f0;
--accent:#0072b2;--mark:#f1f6fa}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#1b1b1f;--line:#444;--soft:#aaa;--alarm:#ff9a90;
--alarm-paper:#33211f;--accent:#56b4e9;--mark:#22282e}}
body{margin:0 auto;padding:1rem;max-width:80rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:break-word}
h1{font-size:1.5rem;margin:.3rem 0}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;margin:1.5rem 0 .4rem}
a{color:var(--accent)}nav a{margin-right:1rem;white-space:nowrap}
.alarm{border-left:4px solid var(--alarm);background:var(--alarm-paper);padding:.5rem .8rem;margin:.6rem 0;
white-space:pre-wrap}
.soft{color:var(--soft)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem}
figure{margin:0;min-width:0}figure svg,figure img{width:100%;height:auto;display:block}
figcaption{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}summary{cursor:pointer}details{margin:.6rem 0}
.sorted td{white-space:pre-wrap}.sorted .n{text-align:right;white-space:nowrap}.sorted .marked{background:var(--mark)}
.sorted button{font:inherit;font-weight:600;color:inherit;text-align:inherit;background:none;border:0;padding:0;
cursor:pointer}
.sorted button:after{content:"\\a0\\2195";color:var(--soft)}
.sorted [aria-sort=ascending] button:after{content:"\\a0\\25b2"}
.sorted [aria-sort=descending] button:after{content:"\\a0\\25bc"}
.tag{border:1px solid currentColor;border-radius:.6rem;padding:0 .5rem;margin-right:.4rem;font-size:.85rem;
white-space:nowrap}
@media (max-width:45rem){.sorted,.sorted tbody,.sorted tbody tr{display:block}
.sorted thead tr{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding-bottom:.5rem}.sorted th{border:0;padding:0}
.sorted tbody tr{border-top:1px solid var(--line);padding:.4rem .3rem}
.sorted td{display:block;border:0;padding:.1rem 0}.sorted td.n{display:inline-block;margin-right:1.1rem}
.sorted td:before{content:attr(data-name) " ";color:var(--soft);font-size:.85rem}.sorted td:empty{display:none}}
"""

# A click on a header sorts: numbers from the largest first, texts from A; a second click turns it round. No < and no &,
# so that a page stays XML.
SORT = """
for(const button of document.querySelectorAll(".sorted th button"))button.addEventListener("click",()=>{
const head=button.parentNode,body=head.closest("table").tBodies[0],column=head.cellIndex,rows=[...body.rows];
const numbers=rows.some(row=>row.cells[column].dataset.value);
const key=row=>{const cell=row.cells[column],text=numbers?cell.dataset.value:cell.textContent.trim();
return text?(numbers?Number(text):text):null};
const was=head.getAttribute("aria-sort"),up=was?was==="descending":!numbers;
rows.sort((a,b)=>{const x=key(a),y=key(b);if(x===null||y===null)return (x===null)-(y===null);
return (x>y?1:y>x?-1:0)*(up?1:-1)});
for(const other of head.parentNode.cells)other.removeAttribute("aria-sort");
head.setAttribute("aria-sort",up?"ascending":"descending");body.append(...rows)});
"""
NUMBER = ' class="n"'
NO_CHARACTER = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Html(str):
    """Text that is HTML already; any other text is escaped."""


class Cell(NamedTuple):
    """Of a sortable table. value: the number by which it is sorted (None: last); texts are sorted as they are."""

    text: str
    value: float | None = None
    is_number: bool = False


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file; parts: of HTML, in order. The browser is told to load nothing and to run nothing but SORT, so
    that not even a mistake in escaping lets a text act."""
    sorts = any('<table class="sorted"' in part for part in parts)
    known = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:"
    policy += f"; script-src 'sha256-{known}'" * sorts
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SORT}</script>" * sorts
        + "\n</body></html>\n"
    )


def write_page(file: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page, whole or not at all, through no link; returns its path."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.write_text(page(title, parts), encoding="utf-8")
    return fresh.replace(file)


def html(text: str) -> str:
    """Text as HTML: escaped, unless it is HTML already. What is no character of XML becomes a question mark."""
    return text if isinstance(text, Html) else escape(NO_CHARACTER.sub("\ufffd", text))


def paragraph(text: str, alarm: bool = False, soft: bool = False) -> str:
    """alarm: something that must not be overlooked; soft: in grey."""
    kind = ' class="alarm"' if alarm else ' class="soft"' if soft else ""
    return f"<p{kind}>{html(text)}</p>"


def heading(text: str, anchor: str = "", level: int = 2) -> str:
    """Of a section. anchor: the name by which a link of this page finds it."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def link(text: str, target: str) -> Html:
    """To a file, by its path from the page's folder."""
    return Html(f'<a href="{escape(quote(target))}">{html(text)}</a>')


def contents(sections: Sequence[tuple[str, str]]) -> str:
    """Links to sections, as (title, anchor)."""
    return "<nav>" + " ".join(f'<a href="#{escape(name)}">{escape(title)}</a>' for title, name in sections) + "</nav>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Texts in rows."""
    top = "".join(f"<th>{html(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def sorted_table(head: Sequence[str], rows: Sequence[Sequence[Cell]], marked: Sequence[int] = ()) -> str:
    """Sorted by a click on a header; on a narrow screen each row is a small block. marked: numbers of rows."""
    numbers = {name for row in rows for name, cell in zip(head, row) if cell.is_number}
    top = "".join(
        f'<th{NUMBER * (name in numbers)}><button type="button">{escape(name)}</button></th>' for name in head
    )
    body = []
    for number, row in enumerate(rows):
        cells = [
            f'<td data-name="{escape(name)}"'
            + (f'{NUMBER} data-value="{"" if cell.value is None else f"{cell.value:.9g}"}"' if cell.is_number else "")
            + f">{html(cell.text)}</td>"
            for name, cell in zip(head, row)
        ]
        kind = ' class="marked"' if number in marked else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="sorted"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def folded(title: str, content: str) -> str:
    """HTML that opens at a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def pictures(figures: Sequence[tuple[str, str]]) -> str:
    """(SVG, caption) side by side where there is room."""
    inside = "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in figures)
    return f'<div class="pictures">{inside}</div>'


def wide_picture(svg: str, caption: str, width: float) -> str:
    """A picture of at least `width` pixels, in which a narrower screen scrolls, and up to 1.4 times as many."""
    return (
        f'<figure><div class="wide"><div style="min-width:{width:g}px;max-width:{1.4 * width:g}px">{svg}</div></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
