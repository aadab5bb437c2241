"""Articles out of a MediaWiki dump (.xml or .xml.bz2, https://www.mediawiki.org/wiki/Help:Export), as plain text.

The file is read in blocks by expat and no tree is built, so the memory is that of one page, however large the dump is.
A document type, without which there are no entities to expand, is refused, and so is a page of absurd length or depth.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO
from xml.parsers import expat

from glasslm.data.sources.child import Child
from glasslm.errors import InputError

BLOCK = 1 << 18  # bytes read at once
# Characters of a field; MediaWiki allows 2 MB: https://www.mediawiki.org/wiki/Manual:$wgMaxArticleSize
LONGEST = 4_000_000
UNFINISHED = 1_000_000  # bytes of a tag or a comment
MOST_HUNG = 10  # pages at which the parser of markup hangs
DEEPEST = 8  # elements inside each other; <mediawiki><page><revision><contributor><username> are 5
DUMP = re.compile(rb"\s*(<\?xml[^>]{0,200}\?>\s*)?<mediawiki[\s>]")
BZIP2 = re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59")
# What a link leads to that shows no text: a picture, a file, or the categories of an article, in English. A dump names
# them in its own language as well, by these numbers: https://www.mediawiki.org/wiki/Manual:Namespace
UNSHOWN, UNSHOWN_NUMBERS = {"file", "image", "media", "category"}, {"-2", "6", "14"}
PARSER = "glasslm.data.sources.wikitext"
START_S, PATIENCE_S = (
    60.0,
    30.0,
)  # for the parser to start, and for a page, of which the largest take a few seconds


@dataclass
class Page:
    """What is known of the page that is being read."""

    title: str = ""
    namespace: str = ""
    redirect: bool = False
    model: str = "wikitext"
    text: str = ""


@dataclass
class Reader:
    """The state between two blocks: what expat tells is put together to pages."""

    pages: list[Page] = field(default_factory=list)  # whole ones that nobody has taken yet
    unshown: set[str] = field(default_factory=lambda: set(UNSHOWN))
    page: Page | None = None
    depth: int = 0
    wanted: str = ""  # the element whose characters are collected
    characters: list[str] = field(default_factory=list)
    length: int = 0

    def doctype(self, *declared: object) -> None:
        raise ValueError("it declares a document type, which no dump does")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"its elements are nested {self.depth} deep")
        if name == "page":
            self.page = Page()
        elif name == "redirect" and self.page:
            self.page.redirect = True
        shown = name != "namespace" or attributes.get("key") not in UNSHOWN_NUMBERS
        if not shown or (self.page and name in ("title", "ns", "model", "text")):
            self.wanted, self.characters, self.length = name, [], 0

    def data(self, characters: str) -> None:
        if self.wanted:
            self.characters.append(characters)
            self.length += len(characters)
            if self.length > LONGEST:
                raise ValueError(f"a <{self.wanted}> has more than {LONGEST:,} characters")

    def end(self, name: str) -> None:
        self.depth -= 1
        if name == self.wanted:
            self._take(name, "".join(self.characters))
            self.wanted, self.characters = "", []
        elif name == "page" and self.page:
            self.pages.append(self.page)
            self.page = None

    def _take(self, name: str, value: str) -> None:
        if name == "namespace":
            self.unshown.add(value.casefold())
        elif self.page and name == "ns":
            self.page.namespace = value
        elif self.page:
            setattr(self.page, name, value)


def is_dump(path: Path) -> bool:
    """Whether a file begins as a dump does, whatever its name is."""
    with open(path, "rb") as file:
        head = file.read(1024)
        if not BZIP2.match(head):
            return bool(DUMP.match(head.removeprefix(b"\xef\xbb\xbf")))
    try:
        with bz2.open(path) as packed:
            return bool(DUMP.match(packed.read(1024).removeprefix(b"\xef\xbb\xbf")))
    except (OSError, EOFError):
        return True  # what is wrong with it is said when it is read


def articles(path: Path) -> Iterator[tuple[float, str]]:
    """The articles (namespace 0, no redirects), title first, each with the share of the file that is read then.

    "" stands for one whose markup shows no text or is beyond the parser. Raises InputError where mwparserfromhell is
    missing or the file is damaged, cut, or no dump after all.
    """
    if find_spec("mwparserfromhell") is None:
        raise InputError(
            f"{path} is a MediaWiki dump, whose markup needs the library mwparserfromhell: pip install 'glasslm[hub]'"
        )
    try:
        with ExitStack() as stack:
            parser: Child | None = None
            hung = 0
            for share, page, unshown in _pages(path):
                if page.namespace != "0" or page.redirect or page.model != "wikitext":
                    continue
                parser = parser or _started(stack.enter_context(Child(PARSER)))
                text = _plain(page, unshown, parser)
                if text is None:
                    stack.close()
                    parser, hung = None, hung + 1
                    if hung > MOST_HUNG:
                        raise ValueError(f"its parser hangs at more than {MOST_HUNG} pages")
                yield share, f"{page.title}\n\n{text}" if text else ""
    except (expat.ExpatError, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):  # a ValueError as well
            raise
        raise InputError(
            f"{path} cannot be read as a MediaWiki dump ({error}): get it again"
        ) from None


def _started(parser: Child) -> Child:
    try:
        ready = parser.line(START_S)
    except TimeoutError:
        ready = b""
    if not ready:
        raise InputError(f"the parser of MediaWiki's markup does not start{parser.last_words()}")
    return parser


def _plain(page: Page, unshown: set[str], parser: Child) -> str | None:
    """The page as plain text; None where the parser hangs or dies of it."""
    parser.tell(json.dumps([page.text, sorted(unshown)]).encode())
    try:
        line = parser.line(PATIENCE_S)
    except TimeoutError:
        return None
    return str(json.loads(line)) if line else None


def _pages(path: Path) -> Iterator[tuple[float, Page, set[str]]]:
    reader = Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.data
    size, fed = max(1, path.stat().st_size), 0
    with open(path, "rb") as raw, closing(_unpacked(raw)) as stream:
        while True:
            block = stream.read(BLOCK)
            fed += len(block)
            parser.Parse(block, not block)
            if (
                fed - parser.CurrentByteIndex > UNFINISHED
            ):  # which expat keeps, and reads again with each block
                raise ValueError(f"a tag or comment goes on for more than {UNFINISHED:,} bytes")
            for page in reader.pages:
                yield raw.tell() / size, page, reader.unshown
            reader.pages.clear()
            if not block:
                return


def _unpacked(raw: BinaryIO) -> BinaryIO | bz2.BZ2File:
    packed = BZIP2.match(raw.read(16))
    raw.seek(0)
    return bz2.BZ2File(raw) if packed else raw
