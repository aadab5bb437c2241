"""Chat templates of imported models: messages to one text, in Jinja's sandbox.

A template is foreign code. The sandbox gives it no attribute of Python's objects and changes none
of its arguments; the length of its output and the time for it are bounded.
"""

from __future__ import annotations

import json
import time
from functools import cached_property
from typing import Any, NoReturn

from glasslm.data.tokenizers import Tokenizer
from glasslm.serve.api_error import ApiError
from glasslm.text import to_one_line

MAX_OUTPUT_CHARS = 1 << 20
MAX_RENDER_S = 5.0


class TemplateRefusal(Exception):
    """A template called raise_exception: it cannot write these messages."""


class ChatTemplate:
    """The chat template of a model, and what ends its turn.

    `settings`: run.json, tokenizer.transformers (interop/hf_special_tokens.py).
    """

    def __init__(self, settings: dict[str, Any], tokenizer: Tokenizer) -> None:
        self._settings, self._tokenizer = settings, tokenizer

    @property
    def source(self) -> str:
        """The template; empty where the model has none."""
        return str(self._settings.get("chat_template") or "")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Reads the special tokens that a template writes, also where a prompt's are plain text."""
        unused = self._tokenizer.unused_special_tokens
        return self._tokenizer.with_special_tokens(unused) if unused else self._tokenizer

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those of the settings and of the tokenizer."""
        special = self.tokenizer.special_tokens
        roles = [special.get(self._settings.get("eos_token", ""))]
        ends = [*roles, *self._settings.get("generation_eos_ids", []), self._tokenizer.end_id]
        return frozenset(token for token in ends if token is not None)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of `messages` with the start of the assistant's answer.

        Raises ApiError where the template refuses them, fails, or writes too much.
        """
        deadline_s, text = time.monotonic() + MAX_RENDER_S, ""
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=True, **self._role_tokens()
            ):
                text += piece
                if len(text) > MAX_OUTPUT_CHARS or time.monotonic() > deadline_s:
                    raise ApiError(
                        400, "the chat template writes too much text: send fewer messages",
                        param="messages", code="invalid_value",
                    )  # fmt: skip
        except ApiError:
            raise
        except Exception as error:  # a foreign template may raise anything
            reason = to_one_line(f"{error}")
            raise ApiError(
                400, f"the model's chat template cannot write these messages: {reason}",
                param="messages", code="invalid_value",
            ) from None  # fmt: skip
        return text

    def _role_tokens(self) -> dict[str, str]:
        return {
            name: token
            for name, token in self._settings.items()
            if name.endswith("_token") and isinstance(token, str)
        }

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = time.strftime
        return environment.from_string(self.source)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """transformers' tojson, which escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
