"""The base's words: tokenizer, chat template and the sentences it reads."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from scene import INSTRUCTIONS, Scene
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

# LLaVA-1.5's manner of speaking: `<s>USER: <image>\nquestion ASSISTANT: answer</s>`. Images come first; an
# answer begins with a space, so that its first word is one token.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role != 'assistant' -%}
        {{- 'USER: ' if message.role == 'user' else '' -}}
        {%- if message.content is string -%}
            {{- message.content | trim -}}
        {%- else -%}
            {%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
            {%- for part in message.content if part.type == 'text' -%}{{- part.text | trim -}}{%- endfor -%}
        {%- endif -%}
        {{- ' ' -}}
    {%- else -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
            {%- if message.content is string -%}
                {{- ' ' + message.content | trim + eos_token -}}
            {%- else -%}
                {%- for part in message.content if part.type == 'text' -%}{{- ' ' + part.text | trim -}}{%- endfor -%}
                {{- eos_token -}}
            {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""  # noqa: E501 - the template's own lines


# -------------------------------------------------------------------------------------------------- processor
# and model


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, and every word of `texts` with the space before it is one
    token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,  # an upper bound: merging ends when every word is whole
        min_frequency=1,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def scene_texts(scenes: Iterable[Scene]) -> Iterable[str]:
    """All that the scenes say, as the chat template has it: requests after `USER:`, answers after a space."""
    for scene in scenes:
        turns = chain(((question.question, question.answer) for question in scene.questions), scene.dialogue)
        for request, answer in chain(turns, ((instruction, scene.caption) for instruction in INSTRUCTIONS)):
            yield f"USER: {request} ASSISTANT: {answer}"
            yield request  # after the image's line break no space comes before it
        yield f"USER: Report: {scene.caption}"
