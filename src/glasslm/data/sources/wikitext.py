"""The markup of MediaWiki to plain text, by mwparserfromhell: `python -m glasslm.data.sources.wikitext`, by mediawiki.py.

A process of its own because that parser may take hours for a few kilobytes that are written against it (some brackets
that are never closed are enough), and cannot be interrupted. Each line in is [markup, namespaces that show nothing],
each line out the text, both as JSON, after a first one that says that it is ready.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mwparserfromhell.wikicode import Wikicode

SWITCH = re.compile(r"__[A-Z]+__")  # such as __NOTOC__
APART = {
    "table",
    "ref",
    "gallery",
    "timeline",
    "math",
    "score",
    "syntaxhighlight",
    "source",
    "style",
    "script",
}


def main() -> None:
    import mwparserfromhell  # noqa: F401 - before it says so

    print("ready", flush=True)
    for line in sys.stdin.buffer:
        markup, unshown = json.loads(line)
        print(json.dumps(plain(markup, set(unshown))), flush=True)


def plain(markup: str, unshown: set[str]) -> str:
    """The text that a reader sees, without tables, notes, formulas and what templates would give.

    Links into the namespaces `unshown` (casefolded) show nothing. "" where the markup is beyond the parser.
    """
    import mwparserfromhell
    from mwparserfromhell.parser import ParserError

    try:
        text = _shown(mwparserfromhell.parse(markup), unshown)
    except (ParserError, RecursionError):
        return ""
    text = "\n".join(line.strip() for line in SWITCH.sub("", text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _shown(code: Wikicode, unshown: set[str]) -> str:
    from mwparserfromhell import nodes

    parts = []
    for node in code.nodes:
        inside: Wikicode | None = None
        if isinstance(node, nodes.Text):
            parts.append(str(node.value))
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, nodes.Heading):
            inside = node.title
        elif isinstance(node, nodes.Wikilink):
            namespace, colon, _ = str(node.title).partition(":")
            if not (colon and namespace.strip().casefold() in unshown):
                inside = node.text or node.title
        elif isinstance(node, nodes.ExternalLink):
            inside = node.title if node.brackets else node.url
        elif isinstance(node, nodes.Tag):
            name = str(node.tag).strip().casefold()
            inside = None if name in APART else node.contents
            parts.append("\n" if name == "br" else "")
        if inside is not None:
            parts.append(_shown(inside, unshown))
    return "".join(parts)


if __name__ == "__main__":
    main()
