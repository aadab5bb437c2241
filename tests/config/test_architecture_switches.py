"""Switches of imported architectures: what they derive, and which combinations are refused."""

import math
from typing import Any

import pytest

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": -1}, "head_dim"),
        ({"head_dim": 5}, "even head size"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": math.inf}, "partial_rotary_factor is inf"),
        ({"partial_rotary_factor": math.nan}, "partial_rotary_factor is nan"),
        ({"partial_rotary_factor": 0.1}, "rope needs an even|expected at least 2"),
        ({"partial_rotary_factor": 0.5, "position": "alibi"}, "--position rope"),
        ({"bias_targets": "q,x"}, "bias_targets is 'q,x'"),
        ({"bias_targets": "q", "bias": True}, "leave out --bias"),
        ({"bias_targets": "k", "position": "learned"}, "--bias-targets k needs --position rope"),
        ({"bias_targets": "head"}, "--no-tie-embeddings"),
        ({"residual": "parallel_one_norm", "norm_position": "post"}, "--norm-position pre"),
        ({"residual": "parallel", "norm_position": "post"}, "--norm-position pre or sandwich"),
        ({"attention_pattern": "fx", "window": 3}, "f \\(full\\)"),
        ({"attention_pattern": "fw"}, "window 0"),
        ({"attention_pattern": "fn", "window": 3}, "window 3"),
        ({"attention_pattern": "fn", "position": "alibi"}, "n needs --position rope"),
        ({"window_rope_base": 100.0}, "--attention-pattern"),
        ({"window_rope_base": 0.5, "attention_pattern": "fw", "window": 3}, "window_rope_base"),
        ({"attention": "flash", "attention_softcap": 5.0}, "--attention flash has no soft cap"),
        ({"attention_softcap": -1.0}, "attention_softcap"),
        ({"rope_scaling": "yarn"}, "--rope-factor above 1"),
        ({"rope_scaling": "ntk", "rope_factor": 1e308}, "rope_factor is 1e\\+308"),
        ({"rope_low_rotations": 5e-324}, "rope_low_rotations is 5e-324"),
        ({"rope_high_rotations": 1e308}, "rope_high_rotations is 1e\\+308"),
        ({"rope_attention_factor": 1e308}, "rope_attention_factor is 1e\\+308"),
        (
            {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_low_rotations": 5.0},
            "0 < low < high",
        ),
    ],
)
def test_impossible_settings_are_refused_with_a_cure(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ModelConfig(**changes)


def test_a_pattern_is_repeated_and_only_its_windows_are_windows() -> None:
    c = ModelConfig(n_layers=5, window=3, attention_pattern="wwf")
    assert [c.layer_kind(layer) for layer in range(5)] == ["w", "w", "f", "w", "w"]
    assert (c.kind_window("w"), c.kind_window("f")) == (3, 0)
    assert not c.has_rolling_cache
    assert ModelConfig(window=3).has_rolling_cache
    assert ModelConfig(window=3).layer_kinds == ["w"]


def test_biases_are_those_of_the_flag_or_the_names() -> None:
    assert ModelConfig(bias=True).biased_modules == {"norm", "q", "v", "o", "mlp"}
    assert ModelConfig(bias_targets="q, k,v").biased_modules == {"q", "k", "v"}
    assert ModelConfig().biased_modules == frozenset()


def test_heads_may_be_wider_than_their_share_of_the_width() -> None:
    c = ModelConfig(d_model=30, n_heads=4, head_dim=16, partial_rotary_factor=0.25)
    assert (c.head_size, c.rotary_size) == (16, 4)
    assert ModelConfig(attention_scale=1.0).query_factor == pytest.approx(32**0.5)
