"""The import of a PEFT folder is compared with PEFT, and its base with the one that it names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.interop import hf, peft_files
from glasslm.interop.hf import COPIES_TO_COMPARE, IMPORT_TOLERANCE, MAX_IMPORT_PROBE_TOKENS
from glasslm.interop.model_export import ModelExport, compute_logits, largest_difference
from glasslm.interop.peft_files import Adapters
from glasslm.interop.peft_settings import SETTINGS_FILE
from glasslm.interop.untrusted_json import read_values
from glasslm.model.adapters import merge_adapters, without_adapters
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, format_bytes, to_one_line
from glasslm.training.memory import free_memory_bytes

Array = NDArray[Any]


def compare_import(
    folder: Path, base: ModelExport, model: ModelConfig, adapters: Adapters, notify: Notify
) -> None:
    """Compare the logits of `base` with imported `adapters` with those of PEFT from `folder`.

    `base` is the model without adapters, which transformers reads from a temporary folder; `model`
    is its configuration with adapters. A note says so where they are not compared: PEFT is not
    installed, the memory is too small, or the base has no architecture in transformers. Raises
    InputError where the logits differ, or PEFT cannot load the folder.
    """
    free = free_memory_bytes()
    needed = COPIES_TO_COMPARE * sum(array.nbytes for array in base.weights.values())
    if free is not None and needed > free:
        notify(
            f"note: logits not compared with PEFT: that takes {format_bytes(needed)} of memory, "
            f"and {format_bytes(free)} are free"
        )
        return
    T = min(base.config.block_size, MAX_IMPORT_PROBE_TOKENS)
    tokens = np.random.default_rng(0).integers(0, base.vocab_size, (1, T))
    with tempfile.TemporaryDirectory() as temporary:
        base_folder = Path(temporary, "base")
        try:
            hf.write(base, base_folder)
            theirs = peft_files.logits(base_folder, folder, tokens)
        except InputError as error:
            notify(f"note: logits not compared: {error}")
            return
        except Exception as error:  # The library raises any type for a bad folder.
            raise_if_exhausted(error, folder)
            raise InputError(
                f"PEFT cannot load {folder} ({to_one_line(str(error))}), so the import cannot be "
                "compared with it: repair the folder"
            ) from error
    merged = merge_adapters(base.weights | adapters, model)
    ours = compute_logits(without_adapters(model).resolve(), base.vocab_size, merged, tokens)
    difference = largest_difference(theirs, ours)
    if not difference <= IMPORT_TOLERANCE:
        raise InputError(
            f"the logits differ from those of PEFT for {folder} (relative difference "
            f"{difference:.1e}, allowed {IMPORT_TOLERANCE:.0e}): glasslm misreads these adapters, "
            f"and nothing was imported. Please report their {SETTINGS_FILE}"
        )


def note_another_base(folder: Path, base: Run, notify: Notify) -> None:
    """Say so where the adapters in `folder` name another model than the imported run `base` was.

    No comparison of logits can find this, because both programs compute with the same base. The
    folder of an exported run may have any name, so a base that glasslm trained is not compared.
    """
    named = read_values(folder / SETTINGS_FILE).values.get("base_model_name_or_path")
    if "imported" not in base.record or not (named and isinstance(named, str)):
        return
    origin = Path(base.record["imported"]["from"])
    # A cache of the hub has its models in folders models--OWNER--NAME.
    names = {part.rpartition("--")[2].lower() for part in origin.parts}
    if Path(named).name.lower() not in names:
        notify(
            f"note: these adapters name the base {named[:100]!r}, and --base was imported from "
            f"{origin}: if that is another model, import the right one and give its run"
        )
