"""HTML by function calls. A plain string is text and is escaped; only what ``tag`` and ``raw`` return is markup.

So names of classes, settings and files, which come from outside, cannot become markup by mistake.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = ("img", "meta", "br", "hr", "col")


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """Declare text to be HTML: only for constants and the output of a drawing library."""
    return Markup(text)


def text(child: object) -> Markup:
    """Markup of a child: itself if it is markup, nothing for None, its items for a list or iterator, else escaped."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    if not isinstance(child, str) and isinstance(child, Iterable):
        return Markup("".join(text(item) for item in child))
    return Markup(html.escape(str(child), quote=True))


def tag(name: str, *children: object, **attributes: str | int | None) -> Markup:
    """An element.

    Args:
        name: such as "td".
        children: see ``text``.
        attributes: ``class_`` stands for class, ``aria_label`` for aria-label; None leaves the attribute out.
    """
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{inside}>")
    return Markup(f"<{name}{inside}>{text(children)}</{name}>")


def section(title: str, *children: object, id_: str | None = None) -> Markup:
    """A section with its heading, or nothing if every child is empty."""
    content = text(children)
    return tag("section", tag("h2", title), content, id_=id_) if content else Markup("")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, class_: str | None = None) -> Markup:
    """A table in a box of its own that scrolls when it is wider than the page. The first cell of a row is its heading.

    Cells may be ready-made ``td`` markup, recognised by its beginning.
    """
    body = (
        tag("tr", tag("th", row[0], scope="row"), [c if _is_cell(c) else tag("td", c) for c in row[1:]]) for row in rows
    )
    header = tag("thead", tag("tr", (tag("th", cell, scope="col") for cell in head))) if head else None
    inner = tag("table", tag("caption", tag("span", caption)), header, tag("tbody", body), class_=class_)
    # focusable: without a mouse, only a focused box can be scrolled
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _is_cell(value: object) -> bool:
    return isinstance(value, Markup) and value.startswith(("<td ", "<td>"))
