"""The model card: Hugging Face reads it, its example is Python, foreign text stays text."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from glasslm.config.schema import PreferenceConfig
from glasslm.interop import card_example, card_front_matter, card_paths, model_card, model_export
from glasslm.interop.model_export import ModelExport
from glasslm.runs.metrics import MetricsLog
from glasslm.runs.run_folder import Run
from small_runs import drop_hashes, logged_lines, read_json, train, write_text

# What could break a table, a heading, a fence, a link, a page, or YAML.
HOSTILE = (
    "a|b `c` *d* <img src=x onerror=alert(1)> [e](javascript:f) ---\n---\n"
    "\"g\": 'h' # \\ ${j} \u202e\x1b[31m 語"
)
FENCE = "\n````\n```\n---\n# not a title\n<script>alert(1)</script>\n"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    command = f"glasslm train --text-file {folder}/cats.txt '--run-dir={folder}/a b' --preset tiny"
    train(write_text(folder / "cats.txt"), folder / "cats-run", val_fraction=0.2)
    record = read_json(folder / "cats-run" / "run.json") | {"command": command}
    (folder / "cats-run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    drop_hashes(folder / "cats-run")
    return folder / "cats-run"


def copy_run(
    run_dir: Path, to: Path, record: dict[str, Any], lines: list[dict[str, Any]] | None = None
) -> ModelExport:
    """The model of a copy of the run, with another record and further lines in its log."""
    drop_hashes(shutil.copytree(run_dir, to))
    whole = read_json(to / "run.json") | record
    (to / "run.json").write_text(
        json.dumps({key: value for key, value in whole.items() if value is not None})
    )
    model = model_export.load_export(str(to))
    with MetricsLog(to / "metrics.jsonl", (to / "metrics.jsonl").stat().st_size) as log:
        for line in lines or []:
            log.write({"step": model.step} | line)
    return model


def read(content: str) -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard(content)


def test_hugging_face_reads_the_numbers(run_dir: Path) -> None:
    model = model_export.load_export(str(run_dir))
    data = read(model_card.render_card(model, 3.2e-7)).data
    best = [line for line in logged_lines(run_dir, "eval") if line["step"] == model.step][-1]
    results = {result.metric_type: result for result in data.eval_results}
    assert results.keys() == {"loss", "perplexity", "bits_per_byte"}
    for name, key in (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bpb")):
        assert results[name].metric_value == pytest.approx(best[key], abs=1e-6)
        assert (results[name].task_type, results[name].dataset_split) == (
            "text-generation",
            "validation",
        )
        assert (results[name].dataset_name, results[name].dataset_type) == ("cats.txt", "text")
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "other",
        "transformers",
        "text-generation",
    )
    assert data.tags == ["glasslm", "character-level"]
    assert data.language is None  # unknown
    assert data.model_name == "cats-run"


def test_the_card_has_the_facts_of_the_run(run_dir: Path) -> None:
    model = model_export.load_export(str(run_dir))
    text, record = model_card.render_card(model, 3.2e-7), model.run.record
    file = record["data"]["files"][0]
    val = [line for line in logged_lines(run_dir, "eval") if line["step"] == model.step][-1]
    for words in (
        f"{record['parameters']['total']:,} parameters",
        "| in transformers | LlamaForCausalLM (llama) |",
        f"| cats.txt | {file['bytes']:,} | {file['sha256']} |",
        "the first 80% for training, then 20% for validation",
        f"| steps | {model.step:,} of 20 |",
        f"| tokens seen | {model.step * 8 * 32:,} |",
        "muon, weight decay 0.1",
        f"| the validation text | {val['loss']:.4f} | {val['perplexity']:.2f} | {val['bpb']:.4f} |",
        "| gzip -9 |",
        "3.2e-07 of the largest",
        record["versions"]["numpy"],
        record["tokenizer"]["sha256"],
        f"knows only the {model.vocab_size} characters",
        "context is 32 tokens",
    ):
        assert words in text, words
    sample = [line for line in logged_lines(run_dir, "sample") if line["step"] <= model.step][-1]
    assert f"```text\n{sample['text']}\n```" in text
    assert "not compared" in model_card.render_card(model, None)


WINDOW = "a token attends to the last 8 tokens, itself included"


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"window": 8}, ["| norm | rmsnorm, before each sublayer |", f"| window | {WINDOW} |"]),
        (
            {"norm": "layernorm", "norm_position": "post", "feedforward": "gelu",
             "position": "learned"},
            ["| norm | layernorm, after each sum |"],
        ),
        (
            {"norm": "rmsnorm1p", "norm_position": "sandwich", "feedforward": "geglu",
             "scale_embeddings": True, "window": 8, "attention_pattern": "wf"},
            ["| norm | rmsnorm1p, before and after each sublayer |",
             f"| window | {WINDOW} in {{window_layers}} of {{layers}} layers |"],
        ),
    ],
)  # fmt: skip
def test_the_card_says_where_norms_and_windows_are(
    changes: dict[str, Any], rows: list[str], run_dir: Path
) -> None:
    model = model_export.load_export(str(run_dir))
    config = dataclasses.replace(model.config, **changes)
    text = model_card.render_card(dataclasses.replace(model, config=config), None)
    layers = config.n_layers
    for row in rows:
        assert row.format(window_layers=(layers + 1) // 2, layers=layers) in text


def test_the_card_names_baselines_that_read_no_special_tokens(tmp_path: Path) -> None:
    few = {"special_tokens": ("<e>",), "val_fraction": 0.2, "max_steps": 1, "sample_interval": 0}
    train(write_text(tmp_path / "text.txt"), tmp_path / "run", **few)
    text = model_card.render_card(model_export.load_export(str(tmp_path / "run")), None)
    rows = [line for line in text.splitlines() if line.startswith(("| gzip", "| single bytes"))]
    assert len(rows) == 2
    assert all("without special tokens" in row for row in rows)


def test_the_card_is_about_the_exported_checkpoint(run_dir: Path) -> None:
    model = model_export.load_export(str(run_dir), 5)
    data = read(model_card.render_card(model, None)).data
    line = next(line for line in logged_lines(run_dir, "eval") if line["step"] == 5)
    expected = [round(line[key], 6) for key in ("loss", "perplexity", "bpb")]
    assert [result.metric_value for result in data.eval_results] == expected
    text = model_card.render_card(model, None)
    for words in (
        "| checkpoint | step 5 |",
        f"| tokens seen | {5 * 8 * 32:,} |",
        "Generated during training at step 0,",
    ):
        assert words in text
    assert "not measured at this step" in model_card.render_card(
        dataclasses.replace(model, step=7), None
    )


def test_the_card_names_no_folder_of_the_machine(run_dir: Path) -> None:
    text = model_card.render_card(model_export.load_export(str(run_dir)), None)
    assert "--text-file cats.txt '--run-dir=a b' --preset tiny" in text
    assert str(run_dir.parent) not in text
    assert run_dir.parent.name not in text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("glasslm train --text-file /home/me/my/faust.txt", "glasslm train --text-file faust.txt"),
        (
            "glasslm train --text-file '/home/me too/faust 1.txt' x",
            "glasslm train --text-file 'faust 1.txt' x",
        ),
        (
            r"glasslm train --text-file 'C:\Users\me\faust.txt'",
            "glasslm train --text-file faust.txt",
        ),
        ("glasslm train --text-file=~/faust.txt", "glasslm train --text-file=faust.txt"),
        (
            "glasslm train --hf-dataset roneneldan/TinyStories",
            "glasslm train --hf-dataset roneneldan/TinyStories",
        ),
        (
            "glasslm.train(text_file=('/home/me/a b.txt', 'x/y'), lr=1/3)",
            "glasslm.train(text_file=('a b.txt', 'x/y'), lr=1/3)",
        ),
        (
            "glasslm.train(text_file='C:\\\\Users\\\\me\\\\faust.txt')",
            "glasslm.train(text_file='faust.txt')",
        ),
        ("glasslm train 'never closed", ""),
    ],
)
def test_absolute_paths_lose_their_folders(command: str, expected: str) -> None:
    assert card_paths.strip_folders(command) == expected


def example(text: str) -> str:
    match = re.search(r"```python\n(.*?)```", text, re.S)
    assert match
    return match[1]


def test_the_example_is_python(run_dir: Path, tmp_path: Path) -> None:
    from glasslm.data.tokenizers import CharTokenizer

    compile(
        example(model_card.render_card(model_export.load_export(str(run_dir)), None)),
        "README.md",
        "exec",
    )
    model = model_export.load_export(str(run_dir))
    for alphabet in ("`", "'\"\\", "\u202e", "語", "\n", "{}"):
        other = dataclasses.replace(model, tokenizer=CharTokenizer(alphabet))
        source = card_example.example_code(other)
        assert source.count("`") == 6
        prompt = re.search(r"tokenizer\((.*), return_tensors", source)
        assert prompt
        assert eval(prompt[1]) in alphabet
        compile(example(source), "README.md", "exec")


@pytest.mark.slow
def test_the_example_runs(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from glasslm.interop import hf

    model = model_export.load_export(str(run_dir))
    hf.write(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    exec(example(model_card.render_card(model, None)), {})
    written = capsys.readouterr().out
    assert len(written) == model.config.block_size + 1
    assert set(written) <= {*model.run.tokenizer.decode(range(model.vocab_size))}


def test_foreign_text_is_harmless(run_dir: Path, tmp_path: Path) -> None:
    data = read_json(run_dir / "run.json")["data"]
    record = {
        "command": f"glasslm train {FENCE}",
        "data": data
        | {
            "files": [
                {"path": f"/home/me/{HOSTILE}", "bytes": 1, "sha256": HOSTILE, "origin": HOSTILE}
            ]
        },
        "machine": {"platform": HOSTILE, "cpu": HOSTILE, "cores": 2},
        "versions": {HOSTILE: HOSTILE},
        "git": {"commit": HOSTILE, "dirty": True},
        "created": HOSTILE,
        "glasslm": HOSTILE,
        "base": {"run": HOSTILE, "step": 1},
        "merged_from": {"run": HOSTILE, "step": 1},
    }
    lines = [
        {"kind": "sample", "prompt": FENCE, "text": FENCE + HOSTILE, "temperature": 1.0, "seed": 1}
    ]
    name = "a|`b` [c](d) <e> ---"
    model = copy_run(run_dir, tmp_path / name, record, lines)
    named = dataclasses.replace(model.run.config.data, text_file=(HOSTILE,))
    model.run.config = dataclasses.replace(model.run.config, data=named)  # type: ignore[misc]
    text = model_card.render_card(model, None)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert read(text).data.model_name == name
    assert "\u202e" not in (read(text).data.eval_results[0].dataset_name)
    assert (
        read(text).data.to_dict().keys()
        == read(model_card.render_card(model_export.load_export(str(run_dir)), None))
        .data.to_dict()
        .keys()
    )
    rest = read(text).text
    outside = re.sub(r"^(`{3,})(?:text|python)\n.*?\n\1$", "", rest, flags=re.S | re.M)
    assert outside.count("\n## ") == text.count("\n## ") == 8
    assert "\n---" not in outside
    assert not re.search(r"(?<!\\)[<>`]|(?<!\\)\]\(", outside)
    assert "# not a title" not in outside
    assert outside.startswith(r"""
# a\|\`b\` \[c\](d) \<e\> ---
""")
    widths = [
        len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("|")
    ]
    assert set(widths) == {3, 4, 7}  # no cell more than the headers have


@pytest.mark.parametrize(
    "name", ["- x", "!!python/object", "yes", "1e5", "null", "&a *a", "{x: y}", "%TAG", "a: b #c"]
)
def test_names_stay_words_in_yaml(run_dir: Path, tmp_path: Path, name: str) -> None:
    model = (
        copy_run(run_dir, tmp_path / name, {})
        if "/" not in name
        else model_export.load_export(str(run_dir))
    )
    data = read(model_card.render_card(model, None)).data
    assert data.model_name == model.run.path.name
    assert read(f"---\nx: {card_front_matter.quote_yaml(name)}\n---\n").data.x == name


@pytest.mark.parametrize("value", [1e-9, 1e22, 3.0, 123456.789, 0.1])
def test_numbers_stay_numbers_in_yaml(value: float) -> None:
    number = read(f"---\nx: {card_front_matter.format_yaml_number(value)}\n---\n").data.x
    assert isinstance(number, float)
    assert number == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_old_runs_lack_fields(run_dir: Path, tmp_path: Path) -> None:
    missing = ("preset", "command", "compiled", "threads", "processes", "parallel", "blas")
    model = copy_run(run_dir, tmp_path / "old", dict.fromkeys(missing))
    assert not {*missing} & Run(tmp_path / "old").record.keys()
    (tmp_path / "old" / "metrics.jsonl").unlink()
    text = model_card.render_card(
        ModelExport(
            Run(tmp_path / "old"), model.step, model.config, model.tokenizer, model.weights
        ),
        None,
    )
    assert "not measured at this step" in text
    assert "## Sample" not in text
    data = read(text).data
    assert data.eval_results is None
    assert data.library_name == "transformers"


def test_an_imported_model_has_no_text(run_dir: Path, tmp_path: Path) -> None:
    none = {
        "files": [],
        "train_tokens": 0,
        "val_tokens": 0,
        "train_bytes": 0,
        "val_bytes": 0,
        "sha256": "imported",
    }
    imported = {
        "from": "/home/me/model",
        "model_type": "llama",
        "sha256": {"config.json": "0" * 64},
    }
    shutil.copytree(run_dir, tmp_path / "imported")
    record = read_json(tmp_path / "imported" / "run.json") | {"data": none, "imported": imported}
    (tmp_path / "imported" / "run.json").write_text(json.dumps(record))
    (tmp_path / "imported" / "metrics.jsonl").write_text("")
    export = model_export.load_export(str(run_dir))
    text = model_card.render_card(
        dataclasses.replace(export, run=Run(tmp_path / "imported"), step=0), 1e-7
    )
    assert "It was not trained by glasslm" in text
    assert "was imported without it" in text
    assert "learning rate" not in text
    assert "0" * 64 in text
    assert "/home/me" not in text
    read(text)


def test_licence_and_origin_of_a_corpus_are_in_the_card(run_dir: Path) -> None:
    export = model_export.load_export(str(run_dir))
    run = Run(run_dir)
    run.config = dataclasses.replace(  # type: ignore[misc]
        run.config, data=dataclasses.replace(run.config.data, corpus="shakespeare", text_file=())
    )
    text = model_card.render_card(dataclasses.replace(export, run=run), None)
    assert read(text).data.language == "en"
    assert (
        "The text was shakespeare (public domain), from https://github.com/karpathy/char-rnn. "
        "It was split" in text
    )
    run.config = dataclasses.replace(
        run.config,
        data=dataclasses.replace(run.config.data, corpus=None, hf_dataset="roneneldan/TinyStories"),
    )
    data = read(model_card.render_card(dataclasses.replace(export, run=run), None)).data
    assert data.datasets == ["roneneldan/TinyStories"]
    assert data.eval_results[0].dataset_type == "roneneldan/TinyStories"


def test_a_fine_tuned_run_names_its_base(run_dir: Path, tmp_path: Path) -> None:
    old = {
        "kind": "eval",
        "split": "old",
        "loss": 2.5,
        "perplexity": 12.2,
        "bpb": 3.6,
        "tokens": 9,
        "bytes": 9,
        "whole": True,
        "best": False,
    }
    base = {"run": "/home/me/runs/first", "step": 7, "data_sha256": "0"}
    model = copy_run(run_dir, tmp_path / "tuned", {"base": base}, [old])
    text = model_card.render_card(model, None)
    assert "fine-tuned from the run first (step 7)" in text
    assert "the validation text of the base run | 2.5000" in text
    assert 2.5 not in [
        result.metric_value for result in read(text).data.eval_results
    ]  # of another text


def test_the_objective_of_preference_tuning_is_no_cross_entropy(
    run_dir: Path, tmp_path: Path
) -> None:
    line = {"kind": "eval", "split": "val", "tokens": 9, "bytes": 0, "whole": True, "best": True}
    old = line | {"split": "old", "loss": 2.5, "perplexity": 12.2, "bpb": 3.6, "best": False}
    for held_out, settings, unit, batch in (
        ("pairs", PreferenceConfig("pairs.jsonl"), "nats per pair", "4 pairs"),
        (
            "prompts", PreferenceConfig(reward="addition", group_size=2), "1 - reward",
            "4 prompts with 2 answers each",
        ),
    ):  # fmt: skip
        line |= {"loss": 0.5, "perplexity": None, "bpb": None, "preference": {"accuracy": 0.75}}
        model = copy_run(run_dir, tmp_path / held_out, {}, [line, old])
        config = dataclasses.replace(model.run.config, preference=settings)
        model.run.config = config  # type: ignore[misc]
        text = model_card.render_card(model, None)
        assert f"On held-out {held_out}" in text
        assert f"| loss ({unit}) | 0.5000 |" in text
        assert f"| batch | {batch} |" in text
        assert "| accuracy | 0.750 |" in text
        assert "text of the base run | 2.5000" in text
        assert "| the validation text |" not in text
        assert "gzip" not in text
        assert "model-index" not in text
