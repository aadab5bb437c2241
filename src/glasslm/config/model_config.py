"""The architecture of a model: ModelConfig, the words of its variants, and its limits."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never, cast, get_args

import tyro

from glasslm.config.config_fields import require_fields
from glasslm.errors import InputError, require

Norm = Literal["rmsnorm", "layernorm", "rmsnorm1p", "none"]
NormPosition = Literal["pre", "post", "sandwich"]
FeedForward = Literal["swiglu", "geglu", "geglu_exact", "gelu", "gelu_exact", "relu", "relu2"]
Position = Literal["none", "sinusoidal", "learned", "rope", "alibi"]
AttentionName = Literal["auto", "plain", "flash"]
Mask = Literal["causal", "window"]  # the keys that a query attends to
RopeScaling = Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"]
Residual = Literal["serial", "parallel", "parallel_one_norm"]
LayerKind = Literal["f", "w", "n"]  # attention of a layer: full, window, full without RoPE

# Activations that multiply a second projection, "gate": nothing else lists which ones do.
GATED: frozenset[FeedForward] = frozenset({"swiglu", "geglu", "geglu_exact"})
# Positions that enter attention by distance only, so that a text may move along them.
RELATIVE_POSITIONS: frozenset[Position] = frozenset({"none", "rope", "alibi"})
ADAPTABLE_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
BIASED_MODULES = ("norm", "q", "k", "v", "o", "mlp", "head")
BIASED_BY_DEFAULT = frozenset({"norm", "q", "v", "o", "mlp"})  # with --bias
# Rotations within the original context, from which on a frequency keeps its value.
HIGH_ROTATIONS: dict[RopeScaling, float] = {"llama3": 4.0, "yarn": 32.0}

# Limits above any real model: the table of a run.json from elsewhere stays small enough to list.
MAX_WIDTH, MAX_BLOCKS, MAX_CONTEXT_TOKENS = 1 << 20, 10_000, 1 << 24


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Both engines implement every field, and the tests enumerate them."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Number of query heads. Must divide d_model unless head_dim is given."""
    n_kv_heads: int = 0
    """Number of key and value heads (0: n_heads; 1: multi-query attention). Must divide n_heads."""
    head_dim: int = 0
    """Width of one head (0: d_model / n_heads)."""
    d_ff: int = 0
    """Inner width of the feed-forward (0: 4 d_model; gated: 8/3 d_model in steps of 32)."""
    block_size: Annotated[int, tyro.conf.arg(aliases=["--seq-len"])] = 128
    """Context length in tokens."""
    dropout: float = 0.0
    """Fraction of activations dropped after the embedding and after each sublayer."""
    attention_dropout: float = 0.0
    """Fraction of attention probabilities dropped."""
    norm: Norm = "rmsnorm"
    """Norm: rmsnorm (arXiv:1910.07467), layernorm (arXiv:1607.06450), none (for experiments).
    The gain of rmsnorm1p is 1 + w, as in Gemma (arXiv:2403.08295)."""
    norm_eps: float = 1e-5
    """Epsilon added to the mean square inside a norm (imported models often use 1e-6)."""
    norm_position: NormPosition = "pre"
    """Normalize the input of each sublayer (pre), or the sum after it (post, arXiv:1706.03762).
    Or the input and the output of each sublayer (sandwich, as in Gemma 2, arXiv:2408.00118)."""
    residual: Residual = "serial"
    """Feed-forward after attention (serial), or both from the same input (arXiv:2204.06745).
    Both read the same norm in parallel_one_norm, as in Phi and GPT-J."""
    feedforward: FeedForward = "swiglu"
    """Feed-forward activation: gated SiLU or GELU (arXiv:2002.05202), or GELU, ReLU without a gate.
    The square of ReLU is relu2 (arXiv:2109.08668). GELU is its tanh form, exact that with erf."""
    position: Position = "rope"
    """Encoding of positions: none, sinusoids, learned vectors, RoPE (arXiv:2104.09864), or ALiBi.
    ALiBi is a bias of attention by distance (arXiv:2108.12409)."""
    rope_base: float = 10_000.0
    """Base of RoPE's frequencies: larger for longer contexts (arXiv:2309.16039, section 4.1)."""
    window_rope_base: float = 0.0
    """Base of RoPE, unscaled, in the window layers of --attention-pattern (0: rope_base)."""
    partial_rotary_factor: float = 1.0
    """Fraction of each head that RoPE rotates: its first dimensions (arXiv:2204.06745)."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head as well (arXiv:1608.05859)."""
    qk_norm: bool = False
    """Apply RMSNorm to the queries and keys of each head (arXiv:2010.04245)."""
    bias: bool = False
    """Add a bias to LayerNorms and linear layers: short for --bias-targets norm,q,v,o,mlp."""
    bias_targets: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = ""
    """Modules with a bias, of norm,q,k,v,o,mlp,head, in place of --bias (Qwen2: q,k,v)."""
    scale_embeddings: bool = False
    """Multiply the embeddings by sqrt(d_model) (arXiv:1706.03762, section 3.4)."""
    attention_scale: float = 0.0
    """Factor of the attention scores (0: 1 / sqrt(head_dim))."""
    attention_softcap: float = 0.0
    """Limit scores of attention to +-c by c tanh(score / c) (0: off; arXiv:2408.00118)."""
    logit_softcap: float = 0.0
    """Limit logits to +-c by c tanh(logit / c) (0: off; arXiv:2408.00118)."""
    attention: AttentionName = "auto"
    """Attention algorithm: plain stores T x T weights, flash works in tiles (arXiv:2205.14135).
    Memory of flash is linear in the context T; auto chooses by T."""
    window: int = 0
    """Number of tokens that each token attends to, itself included (0: all; arXiv:2004.05150)."""
    attention_pattern: str = ""
    """Attention of the layers in turn, repeated: f full, w window, n full without RoPE.
    Gemma 3 has wwwwwf, SmolLM3 fffn (empty: the same in all layers)."""
    document_attention: bool = False
    """Attend only within a document (needs --special-tokens or --document-separator)."""
    document_end_id: tyro.conf.Suppress[int] = -1
    """Token that ends a document, which training sets (-1: not set)."""
    rope_scaling: RopeScaling = "none"
    """Stretch RoPE to longer contexts: linear (arXiv:2306.15595), ntk (keeps high frequencies).
    Or dynamic (ntk for block_size), yarn (arXiv:2309.00071), llama3 (arXiv:2407.21783)."""
    rope_factor: float = 1.0
    """Factor by which --rope-scaling stretches the context."""
    rope_original_context: int = 0
    """Context before dynamic, yarn or llama3 stretched it (0: block_size / rope_factor)."""
    rope_low_rotations: float = 1.0
    """Rotations in the original context below which yarn and llama3 stretch a frequency fully."""
    rope_high_rotations: float = 0.0
    """Rotations above which they keep a frequency (0: 32 for yarn, 4 for llama3)."""
    rope_attention_factor: float = 0.0
    """Factor of rotated queries and keys with yarn (0: 1 + 0.1 ln rope_factor)."""
    n_experts: int = 0
    """Number of experts per feed-forward, each of width d_ff (0: no mixture; arXiv:2401.04088)."""
    experts_per_token: int = 2
    """Number of experts that compute each token: those with the highest router probability."""
    shared_expert: bool = False
    """Add an expert that computes every token (arXiv:2401.06066)."""
    lora_rank: int = 0
    """Train only LoRA adapters of this rank, with frozen weights (0: off; arXiv:2106.09685)."""
    lora_alpha: float = 16.0
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_rank."""
    lora_targets: Annotated[str, tyro.conf.arg(metavar="NAME,NAME")] = "q,v"
    """Matrices that get adapters, of q,k,v,o,gate,up,down."""

    def __post_init__(self) -> None:
        self._require_sizes()
        self._require_divisible_heads()
        self._require_attention_and_positions()
        self._require_rope()
        self._require_biases()
        self._require_residual()
        self._require_experts_and_adapters()

    def _require_sizes(self) -> None:
        counts = ("d_model", "n_layers", "n_heads", "block_size")
        require_fields(self, counts, lambda x: x >= 1, "at least 1")
        derived = ("n_kv_heads", "d_ff", "head_dim", "rope_original_context")
        require_fields(self, derived, lambda x: 0 <= x < 2**63, "0 (derived) or more")
        require_fields(self, ("window", "lora_rank"), lambda x: 0 <= x < 2**63, "0 (off) or more")
        widths = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "lora_rank")
        require_fields(self, widths, lambda x: x <= MAX_WIDTH, f"at most {MAX_WIDTH:,}")
        limit = f"at most {MAX_CONTEXT_TOKENS:,}"
        require_fields(self, ("block_size",), lambda x: x <= MAX_CONTEXT_TOKENS, limit)
        blocks = self.n_layers * max(1, self.n_experts)
        require(blocks <= MAX_BLOCKS, "n_layers x n_experts", blocks, f"at most {MAX_BLOCKS:,}")
        fractions = ("dropout", "attention_dropout")
        require_fields(self, fractions, lambda x: 0 <= x < 1, "at least 0 and below 1")
        rotated = ["partial_rotary_factor"]  # before rotary_size, which needs a finite number
        require_fields(self, rotated, lambda x: 0 < x <= 1, "above 0 and at most 1")

    def _require_divisible_heads(self) -> None:
        if self.d_model % self.n_heads and not self.head_dim:
            step = 2 * self.n_heads  # gives an even head size, which RoPE needs
            raise InputError(
                f"d_model is {self.d_model}, which {self.n_heads} heads do not divide: "
                "choose --d-model as a multiple of --n-heads, for example "
                f"{step * max(1, round(self.d_model / step))}"
            )
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise InputError(
                f"n_kv_heads is {self.n_kv_heads}, which does not divide the {self.n_heads} heads: "
                f"choose --n-kv-heads from {', '.join(map(str, divisors))}"
            )
        if self.position == "rope" and self.rotary_size % 2:
            part = "" if self.partial_rotary_factor == 1 else " x partial_rotary_factor"
            size = "head_dim" if self.head_dim else "d_model / n_heads"
            raise InputError(
                f"{size}{part} is {self.rotary_size}: rope needs an even head size, change "
                "--n-heads or --d-model, or choose another --position"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise InputError(
                f"d_model is {self.d_model}: sinusoidal positions need an even width, for example "
                f"--d-model {self.d_model + 1}"
            )

    def _require_attention_and_positions(self) -> None:
        for name in ("attention_dropout", "attention_softcap"):
            if self.attention == "flash" and getattr(self, name):
                what = "dropout of probabilities" if name == "attention_dropout" else "soft cap"
                raise InputError(
                    f"--attention flash has no {what}: leave out --attention flash or "
                    f"--{name.replace('_', '-')}"
                )
        require_fields(self, ["norm_eps"], lambda x: 0 < x < 1, "above 0 and below 1")
        scale = "0 (1 / sqrt(head_dim)) or more, and finite"
        require_fields(self, ["attention_scale"], lambda x: 0 <= x < math.inf, scale)
        caps = ("attention_softcap", "logit_softcap")
        require_fields(self, caps, lambda x: 0 <= x < math.inf, "0 (off) or more, and finite")
        if set(self.attention_pattern) - set(get_args(LayerKind)):
            raise InputError(
                f"attention_pattern is '{self.attention_pattern[:100]}': expected the letters "
                "f (full), w (window) and n (full without RoPE), for example wwwf"
            )
        if self.attention_pattern and ("w" in self.attention_pattern) != (self.window > 0):
            raise InputError(
                f"attention_pattern is '{self.attention_pattern[:100]}' and window {self.window}: "
                "give a window with w in the pattern, and none without"
            )
        if "n" in self.attention_pattern and self.position != "rope":
            raise InputError(
                f"attention_pattern is '{self.attention_pattern[:100]}': n needs --position rope, "
                f"not {self.position}"
            )

    def _require_rope(self) -> None:
        require_fields(self, ["rope_base"], lambda x: 1 < x < math.inf, "above 1 and finite")
        require_fields(self, ["rope_factor"], lambda x: 1 <= x <= 1e6, "1 to 1e6")
        base = ["window_rope_base"]
        require_fields(self, base, lambda x: x == 0 or 1 < x < math.inf, "0 (rope_base) or above 1")
        numbers = ("rope_low_rotations", "rope_high_rotations", "rope_attention_factor")
        # Powers and logarithms of the scalings stay finite within these limits.
        require_fields(self, numbers, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0, or 1e-6 to 1e6")
        if (self.rope_scaling != "none") != (self.rope_factor > 1):
            raise InputError(
                f"rope_scaling is {self.rope_scaling} and rope_factor is {self.rope_factor:g}: "
                "give both --rope-scaling linear (or ntk) and --rope-factor above 1, or neither"
            )
        needs_rope = {
            f"--rope-scaling {self.rope_scaling}": self.rope_scaling != "none",
            "--partial-rotary-factor": self.partial_rotary_factor < 1,
            "--window-rope-base": self.window_rope_base > 0,
            "--bias-targets k": "k" in self.biased_modules,  # softmax cancels it otherwise
        }
        for flag, is_used in needs_rope.items():
            if is_used and self.position != "rope":
                raise InputError(f"{flag} needs --position rope, not {self.position}")
        if self.position == "rope" and self.rotary_size < 2:
            raise InputError(
                f"partial_rotary_factor is {self.partial_rotary_factor:g} of {self.head_size} "
                "dimensions: expected at least 2 rotated dimensions"
            )
        if self.window_rope_base and "w" not in self.attention_pattern:
            raise InputError("--window-rope-base needs window layers: give --attention-pattern")
        if self.rope_scaling in HIGH_ROTATIONS and not (
            0 < self.rope_low_rotations < self.high_rotations
        ):
            raise InputError(
                f"rope_low_rotations is {self.rope_low_rotations:g} and rope_high_rotations "
                f"{self.high_rotations:g}: expected 0 < low < high"
            )

    def _require_biases(self) -> None:
        names = [word for part in self.bias_targets.split(",") if (word := part.strip())]
        if not set(names) <= set(BIASED_MODULES):
            raise InputError(
                f"bias_targets is '{self.bias_targets[:100]}': expected some of "
                f"{','.join(BIASED_MODULES)}"
            )
        if names and self.bias:
            raise InputError("--bias-targets names all modules with a bias: leave out --bias")
        if "head" in names and self.tie_embeddings:
            raise InputError("--bias-targets head needs a head of its own: --no-tie-embeddings")

    def _require_residual(self) -> None:
        if self.residual == "parallel_one_norm" and self.norm_position != "pre":
            raise InputError(
                f"--residual parallel_one_norm needs --norm-position pre, not {self.norm_position}"
            )
        if self.residual == "parallel" and self.norm_position == "post":
            raise InputError(
                "--residual parallel needs --norm-position pre or sandwich, not post: there is one "
                "sum and not two"
            )

    def _require_experts_and_adapters(self) -> None:
        require_fields(self, ["n_experts"], lambda x: x == 0 or x >= 2, "0 (off), or 2 and more")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise InputError(
                f"experts_per_token is {self.experts_per_token}: expected 1 to {self.n_experts}, "
                "the number of experts"
            )
        if self.shared_expert and not self.n_experts:
            raise InputError(
                "--shared-expert needs other experts: give --n-experts, or leave it out"
            )
        require_fields(self, ["lora_alpha"], lambda x: 0 < x < math.inf, "above 0 and finite")
        known = [name for name in ADAPTABLE_MATRICES if name != "gate" or self.is_gated]
        if not self.adapted_matrices or not set(self.adapted_matrices) <= set(known):
            raise InputError(
                f"lora_targets is '{self.lora_targets}': expected some of {','.join(known)}"
            )

    @property
    def adapted_matrices(self) -> tuple[str, ...]:
        """The matrices that LoRA adapts: the names in lora_targets."""
        return tuple(word for part in self.lora_targets.split(",") if (word := part.strip()))

    @property
    def biased_modules(self) -> frozenset[str]:
        """The modules with a bias: the names in bias_targets, or those of --bias."""
        named = frozenset(word for part in self.bias_targets.split(",") if (word := part.strip()))
        return named or (BIASED_BY_DEFAULT if self.bias else frozenset())

    @property
    def mask(self) -> Mask:
        """The kind of mask. Every path that computes attention matches all kinds."""
        return "window" if self.window else "causal"

    def layer_kind(self, layer: int) -> LayerKind:
        """The attention of one layer; the pattern is repeated."""
        pattern = self.attention_pattern or ("w" if self.window else "f")
        return cast(LayerKind, pattern[layer % len(pattern)])

    def kind_window(self, kind: LayerKind) -> int:
        """The window of the layers of one kind in tokens; 0: none."""
        mask = self.mask
        match mask:
            case "causal":
                return 0
            case "window":
                return self.window if kind == "w" else 0
            case _:
                assert_never(mask)

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """The kinds of all layers, each once."""
        return sorted({self.layer_kind(layer) for layer in range(self.n_layers)})

    @property
    def has_final_norm(self) -> bool:
        """Whether norms precede the sublayers, so that the output needs one, too."""
        match self.norm_position:
            case "pre" | "sandwich":
                return True
            case "post":  # every block ends in a norm
                return False
            case _:
                assert_never(self.norm_position)

    @property
    def has_rolling_cache(self) -> bool:
        """Whether a cache of one window suffices to generate text of any length.

        That needs a window within the context in every layer, and relative positions.
        """
        is_local = set(self.attention_pattern) <= {"w"} and 0 < self.window <= self.block_size
        return is_local and self.position in RELATIVE_POSITIONS

    def cache_length(self, capacity: int) -> int:
        """The number of tokens a KV cache stores of each text of up to `capacity` tokens."""
        return min(capacity, self.window) if self.has_rolling_cache else capacity

    @property
    def head_size(self) -> int:
        """The width of one head: head_dim, or d_model / n_heads."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def rotary_size(self) -> int:
        """The number of dimensions of a head that RoPE rotates."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def high_rotations(self) -> float:
        """rope_high_rotations, or its value for the kind of scaling."""
        return self.rope_high_rotations or HIGH_ROTATIONS.get(self.rope_scaling, 0.0)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that scores / sqrt(head size) have attention_scale."""
        return self.attention_scale * math.sqrt(self.head_size) if self.attention_scale else 1.0

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward multiplies its activation by a second projection."""
        return self.feedforward in GATED

    def resolve(self) -> ModelConfig:
        """The same model with its derived sizes (n_kv_heads, d_ff) as numbers above 0."""
        gated_width = math.ceil(8 * self.d_model / 3 / 32) * 32
        d_ff = gated_width if self.is_gated else 4 * self.d_model
        return dataclasses.replace(
            self, n_kv_heads=self.n_kv_heads or self.n_heads, d_ff=self.d_ff or d_ff
        )
