"""Test doubles: an engine without a model, and a run folder without training."""

from pathlib import Path

import numpy as np

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import CharTokenizer, Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.record import ComputeRecord, RunRecord, build_record


class HistoryCache:
    """The tokens that each row has read."""

    def __init__(self, rows, capacity):
        self.capacity = capacity
        self.numbers = range(rows)  # of the rows, also in a part of the cache
        self.read = [[] for _ in range(rows)]
        self.slots = [[] for _ in range(rows)]  # what a row has held, also before it was cleared

    @property
    def lengths(self):
        return np.array([len(tokens) for tokens in self.read])

    def clear(self, row):
        self.read[row].clear()

    def erase(self, row):
        self.clear(row)

    def append(self, row, tokens):
        start = len(self.read[row])
        self.read[row] += tokens
        self.slots[row][start : start + len(tokens)] = tokens

    def part(self, rows):
        part = HistoryCache(0, self.capacity)
        part.numbers = self.numbers[rows]
        part.read, part.slots = self.read[rows], self.slots[rows]
        return part

    def copy_prefix(self, source, row, tokens):
        assert self.slots[source][: len(tokens)] == tokens.tolist()
        self.clear(row)
        self.append(row, tokens.tolist())


class HistoryEngine:
    """An engine whose logits depend on every token and its position: a wrong cache shows."""

    name = "history"
    row_tile = 4

    def __init__(self, vocab_size, seed=0, spread=2.0):
        self.vocab_size = vocab_size
        self.table = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * spread
        self.calls = 0
        self.widest = 0  # most tokens of a row in one call

    def after(self, tokens):
        """(V,): the logits after these tokens, read into an empty cache."""
        places = np.arange(len(tokens))
        weights = 0.6 ** places[::-1] * np.cos(places)
        return (weights[:, None] * self.table[np.array(tokens, int)]).sum(0).astype(np.float32)

    def new_cache(self, rows, capacity):
        self.cache = HistoryCache(rows, capacity)
        return self.cache

    def logits(self, tokens, cache, counts, every=False):
        assert not every
        assert tokens.dtype == np.int64
        assert tokens.shape == (len(cache.read), max(counts))
        self.calls += 1
        self.widest = max(self.widest, tokens.shape[1])
        # NaN where the count is 0.
        result = np.full((len(tokens), self.vocab_size), np.nan, np.float32)
        for row, (new, count) in enumerate(zip(tokens.tolist(), counts)):
            cache.append(row, new[:count])
            assert len(cache.read[row]) <= cache.capacity, "the cache is full"
            if count:
                result[row] = self.after(cache.read[row])
        return result

    def losses(self, tokens, targets):
        nats = np.zeros(targets.shape, np.float32)
        for row, position in zip(*np.nonzero(targets >= 0)):
            logits = self.after(tokens[row, : position + 1]).astype(np.float64)
            nats[row, position] = (
                np.log(np.exp(logits - logits.max()).sum())
                + logits.max()
                - logits[targets[row, position]]
            )
        return nats


def make_run(folder: Path, alphabet: str, data_sha256: str = "0" * 64, **model) -> Path:
    """A run folder with a checkpoint of step 0, with weights so large that logits differ widely."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "block_size": 16}
    config = RunConfig(model=ModelConfig(**sizes | model)).resolve()
    tokenizer = CharTokenizer(alphabet)
    engine = make_engine(config, tokenizer.vocab_size, ComputeConfig(threads=1))
    weights = initial_weights(parameter_table(config.model, tokenizer.vocab_size), seed=1)
    engine.load((name, array * 12 if array.std() else array) for name, array in weights)
    record = make_record(config, tokenizer, data_sha256)
    run_folder.create_run(folder, record, tokenizer.to_json())
    identity = run_folder.Run(folder).identity
    checkpoint.save(folder, engine.state(), checkpoint.TrainingPosition(0, 0, 0, 0), identity)
    return folder


def make_record(config: RunConfig, tokenizer: Tokenizer, data_sha256: str = "0" * 64) -> RunRecord:
    """run.json of a run whose text has no files."""
    counts = ("train_tokens", "train_bytes", "val_tokens", "val_bytes")
    data = {"files": [], "sha256": data_sha256, **dict.fromkeys(counts, 0)}
    compute: ComputeRecord = {"engine": "numpy", "device": "cpu", "precision": "fp32"}
    return build_record(config, tokenizer, data, compute, preset="tiny", command="")
