"""What a model answers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The greedy continuation of every prompt of one batch, up to an end token, decoded without special tokens."""
    # Padded on the left, so that every row's continuation starts at the same column.
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation: the tokenizer's end of sequence, and the model's own.

    Chat models have several, of which the tokenizer knows one: the end of a turn, or that of the text.
    """
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    return sorted({tokenizer.eos_token_id, *own})
