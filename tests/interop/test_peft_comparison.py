"""An imported PEFT folder is compared with PEFT: a misreading imports nothing."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from adapted_runs import make_config, make_run, random_weights

from glasslm.errors import InputError
from glasslm.interop import model_import, peft_comparison, peft_files
from glasslm.interop.peft_files import Adapters
from glasslm.model.adapters import without_adapters
from glasslm.runs import checkpoint as checkpoints
from small_runs import read_json

# peft 0.21 looks at a name that transformers 5.23 would like to lose
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def folders(tmp_path: Path, kind: str) -> tuple[Path, str]:
    """A PEFT folder, and the run of the model that its adapters belong to."""
    config = make_config(kind)
    tuned, checkpoint = make_run(tmp_path / "tuned", config, random_weights(config))
    peft_files.write(tuned, checkpoint, tmp_path / "adapter", None)
    plain = without_adapters(config)
    weights = random_weights(config)
    frozen = {name: array for name, array in weights.items() if ".lora_" not in name}
    base, _ = make_run(tmp_path / "base", plain, frozen)
    return tmp_path / "adapter", str(base.path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_import_that_agrees_with_peft_says_nothing_and_another_one_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = folders(tmp_path, kind)
    notes: list[str] = []
    run = model_import.import_model(folder, base, tmp_path / "run", "", notes.append)
    assert (run / "run.json").exists()
    assert not notes
    read = peft_files.read

    def misread(path: Path, config: object, model_type: str) -> tuple[object, Adapters]:
        """With half of the scale, which leaves every shape as it is."""
        model, adapters = read(path, config, model_type)  # type: ignore[arg-type]
        return dataclasses.replace(model, lora_alpha=model.lora_alpha / 2), adapters

    monkeypatch.setattr(peft_files, "read", misread)
    with pytest.raises(InputError, match=r"those of PEFT .*: glasslm misreads these adapters"):
        model_import.import_model(folder, base, tmp_path / "other", "", notes.append)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "is_noted"),
    [("hf/other", True), ("Llama-2", True), ("hf/llama", False), ("", False), (None, False)],
)
def test_adapters_that_name_another_base_are_noted(
    name: str | None, is_noted: bool, tmp_path: Path
) -> None:
    config = without_adapters(make_config("llama"))
    origin = {"from": "/cache/models--hf--Llama/snapshots/1", "model_type": "llama", "sha256": {}}
    base, _ = make_run(tmp_path / "base", config, random_weights(config), imported=origin)
    own, _ = make_run(tmp_path / "own", config, random_weights(config))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    notes: list[str] = []
    peft_comparison.note_another_base(tmp_path, own, notes.append)
    assert not notes
    peft_comparison.note_another_base(tmp_path, base, notes.append)
    assert [f"name the base '{name}'" in note for note in notes] == [True] * is_noted


def test_without_peft_a_note_says_that_nothing_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = folders(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    notes: list[str] = []
    model_import.import_model(folder, base, tmp_path / "run", "", notes.append)
    assert notes == [
        "note: logits not compared: peft is not installed: pip install 'glasslm[interop]'"
    ]


def test_adapters_have_the_names_of_the_family_that_the_base_was_imported_as(
    tmp_path: Path,
) -> None:
    """A Phi-3 could be a Llama, whose names are other ones."""
    config = make_config("llama", lora_targets="v,up")
    weights = random_weights(config)
    frozen = {name: array for name, array in weights.items() if ".lora_" not in name}
    imported = {"from": "there", "model_type": "phi3", "sha256": {}}
    base, _ = make_run(tmp_path / "base", without_adapters(config), frozen, imported=imported)
    source = {"run": str(base.path), "step": 5, "data_sha256": ""}
    tuned, checkpoint = make_run(tmp_path / "tuned", config, weights, base=source)
    peft_files.write(tuned, checkpoint, tmp_path / "adapter", None)
    settings = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert settings["target_modules"] == ["qkv_proj", "gate_up_proj"]
    assert peft_files.base_export(tuned, checkpoint).family.model_type == "phi3"

    notes: list[str] = []
    run = model_import.import_model(
        tmp_path / "adapter", str(base.path), tmp_path / "run", "", notes.append
    )
    assert not notes  # compared with PEFT
    for name, array in checkpoints.load(run, "best").weights().items():
        np.testing.assert_array_equal(array, weights[name])
    values = {"model_type": "phi3"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    other, checkpoint = make_run(tmp_path / "other", config, weights)  # of no known base
    peft_files.write(other, checkpoint, tmp_path / "named", str(tmp_path))
    assert read_json(tmp_path / "named" / "adapter_config.json") == settings

    with pytest.raises(InputError, match=r"expected some of .*q_proj"):
        peft_files.read(tmp_path / "adapter", without_adapters(config))
