"""Load a trained model: `load_model(run)` returns a Model that generates text and scores it.

model = glasslm.load("runs/shakespeare-quick")
print(model.generate("ROMEO:", temperature=0.8))
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, DeviceName, EngineName, Precision, RunConfig
from glasslm.data.special_tokens import count_spellings, explain_spellings
from glasslm.data.token_file import Tokens
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import GRADIENT_PREFIX, Edit, forward_names
from glasslm.engines.protocol import NO_TARGET, Batch, Engine
from glasslm.errors import InputError
from glasslm.inference import evaluation, generation
from glasslm.inference.context_config import ContextConfig, RopeScalingName
from glasslm.inference.json_grammar import JsonGrammar
from glasslm.inference.sampling import Sampling
from glasslm.inference.scheduler import Scheduler
from glasslm.inference.stream import visible_length
from glasslm.model.parameters import ParameterTable, parameter_table
from glasslm.runs import checkpoint as checkpoints
from glasslm.runs.checkpoint_selector import CheckpointSelector
from glasslm.runs.protection import open_run
from glasslm.runs.recorded_operations import admit_run_operations
from glasslm.text import Notify, ignore_message

GrammarName = Literal["json"]
EditTuple = tuple[str, Any, Any]  # name, index and value of an engines.inspection.Edit
WINDOWS_PER_CALL = 32  # of a scored text, in one call of Engine.losses


def load_model(
    run: str | os.PathLike[str],
    checkpoint: CheckpointSelector = "best",
    *,
    context: int | None = None,
    rope_scaling: RopeScalingName | None = None,
    engine: EngineName = "auto",
    device: DeviceName = "auto",
    precision: Precision = "auto",
    threads: int = 0,
    ops: str | os.PathLike[str] = "",
) -> Model:
    """Load the model of a run (a path, or a name under ./runs) from one of its checkpoints.

    `checkpoint` is "best", "latest" or a step. `context` is the number of tokens that the model
    reads at once, instead of that of training; `rope_scaling` ("linear" or "ntk") stretches rope to
    it. `ops` is a file whose functions replace operations of the engine, or "recorded": the code in
    run.json, which is not run without this word. Raises InputError where the run or the step does
    not exist, or the positions do not allow the context; DamagedError where files were altered or
    do not belong together.
    """
    source = open_run(run)
    loaded = checkpoints.load(source.path, checkpoint)
    checkpoints.require_identity(loaded, source.identity)
    compute = ComputeConfig(engine=engine, device=device, precision=precision, threads=threads)
    recorded = source.config if not ops else admit_run_operations(source, os.fspath(ops))
    model_config = ContextConfig(context, rope_scaling).apply_to(recorded.model)
    config = dataclasses.replace(recorded, model=model_config)
    model_engine = make_engine(config, source.tokenizer.vocab_size, compute)
    model_engine.load(loaded.lazy_weights())
    return Model(config, source.tokenizer, model_engine, loaded.step)


class Model:
    """A trained model: its weights in an engine, and its tokenizer. `glasslm.load` returns it.

    `config` is the configuration of its run, `step` the number of training steps of its weights.
    Texts may be longer than the context. V is the size of the vocabulary.

    >>> model = glasslm.load("runs/shakespeare-quick")
    >>> model.generate("ROMEO:", max_new_tokens=100, temperature=0.8, seed=7)
    >>> model.evaluate("But, soft! what light through yonder window breaks?").bpb
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, engine: Engine, step: int) -> None:
        """`engine` holds the weights of training step `step`."""
        self.config = config
        self.tokenizer = tokenizer
        self.engine = engine
        self.step = step

    @cached_property
    def parameters(self) -> ParameterTable:
        """The parameter table: each weight's name, shape and initial values."""
        return parameter_table(self.config.model, self.tokenizer.vocab_size)

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 42,
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
    ) -> str:
        """Generate a continuation of `prompt`; returns the new text.

        Args:
            prompt: The text to continue; "" starts after the end of a document, or after a newline
                where the vocabulary has no such token.
            max_new_tokens: The most tokens to generate.
            temperature: Divides the logits; 0 always takes the likeliest token.
            top_k: Keep the k likeliest tokens; 0 keeps all.
            top_p: Keep the smallest set of tokens with this share of the probability.
            min_p: Keep the tokens at least this probable relative to the likeliest.
            repetition_penalty: Above 1, makes tokens of the text so far less likely.
            seed: The same seed gives the same text.
            stop: Strings that end the text; they are not part of it.
            grammar: "json" allows only valid JSON.

        Raises:
            InputError: An argument is out of its range, the tokenizer does not know a character of
                the prompt, or the vocabulary cannot write JSON.
            DivergedError: The logits are not finite.

        >>> model.generate("ROMEO:", 40, temperature=0.8, stop="\\n\\n")
        >>> model.generate('{"name": ', 60, grammar="json")
        """
        self._warn_of_spellings(prompt)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        pieces = self.pieces(
            [prompt], max_new_tokens, sampling=sampling, stop=stop, grammar=grammar
        )
        return "".join(piece.text for piece in pieces)

    def generate_ids(
        self,
        ids: Sequence[int] | NDArray[np.integer[Any]],
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 42,
    ) -> NDArray[np.int64]:
        """Generate a continuation of a text that is given as tokens; returns the new tokens.

        Args:
            ids: The tokens (T,) to continue; with none the text starts as in `generate`.
            max_new_tokens: The most tokens to generate.
            temperature: As in `generate`, like the arguments after it.

        Returns:
            The new tokens (n,), n <= max_new_tokens, of the text that `generate` writes: it stops
            at the end of a document.

        Raises:
            InputError: A token is outside the vocabulary, or an argument is out of its range.
            DivergedError: The logits are not finite.

        >>> model.generate_ids(model.tokenizer.encode("ROMEO:"), 40)
        """
        if isinstance(ids, str):
            raise InputError("ids is a text: give it to generate, or give tokenizer.encode(text)")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        pieces = self.pieces([ids], max_new_tokens, sampling=sampling)
        self._warn_of_spellings(self.tokenizer.decode(ids))
        return np.array([piece.token for piece in pieces], np.int64)

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
    ) -> Iterator[str]:
        """Generate the text of `generate` piece by piece; the joined pieces are the same text.

        Takes the arguments of `generate`, those of sampling as one `Sampling`, and raises the same
        errors.

        >>> for text in model.stream("ROMEO:", 100):
        ...     print(text, end="", flush=True)
        """
        self._warn_of_spellings(prompt)
        pieces = self.pieces(
            [prompt], max_new_tokens, sampling=sampling, stop=stop, grammar=grammar
        )
        return (piece.text for piece in pieces if piece.text)

    def pieces(
        self,
        prompts: Sequence[generation.Prompt],
        max_new_tokens: int = 200,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        samples: int = 1,
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
        use_cache: bool = True,
    ) -> Iterator[generation.Piece]:
        """Generate several texts at once, token by token, with log probabilities.

        Yields a `Piece` per token of the `samples` texts of each of the `prompts`, which are texts
        or the tokens (T,) of texts. Without `use_cache` the text so far is read again for every
        token. The other arguments and the errors are those of `generate`.
        """
        return generation.generate(
            self.engine,
            self.tokenizer,
            prompts,
            model_config=self.config.model,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            samples=samples,
            stop=(stop,) if isinstance(stop, str) else stop,
            grammar=self.json_grammar.start_text if grammar else None,
            use_cache=use_cache,
        )

    def scheduler(self, slots: int) -> Scheduler:
        """A scheduler that generates the texts of up to `slots` requests at once.

        More than one slot is rounded up to a multiple of `engine.row_tile`, so that a text does not
        depend, bit for bit, on the others.
        """
        tile = 1 if slots == 1 else self.engine.row_tile
        slots = math.ceil(slots / tile) * tile
        return Scheduler(self.engine, self.tokenizer, self.config.model, slots=slots)

    @cached_property
    def json_grammar(self) -> JsonGrammar:
        """The grammar of JSON in this vocabulary; InputError where symbols are missing."""
        return JsonGrammar(self.tokenizer.token_bytes)

    def logits(self, text: str) -> NDArray[np.float32]:
        """The logits (V,), in float32, of the token after `text`.

        If a text is longer than the context, only its newest tokens are read
        (`stream.visible_length`); a model with a rolling cache reads all of them. Raises
        InputError for characters that the tokenizer does not know.

        >>> model.logits("ROMEO").argmax()
        """
        self._warn_of_spellings(text)
        c, ids = self.config.model, generation.encode_prompt(self.tokenizer, text)
        if not c.has_rolling_cache:
            ids = ids[len(ids) - visible_length(len(ids), c.block_size) :]
        cache = self.engine.new_cache(1, len(ids))
        for start in range(0, len(ids), c.block_size):
            portion = np.array([ids[start : start + c.block_size]])
            last = self.engine.logits(portion, cache, np.array([portion.size]))
        return np.array(last[0], np.float32)

    def losses(self, text: str) -> NDArray[np.float64]:
        """The losses (tokens - 1,), in nats, of all tokens of `text` but the first.

        The text is read in windows of a context that do not overlap, as in training. Raises
        InputError for characters that the tokenizer does not know.

        >>> model.losses("To be, or not to be").mean()
        """
        self._warn_of_spellings(text)
        tokens = self.tokenizer.encode(text)
        if len(tokens) < 2:
            return np.zeros(0)
        windows = evaluation.TextWindows(tokens, self.config.model.block_size)
        parts = [
            np.asarray(self.engine.losses(inputs, targets), np.float64)[targets >= 0]
            for inputs, targets in evaluation.iterate_windows(
                windows, np.arange(len(windows)), WINDOWS_PER_CALL
            )
        ]
        return np.concatenate(parts)

    def inspect(
        self, text: str, names: Iterable[str] | None = None, edits: Iterable[EditTuple] = ()
    ) -> dict[str, NDArray[Any]]:
        """Activations and gradients inside the model while it reads `text`, by name.

        Args:
            text: At least two tokens; of a longer text than the context the newest are read.
            names: The names of `engines/inspection.py`, such as "blocks.0.attention.weights" or
                "gradient/blocks.0.attention.q.weight"; by default every activation.
            edits: (name, index, value) of activations that are overwritten; see
                `engines.inspection.Edit`. An index begins with the axis B, which has length 1.

        Returns:
            Copies with the shapes that inspection.py lists, without the axis B: T is the number of
            tokens read. Gradients are of the mean loss (nats) of each token after the first; at
            the last position nothing is predicted.

        Raises:
            InputError: A name or a character is unknown, or the text is shorter than two tokens.

        >>> model.inspect("To be, or not", ["blocks.0", "logits"])["blocks.0"].shape  # (T, D)
        """
        self._warn_of_spellings(text)
        names = forward_names(self.config.model) if names is None else names
        return self._inspect(text, names, edits)

    def _inspect(
        self, text: str, names: Iterable[str], edits: Iterable[EditTuple] = ()
    ) -> dict[str, NDArray[Any]]:
        """`inspect` without its warning."""
        ids = np.asarray(self.tokenizer.encode(text), np.int64)[-self.config.model.block_size :]
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} tokens: give at least two to look inside")
        targets = np.append(ids[1:], NO_TARGET)  # nothing is known of the token after the last
        batch = Batch(ids[None], targets[None], 0, np.zeros(1, np.int64))
        arrays = self.engine.inspect(batch, list(names), [Edit(*edit) for edit in edits])

        def has_batch_axis(name: str) -> bool:
            is_weight = name.removeprefix(GRADIENT_PREFIX) in self.parameters
            return not is_weight and ".experts." not in name

        return {name: array[0] if has_batch_axis(name) else array for name, array in arrays.items()}

    def activations(self, text: str) -> NDArray[Any]:
        """The residual stream (layers + 1, T, D) after the embedding and after each block.

        Raises InputError as `inspect` does.

        >>> model.activations("To be, or not to be").std(axis=(1, 2))
        """
        self._warn_of_spellings(text)
        names = ["embedding", *(f"blocks.{i}" for i in range(self.config.model.n_layers))]
        return np.stack(list(self._inspect(text, names).values()))

    def attention(self, text: str) -> NDArray[Any]:
        """The attention weights (layers, H, T, T): row t is what token t attends to.

        Raises InputError as `inspect` does.

        >>> model.attention("To be, or not to be")[0, 0].round(2)
        """
        self._warn_of_spellings(text)
        names = [f"blocks.{i}.attention.weights" for i in range(self.config.model.n_layers)]
        return np.stack(list(self._inspect(text, names).values()))

    def gradients(self, text: str) -> dict[str, NDArray[Any]]:
        """The gradient of the mean loss of `text` by each trained weight, in its shape.

        Raises InputError as `inspect` does.

        >>> {name: float((g * g).sum() ** 0.5) for name, g in model.gradients("To be").items()}
        """
        self._warn_of_spellings(text)
        names = [GRADIENT_PREFIX + name for name, spec in self.parameters.items() if spec.trained]
        return {
            name.removeprefix(GRADIENT_PREFIX): gradient
            for name, gradient in self._inspect(text, names).items()
        }

    def evaluate(self, text: str) -> evaluation.Score:
        """The `Score` of `text`: loss, perplexity and bits per byte.

        Raises InputError for fewer than two tokens, or characters that the tokenizer does not know.

        >>> model.evaluate("To be, or not to be").bpb
        """
        self._warn_of_spellings(text)
        return self.score(self.tokenizer.encode(text))

    def score(self, tokens: Tokens, notify: Notify = ignore_message) -> evaluation.Score:
        """The `Score` of tokens (N,), an array or a file; InputError for fewer than two.

        `notify` receives the progress of a long evaluation.
        """
        return evaluation.evaluate(
            self.engine,
            tokens,
            self.tokenizer.scored_bytes,
            self.config.model.block_size,
            rows=WINDOWS_PER_CALL,
            notify=notify,
        )

    def _warn_of_spellings(self, text: str) -> None:
        """Warn the caller of a method where `text` spells special tokens as ordinary text."""
        tokenizer = self.tokenizer
        unused = tokenizer.unused_special_tokens
        if spellings := count_spellings([text], tokenizer.special_tokens, unused):
            note = explain_spellings(spellings, "the text")
            warnings.warn(note.removeprefix("note: "), stacklevel=3)
