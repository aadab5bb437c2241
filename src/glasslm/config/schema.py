"""What a run is, as frozen dataclasses: ModelConfig, DataConfig, OptimizerConfig, TrainConfig, together a RunConfig.

A RunConfig and a seed determine a run; ComputeConfig says only where and how it is computed. The docstring under a
field is its help text on the command line. Field names are unique over all classes, because the flags are flat.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from glasslm.config.units import byte_count, seconds
from glasslm.errors import InputError, require

Corpus = Literal["shakespeare", "python", "arxiv", "wikipedia"]
Norm = Literal["rmsnorm", "layernorm", "none"]
NormPosition = Literal["pre", "post"]
FeedForward = Literal["swiglu", "geglu", "gelu", "relu", "relu2"]
Position = Literal["none", "sinusoidal", "learned", "rope", "alibi"]
OptimizerName = Literal["adamw", "muon", "sgd"]
AttentionName = Literal["auto", "plain", "flash"]
RopeScaling = Literal["none", "linear", "ntk"]
ScheduleName = Literal["cosine", "wsd", "constant"]
EngineName = Literal["auto", "numpy", "torch"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]

GATED: frozenset[FeedForward] = frozenset({"swiglu", "geglu"})
RELATIVE: frozenset[Position] = frozenset(
    {"none", "rope", "alibi"}
)  # attention sees distances, not places
ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down")
ALIASES = {"seq_len": "block_size"}  # the course's word -> the field


# Beyond every machine. A run.json from elsewhere must not keep us busy with the mere list of its weights.
WIDEST, MOST_BLOCKS = 1 << 20, 10_000


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every field is a switch that both engines and the tests enumerate."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Number of query heads; must divide d_model."""
    n_kv_heads: int = 0
    """Number of key and value heads (0: as many as n_heads; 1: multi-query attention); must divide n_heads."""
    d_ff: int = 0
    """Inner width of the feed-forward (0: 4 d_model, or 8/3 d_model rounded up to a multiple of 32 when gated)."""
    block_size: Annotated[int, tyro.conf.arg(aliases=["--seq-len"])] = 128
    """Context length in tokens."""
    dropout: float = 0.0
    """Share of the activations dropped after the embedding and after each sublayer."""
    attention_dropout: float = 0.0
    """Share of the attention probabilities dropped."""
    norm: Norm = "rmsnorm"
    """Normalisation: RMSNorm (arXiv:1910.07467), LayerNorm (arXiv:1607.06450), or none, to see what it is good for."""
    norm_eps: float = 1e-5
    """Added to the mean square under the root of a norm; other people's models have 1e-6, too."""
    norm_position: NormPosition = "pre"
    """Normalise the input of each sublayer (pre) or the sum after it (post, as in the original transformer)."""
    feedforward: FeedForward = "swiglu"
    """Feed-forward: gated by SiLU or GELU (arXiv:2002.05202), or plain GELU, ReLU, squared ReLU (arXiv:2109.08668)."""
    position: Position = "rope"
    """How order enters: nothing, added sinusoids, learned vectors, rotation (arXiv:2104.09864), ALiBi (2108.12409)."""
    rope_base: float = 10_000.0
    """Base of rope's frequencies: larger ones for longer contexts (arXiv:2309.16039, section 4.1)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head, too (arXiv:1608.05859)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, with a gain (arXiv:2010.04245)."""
    bias: bool = False
    """Give linear layers and LayerNorms a bias (keys never have one: softmax does not see it)."""
    scale_embeddings: bool = False
    """Multiply the embeddings by sqrt(d_model) (arXiv:1706.03762, section 3.4)."""
    attention: AttentionName = "auto"
    """plain keeps all T x T weights; flash goes by tiles, in memory linear in T (arXiv:2205.14135); auto by length."""
    window: int = 0
    """Each token sees only this many of the newest, itself included (0: all; arXiv:2004.05150)."""
    rope_scaling: RopeScaling = "none"
    """Stretch rope for longer texts: linear (arXiv:2306.15595), or ntk, which leaves high frequencies as they are."""
    rope_factor: float = 1.0
    """How many times longer a text the scaled rope is for."""
    n_experts: int = 0
    """Experts in each feed-forward, of width d_ff each (0: an ordinary feed-forward; arXiv:2401.04088)."""
    experts_per_token: int = 2
    """Experts that compute each token: the most probable ones by the router."""
    shared_expert: bool = False
    """One expert more, which computes every token (arXiv:2401.06066)."""
    lora_rank: int = 0
    """Train only adapters of this rank, beside frozen weights (0: train all weights; arXiv:2106.09685)."""
    lora_alpha: float = 16.0
    """What the adapters add is multiplied by lora_alpha / lora_rank."""
    lora_targets: str = "q,v"
    """The matrices that get adapters, of q,k,v,o,gate,up,down."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "block_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("n_kv_heads", "d_ff"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (derived) or more")
        for name in ("window", "lora_rank"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        for name in ("d_model", "n_heads", "n_kv_heads", "d_ff", "lora_rank"):
            require(getattr(self, name) <= WIDEST, name, getattr(self, name), f"at most {WIDEST:,}")
        blocks = self.n_layers * max(1, self.n_experts)
        require(blocks <= MOST_BLOCKS, "n_layers x n_experts", blocks, f"at most {MOST_BLOCKS:,}")
        for name in ("dropout", "attention_dropout"):
            require(
                0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1"
            )
        if self.d_model % self.n_heads:
            fits = 2 * self.n_heads  # an even head size, which rope needs
            raise InputError(
                f"d_model is {self.d_model}, which {self.n_heads} heads do not divide: choose --d-model as a multiple "
                f"of --n-heads, for example {fits * max(1, round(self.d_model / fits))}"
            )
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise InputError(
                f"n_kv_heads is {self.n_kv_heads}, which does not divide the {self.n_heads} heads: choose --n-kv-heads "
                f"from {', '.join(map(str, divisors))}"
            )
        if self.position == "rope" and self.head_size % 2:
            raise InputError(
                f"rope rotates pairs, so d_model / n_heads must be even, not {self.head_size}: change --n-heads or "
                "--d-model, or choose another --position"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise InputError(f"sinusoidal positions need an even d_model, not {self.d_model}")
        self._require_parts_that_fit()

    def _require_parts_that_fit(self) -> None:
        if self.attention == "flash" and self.attention_dropout:
            raise InputError(
                "flash drops no probabilities: leave out --attention flash or --attention-dropout"
            )
        require(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "above 0 and below 1")
        require(1 < self.rope_base < math.inf, "rope_base", self.rope_base, "above 1 and finite")
        require(
            1 <= self.rope_factor < math.inf,
            "rope_factor",
            self.rope_factor,
            "1 or more, and finite",
        )
        if (self.rope_scaling != "none") != (self.rope_factor > 1):
            raise InputError(
                f"rope_scaling is {self.rope_scaling} and rope_factor {self.rope_factor:g}: one does nothing without "
                "the other, give both --rope-scaling linear (or ntk) and --rope-factor above 1, or neither"
            )
        if self.rope_scaling != "none" and self.position != "rope":
            raise InputError(
                f"--rope-scaling {self.rope_scaling} stretches rope, but --position is {self.position}"
            )
        require(
            self.n_experts == 0 or self.n_experts >= 2,
            "n_experts",
            self.n_experts,
            "0 (off), or 2 and more",
        )
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise InputError(
                f"experts_per_token is {self.experts_per_token}: expected 1 to {self.n_experts}, the number of experts"
            )
        if self.shared_expert and not self.n_experts:
            raise InputError(
                "a shared expert stands beside others: give --n-experts, or leave out --shared-expert"
            )
        require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "above 0 and finite")
        known = ADAPTABLE if self.gated else tuple(name for name in ADAPTABLE if name != "gate")
        if not self.adapted_matrices or not set(self.adapted_matrices) <= set(known):
            raise InputError(
                f"lora_targets is '{self.lora_targets}': expected some of {','.join(known)}"
            )

    @property
    def adapted_matrices(self) -> tuple[str, ...]:
        """The matrices that LoRA adapts, by the last word of their names."""
        return tuple(word for part in self.lora_targets.split(",") if (word := part.strip()))

    @property
    def rolling(self) -> bool:
        """Whether a text may go on past the context as if there were none: attention forgets, and sees no places."""
        return 0 < self.window <= self.block_size and self.position in RELATIVE

    def cache_length(self, capacity: int) -> int:
        """How many tokens of a text a cache of keys and values keeps, where there is room for `capacity` asked."""
        return min(capacity, self.window) if self.rolling else capacity

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads

    @property
    def gated(self) -> bool:
        return self.feedforward in GATED

    def resolved(self) -> ModelConfig:
        """The same model with the derived sizes (n_kv_heads, d_ff) written out."""
        d_ff = math.ceil(8 * self.d_model / 3 / 32) * 32 if self.gated else 4 * self.d_model
        return dataclasses.replace(
            self, n_kv_heads=self.n_kv_heads or self.n_heads, d_ff=self.d_ff or d_ff
        )


@dataclass(frozen=True)
class DataConfig:
    """What text, cut into what tokens, split how."""

    corpus: Corpus | None = None
    """A named corpus, fetched once and cached (default: shakespeare, or python where there is no network)."""
    category: str = "cs.RO"
    """Which abstracts --corpus arxiv takes (https://arxiv.org/category_taxonomy)."""
    max_results: int = 5000
    """How many of them, the newest first."""
    text_file: tuple[str, ...] = ()
    """Your own text instead: files, folders, glob patterns, or - for standard input; also parquet files and MediaWiki
    dumps (.xml, .xml.bz2), given by their names."""
    hf_dataset: str | None = None
    """A data set of Hugging Face instead, such as roneneldan/TinyStories."""
    hf_config: str | None = None
    """Which of its configurations (where there are several and none is the default)."""
    hf_split: str = "train"
    """Which of its splits."""
    hf_revision: str | None = None
    """Which commit of it (default: the newest one, which is told)."""
    hf_column: str | None = None
    """The column with the text (default: text, or the only one that holds text)."""
    max_bytes: str = "50MB"
    """How much is taken of --corpus wikipedia or --hf-dataset, from its beginning: such as 200kB, 50MB or 2GB."""
    tokenizer: str = "char"
    """char, byte, bpe (trained on this corpus), gpt2, or the path of a tokenizer.json."""
    vocab_size: int = 4096
    """Size of the vocabulary that --tokenizer bpe trains."""
    val_fraction: float = 0.1
    """Share of the text, at its end, kept for validation."""
    test_fraction: float = 0.0
    """Share of the text, after the validation part, kept for a final test."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8: stop and say where, or replace them by U+FFFD."""

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[A-Za-z-]+(\.[A-Za-z-]+)?", self.category) is not None
        require(known, "category", self.category, "one of arXiv's, such as cs.RO or hep-th")
        require(
            1 <= self.max_results <= 30_000,
            "max_results",
            self.max_results,
            "1 to 30,000, the most that arXiv gives",
        )
        require(
            self.vocab_size >= 257,
            "vocab_size",
            self.vocab_size,
            "at least 257 (256 bytes and one merge)",
        )
        require(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "above 0 and below 1")
        require(
            0 <= self.test_fraction < 1,
            "test_fraction",
            self.test_fraction,
            "at least 0 and below 1",
        )
        require(
            self.val_fraction + self.test_fraction < 1,
            "val_fraction + test_fraction",
            self.val_fraction + self.test_fraction,
            "below 1, so that something is left to train on",
        )
        require(
            1 <= self.most_bytes < 2**63,
            "max_bytes",
            self.max_bytes,
            "a size, such as 200kB, 50MB or 2GB",
        )
        self._require_one_text()

    def _require_one_text(self) -> None:
        """Nothing was given that would be ignored in silence."""
        texts = {
            "--corpus": self.corpus,
            "--text-file": self.text_file,
            "--hf-dataset": self.hf_dataset,
        }
        given = [flag for flag, value in texts.items() if value]
        if len(given) > 1:
            raise InputError(f"both {' and '.join(given)} were given: choose one of them")
        if self.hf_dataset is not None:
            known = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.hf_dataset, re.ASCII) is not None
            require(
                known,
                "hf_dataset",
                self.hf_dataset,
                "OWNER/NAME, as on https://huggingface.co/datasets",
            )
        for name in ("hf_config", "hf_split", "hf_column", "hf_revision"):
            require(getattr(self, name) != "", name, "empty", "a name")
            if self.hf_dataset is None and getattr(self, name) != getattr(DataConfig, name):
                raise InputError(
                    f"--{name.replace('_', '-')} says what to take of --hf-dataset, which was not given"
                )

    @property
    def most_bytes(self) -> int:
        """max_bytes as a number; 0 where it is none."""
        return byte_count(self.max_bytes)

    @property
    def chosen(self) -> bool:
        """Whether a text was asked for; if not, corpora.find takes the default one."""
        return bool(self.corpus or self.text_file or self.hf_dataset)


@dataclass(frozen=True)
class OptimizerConfig:
    """What is minimised beside the cross-entropy, and how gradients become updates. Rates are per update."""

    optimizer: OptimizerName = "muon"
    """adamw (arXiv:1711.05101), muon for the hidden matrices with adamw for the rest, or sgd with momentum."""
    lr: float = 1e-2
    """Peak learning rate. Muon's updates are scaled to AdamW's size (arXiv:2502.16982), so one rate serves both."""
    min_lr: float = 0.0
    """Learning rate of the last step (constant has none; a single step takes the peak). A preset's falls with lr."""
    warmup_steps: int = 50
    """Steps of linear warmup (at most half of the run)."""
    schedule: ScheduleName = "cosine"
    """After warmup: cosine to min_lr; wsd, flat and then linear to it over the last fifth; or constant, at lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    momentum: float = 0.95
    """Momentum of muon and sgd."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings are never decayed."""
    grad_clip: float = 1.0
    """Largest global gradient norm, larger ones are scaled down to it (0: off)."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary, in training (arXiv:1512.00567, section 7)."""
    z_loss: float = 0.0
    """Times the squared logarithm of softmax's sum, which keeps logits small (arXiv:2204.02311, section 5)."""
    balance_loss: float = 0.01
    """Times the term that spreads tokens evenly over the experts (arXiv:2101.03961, equation 4)."""
    router_z_loss: float = 0.001
    """Times the squared logarithm of the sum of the router's softmax (arXiv:2202.08906, equation 5)."""
    ema: float = 0.0
    """Decay of an average of the weights, which is then what is evaluated and used (0: off; 0.99 is a start)."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", self.lr, "above 0 and finite")
        require(
            0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"between 0 and lr ({self.lr:g})"
        )
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        for beta in (*self.betas, self.momentum):
            require(0 <= beta < 1, "betas or momentum", beta, "at least 0 and below 1")
        require(
            0 <= self.weight_decay < math.inf,
            "weight_decay",
            self.weight_decay,
            "0 or more, and finite",
        )
        for name in ("grad_clip", "z_loss", "balance_loss", "router_z_loss"):
            require(
                0 <= getattr(self, name) < math.inf,
                name,
                getattr(self, name),
                "0 (off) or more, and finite",
            )
        for name in ("label_smoothing", "ema"):
            require(
                0 <= getattr(self, name) < 1,
                name,
                getattr(self, name),
                "0 (off) or more, and below 1",
            )


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and what is written down on the way."""

    batch_size: int = 16
    """Sequences in one step."""
    micro_batch_size: int = 0
    """Sequences computed at once; gradients of several are summed (0: as many as suit the engine)."""
    max_steps: int = 1000
    """Number of steps (ignored when epochs or max_time is given)."""
    epochs: float | None = None
    """Passes over the training tokens, in place of max_steps; each pass visits every window once."""
    max_time: str | None = None
    """Time for training, such as 90s, 10m or 1h30m: speed is measured first, then the number of steps is fixed."""
    stop_at_loss: float | None = None
    """Stop as soon as the validation loss is at or below this."""
    patience: int | None = None
    """Stop after this many evaluations without a better validation loss."""
    on_spike: Literal["log", "skip", "rollback"] = "log"
    """On a loss or gradient norm 6 deviations above the last 128: note it, skip the step, or take the weights of the
    last checkpoint and go on with the next batch."""
    eval_interval: int = 100
    """Steps between evaluations."""
    log_interval: int = 10
    """Steps between logged steps."""
    sample_interval: int = 250
    """Steps between samples of text (0: none)."""
    checkpoint_interval: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, besides the first and the best."""
    seed: int = 42
    """Seed of the weights, the order of the data and dropout."""
    init_from: str | None = None
    """Start from the best weights of this run, with its architecture and its tokenizer, as `glasslm finetune` does."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "max_steps",
            "eval_interval",
            "log_interval",
            "checkpoint_interval",
            "keep",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("micro_batch_size", "sample_interval"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.seed < 2**64, "seed", self.seed, "0 or more and below 2**64")
        if self.epochs is not None:
            require(0 < self.epochs < math.inf, "epochs", self.epochs, "above 0 and finite")
        if self.stop_at_loss is not None:
            require(
                0 < self.stop_at_loss < math.inf,
                "stop_at_loss",
                self.stop_at_loss,
                "above 0 and finite",
            )
        if self.patience is not None:
            require(self.patience >= 1, "patience", self.patience, "at least 1")
        if self.max_time is not None:
            seconds(self.max_time)
        if self.epochs is not None and self.max_time is not None:
            raise InputError("both --epochs and --max-time were given: choose one of them")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's result."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def resolved(self) -> RunConfig:
        """The same run with the derived sizes of the model written out, as run.json records it."""
        return dataclasses.replace(self, model=self.model.resolved())


@dataclass(frozen=True)
class DeviceConfig:
    """Where a model is computed: it may change speed and rounding, nothing else."""

    engine: EngineName = "auto"
    """numpy, by hand; torch; or auto, which says why: torch on a GPU and for larger models, where it is installed."""
    device: DeviceName = "auto"
    """Which device computes (auto: a GPU where there is one and PyTorch is installed)."""
    precision: Precision = "auto"
    """Precision of the activations; weights stay in fp32 (auto: bf16 where it is faster; fp64 is for checks)."""
    threads: int = 0
    """CPU threads (0: GLASSLM_THREADS, else one for each core)."""

    def __post_init__(self) -> None:
        require(self.threads >= 0, "threads", self.threads, "0 (automatic) or more")


@dataclass(frozen=True)
class ComputeConfig(DeviceConfig):
    """Where and how a run is trained: this, too, changes speed and rounding only."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile (auto: when the run is long enough to repay it)."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: copies of the model (ddp, which auto means), or one model cut over all processes (fsdp)."""
    deterministic: bool = False
    """On a GPU: the same bits again, at some cost in speed (on a CPU they are always the same)."""
