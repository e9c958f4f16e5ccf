"""Chats for tests: templates in the ways that published models write theirs, a small tokenizer, and conversations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from daybreak.data.tokenizer import get_tokenizer
from daybreak.interop.huggingface import write_tokenizer

TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>", "</turn>")
# ChatML, as Qwen and SmolLM have it, here with a default system message.
CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same with answers marked.
MARKED = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{% if message['role'] == 'assistant' %}
{% generation %}
{{- message['content'] + '<|im_end|>' -}}
{% endgeneration %}
{{- '\\n' -}}
{% else %}
{{- message['content'] + '<|im_end|>\\n' -}}
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' -}}{% endif %}"""
# Headers around roles, trimmed texts, tools in JSON, a date, the beginning of the text: as Llama 3 does.
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set said = "" %}{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}{%- endif %}
{{- said + "<|eot|>" }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant', 'tool') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + (message['content'] | trim) + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""
# Instructions between brackets, answers that end with eos, a loop that is left: as Mistral and Llama 2 do.
BRACKETS = """{{ bos_token }}{% set ns = namespace(found=false) %}{% for message in messages %}
{% if message['role'] == 'system' %}{% continue %}{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) and not ns.found %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}
"""
# Another name for the assistant, macros, a part of the content, marks: as Gemma does.
TURNS = """{{- bos_token -}}
{%- macro of(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content if part.type == 'text' -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<turn>' + role + '\n' }}
{%- if role == 'model' -%}{% generation %}{{ of(message.content) }}{{ '</turn>\n' }}{% endgeneration %}
{%- else -%}{{ of(message.content) }}{{ '</turn>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\n' }}{%- endif -%}"""
# Earlier thoughts vanish when another question follows: as Qwen 3 does.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "headers": HEADERS, "brackets": BRACKETS, "turns": TURNS,
             "thinking": THINKING}  # fmt: skip

WORDS = ["naïve", "日本", "don't", "🙂", "x=1;", "the", "cat,", "on", "a", "mat\n\n", "", "then", "", "42?", "λ"]


def conversation(i: int, turns: int = 2, system: bool = False) -> list[dict[str, Any]]:
    """Questions and answers, of which none is like another."""
    said = [{"role": "system", "content": f"You are number {i}."}] if system else []
    for t in range(turns):
        words = " ".join(WORDS[(i * 7 + t * 3 + k) % len(WORDS)] for k in range(3 + (i + t) % 9))
        said += [{"role": "user", "content": f"What of {i}.{t}, {words}?"}]
        said += [{"role": "assistant", "content": f"{words} is {i * t} <b>&</b>"}]
    return said


@cache
def _tokenizer() -> str:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(get_tokenizer("gpt2-600").to_json())
    made.add_special_tokens(list(TOKENS))
    return str(made.to_str())


def make_model(folder: Path, template: str = CHATML, *, own_file: bool = True) -> Path:
    """A tokenizer with special tokens, and a chat template, as a model's folder has them. Returns tokenizer.json."""
    pytest.importorskip("tokenizers")
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(get_tokenizer("gpt2-600"), 512, folder)
    (folder / "tokenizer.json").write_text(_tokenizer())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "extra_special_tokens": []
    }  # fmt: skip
    if own_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
