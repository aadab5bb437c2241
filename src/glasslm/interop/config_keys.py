"""Every key of a config.json: used, without an effect on logits, or refused by name.

A key that glasslm ignores could change what the model computes. So the tables below list all keys
that a family reads, all keys that change no logits, and the values with which other keys change
none. Any other key is refused.
"""

from __future__ import annotations

from typing import Any

from glasslm.errors import InputError
from glasslm.interop.config_key_tables import (
    COMMON_FIXED,
    HARMLESS_KEYS,
    KEY_TABLES,
    REASONS,
    KeyTable,
)
from glasslm.interop.rope_settings import ROPE_TYPE_KEYS
from glasslm.interop.untrusted_json import Values, require_supported

_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KEYS_OUTSIDE_ROPE = ("rope_theta", "partial_rotary_factor")  # in older files
LAYER_TYPES = ("full_attention", "sliding_attention")


def known_values(values: Values) -> Values:
    """The values of a config.json that a family reads, each under one name (rope_parameters).

    Raises InputError, which names the key, for a key that is not in the tables, for one with a
    value that changes the logits, and for two keys that contradict each other.
    """
    kind = values.string("model_type")
    table = KEY_TABLES[kind]
    known: dict[str, Any] = {}
    for key, value in values.values.items():
        if value is None and key in table.used:
            known.setdefault(key, None)  # null has a meaning of its own: no window, for example
        if value is None or key in HARMLESS_KEYS or key in table.harmless or key in table.equal:
            continue
        if key == "architectures":
            _require_architecture(values, table)
        elif key in table.fixed or key in COMMON_FIXED:
            allowed = {**COMMON_FIXED, **table.fixed}[key]
            if not any(_is_same(value, other) for other in allowed):
                raise _unsupported(values, key, " or ".join(map(_as_json, allowed)))
        else:
            name = table.aliases.get(key, key)
            if name not in table.used:
                raise _unknown(values, key, kind)
            if known.get(name) is not None and not _is_same(known[name], value):
                raise _contradiction(values, key, name, known[name])
            known[name] = value
    for key, name in table.equal.items():
        value = values.values.get(key)
        if value is not None and not _is_same(value, known.get(name, value)):
            raise _contradiction(values, key, name, known[name])
    if rope := _known_rope(values, table).values:
        known |= {"rope_parameters": rope, "rope_scaling": None}
    return Values(values.path, known)


def _known_rope(values: Values, table: KeyTable) -> Values:
    """The object rope_parameters, or rope_scaling in older files; empty without both.

    Raises InputError for keys in it that glasslm does not know, and where the two objects, or a
    key inside and outside of them, contradict each other.
    """
    names = [name for name in ("rope_parameters", "rope_scaling") if values.object(name)]
    _require_whole_heads(values, values, table)
    if not names:
        return Values(values.path, {})
    rope = values.object(names[0])
    if len(names) == 2 and values.object(names[1]).values != rope.values:
        raise _contradiction(values, names[1], names[0], rope.values)
    if table.rope_by_layer_type and rope.values.keys() <= {*LAYER_TYPES}:
        for layer_type in rope.values:
            _require_known_rope(rope.object(layer_type), names[0], table)
        return rope
    _require_known_rope(rope, names[0], table)
    for key in _KEYS_OUTSIDE_ROPE:
        inside = rope.values.get(key)
        for outside in (key, *(other for other, name in table.aliases.items() if name == key)):
            value = values.values.get(outside)
            if None not in (inside, value) and not _is_same(value, inside):
                raise _contradiction(values, outside, f"{key} in {names[0]}", inside)
    return rope


def _require_known_rope(rope: Values, name: str, table: KeyTable) -> None:
    """Raise InputError for a rope_type, or a key of it, that glasslm cannot compute."""
    types = table.rope_types
    kinds = {rope.string(key) for key in ("rope_type", "type") if rope.values.get(key) is not None}
    if len(kinds) > 1 or not kinds <= set(types):
        value = " and ".join(sorted(kind[:100] for kind in kinds))
        raise InputError(
            f"{rope.path} has the rope_type {value} in {name}, which glasslm cannot compute: "
            f"expected {' or '.join(types)}"
        )
    kind = next(iter(kinds), "default")
    for key, value in rope.values.items():
        if value is None or key in ROPE_TYPE_KEYS[kind]:
            continue
        if key == "factor":  # of the type default
            if rope.number("factor") == 1:
                continue
            raise InputError(
                f"{rope.path} has the factor {rope.number('factor'):g} in {name} without the "
                "rope_type linear: expected linear, or no factor"
            )
        if key not in _ROPE_KEYS:
            raise _unknown(rope, key, f"{name} with the rope_type {kind}")
    _require_whole_heads(rope, rope, table)


def _require_whole_heads(values: Values, rope: Values, table: KeyTable) -> None:
    """Raise InputError where a part of each head is rotated in a family that rotates all."""
    share = rope.values.get("partial_rotary_factor")
    if share is not None and not table.partial_rotary:
        require_supported(
            values.number("partial_rotary_factor") == 1, "partial_rotary_factor", share, "1"
        )


def _require_architecture(values: Values, table: KeyTable) -> None:
    names = values.array("architectures")
    if not all(name in table.architectures for name in names):
        raise _unsupported(values, "architectures", f"[{_as_json(table.architectures[0])}]")


def _is_same(a: object, b: object) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _as_json(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _unsupported(values: Values, key: str, expected: str) -> InputError:
    value = _as_json(values.values[key])
    return InputError(
        f"{values.path} has {key} {value}, which glasslm cannot compute: expected {expected}"
    )


def _unknown(values: Values, key: str, owner: str) -> InputError:
    reason = REASONS.get(
        key,
        f"glasslm does not know this key of a {owner}. Remove it from the file if the model does "
        "not use it",
    )
    return InputError(
        f"{values.path} has {key[:100]!r} set to {_as_json(values.values[key])}: {reason}"
    )


def _contradiction(values: Values, key: str, name: str, other: object) -> InputError:
    return InputError(
        f"{values.path} has {key} {_as_json(values.values[key])} and {name} {_as_json(other)}, "
        "which contradict each other: remove the wrong one from the file"
    )
