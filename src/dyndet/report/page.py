"""A page of HTML that is one file: nothing to load, no scripts, readable at any width and on paper.

Whatever is put on it as `str` is text and gets escaped; only what these functions return is markup.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import Final, Literal

from PIL import Image

VOID: Final = frozenset({"img", "meta", "br"})


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


Content = str | float | None | Html | Iterable["Content"]
"""Text, a number, markup, nothing, or some of these in a row."""


def html(content: Content) -> Html:
    """Content as markup: text is escaped, quotes included."""
    if content is None:
        return Html()
    if isinstance(content, Html):
        return content
    if isinstance(content, str | int | float):
        return Html(escape(str(content)))
    return Html("".join(html(item) for item in content))


def element(name: str, /, *content: Content, **attributes: object) -> Html:
    """`<name attributes>content</name>`.

    Args:
        name: of the element.
        content: inside of it.
        attributes: escaped; None leaves one out; `class_` and `stroke_width` mean class and stroke-width.
    """
    pairs = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    start = "".join(f' {key}="{escape(_short(value))}"' for key, value in pairs.items())
    return Html(f"<{name}{start}>") if name in VOID else Html(f"<{name}{start}>{html(content)}</{name}>")


def document(title: str, *sections: Content, subtitle: Content = None, links: Mapping[str, str] | None = None) -> str:
    """The whole file.

    Args:
        title: of the page.
        sections: of `section`.
        subtitle: below the title.
        links: names of sections to their anchors, offered at the top.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(files("dyndet.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    menu = element("nav", *(element("a", name, href=f"#{anchor}") for name, anchor in (links or {}).items()))
    header = element("header", element("h1", title), element("p", subtitle) if subtitle else None)
    body = element("body", header, menu if links else None, element("main", *sections))
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def section(title: str, *content: Content, anchor: str | None = None, note: Content = None, level: int = 2) -> Html:
    """A heading, a note below it, and what belongs to it."""
    return element("section", element(f"h{level}", title, id=anchor), paragraph(note) if note else None, *content)


def small(*content: Content) -> Html:
    """What a caption adds."""
    return element("small", *content)


def paragraph(*content: Content, kind: Literal["note", "problem"] = "note") -> Html:
    """A line of text; a problem stands out."""
    return element("p", *content, class_=kind)


def details(summary: Content, *content: Content, is_open: bool = False) -> Html:
    """What opens at a click."""
    return element("details", element("summary", summary), *content, open="" if is_open else None)


def cards(*content: Content, small: bool = False) -> Html:
    """Things side by side, as many as the width allows."""
    return element("div", *content, class_="cards small" if small else "cards")


def figure(content: Content, caption: Content = None, *, span: Literal["two", "wide"] | None = None) -> Html:
    """A chart, picture or table with its caption, in a card; or one that is as wide as two, or as the page."""
    return element("figure", element("figcaption", caption) if caption else None, content, class_=span)


def facts(values: Mapping[str, Content]) -> Html:
    """A few numbers that are seen first."""
    tiles = (element("div", element("dt", name), element("dd", value)) for name, value in values.items())
    return element("dl", *tiles, class_="facts")


def table(rows: Sequence[Mapping[str, Content]], columns: Sequence[str] | None = None) -> Html:
    """A table that scrolls by itself where the page is narrow; numbers are set flush right.

    Args:
        rows: column name to cell; missing cells stay empty.
        columns: which, in order; default all, in the order in which they first appear.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    kinds = {column: "number" if _numbers(row.get(column) for row in rows) else None for column in columns}
    heads = (element("th", column, scope="col", class_=kinds[column]) for column in columns)
    lines = (element("tr", *(element("td", row.get(name), class_=kinds[name]) for name in columns)) for row in rows)
    return _scrolling(element("thead", element("tr", *heads)), element("tbody", *lines))


def matrix(
    rows: Sequence[Content],
    columns: Sequence[Content],
    cells: Sequence[Sequence[Content]],
    shares: Sequence[Sequence[float | None]],
    *,
    titles: Sequence[Sequence[str]] | None = None,
    corner: Content = None,
) -> Html:
    """A table whose cells are the darker the larger their share.

    Args:
        rows: names of the rows.
        columns: names of the columns.
        cells: what is written, row by row.
        shares: of every cell, in 0..1; None leaves it white.
        titles: tooltips.
        corner: above the names of the rows.
    """

    def cell(row: int, column: int) -> Html:
        share = shares[row][column]
        style = None if share is None else f"background:{shade(share)};color:{'#ffffff' if share > 0.5 else '#1d1d24'}"
        title = titles[row][column] if titles else None
        return element("td", cells[row][column], class_="number", style=style, title=title)

    heads = (element("th", name, scope="col", class_="number") for name in columns)
    lines = (
        element("tr", element("th", name, scope="row"), *(cell(row, column) for column in range(len(columns))))
        for row, name in enumerate(rows)
    )
    head = element("thead", element("tr", element("th", corner), *heads))
    return _scrolling(head, element("tbody", *lines))


def _scrolling(*content: Content) -> Html:
    return element("div", element("table", *content), class_="scroll", tabindex="0")


def picture(image: Image.Image, alt: str, *, quality: int = 82) -> Html:
    """A picture inside of the page."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return element("img", src=source, alt=alt, width=image.width, height=image.height)


def shade(share: float) -> str:
    """White (0) to deep blue (1)."""
    mixed = (round(255 + (end - 255) * min(max(share, 0), 1)) for end in (25, 75, 140))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _numbers(cells: Iterable[Content]) -> bool:
    filled = [cell for cell in cells if cell not in (None, "")]
    return bool(filled) and all(
        isinstance(cell, int | float) or (isinstance(cell, str) and cell.lstrip("-+")[:1].isdigit()) for cell in filled
    )


def _short(value: object) -> str:
    """Coordinates need no more than two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
