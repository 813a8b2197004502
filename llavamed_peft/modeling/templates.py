"""How a checkpoint writes a conversation: its chat template, read by rendering, completed where necessary.

A template is a program; we find out what it does by running it on probes, never from its text or the model's
name. Training needs two things of it. The text before an answer must be the template's generation prompt,
since the model will see that when it is asked; LLaVA-OneVision's own template writes assistant turns
differently. And an answer must end in a stop token; LLaVA-1.5's template ends it with a space.
`read_template` finds out both. `ChatFormat.pieces` writes a conversation so that both hold, and
`ChatFormat.template` is a template that gives the same text with the stock `apply_chat_template`: the
checkpoint's own if that does it already, else the checkpoint's own inside a few more lines. A template that
writes today's date gets a fixed one, or a run resumed tomorrow would see another prompt.
`packing/` makes the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import ProcessorMixin

from ..conversations import IMAGE_MARKER, Turn
from ..errors import CheckpointError, DataError

Message = dict[str, Any]

_QUESTION, _ANSWER = "Qz1 what is seen?", "Az1 a probe"
_DAY = datetime(2026, 1, 1)  # what a template that asks for today's date gets
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1""")
_FROZEN = "{# the date of training: #}{% macro strftime_now(format) %}"
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")

# Runs the checkpoint's own template on the messages up to each answer, as generation prompt, and writes the
# answer after it.
_WRAPPER = """\
{%- macro checkpoint_template(messages, add_generation_prompt) %}
@ORIGINAL@{% endmacro -%}
{%- set seen = namespace(characters=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- checkpoint_template(messages[:loop.index0], true)[seen.characters:] -}}
{%- generation -%}
{{- @LEAD@ -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}\
{%- endfor -%}{%- endif -%}
{{- @STOP@ -}}
{%- endgeneration -%}
{{- @TAIL@ -}}
{%- set seen.characters = checkpoint_template(messages[:loop.index], false)|length -%}
{%- endif -%}
{%- endfor -%}
{{- checkpoint_template(messages, add_generation_prompt|default(false))[seen.characters:] -}}
"""
_HEAD, _, _REST = _WRAPPER.partition("@ORIGINAL@")
_WRAPPED = re.compile(re.escape(_HEAD) + "(.*)" + re.escape(_REST.partition("@LEAD@")[0]) + ".*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a conversation's text, and whether the model learns to write it."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a checkpoint's chat template does around an answer.

    Args:
        original: the checkpoint's own template.
        lead: what comes between the generation prompt and the answer's first word (LLaVA-1.5: a space).
        stop: what ends the answer, the stop token included; the model learns it.
        tail: what the template writes after the stop (ChatML: a line break).
        plain: the template wants a message's content as a string with `<image>` in it, not as a list of
            parts.
        template: a template whose rendering is the joined `pieces`, for the stage folder.
    """

    original: str
    lead: str
    stop: str
    tail: str
    plain: bool
    template: str

    def pieces(self, processor: ProcessorMixin, turns: Sequence[Turn], system: str = "") -> list[Piece]:
        """A conversation's turns as alternating prompts and answers, up to the last stop.

        The prompt before the first answer is byte for byte the template's generation prompt.

        Args:
            system: the conversation's own system message; `""`: what the template writes without one.

        Raises:
            DataError: the template refuses these turns, shows no system message, or rewrites an earlier turn
                once there is a later one.
        """
        messages = to_messages(turns, self.plain, system)
        offset = len(messages) - len(turns)  # 1 for a system message
        pieces: list[Piece] = []
        written = ""  # by the checkpoint's template, up to here
        for position in range(1, len(turns), 2):
            try:
                prompt = _render(
                    processor, self.original, messages[: position + offset], add_generation_prompt=True
                )
                if pieces:
                    written = _render(processor, self.original, messages[: position - 1 + offset])
            except TemplateError as error:
                raise RefusedTurns(
                    f"The chat template refuses {'turn ' + str(position) if pieces else 'the conversation'} "
                    f"({error}); wanted turns that it takes. Leave the row out, or split it into "
                    "conversations of one question each."
                ) from error
            if not prompt.startswith(written):
                raise DataError(
                    f"The chat template renders the turns before turn {position} as "
                    f"{_ending(written, prompt)!r}, and with that turn as {_ending(prompt, written)!r}; "
                    "wanted the same. It rewrites earlier turns, so later answers cannot be trained on. "
                    "Leave the row out, or split it into conversations of one question each."
                )
            if system and not pieces and system not in prompt:
                raise DataError(
                    f"The chat template shows nothing of the system message {system!r}; wanted a template "
                    "with a place for it. Leave the message out, or put it before the question."
                )
            pieces.append(Piece((self.tail if pieces else "") + prompt[len(written) :], supervised=False))
            answer = turns[position]
            pieces.append(Piece(self.lead + answer.text + self.stop, answer.supervised))
        return pieces

    def stop_tokens(self, processor: ProcessorMixin) -> dict[str, int]:
        """The special tokens that end an answer, which the model learns to write: token → id."""
        tokenizer = processor.tokenizer
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = tokenizer(self.stop, add_special_tokens=False)["input_ids"]
        return {tokenizer.convert_ids_to_tokens(number): number for number in ids if number in special}


class RefusedTurns(DataError):
    """The template itself raises an error for a conversation."""


def to_messages(turns: Sequence[Turn], plain: bool = False, system: str = "") -> list[Message]:
    """Turns as the messages that a chat template takes.

    Markers before or after a turn's words become images before them, and the template decides where it shows
    them; markers between words keep their place. A system message comes first.
    """
    messages: list[Message] = []
    if system:
        content = system if plain else [{"type": "text", "text": system}]
        messages.append({"role": "system", "content": content})
    for turn in turns:
        words = [part.strip() for part in turn.text.split(IMAGE_MARKER)]
        images: list[dict[str, str]] = [{"type": "image"}] * turn.image_count
        if sum(map(bool, words)) <= 1:
            content = [*images, *({"type": "text", "text": part} for part in words if part)]
        else:
            content = [{"type": "text", "text": words[0]}] if words[0] else []
            for part in words[1:]:
                content += [{"type": "image"}] + ([{"type": "text", "text": part}] if part else [])
        if plain:
            text = "\n".join(part.get("text", IMAGE_MARKER) for part in content)
            messages.append({"role": turn.role, "content": text})
        else:
            messages.append({"role": turn.role, "content": content})
    return messages


def read_template(processor: ProcessorMixin) -> ChatFormat:
    """Find out by rendering what the checkpoint's chat template does.

    Raises:
        CheckpointError: there is no template, it does not show the image or the words, or there is no EOS
            token.
    """
    original = _with_fixed_date(_template_text(processor))
    special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    special -= {processor.image_token}
    question, answer = (Turn("user", f"{IMAGE_MARKER}\n{_QUESTION}"), Turn("assistant", _ANSWER))

    for plain in (False, True):
        messages = to_messages([question, answer], plain)
        try:
            prompt = _render(processor, original, messages[:1], add_generation_prompt=True)
        except (TypeError, TemplateError) as error:  # it does not take content in this form
            prompt = f"{type(error).__name__}: {error}"
        asked = prompt.count(_QUESTION) == 1 and prompt.count(processor.image_token) == 1
        if asked:
            break
    if not asked:
        raise CheckpointError(
            f"The chat template shows a question about one image as {prompt!r}; wanted the question once and "
            f"one {processor.image_token}. Give the processor a template of a LLaVA checkpoint."
        )
    try:
        exchange = _render(processor, original, messages)
    except TemplateError as error:
        raise CheckpointError(f"The chat template refuses a question with its answer: {error}") from error
    if exchange.count(_ANSWER) != 1:
        raise CheckpointError(
            f"The chat template shows the answer {_ANSWER!r} as {exchange!r}; wanted its words once, "
            "unchanged."
        )
    before, after = exchange.split(_ANSWER)
    continues = before.startswith(prompt)
    lead = before[len(prompt) :] if continues else ""
    stops = [after.index(token) + len(token) for token in special if token in after]
    if stops:
        stop, tail = after[: min(stops)], after[min(stops) :]
    elif processor.tokenizer.eos_token is None:
        raise CheckpointError(
            "The chat template ends no answer and the tokenizer has no EOS token; wanted one of the two."
        )
    else:
        stop, tail = processor.tokenizer.eos_token, after if after.strip() else ""
    template = original if continues and stops else _wrap(original, lead, stop, tail)
    chat_format = ChatFormat(original, lead, stop, tail, plain, template)
    _check_template(processor, chat_format, [question, answer])
    return chat_format


def _template_text(processor: ProcessorMixin) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template and (wrapped := _WRAPPED.fullmatch(template)):
        # An earlier stage's; a wrapper around a wrapper would get slower with each stage
        template = wrapped[1]
    if not template:
        raise CheckpointError(
            "The checkpoint has no chat template; wanted one in chat_template.jinja, processor_config.json "
            "or tokenizer_config.json. Set processor.chat_template, for example to that of the llava-hf "
            "checkpoint it came from."
        )
    return str(template)


def _with_fixed_date(template: str) -> str:
    """The template, with a macro of the library's name in front of it where it asks for today's date.

    Raises:
        CheckpointError: it asks for the date in a format that is not written out.
    """
    formats = dict.fromkeys(found[1] for found in _DATE_CALL.findall(template))
    if "strftime_now(" not in template or _FROZEN in template:
        return template
    if template.count("strftime_now(") > len(_DATE_CALL.findall(template)):
        raise CheckpointError(
            "The chat template asks for today's date in a format that it computes, so it cannot be fixed; "
            "wanted strftime_now('…') with the format written out, or no date. A run that is resumed "
            "tomorrow would see another prompt."
        )
    dates = "".join(
        f"{{% {'elif' if number else 'if'} format == {written!r} %}}{_DAY.strftime(written)}"
        for number, written in enumerate(formats)
    )
    # The library drops the line break after a block, so the template begins as it did.
    return f"{_FROZEN}{dates}{{% endif %}}{{% endmacro %}}\n{template}"


def _ending(text: str, other: str) -> str:
    """What a text says from a little before the place where it differs from another."""
    pairs = zip(text, other, strict=False)
    same = next((place for place, (one, another) in enumerate(pairs) if one != another), 0)
    return text[max(0, same - 20) : same + 60]


def _render(
    processor: ProcessorMixin, template: str, messages: list[Message], add_generation_prompt: bool = False
) -> str:
    return processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=add_generation_prompt
    )


def _wrap(original: str, lead: str, stop: str, tail: str) -> str:
    # Inside the macro, generation markers would be counted from the wrong place. A comment in their place
    # keeps the dashes, which strip whitespace. Jinja drops one line break at the end of a template.
    inert = _GENERATION_TAG.sub(r"{#\1 \2#}", original).removesuffix("\n")
    filled = _WRAPPER
    for name, value in (("LEAD", lead), ("STOP", stop), ("TAIL", tail)):
        filled = filled.replace(f"@{name}@", repr(value))
    return filled.replace("@ORIGINAL@", inert)


def _check_template(processor: ProcessorMixin, chat_format: ChatFormat, exchange: list[Turn]) -> None:
    """Check that the stage's template gives what training sees: two turns, four, and two without an image.

    A template may refuse the latter two: then rows like them will be rejected.
    """
    again = [Turn("user", f"And {_QUESTION}"), Turn("assistant", f"{_ANSWER}, twice")]
    for turns in (exchange, [*exchange, *again], again):
        try:
            pieces = chat_format.pieces(processor, turns)
        except RefusedTurns as error:
            if turns is exchange:
                raise CheckpointError(str(error)) from error
            continue
        except DataError as error:
            raise CheckpointError(str(error)) from error
        trained = "".join(piece.text for piece in pieces) + chat_format.tail
        messages = to_messages(turns, chat_format.plain)
        if _render(processor, chat_format.template, messages) != trained:
            raise CheckpointError(
                f"The chat template renders {_render(processor, chat_format.template, messages)!r}, training "
                f"would see {trained!r}; wanted equal texts. Give the processor a template that treats every "
                "turn alike."
            )
