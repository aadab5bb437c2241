"""The metrics line of a sample: a text that the model generates during training."""

from __future__ import annotations

from collections.abc import Callable

from glasslm.config.schema import RunConfig
from glasslm.data.dataset import Dataset
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.inference import generation
from glasslm.inference.sampling import Sampling
from glasslm.runs.metrics import SampleLine

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 200, 0.8


def sample_line(
    step: int,
    engine: Engine,
    tokenizer: Tokenizer,
    config: RunConfig,
    check_interrupt: Callable[[], None],
    prompt: str | list[int] = "",
) -> SampleLine:
    """The line of a text of SAMPLE_TOKENS, generated from the same random numbers each time.

    It continues `prompt`; of a synthetic task or a conversation that is a question, and the answer
    ends the text.
    `check_interrupt` is called before each token; its exception ends the sample.
    """
    seed = config.train.seed
    pieces = generation.generate(
        engine,
        tokenizer,
        [prompt],
        model_config=config.model,
        max_new_tokens=SAMPLE_TOKENS,
        sampling=Sampling(temperature=SAMPLE_TEMPERATURE, seed=seed),
        stop=("\n",) if config.data.task else (),
    )
    text = ""
    for piece in pieces:
        check_interrupt()
        text += piece.text
    return {
        "kind": "sample",
        "step": step,
        "prompt": prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
        "text": text,
        "temperature": SAMPLE_TEMPERATURE,
        "seed": seed,
    }


def first_question(dataset: Dataset) -> str | list[int]:
    """The first question of the validation part; empty for texts that have none.

    That of a task has its "="; that of a conversation is in tokens.
    """
    val = dataset.val
    if val.conversations is not None:
        return val.conversations.first_question(val.tokens)
    if val.answers is None:
        return ""
    line = dataset.tokenizer.decode(val.tokens[: val.answers.line_length])
    return line.partition("=")[0] + "="
