"""Figures as inline SVG: small, reproducible, themed and described in words."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from fedkd.reports.plots.style import COLOURS, HEAT, INK, MUTED, ON_HEAT, PAPER, RULE, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    HEAT: "heat",
    ON_HEAT: "on-heat",
    **{colour: f"c{number}" for number, colour in enumerate(COLOURS)},
}
"""CSS variable of the page for each colour of a figure."""

_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_STYLE = re.compile(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", re.DOTALL)
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'(url\(|href=")#')
_TAG = re.compile(r"<[^>]+>")
_USED = re.compile(r'(?:url\(|href=")#([^)"]*)')
_NUMBER = re.compile(r"(?<![#\w.])-?\d+\.\d{3,}")
_OPEN = re.compile(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>")


def inline(figure: Figure, anchor: str, title: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element.

    Colours are the page's variables, text has the page's font, and ids begin with `anchor`, so that
    they are unique in the page. The same figure gives the same text.

    Args:
        figure: as drawn by `fedkd.reports.plots`.
        anchor: unique in the page; letters, digits and hyphens.
        title: what a screen reader reads first.
        description: what the figure shows, in words.
    """
    text = _drawn(figure)
    text = text[text.index("<svg") :]
    text = _STYLE.sub("", _METADATA.sub("", text))
    used = set(_USED.findall(text))
    text = _TAG.sub(lambda tag: _tag(tag[0], anchor, used), text)
    text = re.sub(r">\s+<", "><", text)
    opening = (
        f'<svg role="img" aria-labelledby="{anchor}-title {anchor}-desc" viewBox="\\1" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{anchor}-title">{_safe(title)}</title>'
        f'<desc id="{anchor}-desc">{_safe(description)}</desc>'
    )
    return _OPEN.sub(opening, text, count=1).strip()


def _tag(tag: str, anchor: str, used: set[str]) -> str:
    """Return a tag with its attributes rewritten; text between tags is not changed."""
    tag = _FONT.sub("", " ".join(tag.split()))
    tag = _COLOUR.sub(_variable, tag)
    tag = _NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    tag = _ID.sub(lambda match: f' id="{anchor}-{match[1]}"' if match[1] in used else "", tag)
    return _REFERENCE.sub(rf"\1#{anchor}-", tag)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as ``.svg`` and ``.png`` in the colours of a printed page."""
    svg, png = (stem.with_name(f"{stem.name}.{ending}") for ending in ("svg", "png"))
    with style():
        figure.savefig(svg, metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        figure.savefig(png, dpi=200, metadata={"Software": None}, facecolor=PAPER)
    return [svg, png]


def _drawn(figure: Figure) -> str:
    with style():
        buffer = StringIO()
        for axes in figure.axes:
            axes.patch.set_visible(False)  # the page shows through
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _variable(colour: re.Match[str]) -> str:
    name = VARIABLES.get(colour[0])
    return f"var(--{name})" if name else colour[0]


def _safe(text: str) -> str:
    return escape(text).replace("\\", "\\\\")
