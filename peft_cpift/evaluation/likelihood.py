"""How likely a model finds given texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    end: bool = True,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of completions given their prompts, one batch.

    Args:
        prompts, completions: B strings each. Tokens are split between them as in TRL's training: a prompt's length in
            tokens is that of the prompt alone. With the prompt "" the completion is plain text: all its tokens count
            but a first one that nothing precedes, not even the beginning-of-sequence token of some tokenizers.
        end: append the end-of-sequence token to the completion, as TRL does in training.
        max_length: leave out what is beyond this many tokens, prompt included.

    Returns:
        Sums in nats (B, float32), and the numbers of tokens summed over (B, int64).
    """
    ids, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        full = tokenizer(prompt + completion).input_ids
        if end and full[-1:] != [tokenizer.eos_token_id]:
            full = [*full, tokenizer.eos_token_id]
        start = len(tokenizer(prompt).input_ids)
        ids.append(torch.tensor(full[:max_length]))
        labels.append(torch.tensor(([-100] * start + full[start:])[:max_length]))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad(ids, batch_first=True, padding_value=0).to(model.device)
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
    targets = pad(labels, batch_first=True, padding_value=-100)[:, 1:].to(model.device)
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    scored = targets != -100
    # Row by row, and only what counts: a large vocabulary times all positions would not fit in float32.
    losses = [
        cross_entropy(row[kept].float(), target[kept], reduction="sum")
        for row, target, kept in zip(logits, targets, scored, strict=True)
    ]
    return torch.stack(losses).cpu(), scored.sum(dim=1).cpu()
