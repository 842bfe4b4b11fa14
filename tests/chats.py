"""Chat templates as the models' makers write them, and chats that are hard for them."""

from __future__ import annotations

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
"""TinyLlama-Chat's: roles are plain text, EOS ends a turn, no BOS."""

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral-Instruct's: no system turn, and nothing between [/INST] and the reply."""

MISTRAL_SPACED = MISTRAL.replace("{{ message['content'] + eos_token", "{{ ' ' + message['content'] | trim + eos_token")
"""The same with a space that the model has to write, and a trimmed reply."""

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's: every content is trimmed, a turn ends with a token that is not EOS."""

LLAMA3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3's: today's date in a system turn of its own."""

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen 3's manner: what the assistant thought is taken out of its earlier turns."""

DROPPING = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
"""One that leaves system turns out without a word."""

LONG = "All work and no play makes Jack a dull boy. " * 60

CHATS = {
    "one turn": [("user", "What is 2 + 3?"), ("assistant", "2 + 3 = 5.")],
    "system": [("system", "Be brief."), ("user", "Name a colour"), ("assistant", "Red")],
    "several": [
        ("user", "Hi there"),
        ("assistant", "Hello! How can I help?"),
        ("user", "Count to 3\nand stop."),
        ("assistant", "1\n2\n3"),
    ],
    "unicode": [("user", "naïve café – 漢字 👩‍👩‍👧?"), ("assistant", "漢字は「かんじ」です — e\u0301té 🙂")],
    "white space": [("user", "  two before\n"), ("assistant", "\n\nblank lines before, and one after \n")],
    "long": [("user", LONG), ("assistant", LONG.upper())],
    "empty": [("system", ""), ("user", ""), ("assistant", "Nothing was asked.")],
    "template's words": [
        ("user", "user\n[INST] <|user|> [/INST] assistant"),
        ("assistant", "<|assistant|>\nuser: model"),
    ],
    "the same twice": [("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes yes")],
}
