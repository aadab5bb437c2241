"""The checkpoints that the page looks at: listed by hash, and a few of them loaded.

The microscope has engines of its own, so neither the answers of the API nor a run in training
depend on it. It reads the files of a run and writes none.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.file_stamp import FileStamp, read_stamp
from glasslm.engines.protocol import Engine
from glasslm.errors import DamagedError
from glasslm.inference.microscope.attention import induction_probe, score_heads
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.inference.microscope.sgd_step import make_step_engine
from glasslm.inference.trained_model import Model, load_model
from glasslm.runs import checkpoint
from glasslm.serve.api_error import ApiError
from glasslm.serve.inside.texts import InsideText
from glasslm.serve.logprobs import TokenNames
from glasslm.serve.served_model import ModelSource, hash_checkpoint, manifest_path

MAX_MODELS, MAX_MODEL_BYTES = 8, 2 << 30  # loaded together; two are kept, whatever they need
MAX_PASSES, MAX_PASS_BYTES = 64, 256 << 20


@dataclass(frozen=True)
class CheckpointName:
    """A checkpoint of a served run. `hash` names its bytes and those of run.json."""

    source: ModelSource
    step: int
    hash: str


@dataclass(eq=False)
class InsideModel:
    """A loaded checkpoint."""

    name: CheckpointName
    model: Model

    @cached_property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The weights by the names of the parameter table, as the model computes with them."""
        loaded = checkpoint.load(self.name.source.path, self.name.step)
        return loaded.weights()

    @cached_property
    def repeated_scores(self) -> tuple[int, NDArray[np.float64]]:
        """The tokens of a random text that is repeated once, and the scores (K, L, H) on it."""
        probe = RecordedPass(self.model, induction_probe(self.model))
        return probe.length, score_heads(probe)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """The identity of the tokenizer."""
        return self.model.tokenizer.sha256

    @cached_property
    def token_names(self) -> TokenNames:
        """How tokens are written."""
        return TokenNames(self.model.tokenizer)

    @cached_property
    def step_engine(self) -> Engine:
        """An engine that takes steps with a copy of the weights, which it must load."""
        return make_step_engine(self.model)

    @property
    def bytes(self) -> int:
        """The memory of the model, at most: weights, a second copy, and an engine for steps."""
        return 4 * 4 * self.model.parameters.total


class CheckpointStore:
    """Finds, loads and keeps checkpoints and forward passes. Loading is for one thread alone."""

    def __init__(self, sources: Sequence[ModelSource]) -> None:
        self.sources = {source.name: source for source in sources}
        self._hashes: dict[Path, tuple[FileStamp | None, str]] = {}
        self._models: OrderedDict[str, InsideModel] = OrderedDict()
        self._passes: OrderedDict[tuple[str, str], RecordedPass] = OrderedDict()

    def list(self, source: ModelSource) -> list[CheckpointName]:
        """The checkpoints of a run, ascending by step, without one that is being written."""
        names = []
        for step in checkpoint.list_steps(source.path):
            digest = self._hash(source.path, step)
            if digest:
                names.append(CheckpointName(source, step, digest))
        return names

    def find(self, digest: str) -> CheckpointName:
        """The checkpoint with this hash. Raises ApiError 404 where no served run has it now."""
        for source in self.sources.values():
            for name in self.list(source):
                if name.hash == digest:
                    return name
        raise ApiError(
            404,
            "no served run has this checkpoint: training may have replaced it by a newer one",
            code="unknown_checkpoint",
        )

    def load(self, digest: str) -> InsideModel:
        """The model of a checkpoint. Raises ApiError where it is gone or damaged."""
        if digest not in self._models:
            name = self.find(digest)
            try:
                model = load_model(name.source.path, name.step, **vars(name.source.device))
            except (DamagedError, FileNotFoundError) as error:
                raise ApiError(
                    404, f"the checkpoint cannot be read: {error}", code="unknown_checkpoint"
                ) from None
            self._models[digest] = InsideModel(name, model)
        self._models.move_to_end(digest)
        total = sum(loaded.bytes for loaded in self._models.values())
        while len(self._models) > MAX_MODELS or (total > MAX_MODEL_BYTES and len(self._models) > 2):
            _, oldest = self._models.popitem(last=False)
            total -= oldest.bytes
            self._passes = OrderedDict(
                (key, recorded)
                for key, recorded in self._passes.items()
                if recorded.model is not oldest.model
            )
        return self._models[digest]

    def record(self, loaded: InsideModel, text: InsideText) -> RecordedPass:
        """The forward pass of a model over a text, kept from the last time where possible."""
        key = loaded.name.hash, text.id
        if key not in self._passes:
            self._passes[key] = RecordedPass(loaded.model, np.array(text.ids))
        self._passes.move_to_end(key)
        for old in self._surplus_passes():
            del self._passes[old]
        return self._passes[key]

    def _surplus_passes(self) -> Iterator[tuple[str, str]]:
        """The oldest passes, which must be forgotten; the newest stays."""
        total = sum(recorded.bytes for recorded in self._passes.values())
        for count, (key, recorded) in zip(range(len(self._passes), 1, -1), [*self._passes.items()]):
            if count <= MAX_PASSES and total <= MAX_PASS_BYTES:
                return
            total -= recorded.bytes
            yield key

    def _hash(self, run_dir: Path, step: int) -> str:
        """`hash_checkpoint`, computed again where the manifest has changed."""
        manifest = manifest_path(run_dir, step)
        stamp = read_stamp(manifest)
        if stamp is None:
            return ""
        known = self._hashes.get(manifest)
        if known is None or known[0] != stamp:
            known = stamp, hash_checkpoint(run_dir, step)
            if known[1]:
                self._hashes[manifest] = known
        return known[1]


def checkpoint_content(
    name: CheckpointName, best: int | None, losses: dict[int, float]
) -> dict[str, Any]:
    """The JSON of a checkpoint in /inside/runs; `losses` are validation losses by step."""
    content = dataclasses.asdict(dataclasses.replace(name, source=None))  # type: ignore[arg-type]
    del content["source"]
    return content | {"best": name.step == best, "val_loss": losses.get(name.step)}
