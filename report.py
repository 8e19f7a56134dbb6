r"""One self-contained HTML page: sections of text, tables and pictures. Nothing is fetched from anywhere when it is read.

    page(title, lead, sections) -> str        a Section has a title, a text, a table (rows: dicts), a picture (PNG bytes)

Pictures are inlined as base64. Colours follow the reader's light or dark setting; pictures keep their white ground.
"""
import base64
import re
from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ground: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5c616b; --line: #e2dfd9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171b; --card: #1e2126; --ink: #e8e6e3; --soft: #a3a8b1; --line: #33373e; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; }
.lead, .soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1.2rem 0 1.6rem; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem; margin: 1.25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .7rem 0; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; }
figure { margin: .9rem 0 .2rem; background: #ffffff; border-radius: 8px; padding: .5rem; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details summary { cursor: pointer; color: var(--accent); font-size: .92rem; margin-top: .6rem; }
@media print { section { break-inside: avoid; } }
"""


@dataclass
class Section:
    title: str
    text: str = ""
    table: list = None          # rows, dicts with the same keys
    picture: bytes = None       # PNG
    folded: bool = False        # the table is shown when it is asked for


def page(title, lead, sections):
    """The whole page, a str. Everything that is handed in is text, no HTML."""
    anchors = [re.sub(r"[^a-z0-9]+", "-", s.title.lower()).strip("-") for s in sections]
    links = "".join(f'<a href="#{a}">{escape(s.title)}</a>' for a, s in zip(anchors, sections))
    body = "".join(f'<section id="{a}">{section_html(s)}</section>\n' for a, s in zip(anchors, sections))
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body><main>\n<h1>{escape(title)}</h1>\n'
            f'<p class="lead">{escape(lead)}</p>\n<nav>{links}</nav>\n{body}</main></body>\n</html>\n')


def section_html(section):
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.picture:
        data = base64.b64encode(section.picture).decode()
        parts.append(f'<figure><img alt="{escape(section.title)}" src="data:image/png;base64,{data}"></figure>')
    if section.text:
        parts.append(f'<p class="soft">{escape(section.text)}</p>')
    if section.table:
        table = f'<div class="wide">{table_html(section.table)}</div>'
        parts.append(f"<details><summary>Numbers</summary>{table}</details>" if section.folded else table)
    return "\n".join(parts)


def table_html(rows):
    """Rows as a table; a column of numbers is set to the right."""
    def kind(value):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "number" if number else "long" if len(str(value)) > 40 else "text"

    def cell(value):
        return f'<td class="{kind(value)}">{escape(str(value))}</td>'
    head = "".join(f'<th class="{kind(value)}">{escape(key)}</th>' for key, value in rows[0].items())
    body = "".join(f'<tr>{"".join(map(cell, row.values()))}</tr>\n' for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table>"
