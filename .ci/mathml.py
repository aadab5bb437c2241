"""Formulas of docs/ as MathML, which browsers draw without a script: `$...$`, and `math` fences.

zensical.toml names this module and `format_fence`. GitHub draws the same sources by itself.
"""

import re
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml import converter
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

# A dollar sign opens a formula if no space follows it, and closes one if no space precedes it.
INLINE = r"(?<![\\$])\$(?! )((?:\\.|[^$\\])+?)(?<! )\$(?!\d)"


def format_fence(source: str, *_: Any, **__: Any) -> str:
    """HTML of a fence of the language `math`."""
    return f"<div>{converter.convert(source, display='block')}</div>"


class InlineFormula(InlineProcessor):
    def handleMatch(  # type: ignore[override]
        self, match: re.Match[str], _: str
    ) -> tuple[Element, int, int]:
        return converter.convert_to_element(match[1]), match.start(0), match.end(0)


class InlineFormulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # 185: after code spans (190), before backslash escapes (180)
        md.inlinePatterns.register(InlineFormula(INLINE, md), "formula", 185)


def makeExtension(**settings: Any) -> Extension:
    """The extension; Markdown looks for this name."""
    return InlineFormulas(**settings)
