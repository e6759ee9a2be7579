"""Chat templates by name, written in jinja with ``{% generation %}`` around what is learned.

    chatml   <|im_start|>role\\n content <|im_end|>\\n
    llama3   <|start_header_id|>role<|end_header_id|>\\n\\n content <|eot_id|>
    gemma    <start_of_turn>role\\n content <end_of_turn>\\n         (assistant is called model)
    alpaca   ### Instruction:\\n content \\n\\n### Response:\\n content EOS
    raw      User: content\\nAssistant: content EOS

The formats are those that the models' authors document. The span of an answer begins after its
header and ends with the token that stops generation. A space at the end of a header belongs to the
span, because BPE tokenizers join it with the first word. White space after the last token of a turn
belongs to neither.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s{}]+\|>|<｜[^｜<>\s{}]+｜>|<(?:start|end)_of_turn>")
_EOS = "\0"  # in a closer: the tokenizer's EOS


class _Format(NamedTuple):
    """The texts around a message of each role. ``{role}`` stands for the role."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None  # None: put before the first message of the user
    others: bool = False  # other roles are written as the user's
    bos: bool = False
    trim: bool = False


_FORMATS = {
    "chatml": _Format(
        ("<|im_start|>{role}\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        ("<|im_start|>{role}\n", "<|im_end|>\n"),
        others=True,
    ),
    "llama3": _Format(
        ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
        others=True,
        bos=True,
        trim=True,
    ),
    "gemma": _Format(
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        ("<start_of_turn>model\n", "<end_of_turn>\n"),
        bos=True,
        trim=True,
    ),
    "alpaca": _Format(
        ("### Instruction:\n", "\n\n"), ("### Response:\n", f"{_EOS}\n\n"), ("", "\n\n")
    ),
    "raw": _Format(("User: ", "\n"), ("Assistant: ", f"{_EOS}\n"), ("System: ", "\n")),
}
PRESETS = tuple(_FORMATS)

_HEAD = """\
{%- macro text_of(message) -%}
{%- if message.tool_calls or message.reasoning_content -%}
{{- raise_exception("the PRESET template writes the content of a message only, got a message with \
tool calls or reasoning; use a template of a model that has them") -}}
{%- elif message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type != "text" -%}
{{- raise_exception("the PRESET template writes text only, got a part of type " ~ part.type) -}}
{%- endif -%}
{{- part.text -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- raise_exception("the PRESET template writes no tools; use a template of a model that has \
them") -}}
{%- endif -%}
"""
_SYSTEM_FIRST = """\
{%- if loop.index0 == 1 and messages[0].role == "system" -%}
{{- (text_of(messages[0]) | trim) ~ "\\n\\n" -}}
{%- endif -%}
"""


class ChatTemplate:
    """A chat template by name, with another header or closer of the assistant if given.

    Args:
        preset: ``"chatml"``, ``"llama3"``, ``"gemma"``, ``"alpaca"`` or ``"raw"``.
        assistant_header: the text before an answer, which generation begins after.
        assistant_closer: the text after an answer. Its white space at the end is not learned.

    Attributes:
        jinja: the template.
        assistant_header: the text that ``add_generation_prompt=True`` appends.
        assistant_closer: the text after an answer, without the EOS of ``alpaca`` and ``raw``.
        special_tokens: texts that must each be one token of the tokenizer.

    Raises:
        ValueError: if there is no such preset.
    """

    def __init__(
        self,
        preset: str = "chatml",
        *,
        assistant_header: str | None = None,
        assistant_closer: str | None = None,
    ) -> None:
        if preset not in _FORMATS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        form = _FORMATS[preset]
        header = form.assistant[0] if assistant_header is None else assistant_header
        closer = form.assistant[1] if assistant_closer is None else assistant_closer
        self.preset = preset
        self.assistant_header = header.rstrip(" ")
        self.assistant_closer = closer.replace(_EOS, "")
        self._needs_eos = _EOS in closer
        form = form._replace(assistant=(header, closer))
        self.jinja = _write(preset, form)
        pairs = (form.user, form.assistant, form.system or ())
        texts = "".join(text for pair in pairs for text in pair)
        self.special_tokens = tuple(dict.fromkeys(SPECIAL_TOKEN.findall(texts)))

    def set_on(self, tokenizer: Any) -> None:
        """Make this the ``chat_template`` of the tokenizer, for training, generation and serving.

        Raises:
            ValueError: if the tokenizer splits a special token of the template, or if the template
                ends an answer with the EOS and the tokenizer has none.
        """
        split = [token for token in self.special_tokens if not is_one_token(tokenizer, token)]
        if split:
            raise ValueError(
                f"tokenizer must have the special tokens of the {self.preset} template as single "
                f"tokens, got one that splits {', '.join(split)}; add them before the model is "
                "trained, or choose another template"
            )
        if self._needs_eos and not tokenizer.eos_token:
            raise ValueError(
                f"tokenizer must have an eos_token, which ends an answer in the {self.preset} "
                "template, got one without it"
            )
        tokenizer.chat_template = self.jinja


def is_one_token(tokenizer: Any, token: str) -> bool:
    """Whether the tokenizer encodes a text as one token."""
    return len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


def set_template(tokenizer: Any, template: str | ChatTemplate | None) -> None:
    """Set a chat template on a tokenizer.

    Args:
        tokenizer: to change.
        template: a preset's name, a `ChatTemplate`, or jinja; None keeps the tokenizer's own.

    Raises:
        TypeError: if ``template`` is nothing of this.
        ValueError: if there is no such preset, if the tokenizer cannot use the template, or if
            ``template`` is None and the tokenizer has none.
    """
    if template is None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "template must be given if the tokenizer has no chat template: one of "
                f"{', '.join(PRESETS)}, a ChatTemplate or jinja"
            )
    elif isinstance(template, str) and "{" in template:
        tokenizer.chat_template = template
    elif isinstance(template, (str, ChatTemplate)):
        chosen = ChatTemplate(template) if isinstance(template, str) else template
        chosen.set_on(tokenizer)
    else:
        raise TypeError(
            f"template must be a preset's name, a ChatTemplate or jinja, got "
            f"{type(template).__name__}"
        )


def _write(preset: str, form: _Format) -> str:
    """The jinja of a format. Each turn is one expression: an output takes longer than a join."""
    header, closer = form.assistant
    begin = header.rstrip(" ")  # the space is sampled together with the first word
    learned = closer.rstrip() or closer
    parts = [
        "{{- bos_token or '' -}}\n" if form.bos else "",
        _HEAD.replace("PRESET", preset),
        "{%- for message in messages -%}\n",
        "{%- set role = message['role'] -%}\n",
        "{%- set content = message['content'] -%}\n",
        # A key is faster than an attribute, which is looked for in vain first.
        # Two keys are role and content alone. This is the usual case, and a macro takes time.
        "{%- if content is not string or message | length > 2 -%}\n",
        "{%- set content = text_of(message) -%}\n",
        "{%- endif -%}\n",
        "{%- set content = content | trim -%}\n" if form.trim else "",
        '{%- if role == "assistant" -%}\n',
        _output(begin),
        "{%- generation -%}\n",
        _output(f"{header[len(begin) :]}{{content}}{learned}"),
        "{%- endgeneration -%}\n",
        _output(closer[len(learned) :]),
        *_other_roles(preset, form),
        "{%- endif -%}\n",
        "{%- endfor -%}\n",
        f"{{%- if add_generation_prompt -%}}\n{_output(begin)}{{%- endif -%}}",
    ]
    return "".join(parts)


def _other_roles(preset: str, form: _Format) -> list[str]:
    parts = []
    if form.system is None:
        parts += [
            '{%- elif role == "system" and loop.first and loop.length > 1 '
            'and messages[1].role == "user" -%}\n'
        ]
    elif form.system != form.user:
        parts += ['{%- elif role == "system" -%}\n', _turn(form.system)]
    if form.others:
        return [*parts, "{%- else -%}\n", _turn(form.user)]
    parts += ['{%- elif role == "user" -%}\n']
    if form.system is None:
        parts += [_output(form.user[0]), _SYSTEM_FIRST, _output(f"{{content}}{form.user[1]}")]
    else:
        parts += [_turn(form.user)]
    message = f"the {preset} template cannot write a message of this role at this place: "
    return [*parts, f'{{%- else -%}}\n{{{{- raise_exception("{message}" ~ role) -}}}}\n']


def _turn(around: tuple[str, str]) -> str:
    return _output(f"{around[0]}{{content}}{around[1]}")


def _output(text: str) -> str:
    """Jinja that writes a text."""
    names = {_EOS: "eos_token", "{role}": "role", "{content}": "content"}
    pieces = [
        names.get(piece) or json.dumps(piece, ensure_ascii=False)
        for piece in re.split(r"(\0|\{role\}|\{content\})", text)
        if piece
    ]
    return f"{{{{- {' ~ '.join(pieces)} -}}}}\n" if pieces else ""
