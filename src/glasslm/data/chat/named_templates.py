"""Chat templates by name, as Jinja that transformers and llama.cpp read.

`chatml` and `llama3` begin with the token that begins a text, which lets several conversations
share a row. `plain` needs one special token only, the end of the text.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_TEMPLATE = "chatml"


class NamedTemplate(NamedTuple):
    """A template, and the roles of its special tokens.

    An empty token is the one that ends the documents of the model, or <|endoftext|>.
    """

    source: str
    tokens: tuple[str, ...]  # special tokens that it writes
    turn_end: str = ""  # ends an answer
    text_begin: str = ""  # begins a conversation


NAMED_TEMPLATES = {
    # OpenAI's, as Qwen and SmolLM use it, with a token that begins the conversation.
    "chatml": NamedTemplate(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": NamedTemplate(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "plain": NamedTemplate(
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n' }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}",
        (),
    ),
}
