"""Questions about images → a model's greedy answers.

The model is asked what it was asked in training: prompts come from the same `packing.Encoder`, images through
the same processor.
Left out: sampling, and sharing the image among questions about it; every question brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import GenerationConfig, ProcessorMixin

from ..conversations import Conversation, Question
from ..errors import DataError
from ..modeling.generation import stop_token_ids
from ..modeling.parts import bare
from ..packing import Encoder
from ..storage.images import load_image


def answer_questions(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    questions: Sequence[Question | Conversation],
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> list[str]:
    """The model's greedy answer to each question.

    Args:
        model: a LLaVA model, bare or with an adapter, 16, 32 or 4 bit, on its device. Its mode is as before
            afterwards.
        processor: of the stage (or the base) that is asked.
        questions: what to ask. Of a conversation the last answer is asked for; it is not shown, the turns
            before it are.
        max_new_tokens: where an answer is cut if it has not ended by itself.
        batch_size: questions answered at once, padded on the left to the longest.

    Returns:
        One text for each question, in their order, without special tokens and outer whitespace; it may be
        empty.

    Raises:
        DataError: an image cannot be read; the message names the question.
        CheckpointError: the processor's chat template shows no question.
    """
    encoder = Encoder(processor)
    config = _greedy(model, encoder, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        answers = [
            answer
            for begin in range(0, len(questions), batch_size)
            for answer in _answer_batch(model, encoder, questions[begin : begin + batch_size], config)
        ]
    finally:
        model.train(was_training)
    assert len(answers) == len(questions)
    return answers


def _greedy(model: torch.nn.Module, encoder: Encoder, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding; a checkpoint's own settings (Qwen2's repetition penalty, Vicuna's temperature)
    would fill gaps."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, encoder.processor),
        pad_token_id=encoder.pads_with,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
    )


def _answer_batch(
    model: torch.nn.Module,
    encoder: Encoder,
    questions: Sequence[Question | Conversation],
    config: GenerationConfig,
) -> list[str]:
    conversations = [asked.conversation() if isinstance(asked, Question) else asked for asked in questions]
    images = [_load_images(conversation) for conversation in conversations]
    shown = [group for group in images if group]
    pixels, counts = encoder.process_images(shown) if shown else ({}, [])
    remaining = iter(counts)
    prompts = [
        encoder.encode_prompt(conversation.turns[:-1], next(remaining) if group else [], conversation.system)
        for conversation, group in zip(conversations, images, strict=True)
    ]
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), encoder.pads_with)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    tower = bare(model).model.vision_tower
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **pixels}
    inputs = {
        name: tensor.to(tower.device, tower.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    written = model.generate(**inputs, generation_config=config)
    answers = encoder.processor.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _load_images(conversation: Conversation) -> list[Image.Image]:
    try:
        return [load_image(path) for path in conversation.images]
    except DataError as error:
        raise DataError(f"{conversation.source or 'question'} (id {conversation.id}): {error}") from error
