"""Self-contained HTML pages: no script, nothing loaded from elsewhere.

Titles are untrusted: all text from data goes through `escape_text` (in elements) or `escape_attribute`.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from html import escape

from data.files import GENERATOR

LIMIT = 200  # characters of a text from data
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # embeddings, overrides, isolates: they affect text after a title

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d5dae0;--card:#f6f8fa;--base:#8250df;
--tuned:#0969da;--right:#116329;--right-paper:#dafbe1;--bad:#a40e26;--focus:#0969da}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e6e9ee;--soft:#9aa5b1;--line:#333b45;--card:#181e25;
--base:#c297ff;--tuned:#6cb6ff;--right:#7ee2a0;--right-paper:#12351f;--bad:#ff8f8f;--focus:#6cb6ff}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Liberation Sans",sans-serif}
header,main,footer{max-width:62rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
footer{padding-bottom:3rem;color:var(--soft)}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6rem 0 .5rem}
h4{font-size:1rem;line-height:1.35;margin:0 0 .25rem;overflow-wrap:anywhere}
p{margin:.4rem 0 .8rem;max-width:46rem}
.lead{font-size:1.15rem}
.lead strong{white-space:nowrap}
.soft{color:var(--soft)}
small,.small{font-size:.85rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:.8rem 0 0;padding:0}
a{color:var(--tuned)}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:3px solid var(--focus);outline-offset:2px}
.skip{position:absolute;left:-999rem}
.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.4rem .8rem;z-index:1}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{text-align:left;padding:.32rem .8rem .32rem 0;border-bottom:1px solid var(--line);vertical-align:middle}
td.n,th.n{white-space:nowrap}
th{font-weight:600}
tbody th{font-weight:400}
.ci{color:var(--soft);font-size:.85em}
.up{color:var(--right);font-weight:600}
.down{color:var(--bad);font-weight:600}
.base-ink{color:var(--base)}
.tuned-ink{color:var(--tuned)}
.interval{width:10rem;height:auto;display:block}
.rule{stroke:var(--line);stroke-width:1}
.bar{stroke-width:3;stroke-linecap:round}
.bar.b{stroke:var(--base)}.bar.t{stroke:var(--tuned)}
.dot.b{fill:var(--base)}.dot.t{fill:var(--tuned)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 2rem}
.chart{margin:0;min-width:0}
.chart p{margin:.1rem 0 0}
.chart figcaption{font-weight:600}
.chart>svg{width:100%;height:auto;display:block}
.chart text{fill:var(--soft);font-size:12px}
.mark{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:var(--tuned)}.s1{stroke:var(--base);stroke-dasharray:6 4}.s2{stroke:var(--right)}
.s3{stroke:var(--tuned);stroke-dasharray:2 4}.s4{stroke:var(--right);stroke-dasharray:2 4}
.band{fill:var(--tuned);opacity:.16}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;list-style:none;margin:.2rem 0 0;padding:0;font-size:.85rem}
.key svg{width:28px;height:8px;margin-right:.4rem;vertical-align:middle}
.cases{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1rem;padding:0;margin:0;
list-style:none}
.case{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;min-width:0}
.query{display:flex;gap:.8rem;align-items:flex-start}
.query>div{min-width:0}
.thumb{display:block;width:8rem;height:auto;max-height:8rem;object-fit:contain;border-radius:4px;flex:none;
background:var(--line)}
.gone{display:grid;place-items:center;width:8rem;height:4.5rem;border-radius:4px;background:var(--line);
color:var(--soft);font-size:.8rem;flex:none}
.rank{font-weight:600}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr));gap:.2rem 1rem}
.two h5,.strip h5{margin:.6rem 0 .1rem;font-size:.85rem}
.two ol{margin:0;padding:0;list-style:none;font-size:.85rem;line-height:1.35}
.two li{display:flex;gap:.5rem;padding:.12rem .3rem;border-radius:4px}
.two li bdi{overflow-wrap:anywhere;min-width:0}
.score{color:var(--soft);font-variant-numeric:tabular-nums}
.right{background:var(--right-paper);color:var(--right);font-weight:600}
.right .score{color:inherit}
.strip ol{display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:.4rem;margin:0;padding:0;list-style:none;
font-size:.8rem}
.strip .thumb,.strip .gone{width:100%;aspect-ratio:4/3;height:auto;max-height:none}
.strip li{padding:.2rem;border-radius:6px;border:2px solid transparent;min-width:0;overflow-wrap:anywhere}
.strip li.right{border-color:var(--right)}
.results{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:1rem;padding:0;margin:0;
list-style:none}
.results .thumb{width:100%;height:10rem;max-height:none}
.results p{overflow-wrap:anywhere}
summary{cursor:pointer;font-weight:600;padding:.3rem 0}
details{margin:.6rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.88em/1.5 ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem;white-space:pre-wrap}
@media (max-width:30rem){.thumb,.gone{width:6rem}dl{grid-template-columns:1fr}dt{color:var(--soft)}
th,td{padding-right:.5rem}.ci{display:block;font-size:.78em}.bars{display:none}table{font-size:.88rem}}
@media print{.case{break-inside:avoid}}
"""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{generator}
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>{header}</header>
<main id="main">{main}</main>
<footer>{footer}</footer>
</body>
</html>
"""


def document(title: str, header: str, main: str, footer: str) -> str:
    """Return a whole page; `title` is plain text, the other parts are HTML."""
    return PAGE.format(policy=POLICY, generator=GENERATOR, title=escape(clean(title)), style=STYLE, header=header,
                       main=main, footer=footer)


def template(text: str) -> str:
    """Return a template for `str.format` without its line breaks, which are there for its readers alone."""
    return text.replace("\n", "")


def clean(value: object, limit: int = LIMIT) -> str:
    """Return one line of at most `limit` characters, without control, surrogate and bidi formatting characters."""
    raw = BIDI.sub("", str(value)[:4 * limit])
    characters = []
    for char in raw:
        forbidden = unicodedata.category(char) in ("Cc", "Cs") and not char.isspace()
        characters.append("\ufffd" if forbidden else char)
    line = " ".join("".join(characters).split())
    return line if len(line) <= limit else line[:limit - 1] + "…"


def escape_text(value: object, limit: int = LIMIT) -> str:
    """Return text from data for an element: escaped, clipped, isolated from the direction of the text around it."""
    return f'<bdi dir="auto">{escape(clean(value, limit))}</bdi>'


def escape_attribute(value: object, limit: int = LIMIT) -> str:
    """Return text from data for the inside of a quoted attribute."""
    return escape(clean(value, limit), quote=True)


def image_tag(jpeg: bytes, alt: str) -> str:
    """Return an inline JPEG, a grey box for empty bytes; `alt` is plain text."""
    text = escape_attribute(alt)
    if not jpeg:
        return f'<span class="gone" role="img" aria-label="{text} (not available)">no picture</span>'
    data = base64.b64encode(jpeg).decode()
    return f'<img class="thumb" alt="{text}" src="data:image/jpeg;base64,{data}">'
