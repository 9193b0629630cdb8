"""Taking an HTML document apart, to test pages."""

import html.parser
import re

OPEN_ENDED = ("meta", "th", "td", "li", "br", "tr", "p")
"""Tags that HTML lets stay open."""


class Page(html.parser.HTMLParser):
    """A page's text, ids, links, tooltips and cell names. Fails on unmatched tags and on anything to fetch or run."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.names: list[str] = []
        """Names of the cells' columns, which a narrow page shows beside the values."""
        self._words, self._open = list[str](), list[str]()
        self.feed(source)
        self.close()
        self.text = " ".join(" ".join(self._words).split())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in OPEN_ENDED:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "image", "iframe", "object", "base", "form")
        lists = {
            "id": self.ids,
            "href": self.links,
            "xlink:href": self.links,
            "title": self.titles,
            "data-name": self.names,
        }
        for name, value in attrs:
            assert not name.startswith("on") and name != "src"
            if name in lists:
                lists[name].append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPEN_ENDED:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self._words.append(data)
        else:
            assert not re.search(r"url\((?!#)|@import", data)
