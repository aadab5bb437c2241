"""Adapters go to PEFT and come from there, and the real library computes with them what glasslm
does.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
import transformers
from adapted_runs import KINDS, Array, change_settings, make_config, make_run, random_weights
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.errors import InputError
from glasslm.interop import hf, model_export, peft_files, peft_settings
from glasslm.interop.model_export import ModelExport, largest_difference
from glasslm.interop.peft_matrices import AdaptableMatrix

# peft 0.21 looks at a name that transformers 5.23 would like to lose
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

Bases = Callable[[str], tuple[Path, ModelExport]]

TOLERANCE = 1e-5  # of logits in float32, as a share of the largest
ATTENTION = ("q,v", "k", "v,k", "q,k,v,o")
ALL = {True: "q,k,v,o,gate,up,down", False: "q,k,v,o,up,down"}
QUICK = {
    ("llama", ALL[True]),
    ("llama untied", "v,k"),
    ("llama scaled", "q,v"),
    ("mistral", "q,o,down"),
    ("mixtral", "q,v"),
    ("qwen3", "q,k,v,o"),
    ("gpt2", ALL[False]),
    ("gpt2", "v,k"),
    ("gpt2", "k"),
    ("gpt2 untied", "q,o,down"),
    ("gpt_neo", ALL[False]),
    ("opt", "q,o,down"),
    ("gpt_neox", "v,k"),
    ("gpt_neox", ALL[False]),
    ("phi", "q,o,down"),
    ("starcoder2", ALL[False]),
    ("stablelm", "q,o,down"),
    ("phi3", "v,k"),
    ("phi3", ALL[True]),
    ("gemma2", "q,o,down"),
}


def pairs() -> list[Any]:
    """Every kind with every choice of targets; most of them are slow together."""
    parameters = []
    for kind in KINDS:
        further = () if kind == "mixtral" else ("q,o,down", ALL[make_config(kind).is_gated])
        for targets in (*ATTENTION, *further):
            marks = () if (kind, targets) in QUICK else pytest.mark.slow
            parameters.append(pytest.param(kind, targets, marks=marks))
    return parameters


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """For each kind a model folder that transformers reads, and the same model in glasslm."""
    known: dict[str, tuple[Path, ModelExport]] = {}

    def base(kind: str) -> tuple[Path, ModelExport]:
        if kind not in known:
            folder, config = tmp_path_factory.mktemp("base"), make_config(kind)
            model = peft_files.base_export(
                *make_run(folder / "run", config, random_weights(config))
            )
            hf.write(model, folder / "base")
            known[kind] = folder / "base", model
        return known[kind]

    return base


def logits_here(
    base: ModelExport, config: ModelConfig, adapters: dict[str, Array], tokens: Array
) -> Array:
    """With the adapters beside the weights, not in them."""
    engine = make_engine(
        RunConfig(model=config), base.vocab_size, ComputeConfig(engine="numpy", threads=1)
    )
    engine.load((base.weights | adapters).items())
    B, T = tokens.shape
    return engine.logits(tokens, engine.new_cache(B, T), np.full(B, T), every=True)


def assert_equal(arrays: dict[str, Array], expected: dict[str, Array]) -> None:
    """To the last bit."""
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])


# -- ours, read by peft ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "targets"), pairs())
def test_peft_computes_with_our_adapters_what_we_do_and_they_come_back(
    kind: str, targets: str, bases: Bases, tmp_path: Path
) -> None:
    """To the last bit, and rank, alpha and targets, too."""
    base, model = bases(kind)
    config = make_config(kind, lora_targets=targets)
    run, checkpoint = make_run(tmp_path / "run", config, random_weights(config))
    peft_files.write(run, checkpoint, tmp_path / "out", str(base))
    whole = model_export.load_export(str(run.path))
    tokens = whole.probe_tokens()
    theirs = peft_files.logits(base, tmp_path / "out", tokens)
    assert largest_difference(whole.logits(tokens), theirs) < TOLERANCE
    assert (
        largest_difference(whole.logits(tokens), model.logits(tokens)) > 0.01
    )  # the adapters matter

    read_config, adapters = peft_files.read(tmp_path / "out", model.config)
    assert set(read_config.adapted_matrices) == set(config.adapted_matrices)
    assert (read_config.lora_rank, read_config.lora_alpha) == (3, 7.5)
    unadapted = {"lora_rank": 0, "lora_alpha": 7.5, "lora_targets": model.config.lora_targets}
    assert dataclasses.replace(read_config, **unadapted) == model.config
    assert_equal(
        adapters, {name: array for name, array in checkpoint.weights().items() if ".lora_" in name}
    )


def test_the_folder_is_what_save_pretrained_writes(bases: Bases, tmp_path: Path) -> None:
    """The same files, the same names and shapes in them; settings that are left out are the
    defaults there.
    """
    base, _ = bases("llama")
    config = make_config("llama", lora_alpha=8.0)
    peft_files.write(
        *make_run(tmp_path / "run", config, random_weights(config)), tmp_path / "ours", str(base)
    )
    theirs = save_theirs(
        base, tmp_path / "theirs", r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in theirs.iterdir()
    }
    ours, others = (
        load_file(folder / peft_files.WEIGHTS_FILE) for folder in (tmp_path / "ours", theirs)
    )
    assert {name: array.shape for name, array in ours.items()} == {
        name: array.shape for name, array in others.items()
    }
    read = {
        folder: peft.PeftConfig.from_pretrained(str(folder))
        for folder in (tmp_path / "ours", theirs)
    }
    # A folder of this machine is not named.
    expected = dataclasses.asdict(read[theirs]) | {"base_model_name_or_path": None}
    assert dataclasses.asdict(read[tmp_path / "ours"]) == expected


@pytest.mark.parametrize(
    "base",
    [
        "someone/a-model", 'C:\\models\\"mine"', "a: {b}\n---\n# no", "ü 語 🙂", "/home/me/base",
        "../b", "src", "tests/interop", None,
    ],
)  # fmt: skip
def test_the_card_is_read_whatever_the_base_is_called(base: str | None, tmp_path: Path) -> None:
    """Only a name on the Hub is named: "src" and "tests/interop" are folders here."""
    config, hub_name = make_config("llama"), base if base == "someone/a-model" else None
    peft_files.write(
        *make_run(tmp_path / "run", config, random_weights(config)), tmp_path / "out", base
    )
    assert (
        json.loads((tmp_path / "out" / peft_settings.SETTINGS_FILE).read_bytes())[
            "base_model_name_or_path"
        ]
        == hub_name
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict().get("base_model") == hub_name
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_stacked_adapters_have_their_rank_and_alpha_in_patterns(
    bases: Bases, tmp_path: Path
) -> None:
    base, _ = bases("gpt2")
    config = make_config("gpt2", lora_alpha=16.0, lora_targets="q,v,down")
    run, checkpoint = make_run(tmp_path / "run", config, random_weights(config))
    peft_files.write(run, checkpoint, tmp_path / "out", str(base))
    values = json.loads((tmp_path / "out" / peft_settings.SETTINGS_FILE).read_bytes())
    assert values["rank_pattern"] == {"attn.c_attn": 6}
    assert values["alpha_pattern"] == {"attn.c_attn": 32}
    assert type(values["lora_alpha"]) is int
    assert set(values["target_modules"]) == {"attn.c_attn", "mlp.c_proj"}  # and not attn.c_proj


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora_rank": 0}, "--lora-rank"),
        ({"n_experts": 2, "lora_targets": "q,up"}, "--lora-targets"),
        ({"norm_position": "post"}, "--norm-position pre"),
    ],
)
def test_what_peft_has_no_place_for_is_refused_with_the_switch(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    config = make_config("llama", **changes)
    run, checkpoint = make_run(tmp_path / "run", config, random_weights(config))
    with pytest.raises(InputError, match=word):
        peft_files.write(run, checkpoint, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_matrix_that_transformers_does_not_have_are_refused_with_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("llama", lora_targets="q,v")
    run, checkpoint = make_run(tmp_path / "run", config, random_weights(config))
    rows = np.arange(config.d_model, dtype=np.int64)
    matrix = AdaptableMatrix("q_proj", ("blocks.0.attention.q",), (rows,))
    paths = {"model.layers.0.self_attn.q_proj": matrix}
    monkeypatch.setattr(peft_files, "adaptable_matrices", lambda c, family: paths)
    with pytest.raises(InputError, match=r"does not have \(v\).*--lora-targets q,"):
        peft_files.write(run, checkpoint, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


# -- theirs, read here -----------------------------------------------------------------------------


def wrap_with_peft(base: Path, **settings: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def save_theirs(base: Path, folder: Path, **settings: Any) -> Path:
    """Adapters as peft starts them."""
    wrap_with_peft(base, **settings).save_pretrained(folder)
    return folder


THEIRS: dict[str, tuple[str, dict[str, Any], str]] = {
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"]}, "q,v"),
    "every layer": ("llama untied", {"target_modules": "all-linear", "r": 5},
        "q,k,v,o,gate,up,down"),
    "dropout": ("qwen3", {"target_modules": ["k_proj", "o_proj"], "lora_dropout": 0.4}, "k,o"),
    "rsLoRA": (
        "llama", {"target_modules": ["up_proj"], "use_rslora": True, "r": 5, "lora_alpha": 3}, "up",
    ),
    "normal start": ("mistral", {"target_modules": ["gate_proj"], "init_lora_weights": "gaussian"},
        "gate"),
    "orthogonal start": ("llama", {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal",
        "r": 4}, "v"),
    "names that are not there": ("llama", {"target_modules": ["down_proj", "query", "c_attn"]},
        "down"),
    "whole names": (
        "llama", {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]}, "q",
    ),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}, "q,o"),
    "a pattern that changes nothing": ("llama", {"target_modules": ["q_proj"], "r": 2,
        "lora_alpha": 4, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, "q"),
    "GPT-2, as peft chooses": ("gpt2", {"fan_in_fan_out": True, "r": 3}, "q,k,v"),
    "GPT-2, every layer": ("gpt2 untied", {"target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True, "r": 6}, "q,k,v,o,up,down"),
    "GPT-NeoX, as peft chooses": ("gpt_neox", {"r": 3}, "q,k,v"),
    "GPT-Neo, every layer": ("gpt_neo", {"target_modules": "all-linear"}, "q,k,v,o,up,down"),
    "OPT": ("opt", {"target_modules": ["q_proj", "out_proj", "fc1"]}, "q,o,up"),
    "Phi": ("phi", {"target_modules": ["k_proj", "dense", "fc2"]}, "k,o,down"),
    "Phi-3, every layer": ("phi3", {"target_modules": "all-linear"}, "q,k,v,o,gate,up,down"),
    "StarCoder2": ("starcoder2", {"target_modules": ["q_proj", "c_fc", "c_proj"]}, "q,up,down"),
    "GPT-2, one c_proj": ("gpt2", {"target_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        "down"),
}  # fmt: skip


# Dense adapters of a matrix with several parts are several adapters here.
DENSE = {
    "GPT-2, as peft chooses", "GPT-2, every layer", "GPT-NeoX, as peft chooses",
    "Phi-3, every layer",
}  # fmt: skip
SLOW = {
    "dropout",
    "normal start",
    "names that are not there",
    "whole names",
    "GPT-2, one c_proj",
}  # together


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in THEIRS]
)
def test_adapters_that_peft_wrote_compute_the_same_here(
    name: str, bases: Bases, tmp_path: Path
) -> None:
    kind, settings, targets = THEIRS[name]
    base, model = bases(kind)
    torch.manual_seed(3)
    theirs = wrap_with_peft(base, **settings)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if ".lora_" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = model.probe_tokens()
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    config, adapters = peft_files.read(tmp_path / "theirs", model.config)
    assert config.lora_targets == targets
    logits = logits_here(model, config, adapters, tokens)
    assert largest_difference(expected, logits) < TOLERANCE
    assert largest_difference(expected, model.logits(tokens)) > 1e-3

    peft_files.write(
        *make_run(tmp_path / "run", config, model.weights | adapters), tmp_path / "back", str(base)
    )
    again, returned = peft_files.read(tmp_path / "back", model.config)
    assert_equal(returned, adapters)
    assert again == config
    assert (
        largest_difference(expected, peft_files.logits(base, tmp_path / "back", tokens)) < TOLERANCE
    )
    if name not in DENSE:
        assert_equal(
            load_file(tmp_path / "back" / peft_files.WEIGHTS_FILE),
            load_file(tmp_path / "theirs" / peft_files.WEIGHTS_FILE),
        )


def test_adapters_as_peft_starts_them_do_nothing_and_are_all_there(
    bases: Bases, tmp_path: Path
) -> None:
    base, model = bases("gpt2")
    config, adapters = peft_files.read(
        save_theirs(base, tmp_path / "theirs", fan_in_fan_out=True), model.config
    )
    assert config.lora_targets == "q,k,v"
    assert config.lora_rank == 8
    tokens = model.probe_tokens()
    np.testing.assert_array_equal(
        logits_here(model, config, adapters, tokens), model.logits(tokens)
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(kind: Any, bases: Bases, tmp_path: Path) -> None:
    base, model = bases("llama")
    theirs = wrap_with_peft(base, target_modules=["q_proj"], init_lora_weights=False)
    theirs.to(kind).save_pretrained(tmp_path / "theirs")
    _, adapters = peft_files.read(tmp_path / "theirs", model.config)
    expected = theirs.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight
    np.testing.assert_array_equal(
        adapters["blocks.1.attention.q.lora_b"], expected.detach().float().numpy()
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused_as_peft_saves_it(
    start: str, bases: Bases, tmp_path: Path
) -> None:
    base, model = bases("llama")
    folder = save_theirs(
        base, tmp_path / "theirs", target_modules=["q_proj"], init_lora_weights=start
    )
    with pytest.raises(InputError, match=start):
        peft_files.read(folder, model.config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
        (
            "llama",
            {
                "lora_dropout": 0.5,
                "fan_in_fan_out": True,
                "inference_mode": False,
                "revision": "main",
            },
        ),
        (
            "llama",
            {
                "qalora_group_size": 8,
                "megatron_core": "megatron.core",
                "peft_version": "99",
                "auto_mapping": {},
            },
        ),
    ],
)
def test_what_says_nothing_about_trained_adapters_changes_nothing(
    kind: str, changes: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    """Neither in glasslm nor in PEFT."""
    base, model = bases(kind)
    folder, config = tmp_path / "adapters", make_config(kind)
    peft_files.write(*make_run(tmp_path / "run", config, random_weights(config)), folder, str(base))
    before, tokens = peft_files.read(folder, model.config), model.probe_tokens()
    expected = peft_files.logits(base, folder, tokens)
    change_settings(folder, **changes)
    after = peft_files.read(folder, model.config)
    assert before[0] == after[0]
    assert_equal(before[1], after[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "warnings.warn", lambda *_, **__: None
        )  # which peft does about options without an effect
        np.testing.assert_array_equal(peft_files.logits(base, folder, tokens), expected)
