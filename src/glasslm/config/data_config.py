"""The training text: DataConfig."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import tyro

from glasslm.config.config_fields import optional_flag, require_fields
from glasslm.config.units import parse_size
from glasslm.errors import InputError, require

TextCorpus = Literal["shakespeare", "python", "arxiv", "wikipedia", "dialogues"]
TaskCorpus = Literal[
    "task:copy", "task:reverse", "task:sort", "task:addition", "task:addition-reversed",
    "task:modular-addition", "task:associative-recall", "task:induction", "task:dyck",
    "task:parity", "task:counting", "task:grammar", "task:regression",
]  # fmt: skip
Corpus = Literal[TextCorpus, TaskCorpus]
TASK_PREFIX = "task:"
TASK_TOKENIZERS = ("char", "byte")  # an example has one token for each character

MAX_ARXIV_RESULTS = 30_000  # abstracts: the API of arXiv returns no more
END_OF_TEXT = "<|endoftext|>"  # GPT-2's special token for the end of a document
MIN_BPE_VOCABULARY = 257  # 256 bytes and one merge
MAX_BPE_VOCABULARY = 1 << 20
MAX_SPECIAL_TOKEN = 256  # characters
# The fields of DataConfig that say which text it is; the others say how it is split and tokenized.
SOURCE_FIELDS = (
    "corpus", "task_size", "task_examples", "task_line", "category", "max_results", "text_file",
    "json_field", "hf_dataset", "hf_config", "hf_split", "hf_revision", "hf_column", "chat",
    "chat_template", "max_bytes", "document_separator",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The training text, its tokenizer, and how it is split."""

    corpus: Annotated[
        Corpus | None,
        optional_flag(
            "|".join([*get_args(TextCorpus), "task:NAME"]), "shakespeare, or python when offline"
        ),
    ] = None
    """Train on a named corpus, which is downloaded once and cached, or on a synthetic task.
    Answers alone are learned of a task such as task:copy (`glasslm corpus list` shows all)."""
    task_size: int = 0
    """Largest size of the examples of a task: letters, digits, the modulus (0: the task's own)."""
    task_examples: int = 20_000
    """Number of examples of a task, of which --val-fraction are held out."""
    task_line: int = 0
    """Tokens of an example of a task, filled with line ends (0: the next power of two).
    The context holds a whole number of them."""
    category: str = "cs.RO"
    """Category of the abstracts of --corpus arxiv (https://arxiv.org/category_taxonomy)."""
    max_results: int = 5000
    """Number of abstracts of --corpus arxiv, the newest first."""
    text_file: Annotated[tuple[str, ...], optional_flag("PATH...", "none")] = ()
    """Train on these instead of a corpus: files, folders, glob patterns, or - for standard input.
    A parquet file is converted to text."""
    json_field: Annotated[str | None, optional_flag("NAME", "none: the lines as they are")] = None
    """Read --text-file as JSON lines: this field of each line is a document."""
    hf_dataset: Annotated[str | None, optional_flag("OWNER/NAME", "none")] = None
    """Train on a Hugging Face dataset instead, such as roneneldan/TinyStories."""
    hf_config: Annotated[str | None, optional_flag("NAME", "the dataset's default")] = None
    """Configuration of --hf-dataset (required where several exist and none is the default)."""
    hf_split: str = "train"
    """Split of --hf-dataset."""
    hf_revision: Annotated[str | None, optional_flag("COMMIT", "the newest one")] = None
    """Commit of --hf-dataset. The run records which one it used."""
    hf_column: Annotated[str | None, optional_flag("NAME", "text, or the only column of text")] = (
        None
    )
    """Column of --hf-dataset that holds the text."""
    chat: Annotated[str | None, optional_flag("FILE.jsonl|dialogues", "none")] = None
    """Fine-tune on conversations instead of a text: one JSON object of messages a line.
    Only the assistant's turns are learned. The word dialogues stands for made-up ones."""
    chat_template: Annotated[
        str | None, optional_flag("chatml|llama3|plain|FILE", "the model's own, or chatml")
    ] = None
    """How --chat writes conversations: a name, or a file with a Jinja template."""
    max_bytes: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "50MB"
    """Size of the text taken from the start of --corpus wikipedia or --hf-dataset, such as 2GB."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="char|byte|bpe|gpt2|PATH")] = "char"
    """Tokenizer: characters, bytes, BPE trained on this text, GPT-2's, or a tokenizer.json file."""
    vocab_size: int = 4096
    """Vocabulary size that --tokenizer bpe trains."""
    val_fraction: float = 0.1
    """Fraction of the text, at its end, used for validation."""
    test_fraction: float = 0.0
    """Fraction of the text, after the validation part, kept for a final test."""
    encoding_errors: Literal["strict", "replace", "replace-all"] = "strict"
    """Stop at bytes that are not UTF-8 (strict), or read them as U+FFFD.
    Of a file at most 1% (replace), or all of it, whatever it holds (replace-all)."""
    special_tokens: Annotated[tuple[str, ...], optional_flag("TEXT...", "none")] = ()
    """Texts that are one token each, such as "<|endoftext|>" (the first ends each document).
    A document is a file, a row of a dataset, or a part between separators."""
    document_separator: Annotated[str, optional_flag("TEXT", "none")] = ""
    """Text between the documents of a file. The first special token replaces it."""

    def __post_init__(self) -> None:
        is_category = re.fullmatch(r"[A-Za-z-]+(\.[A-Za-z-]+)?", self.category) is not None
        require(is_category, "category", self.category, "one of arXiv's, such as cs.RO or hep-th")
        require_fields(
            self,
            ["max_results"],
            lambda x: 1 <= x <= MAX_ARXIV_RESULTS,
            f"1 to {MAX_ARXIV_RESULTS:,}, the most that arXiv returns",
        )
        require_fields(
            self,
            ["vocab_size"],
            lambda x: MIN_BPE_VOCABULARY <= x <= MAX_BPE_VOCABULARY,
            f"at least {MIN_BPE_VOCABULARY} (256 bytes and one merge), "
            f"at most {MAX_BPE_VOCABULARY:,}",
        )
        require_fields(self, ["val_fraction"], lambda x: 0 < x < 1, "above 0 and below 1")
        require_fields(self, ["test_fraction"], lambda x: 0 <= x < 1, "at least 0 and below 1")
        held_out = self.val_fraction + self.test_fraction
        require(
            held_out < 1,
            "val_fraction + test_fraction",
            held_out,
            "below 1, so that some text is left to train on",
        )
        is_size = 1 <= self.max_byte_count < 2**63
        require(is_size, "max_bytes", self.max_bytes, "a size, such as 200kB, 50MB or 2GB")
        self._require_one_source()
        self._require_task_settings()
        is_distinct = len(set(self.special_tokens)) == len(self.special_tokens)
        require(
            is_distinct and all(map(_is_token, self.special_tokens)),
            "special_tokens",
            " ".join(repr(token) for token in self.special_tokens),
            f"different texts of 1 to {MAX_SPECIAL_TOKEN} characters, none of blanks alone",
        )

    def _require_one_source(self) -> None:
        """Raise InputError for two sources, and for a setting of a dataset that is not given."""
        sources = {
            f"the corpus {self.corpus}": self.corpus,  # --corpus, or NAME of `glasslm corpus`
            "--text-file": self.text_file,
            "--hf-dataset": self.hf_dataset,
            "--chat": self.chat,
        }
        named_sources = [name for name, value in sources.items() if value]
        if len(named_sources) > 1:
            raise InputError(f"both {' and '.join(named_sources)} were given: choose one of them")
        if self.hf_dataset is not None:
            is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.hf_dataset, re.ASCII) is not None
            expected = "OWNER/NAME, as on https://huggingface.co/datasets"
            require(is_name, "hf_dataset", self.hf_dataset, expected)
        require(self.chat != "", "chat", "empty", "a file of JSON lines, or dialogues")
        if self.chat_template is not None and self.chat is None:
            raise InputError("--chat-template needs --chat: give both, or leave out the template")
        if self.chat is not None and self.document_separator:
            raise InputError("--chat has conversations, which need no --document-separator")
        require(self.json_field != "", "json_field", "empty", "the name of a field")
        if self.json_field is not None and not self.text_file:
            raise InputError("--json-field needs --text-file: give both, or leave out --json-field")
        if self.json_field is not None and self.document_separator:
            raise InputError(
                "each line of --json-field is a document: leave out --document-separator"
            )
        for name in ("hf_config", "hf_split", "hf_column", "hf_revision"):
            require(getattr(self, name) != "", name, "empty", "a name")
            if self.hf_dataset is None and getattr(self, name) != getattr(DataConfig, name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} needs --hf-dataset: give both, or leave out {flag}")

    def _require_task_settings(self) -> None:
        """Raise InputError where a setting and the synthetic task do not go together."""
        require_fields(self, ["task_size", "task_line"], lambda x: x >= 0, "0 (automatic) or more")
        require_fields(self, ["task_examples"], lambda x: x >= 10, "10 or more")
        if self.task is None:
            for name in ("task_size", "task_examples", "task_line"):
                if getattr(self, name) != getattr(DataConfig, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise InputError(f"{flag} needs a task: give --corpus task:NAME as well")
            return
        if self.tokenizer not in TASK_TOKENIZERS:
            raise InputError(
                f"--tokenizer {self.tokenizer} may join the symbols of {self.corpus}: leave it out"
            )
        if self.used_special_tokens:
            raise InputError(
                f"the examples of {self.corpus} end with their line: leave out --special-tokens "
                "and --document-separator"
            )

    @property
    def task(self) -> str | None:
        """The name of the synthetic task; None for other texts."""
        is_task = self.corpus is not None and self.corpus.startswith(TASK_PREFIX)
        return str(self.corpus).removeprefix(TASK_PREFIX) if is_task else None

    @property
    def predicts_answers(self) -> bool:
        """Whether the loss is that of answers alone: of a task, or in conversations."""
        return self.task is not None or self.chat is not None

    @property
    def max_byte_count(self) -> int:
        """max_bytes as a number; 0 if it is not a size."""
        return parse_size(self.max_bytes)

    @property
    def used_special_tokens(self) -> tuple[str, ...]:
        """The special tokens, the end of a document first; empty if documents have no end."""
        default = (END_OF_TEXT,) if self.document_separator else ()
        return self.special_tokens or default

    @property
    def has_source(self) -> bool:
        """Whether a source of text is named; if not, data.sources.corpora takes the default one."""
        return bool(self.corpus or self.text_file or self.hf_dataset or self.chat)

    def without_source(self) -> DataConfig:
        """The same split and tokenizer, without a text."""
        defaults: dict[str, Any] = {name: getattr(DataConfig, name) for name in SOURCE_FIELDS}
        return replace(self, special_tokens=self.used_special_tokens, **defaults)

    def with_source_of(self, other: DataConfig) -> DataConfig:
        """The text of `other` with this split and tokenizer; what is set here stays."""
        values: dict[str, Any] = {
            name: getattr(other, name)
            for name in SOURCE_FIELDS
            if getattr(self, name) == getattr(DataConfig, name)
        }
        if self.special_tokens == other.used_special_tokens:
            values["special_tokens"] = other.special_tokens
        return replace(self, **values)


def _is_token(text: str) -> bool:
    """Whether a text can be a special token, which people must be able to read in messages."""
    return len(text) <= MAX_SPECIAL_TOKEN and bool(text.strip())
