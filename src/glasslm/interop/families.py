"""The model families of transformers that glasslm writes and reads."""

from __future__ import annotations

from collections.abc import Collection

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.interop import gemma, gpt2, gpt_neo, gpt_neox, llama
from glasslm.interop.family import Family
from glasslm.interop.untrusted_json import Values

# In the order of preference: a model that several families compute is written as the first.
FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES, *gpt2.FAMILIES, *gemma.FAMILIES, *gpt_neox.FAMILIES, *gpt_neo.FAMILIES,
)  # fmt: skip
# Model types that transformers has, and what glasslm lacks to compute them.
UNSUPPORTED = {
    "bloom": "a norm after the embeddings",
    "cohere": "interleaved RoPE and scaled logits",
    "cohere2": "interleaved RoPE and scaled logits",
    "falcon": "fused multi-query matrices of several layouts",
    "gemma3": "images; the model type gemma3_text of the same files has none",
    "gemma3n": "layers with states of their own",
    "gptj": "interleaved RoPE",
    "gpt_bigcode": "fused multi-query matrices",
    "gpt_oss": "attention sinks",
    "granite": "multipliers of embeddings, residuals and logits",
    "llama4": "images, interleaved RoPE and norms without weights",
    "mamba": "state-space layers",
    "mpt": "fused matrices and another ALiBi",
    "olmo": "norms without weights",
    "olmo2": "a norm over all heads of the queries",
    "olmo3": "a norm over all heads of the queries",
    "qwen2_moe": "a gate of the shared expert",
    "rwkv": "recurrent layers",
}


def choose_family(
    c: ModelConfig, model_type: str = "", other_tokenizers: Collection[str] = ()
) -> Family:
    """The family that computes what this model computes: `model_type` if it does, or the first.

    `other_tokenizers` are model types for which transformers would replace the tokenizer. Raises
    InputError if there is none; the message lists what the nearest family lacks and the switches
    that help.
    """
    refusals = {family.model_type: family.refusals(c) for family in FAMILIES}
    for name in other_tokenizers:
        refusals[name].append(f"transformers gives a {name} its own tokenizer (--no-bias)")
    for family in sorted(FAMILIES, key=lambda family: family.model_type != model_type):
        if not refusals[family.model_type]:
            return family

    def distance(family: Family) -> tuple[int, int]:
        different = (bool(c.n_experts) != family.support.experts) + (
            c.qk_norm != family.support.qk_norm
        )
        return len(refusals[family.model_type]), different

    nearest = min(FAMILIES, key=distance).model_type
    raise InputError(
        f"no architecture of transformers computes this model. The nearest is {nearest}, but "
        f"{'; '.join(refusals[nearest])}. Train with the flags in parentheses, then export"
    )


def find_family(values: Values) -> Family:
    """The family of a config.json.

    Raises InputError for a model type that glasslm does not know.
    """
    model_type = values.string("model_type")
    for family in FAMILIES:
        if model_type == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    lacks = f", for which glasslm lacks {UNSUPPORTED[model_type]}" if (
        model_type in UNSUPPORTED
    ) else ""  # fmt: skip
    raise InputError(
        f"{values.path} has the model type {model_type[:100]!r}{lacks}: expected one of {known}"
    )
