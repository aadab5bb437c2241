"""Tokenizers that lose text are recognized; texts and streams are those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from glasslm.cli import main
from glasslm.data import tokenizers
from glasslm.data.stream_decoder import StreamDecoder
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer
from glasslm.lab.verification import comparison
from glasslm.runs.run_folder import Run
from small_runs import logged_lines, read_json, train, without_report, write_text

TEXT = (
    "the cat sat on the mat, and the dog didn't! it ran; the old king said: what? a cat.\n" * 20
    + "abcdefghijklmnopqrstuvwxyz0123456789\n"
)


def word_level() -> Library:
    library = Library(models.WordLevel(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(library, trainers.WordLevelTrainer(vocab_size=60, special_tokens=["[UNK]"]))


def word_piece() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return trained(library, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"]))


def bpe(
    normalizer: normalizers.Normalizer | None = None, unknown: str | None = None, suffix: str = ""
) -> Library:
    """A BPE of characters, as SentencePiece and GPT-1 have it."""
    options = {"unk_token": unknown, "end_of_word_suffix": suffix}
    library = Library(models.BPE(**{name: text for name, text in options.items() if text}))
    if normalizer:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Whitespace() if suffix else pre_tokenizers.Metaspace()
    library.decoder = decoders.BPEDecoder(suffix) if suffix else decoders.Metaspace()
    special = [unknown] if unknown else []
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=special, **({"end_of_word_suffix": suffix} if suffix else {})
    )
    return trained(library, trainer)


def unigram(**options: bool) -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>")
    return trained(library, trainer)


def llama() -> Library:
    """Bytes for unknown characters, as Llama 2 has them."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"acetht", "▁t", "▁th"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    library = Library(
        models.BPE(
            vocab=vocabulary, merges=[("▁", "t"), ("▁t", "h")], unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    library.add_special_tokens(["<unk>"])
    return library


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Library:
    library = Library.from_str(tokenizers.train_bpe([TEXT], 300).to_json())
    if normalizer:
        library.normalizer = normalizer
    return library


def bytes_of_its_text(suffix: str = "") -> Library:
    """A byte-level BPE with tokens for the bytes of its training text alone."""
    options = {"end_of_word_suffix": suffix} if suffix else {}
    library = Library(models.BPE(**options))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if suffix else []
    return trained(
        library, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, **options)
    )


def trained(library: Library, trainer: trainers.Trainer) -> Library:
    trainer.show_progress = False
    library.train_from_iterator([TEXT], trainer)
    return library


LOSSY: dict[str, tuple[Callable[[], Library], str]] = {
    "words": (word_level, "WordLevel"),
    "pieces of words, lower case": (word_piece, "BertNormalizer"),
    "bpe that drops unknown characters": (bpe, "comes back as"),
    "bpe with <unk>": (lambda: bpe(unknown="<unk>"), "comes back as"),
    "bpe without spaces": (lambda: bpe(suffix="</w>"), "comes back as"),
    "unigram with <unk>": (unigram, "comes back as"),
    "lower case": (lambda: byte_level(normalizers.Lowercase()), "Lowercase"),
    "compatibility forms": (lambda: byte_level(normalizers.NFKC()), "NFKC"),
    "accents": (
        lambda: byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "NFD",
    ),
    "strip": (lambda: byte_level(normalizers.Strip()), "Strip"),
    "spaces": (
        lambda: byte_level(normalizers.Replace(Regex(" {2,}"), " ")),
        "'a  b' comes back as 'a b'",
    ),
    "bytes of its own text": (bytes_of_its_text, "comes back as"),
    "bytes with a suffix": (lambda: bytes_of_its_text("</w>"), "comes back as"),
}  # fmt: skip
LOSSLESS: dict[str, Callable[[], Library]] = {
    "byte level": byte_level,
    "byte level, composed": lambda: byte_level(normalizers.NFC()),
    "bytes for unknown characters": llama,
}
ALL = {name: make for name, (make, _) in LOSSY.items()} | LOSSLESS


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_tokenizer_is_recognized_with_its_reason(name: str) -> None:
    make, reason = LOSSY[name]
    tokenizer = SubwordTokenizer(make().to_str())
    assert reason in tokenizer.lossy_reason
    assert not tokenizer.scored_bytes.any()
    assert tokenizers.parse_tokenizer(tokenizer.to_json()).lossy_reason == tokenizer.lossy_reason


def test_corpus_inspect_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for make in (byte_level, lambda: byte_level(normalizers.Lowercase())):
        make().save(str(tmp_path / "tokenizer.json"))
        flags = ["--text-file", str(tmp_path / "text.txt"), "--json"]
        flags += ["--tokenizer", str(tmp_path / "tokenizer.json")]
        assert main(["corpus", "inspect", *flags]) == 0
        out, err = capsys.readouterr()
        tokenizer = json.loads(out)["tokenizer"]
        assert tokenizer["lossless"] == ("note: the tokenizer loses text" not in err)
    assert "Lowercase" in tokenizer["lossy_reason"]
    assert tokenizer["lossy_reason"] in err


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_tokenizer_has_bits_per_byte(name: str) -> None:
    tokenizer = SubwordTokenizer(LOSSLESS[name]().to_str())
    assert tokenizer.lossy_reason == ""
    assert (tokenizer.scored_bytes == tokenizer.byte_lengths).all()
    for own in (ByteTokenizer(), CharTokenizer("ab"), tokenizers.train_bpe([TEXT], 300)):
        assert (own.lossy_reason, own.scored_bytes.any()) == ("", True)


@pytest.mark.parametrize("name", ALL)
def test_texts_and_streams_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    library = ALL[name]()
    tokenizer = SubwordTokenizer(library.to_str())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, clean_up_tokenization_spaces=False
    )
    ids = tokenizer.encode(TEXT[:200]).tolist()
    expected = theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == expected
    for start in (0, 1, 5, 20):
        stream = StreamDecoder(tokenizer, ids[:start])
        before = theirs.decode(ids[:start], skip_special_tokens=True)
        pieces = [stream.push(token) for token in ids[start:]]
        assert before + "".join(pieces) + stream.flush() == expected
        assert len([piece for piece in pieces if piece]) > 10  # as it comes, not at the end


def test_streams_wait_for_whole_characters_and_pass_over_special_tokens() -> None:
    tokenizer = SubwordTokenizer(llama().to_str())
    ids = tokenizer.encode("a é the").tolist()
    stream = StreamDecoder(tokenizer)
    pieces = []
    for token in ids:
        pieces += [stream.push(token), stream.push(0)]
    assert "".join(pieces) == "a é the"
    assert not any("\ufffd" in piece for piece in pieces)
    stream = StreamDecoder(tokenizer, ids)
    assert stream.push(1 + 0xC3) == ""
    assert [stream.count_replaced(token) for token in (1 + 0xA9, 1 + 0xC3, ids[0])] == [0, 1, 1]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("prompt", ["語語語", "語語語🎭", "éééééa語語", "the 語語語 "])
def test_a_prompt_that_ends_in_bytes_leaves_the_next_characters_whole(prompt: str) -> None:
    """Wherever the tokens that the decoder remembers begin."""
    tokenizer = SubwordTokenizer(llama().to_str())
    ids = tokenizer.encode(f"{prompt}語🎭 the").tolist()
    start = len(tokenizer.encode(prompt))
    stream = StreamDecoder(tokenizer, ids[:start])
    pieces = [stream.push(token) for token in ids[start:]]
    assert "".join(pieces) + stream.flush() == "語🎭 the"
    assert pieces[2] == "語"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a lossy tokenizer, and one of bytes on the same text."""
    folder = tmp_path_factory.mktemp("runs")
    file, text = folder / "words.json", write_text(folder / "text.txt")
    file.write_text(word_piece().to_str(), encoding="utf-8")
    small = {"max_steps": 4, "eval_interval": 2, "checkpoint_interval": 4, "sample_interval": 2}
    lossy = train(text, folder / "lossy", tokenizer=str(file), **small).run_dir
    return lossy, train(text, folder / "bytes", tokenizer="byte", **small).run_dir


def test_a_run_records_it_and_has_no_bits_per_byte(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_json(runs[0] / "run.json")["tokenizer"]
    assert record["lossless"] is False
    assert "BertNormalizer" in record["lossy_reason"]
    assert read_json(runs[1] / "run.json")["tokenizer"]["lossless"] is True
    evals = logged_lines(runs[0], "eval")
    assert evals
    assert all(line["bpb"] is None for line in evals)
    assert all(isinstance(line["loss"], float) for line in evals)
    text = runs[0].parent / "text.txt"
    for more in ([], ["--text-file", str(text)]):
        capsys.readouterr()
        assert main(["evaluate", str(runs[0]), *more]) == 0
        assert "the tokenizer loses text (its normalizer BertNormalizer" in capsys.readouterr().out
        assert main(["evaluate", str(runs[0]), *more, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["bpb"] is None
        assert "gzip_bpb" not in result
    assert main(["report", str(runs[0])]) == 0


def test_the_first_lines_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "words.json"
    file.write_text(word_piece().to_str(), encoding="utf-8")
    text = write_text(tmp_path / "text.txt")
    flags = {"text-file": text, "tokenizer": file, "run-dir": tmp_path / "run", "max-steps": 1,
             "d-model": 16, "n-layers": 1, "n-heads": 2, "block-size": 16}  # fmt: skip
    argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    with without_report():
        assert main(["train", *argv]) == 0
    plan = capsys.readouterr().err.split("eval ")[0]
    assert "the tokenizer loses text" in " ".join(plan.split())


def test_no_winner_is_named_by_bits_per_byte(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    compared = comparison.label_runs([Run(path) for path in runs])
    assert compared[0].results["best bits per byte"] is None
    remarks = " ".join(comparison.remarks(compared))
    assert "No winner is named" in remarks
    assert "A: the tokenizer loses text" in remarks
    out = runs[0].parent / "comparison"
    assert main(["compare", *map(str, runs), "--cross", "--out", str(out)]) == 0
    assert "A has no bits per byte" in " ".join(capsys.readouterr().out.split())
    old = read_json(runs[0] / "run.json")  # a run of before: the number is there and not believed
    del old["tokenizer"]["lossless"], old["tokenizer"]["lossy_reason"]
    assert comparison.label_runs([Run(path) for path in runs])[0].lossy_reason


def test_the_text_shows_what_the_file_does_not(tmp_path: Path) -> None:
    """Composition loses nothing of usual texts, and half of the bytes of decomposed ones."""
    file = tmp_path / "composed.json"
    file.write_text(byte_level(normalizers.NFC()).to_str(), encoding="utf-8")
    for accent, lossless in (("é", True), ("e\u0301", False)):
        text = tmp_path / f"{lossless}.txt"
        text.write_text(f"caf{accent} {accent}t{accent}\n" * 200, encoding="utf-8")
        run = train(text, tmp_path / str(lossless), tokenizer=str(file), max_steps=1).run_dir
        assert read_json(run / "run.json")["tokenizer"]["lossless"] is lossless
        assert bool(Run(run).tokenizer.lossy_reason) is not lossless
        assert all((line["bpb"] is not None) is lossless for line in logged_lines(run, "eval"))
