"""Reading a page: its elements, its text, and whatever in it would reach outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = ("img", "meta")


class Page(HTMLParser):
    """Elements with attributes and text; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "title"):
            return
        self.texts.append(data)
        if self._open and re.fullmatch(r"h[1-6]", self._open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [text for level, text in self.headings if level == 2]

    @property
    def drawings(self) -> set[str]:
        return {drawing["aria-labelledby"] for drawing in self.all("svg") if drawing.get("role") == "img"}


def outside_references(text: str) -> list[str]:
    """Everything in a page that would make a browser fetch or run something."""
    found = []
    for tag, attributes in Page(text).elements:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            found.append(tag)
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background") and not (
                value.startswith("#") or re.match(r"data:image/(jpeg|png);base64,", value)
            ):
                found.append(f"{tag} {name}={value[:40]}")
            if name.startswith("on") or value.lower().startswith("javascript:"):
                found.append(f"{tag} {name}")
    found += [match for match in re.findall(r"url\(\s*['\"]?([^)'\"]*)", text) if not match.startswith("#")]
    found += re.findall(r"@import|https?://|//[a-z0-9-]+\.[a-z]{2,}", text)
    return found
