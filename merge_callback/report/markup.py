"""HTML put together so that every text in it is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """A piece of HTML; any other string is a text, and is escaped when it becomes part of one."""

    __slots__ = ()


_EMPTY = {"rect", "path", "line", "meta"}
"""Elements that end where they begin."""


def tag(kind: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    >>> tag("p", "1 < 2 ", tag("b", "so"), class_="note", data_step=3, hidden=None)
    '<p class="note" data-step="3">1 &lt; 2 <b>so</b></p>'

    Args:
        kind: of the element.
        *children: texts, numbers and elements.
        **attributes: an underscore stands for a hyphen, one at the end is dropped; ``None`` leaves it out,
            what is ``True`` has no value.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if kind in _EMPTY:
        return Html(f"<{kind}{given}/>")
    return Html(f"<{kind}{given}>{join(children)}</{kind}>")


def join(children: Iterable[object]) -> Html:
    """Texts and elements, one after the other."""
    return Html("".join(c if isinstance(c, Html) else escape(str(c)) for c in children))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "", **attributes: object
) -> Html:
    """A table whose columns have headings; it scrolls by itself where it is too wide."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else "",
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)),
            **attributes,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    name = {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}.get(name, name)
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
