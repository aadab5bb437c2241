"""What a model family of transformers computes, and why it cannot compute a model of glasslm."""

from __future__ import annotations

from dataclasses import dataclass

from glasslm.config.schema import ModelConfig
from glasslm.interop.rope_settings import rope_refusals

ATTENTION = frozenset({"q", "k", "v", "o"})


@dataclass(frozen=True)
class Support:
    """The variants that a family has. A variant that is not listed is refused."""

    norms: tuple[str, ...] = ("rmsnorm",)
    norm_positions: tuple[str, ...] = ("pre",)
    residuals: tuple[str, ...] = ("serial",)
    feedforwards: tuple[str, ...] = ("swiglu", "geglu", "geglu_exact")
    positions: tuple[str, ...] = ("rope",)
    rope_scalings: tuple[str, ...] = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")
    biases: frozenset[str] = frozenset()  # modules that may have a bias
    layer_kinds: frozenset[str] = frozenset("f")  # letters of attention_pattern
    has_patterns: bool = False  # whether layers may differ
    qk_norm: bool = False  # whether there is one, always
    experts: bool = False
    shares_keys: bool = True
    has_head_dim: bool = True  # apart from width and heads
    partial_rotary: bool = False
    window_rope_base: bool = False
    attention_scale: bool = False
    softcaps: bool = False
    scaled_embeddings: tuple[bool, ...] = (False,)

    def refusals(self, c: ModelConfig) -> list[str]:
        """Reasons why the family does not compute a model, each with a flag that helps."""
        return [*self._variant_refusals(c), *self._attention_refusals(c), *self._other_refusals(c)]

    def _variant_refusals(self, c: ModelConfig) -> list[str]:
        reasons = []
        for sentence, value, words, flag in (
            ("its norm is {}", c.norm, self.norms, "norm"),
            ("its norms are in the position {}", c.norm_position, self.norm_positions,
             "norm-position"),
            ("its sublayers are {}", c.residual, self.residuals, "residual"),
            ("its feed-forward is {}", c.feedforward, self.feedforwards, "feedforward"),
            ("its positions are {}", c.position, self.positions, "position"),
            ("its rope is scaled by {}", c.rope_scaling, self.rope_scalings, "rope-scaling"),
        ):  # fmt: skip
            if value not in words and not (flag == "rope-scaling" and "rope" not in self.positions):
                reasons.append(f"{sentence.format(value)} (--{flag} {words[0]})")
        return reasons

    def _attention_refusals(self, c: ModelConfig) -> list[str]:
        reasons = []
        if c.mask not in ("causal", "window"):
            return [f"its mask is {c.mask} (--window 0)"]
        kinds: set[str] = set(c.layer_kinds)
        if c.window >= c.block_size:  # hides nothing
            kinds = {kind.replace("w", "f") for kind in kinds}
        if "n" in kinds and "n" not in self.layer_kinds:
            reasons.append("some layers have no RoPE (--attention-pattern '')")
        if "w" in kinds and "w" not in self.layer_kinds:
            reasons.append(f"its attention has a window of {c.window} tokens (--window 0)")
        elif "w" in kinds and len(kinds) > 1 and not self.has_patterns:
            reasons.append("some layers have a window and some have none (--attention-pattern '')")
        if c.qk_norm != self.qk_norm:
            does, flag = ("does not normalize", "") if self.qk_norm else ("normalizes", "no-")
            reasons.append(f"it {does} queries and keys (--{flag}qk-norm)")
        if not self.shares_keys and c.resolve().n_kv_heads != c.n_heads:
            reasons.append(
                f"{c.n_heads // c.n_kv_heads} heads share their keys (--n-kv-heads {c.n_heads})"
            )
        if not self.has_head_dim and c.head_size * c.n_heads != c.d_model:
            reasons.append(f"its heads have {c.head_size} dimensions (--head-dim 0)")
        if not self.partial_rotary and c.partial_rotary_factor != 1:
            reasons.append("rope rotates a part of its heads (--partial-rotary-factor 1)")
        if not self.window_rope_base and c.window_rope_base:
            reasons.append("its window layers have a base of their own (--window-rope-base 0)")
        if not self.attention_scale and c.attention_scale:
            reasons.append(f"its scores are scaled by {c.attention_scale:g} (--attention-scale 0)")
        return reasons + rope_refusals(c)

    def _other_refusals(self, c: ModelConfig) -> list[str]:
        reasons = []
        biased = c.biased_modules - (set() if c.norm == "layernorm" else {"norm"})
        if extra := sorted(biased - self.biases):
            cure = "--no-bias" if c.bias else "--bias-targets ''"
            reasons.append(f"it has biases of {', '.join(extra)} ({cure})")
        for flag in ("attention-softcap", "logit-softcap"):
            if getattr(c, flag.replace("-", "_")) and not self.softcaps:
                reasons.append(f"it has a soft cap (--{flag} 0)")
        if c.scale_embeddings not in self.scaled_embeddings:
            what = "scales" if c.scale_embeddings else "does not scale"
            flag = "no-scale" if c.scale_embeddings else "scale"
            reasons.append(f"it {what} the embeddings (--{flag}-embeddings)")
        if bool(c.n_experts) != self.experts:
            reasons.append(
                "it has no experts (--n-experts 8)"
                if self.experts
                else "it has experts (--n-experts 0)"
            )
        if c.shared_expert:
            reasons.append("it has a shared expert (--no-shared-expert)")
        return reasons
