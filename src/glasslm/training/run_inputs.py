"""What a new run starts from: its text, and the base run of fine-tuning."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, cast

from glasslm.config.schema import DataConfig, RunConfig
from glasslm.data.answer_targets import require_whole_examples
from glasslm.data.chat import dialogues
from glasslm.data.chat.chat_vocabulary import ChatVocabulary
from glasslm.data.chat.named_templates import NAMED_TEMPLATES
from glasslm.data.dataset import Dataset, Split, prepare_dataset, require_enough_tokens
from glasslm.data.sources import corpora
from glasslm.data.sources.text_files import Source
from glasslm.engines.protocol import State
from glasslm.errors import DamagedError, InputError
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.metrics import Line
from glasslm.text import Notify
from glasslm.training.chat_run import open_chat, with_conversations
from glasslm.training.fine_tuning import BaseRun
from glasslm.training.preference.opening import require_tunable


@dataclass(frozen=True)
class RunInputs:
    """The tokenized text of a new run, and its base run."""

    dataset: Dataset
    source: Source | None  # None: the caller has prepared the dataset
    base: BaseRun | None  # None: training starts from random weights
    chat: ChatVocabulary | None = None  # of a run that learns conversations
    old_text: Split | None = None  # the validation split of the base, where it was opened

    def with_old_text(self, block_size: int, notify: Notify) -> RunInputs:
        """These inputs with the text of the base, on which forgetting is measured."""
        old_text = self.base.old_text(block_size, notify) if self.base else None
        return dataclasses.replace(self, old_text=old_text)

    def complete(self, config: RunConfig) -> RunConfig:
        """`config` with what these inputs decide: its text, and the token that ends documents."""
        return with_document_end(with_base_source(config, self.base), self.dataset)

    def first_weights(self, config: RunConfig) -> State:
        """The first weights of a run of this config, by name."""
        if self.base:
            return self.base.first_weights(config, self.dataset.tokenizer)
        table = parameter_table(config.model, self.dataset.tokenizer.vocab_size)
        return initial_weights(table, config.train.seed)

    @property
    def warnings(self) -> list[Line]:
        """The warning of the log where another corpus took the place of the default one."""
        if self.source is None or not self.source.fallback:
            return []
        message = (
            f"Shakespeare could not be downloaded: training on the corpus '{self.source.name}' "
            "instead"
        )
        return [{"kind": "warning", "step": 0, "code": "fallback", "message": message}]


def require_documents(config: RunConfig) -> None:
    """Raise InputError where attention is kept inside documents that have no end."""
    if config.data.chat is not None:
        return  # its template marks where conversations begin
    if config.model.document_attention and not config.data.used_special_tokens:
        raise InputError(
            "--document-attention needs documents that end with a token: give --special-tokens "
            "'<|endoftext|>' or --document-separator TEXT, or leave it out"
        )


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` with absolute paths of the pairs, the conversations and their template.

    They are read again from other working folders: by a resume, a verification, a repetition.
    """
    data, preference = config.data, config.preference
    if data.chat and data.chat != dialogues.NAME:
        data = dataclasses.replace(data, chat=os.path.abspath(data.chat))
    if data.chat_template and data.chat_template not in NAMED_TEMPLATES:
        data = dataclasses.replace(data, chat_template=os.path.abspath(data.chat_template))
    if preference.preferences:
        path = os.path.abspath(preference.preferences)
        preference = dataclasses.replace(preference, preferences=path)
    return dataclasses.replace(config, data=data, preference=preference)


def with_base_source(config: RunConfig, base: BaseRun | None) -> RunConfig:
    """`config` with the source of the base's text, where preference tuning names none.

    Raises InputError where the base has no text.
    """
    if base is None or config.data.has_source or not config.preference.is_active:
        return config
    base_data = base.run.config.data
    if not base_data.has_source:
        raise InputError(
            f"{base.run.path} has no text of its own, on which forgetting is measured: give some "
            "text like that which it learned as --text-file PATH"
        )
    return dataclasses.replace(config, data=config.data.with_source_of(base_data))


def with_document_end(config: RunConfig, dataset: Dataset) -> RunConfig:
    """`config` with the token that ends documents, where attention is kept inside them."""
    if dataset.train.conversations is not None:
        return with_conversations(config, dataset)
    if not config.model.document_attention:
        return config
    require_documents(config)
    end_id = dataset.tokenizer.end_id
    assert end_id is not None, "the tokenizer is not that of the config"
    model = dataclasses.replace(config.model, document_end_id=end_id)
    return dataclasses.replace(config, model=model)


def open_run_inputs(config: RunConfig, notify: Notify, dataset: Dataset | None = None) -> RunInputs:
    """Open the base run and the text of a resolved config; with `dataset`, no text is opened.

    Raises InputError if training could not start: the base does not fit, adapters have no base, or
    the text is too short.
    """
    require_documents(config)
    base = BaseRun(config.train.init_from) if config.train.init_from else None
    is_base_text = config.preference.is_active and not config.data.has_source
    config = with_base_source(config, base)
    require_tunable(config, base.run.config.data if base else None)
    require_whole_examples(config.data, config.model.block_size)
    if base:
        base.require_fit(config)
        if config.preference.is_active and base.chat_template:
            notify(
                f"note: {base.run.path} has a chat template, and prompts are written without it: "
                "write what the template writes into the prompts of the pairs"
            )
    elif config.model.lora_rank:
        raise InputError(
            "LoRA adapters need trained weights to adapt: give --init-from RUN, or use "
            "`glasslm finetune RUN`"
        )
    if config.data.chat is not None:
        opened, chat = open_chat(config, base, notify)
        if dataset is not None and not opened.has_identity(dataset.sha256):
            raise InputError("the conversations or their template have changed: restore them")
        if dataset is not None and dataset.sha256 != opened.sha256:
            opened = dataset  # its tokens are those of an older version
        return RunInputs(opened, None, base, chat)
    source = None
    if dataset is None and base and is_base_text:
        dataset = _open_base_text(config.data, base, notify)
    elif dataset is None:
        source = corpora.find_source(config.data, notify)
        dataset = prepare_dataset(config.data, source, notify, base.run.tokenizer if base else None)
    # The text of preference tuning is only measured.
    rows = 1 if config.preference.is_active else config.train.batch_size
    require_enough_tokens(dataset, config.model.block_size, rows)
    return RunInputs(dataset, source, base)


def _open_base_text(data: DataConfig, base: BaseRun, notify: Notify) -> Dataset:
    """The text of the base as its run.json records it, split and tokenized as `data` says.

    The names in its config could mean other files here. Raises InputError where the text is gone.
    """
    record = cast(dict[str, Any], base.run.record["data"])
    try:
        if data == base.run.config.data:
            return dataclasses.replace(base.run.dataset(notify), facts=record)
        source = corpora.find_run_source(data, record, notify)
    except DamagedError as error:
        raise InputError(f"{error}, or give a text like it as --text-file PATH") from None
    return prepare_dataset(data, source, notify, base.run.tokenizer)
