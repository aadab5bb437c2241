"""What a new run starts from: its text, and the base run of fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from glasslm.config.schema import RunConfig
from glasslm.data.answer_targets import require_whole_examples
from glasslm.data.chat.chat_vocabulary import ChatVocabulary
from glasslm.data.dataset import Dataset, Split, prepare_dataset, require_enough_tokens
from glasslm.data.sources import corpora
from glasslm.data.sources.text_files import Source
from glasslm.engines.protocol import State
from glasslm.errors import InputError
from glasslm.model.parameters import initial_weights, parameter_table
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

    def first_weights(self, config: RunConfig) -> State:
        """The first weights of a run of this config, by name."""
        if self.base:
            return self.base.first_weights(config, self.dataset.tokenizer)
        table = parameter_table(config.model, self.dataset.tokenizer.vocab_size)
        return initial_weights(table, config.train.seed)


def require_documents(config: RunConfig) -> None:
    """Raise InputError where attention is kept inside documents that have no end."""
    if config.data.chat is not None:
        return  # its template marks where conversations begin
    if config.model.document_attention and not config.data.used_special_tokens:
        raise InputError(
            "--document-attention needs documents that end with a token: give --special-tokens "
            "'<|endoftext|>' or --document-separator TEXT, or leave it out"
        )


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
    require_whole_examples(config.data, config.model.block_size)
    require_tunable(config)
    base = BaseRun(config.train.init_from) if config.train.init_from else None
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
        if dataset is not None and dataset.sha256 != opened.sha256:
            raise InputError("the conversations or their template have changed: restore them")
        return RunInputs(opened, None, base, chat)
    source = None
    if dataset is None:
        source = corpora.find_source(config.data, notify)
        dataset = prepare_dataset(config.data, source, notify, base.run.tokenizer if base else None)
    # The text of preference tuning is only measured.
    rows = 1 if config.preference.is_active else config.train.batch_size
    require_enough_tokens(dataset, config.model.block_size, rows)
    return RunInputs(dataset, source, base)
