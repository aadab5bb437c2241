"""From a checked request to the requests of the scheduler: tokens, limits of the model, grammars.

Everything here may take long for a long prompt, so it runs in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glasslm.errors import GlasslmError
from glasslm.inference.generation import encode_prompt
from glasslm.inference.request import Grammar, Request
from glasslm.serve.api_error import ApiError, wrong_value
from glasslm.serve.choice_text import prompt_offsets
from glasslm.serve.limits import Limits
from glasslm.serve.schema import ChatRequest, CompletionRequest, PromptField, TextSettings
from glasslm.serve.served_model import LoadedModel

DEFAULT_CHAT_TOKENS = 256  # of a model whose context has no end

GrammarFactory = Callable[[int], Grammar]


@dataclass(frozen=True)
class Echo:
    """The prompt that is returned before a text; empty where it is not asked for.

    `offsets` (N,): where its tokens begin, if their log-probabilities are asked for. An empty
    prompt has none: the token that the model reads for it is no part of the text.
    """

    text: str = ""
    offsets: Sequence[int] = ()


@dataclass(frozen=True)
class PreparedText:
    """One choice of an answer, and the echo before it.

    `scoring` is a request of its own for the log-probabilities of a prompt of one token more than
    the context, as evaluations send it: each of its tokens is predicted from a whole context, but
    the text after it continues from the newest half (stream.visible_length).
    """

    request: Request
    echo: Echo = Echo()
    scoring: Request | None = None


def prepare_completion(
    loaded: LoadedModel, request: CompletionRequest, limits: Limits
) -> list[PreparedText]:
    """The texts of /v1/completions: n for each prompt, in the order of their index."""
    texts, n_tokens = [], 0
    grammar = _grammar(loaded, request.settings)
    for prompt in request.prompts:
        ids = encode_field(loaded, prompt)
        n_tokens += len(ids) * request.settings.n
        if n_tokens > limits.prompt_tokens:
            raise wrong_value(
                "prompt", prompt, f"at most {limits.prompt_tokens:,} tokens x n in a request"
            )
        echo = _echo(loaded, request, prompt, ids) if request.echo else Echo()
        is_scored = request.echo and request.settings.top_logprobs is not None
        texts += _texts(loaded, request.settings, ids, grammar, echo=echo, is_scored=is_scored)
    return texts


def prepare_chat(loaded: LoadedModel, request: ChatRequest, limits: Limits) -> list[PreparedText]:
    """The texts of /v1/chat/completions. Raises ApiError where the model has no chat template."""
    template = loaded.template
    if not template.source:
        raise ApiError(
            400,
            f"the model {loaded.name} has no chat template: it continues texts. Use "
            "/v1/completions with a prompt",
            param="messages",
            code="no_chat_template",
        )
    try:
        ids = template.encode_prompt(request.messages)
    except GlasslmError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    if not ids or len(ids) > limits.prompt_tokens:
        raise ApiError(
            400, f"the messages have {len(ids):,} tokens: expected 1 to {limits.prompt_tokens:,}",
            param="messages", code="invalid_value",
        )  # fmt: skip
    grammar = _grammar(loaded, request.settings)
    return _texts(
        loaded, request.settings, ids, grammar, end_ids=template.end_ids, param="messages"
    )


def _echo(
    loaded: LoadedModel, request: CompletionRequest, prompt: PromptField, ids: list[int]
) -> Echo:
    """A prompt as it is returned. A text has the names of special tokens, as it was given."""
    tokenizer, names = loaded.model.tokenizer, dict[int, str]()
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    if request.settings.top_logprobs is None or not prompt:
        return Echo(text)
    if isinstance(prompt, str):
        names = {token: name for name, token in tokenizer.special_tokens.items()}
    return Echo(text, prompt_offsets(tokenizer, ids, names))


def encode_field(loaded: LoadedModel, prompt: PromptField) -> list[int]:
    """The tokens of a prompt. Raises ApiError for text or tokens that the model does not know."""
    try:
        return encode_prompt(loaded.model.tokenizer, prompt)
    except GlasslmError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_value") from None


def _texts(
    loaded: LoadedModel,
    settings: TextSettings,
    ids: list[int],
    grammar: GrammarFactory | None,
    *,
    echo: Echo = Echo(),
    is_scored: bool = False,
    end_ids: frozenset[int] = frozenset(),
    param: str = "prompt",
) -> list[PreparedText]:
    max_tokens = _max_tokens(loaded, settings, len(ids), is_scored, param)
    vocab_size = loaded.model.tokenizer.vocab_size
    for token in settings.logit_bias:
        if token >= vocab_size:
            raise wrong_value("logit_bias", token, f"token ids below {vocab_size:,}")
    if grammar and max_tokens:
        _check_grammar(grammar, max_tokens)
    n_top = settings.top_logprobs or 0
    config = loaded.model.config.model
    scoring = None
    if is_scored and max_tokens and len(ids) > config.block_size and not config.has_rolling_cache:
        scoring = Request(ids, max_new_tokens=0, top_logprobs=n_top, prompt_logprobs=True)
    return [
        PreparedText(
            Request(
                ids,
                max_new_tokens=max_tokens,
                sampling=settings.sampling,
                sample=sample,
                stop=settings.stop,
                grammar=grammar if max_tokens else None,
                logit_bias=settings.logit_bias,
                top_logprobs=n_top,
                prompt_logprobs=is_scored and scoring is None,
                end_ids=end_ids,
            ),
            echo,
            scoring,
        )
        for sample in range(settings.n)
    ]


def _max_tokens(
    loaded: LoadedModel, settings: TextSettings, n_prompt: int, is_scored: bool, param: str
) -> int:
    """max_tokens; raises ApiError for a prompt that the model cannot read as a whole.

    The last token of a prompt is not read where nothing follows it.
    """
    config = loaded.model.config.model
    if config.has_rolling_cache:
        return DEFAULT_CHAT_TOKENS if settings.max_tokens is None else settings.max_tokens
    if n_prompt > config.block_size + (is_scored or settings.max_tokens == 0):
        raise ApiError(
            400,
            f"{param} has {n_prompt:,} tokens: {loaded.name} reads at most "
            f"{config.block_size:,}. Shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if settings.max_tokens is None:
        return max(1, config.block_size - n_prompt)
    return settings.max_tokens


def _grammar(loaded: LoadedModel, settings: TextSettings) -> GrammarFactory | None:
    response_format = settings.response_format
    if response_format is None:
        return None
    if response_format.kind == "json_object":
        return loaded.json_text
    schema, grammars = response_format.schema, loaded.schema_grammar
    return lambda max_new_tokens: grammars.start_text(schema)


def _check_grammar(grammar: GrammarFactory, max_tokens: int) -> None:
    """Raise the errors of a grammar here, where a schema that takes long delays nobody else."""
    try:
        grammar(max_tokens).allowed(max_tokens)
    except GlasslmError as error:
        raise ApiError(400, str(error), param="response_format", code="invalid_value") from None
