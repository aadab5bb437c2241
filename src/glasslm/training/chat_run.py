"""What a run that learns conversations starts from: vocabulary, tokens and attention."""

from __future__ import annotations

import dataclasses
from typing import Any

from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.data.chat import dialogues
from glasslm.data.chat.chat_dataset import prepare_chat_dataset
from glasslm.data.chat.chat_source import ChatSource
from glasslm.data.chat.chat_vocabulary import ChatVocabulary, make_chat_vocabulary
from glasslm.data.chat.conversation_rows import ConversationRows
from glasslm.data.dataset import Dataset, Split
from glasslm.errors import InputError
from glasslm.text import Notify, plural
from glasslm.training.fine_tuning import BaseRun, new_tokens


def open_chat(
    config: RunConfig, base: BaseRun | None, notify: Notify
) -> tuple[Dataset, ChatVocabulary]:
    """The tokenized conversations of a config, and the vocabulary of the base with a template.

    Raises InputError where there is no base, or its tokenizer cannot express the conversations.
    """
    if base is None:
        raise InputError(
            "--chat teaches a trained model to answer: train it on text first, then use `glasslm "
            "finetune RUN --chat ...`"
        )
    settings = base.run.record["tokenizer"].get("transformers")
    data, tokenizer = config.data, base.run.tokenizer
    vocabulary = make_chat_vocabulary(data.chat_template, data.special_tokens, tokenizer, settings)
    source = ChatSource.open(data, describe_itself(config.model, tokenizer.vocab_size))
    dataset = prepare_chat_dataset(data, source, vocabulary, notify)
    _notify(config.model, dataset, new_tokens(vocabulary.tokenizer, tokenizer), notify)
    return dataset, vocabulary


def describe_itself(c: ModelConfig, vocab_size: int) -> dict[str, str]:
    """What the made-up dialogues ask the model about itself: numbers by their name."""
    values = (c.n_layers, c.n_heads, c.d_model, c.block_size, vocab_size)
    return dict(zip(dialogues.FACTS, map(str, values), strict=True))


def with_conversations(config: RunConfig, dataset: Dataset) -> RunConfig:
    """`config` with the special tokens of the template, and attention inside conversations.

    Where the model cannot keep it inside each, conversations do not share rows.
    """
    conversations = dataset.train.conversations
    assert conversations is not None
    data = dataclasses.replace(config.data, special_tokens=tuple(dataset.tokenizer.special_tokens))
    model = config.model
    if conversations.can_share_rows(model):
        model = dataclasses.replace(
            model, document_attention=True, document_end_id=conversations.begin_id
        )
    return dataclasses.replace(config, data=data, model=model)


def require_rows(config: RunConfig, dataset: Dataset) -> list[str]:
    """Notes on the rows of a chat run. Raises InputError where a split has none."""
    T, notes = config.model.block_size, []
    for name, split in (("training", dataset.train), ("validation", dataset.val)):
        rows = make_rows(split, config.model)
        if not len(rows):
            raise InputError(
                f"in all {name} conversations the first answer lies behind the context of {T} "
                "tokens: use a larger --block-size, or shorter conversations"
            )
        if rows.n_cut:
            unanswered = f", {rows.n_unanswered:,} before their first answer" * bool(
                rows.n_unanswered
            )
            notes.append(
                f"{rows.n_cut:,} of {len(rows.conversations):,} {name} conversations are longer "
                f"than the context and are cut at {T} tokens{unanswered}: --block-size takes more"
            )
    rows = make_rows(dataset.train, config.model)
    share = rows.n_tokens / (len(rows) * (T + 1))
    notes.append(
        f"{plural(len(rows), 'row')} of {T} tokens hold {len(rows.conversations):,} conversations, "
        f"{share:.0%} full"
    )
    return notes


def make_rows(split: Split, c: ModelConfig) -> ConversationRows:
    """The rows of a split of conversations."""
    assert split.conversations is not None
    return ConversationRows(split.conversations, c)


def _notify(c: ModelConfig, dataset: Dataset, tokens: dict[int, str], notify: Notify) -> None:
    facts: dict[str, Any] = dataset.facts["chat"]
    notify(
        f"{facts['train_conversations']:,} training and {facts['val_conversations']:,} validation "
        f"conversations; the loss is that of the assistant's "
        f"{facts['train_answer_tokens']:,} and {facts['val_answer_tokens']:,} tokens alone"
    )
    if not tokens:
        return
    added = f"note: the template adds {' '.join(tokens.values())} to the vocabulary"
    if c.lora_rank:
        added += (
            ". LoRA trains no embeddings, so their rows stay as they were drawn: --full trains them"
        )
    notify(added)
