"""Texts that follow a JSON schema, by llguidance, an optional library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.tokenizers import Tokenizer
from glasslm.serve.api_error import ApiError
from glasslm.text import to_one_line

PARAM = "response_format"


class SchemaGrammar:
    """Grammars of JSON schemas over one vocabulary. Raises ApiError without llguidance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise ApiError(
                400,
                "response_format json_schema needs the library llguidance on the server: "
                "pip install llguidance, or ask for json_object",
                param=PARAM,
                code="unsupported_parameter",
            ) from None
        self.vocab_size = tokenizer.vocab_size
        # The library wants a token that ends the text: one that is in no model's vocabulary.
        self.end_id = tokenizer.vocab_size
        vocabulary = _Vocabulary(tokenizer, self.end_id)
        self.library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary))

    def start_text(self, schema: Any) -> SchemaText:
        """The state of a new text. Raises ApiError for a schema that is wrong or too complex."""
        import llguidance

        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": " ?"}
            )
            problem = llguidance.LLMatcher.validate_grammar(grammar, self.library)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ApiError(
                400,
                f"response_format.json_schema cannot be used: {to_one_line(problem, 300)}",
                param=PARAM,
                code="invalid_value",
            )
        return SchemaText(self, llguidance.LLMatcher(self.library, grammar, log_level=0))


class SchemaText:
    """The state of one text in a schema; a request.Grammar."""

    def __init__(self, grammar: SchemaGrammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self.finished = self.can_end = False

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,): marks the tokens that may come next. `remaining` is not used: a text may be cut."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._grammar.vocab_size].astype(bool)
        if not bits.any():
            raise ApiError(
                400,
                "the model's vocabulary cannot write JSON of this schema",
                param=PARAM,
                code="invalid_value",
            )
        return bits

    def advance(self, token: int) -> None:
        """Append a token to the text."""
        self._matcher.consume_token(token)
        if error := self._matcher.get_error():
            raise ApiError(400, f"the JSON schema is too complex: {to_one_line(error, 300)}")
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little").astype(bool)
        self.finished = not bits[: self._grammar.vocab_size].any()
        self.can_end = bool(bits[self._grammar.end_id]) and not self.finished


class _Vocabulary:
    """The vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self.eos_token_id = end_id
        self.tokens = [*tokenizer.token_bytes, b"<end>"]
        self.special_token_ids = [*tokenizer.special_tokens.values(), end_id]
        self._ids = {spelling: i for i, spelling in enumerate(tokenizer.token_bytes) if spelling}

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text, one byte each where possible: any spelling will do."""
        pieces = (bytes([byte]) for byte in text)
        return [self._ids[piece] for piece in pieces if piece in self._ids]
