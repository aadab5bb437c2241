"""An imported PEFT folder is compared with PEFT: a misreading imports nothing."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from adapted_runs import make_config, make_run, random_weights

from glasslm.errors import InputError
from glasslm.interop import model_import, peft_files
from glasslm.interop.peft_files import Adapters
from glasslm.model.adapters import without_adapters

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

    def misread(path: Path, config: object) -> tuple[object, Adapters]:
        """With half of the scale, which leaves every shape as it is."""
        model, adapters = read(path, config)  # type: ignore[arg-type]
        return dataclasses.replace(model, lora_alpha=model.lora_alpha / 2), adapters

    monkeypatch.setattr(peft_files, "read", misread)
    with pytest.raises(InputError, match="the logits differ from those of PEFT"):
        model_import.import_model(folder, base, tmp_path / "other", "", notes.append)
    assert not (tmp_path / "other").exists()


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
