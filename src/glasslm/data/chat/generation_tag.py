"""The tag of transformers around an answer: {% generation %} ... {% endgeneration %}."""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationTag(Extension):
    """Writes the block as it is: chat_template.py finds the answers without the tag."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares a set of the instance

    def parse(self, parser: Parser) -> nodes.Node:
        """The block, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
