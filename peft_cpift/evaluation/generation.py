"""What a model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """The greedy continuation of every prompt of one batch, up to an end token, decoded without special tokens.

    Of the model's own generation settings only the end tokens count: there is no sampling, no beam, no penalty, no
    forced or forbidden token, and no least length.
    """
    # Padded on the left, so that every row's continuation starts at the same column.
    inputs = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    with _only(config, model):
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=config
        )
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a generation: the tokenizer's end of sequence, and the model's own.

    Chat models have several, of which the tokenizer knows one: the end of a turn, or that of the text.
    """
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    return sorted({tokenizer.eos_token_id, *own})


@contextmanager
def _only(config: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """Take away the model's own settings, from which `generate` fills whatever a given configuration leaves open."""
    # The model itself may be inside an adapter's, which hands its settings on.
    own = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    for module in own:
        module.generation_config = config
    try:
        yield
    finally:
        for module, kept in own.items():
            module.generation_config = kept
