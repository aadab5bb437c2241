"""A page as a test reads it: well nested, its tags and its text."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

from glasslm.report import page

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks the nesting to the end and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []  # contents; the type is in tags
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def require_own_scripts(self) -> None:
        """All scripts are JSON data, except one: curves.js, whose hash alone the policy allows."""
        types = [attributes.get("type") for tag, attributes in self.tags if tag == "script"]
        code = [text for kind, text in zip(types, self.scripts, strict=True) if kind is None]
        data = [text for kind, text in zip(types, self.scripts) if kind == "application/json"]
        assert len(code) + len(data) == len(types)
        assert code == [Path(page.TEMPLATES, "curves.js").read_text(encoding="utf-8")]
        assert all(isinstance(json.loads(text), list) and "<" not in text for text in data)
        digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
        policies = [
            attributes["content"]
            for tag, attributes in self.tags
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert len(policies) == 1
        assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in (
            policies[0] or ""
        )
