"""Train the demonstration's base model from nothing.

    python benchmarks/train_demo_model.py --output peft_cpift/demo/tiny-llama

A Llama of 0.4 million weights learns operator calls on digits, one character a token. Its lessons are six operators
that no task uses (copy, rotate, first, last, largest, smallest) and easier forms of the five tasks: shorter strings,
smaller numbers. One lesson in a thousand is a task at its full size. So the model knows the digits and the form of a
call, and each task in part: it leaves something to fine-tune, and something to forget.

Lessons are drawn without regard to any test set. Those of `add` cover about a fifth of the task's 8,100 prompts, so
the base model's score there is partly memory; the other tasks have too many prompts for that to matter.

The seed fixes the lessons and the starting weights. On one thread of one machine the outcome is the same to the bit;
another processor or version of PyTorch rounds differently, and gives another model of like skill.
"""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peft_cpift.demo.tasks import TASKS, add, call, compare, draw_digits, make_examples, parity, reverse, sort

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FULL_SIZE_SHARE = 0.001
BATCH_SIZE = 64


def copy(digits: str) -> str:
    """The digits as they are."""
    return digits


def rotate(digits: str) -> str:
    """The digits with the first one moved to the end."""
    return digits[1:] + digits[:1]


def first(digits: str) -> str:
    """The first digit."""
    return digits[0]


def last(digits: str) -> str:
    """The last digit."""
    return digits[-1]


def largest(digits: str) -> str:
    """The largest digit."""
    return max(digits)


def smallest(digits: str) -> str:
    """The smallest digit."""
    return min(digits)


def draw_lesson(rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion) pair of the pre-training mix."""
    if rng.random() < FULL_SIZE_SHARE:
        return TASKS[rng.choice(list(TASKS))](rng)
    operator = rng.choice([copy, rotate, first, last, largest, smallest, add, reverse, sort, parity, compare])
    if operator is add:
        # One of the two numbers, on either side, is below 20: carrying is learned, adding tens hardly.
        numbers = [str(rng.randint(0, 99)), str(rng.randint(0, 19))]
        rng.shuffle(numbers)
        return call(add, *numbers)
    if operator is compare:
        length = rng.randint(1, 2)
        return call(compare, draw_digits(rng, length), draw_digits(rng, length))
    longest = 4 if operator in (reverse, sort, parity) else 5
    return call(operator, draw_digits(rng, rng.randint(1, longest)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character; nothing is added around a text, nothing between its tokens."""
    vocabulary = [*SPECIAL_TOKENS.values(), *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, set to answer greedily."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    return model


def make_batch(tokenizer: PreTrainedTokenizerFast, lessons: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, each (lessons, tokens), padded on the right; only the answers are scored."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in lessons]
    answers = [[*tokenizer.encode(completion), tokenizer.eos_token_id] for _, completion in lessons]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(lessons), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int, report: int) -> None:
    """Train in place with AdamW, one cycle of the learning rate, and fresh lessons in every batch."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**make_batch(tokenizer, [draw_lesson(rng) for _ in range(BATCH_SIZE)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % report == 0 or step == steps:
            scores = "  ".join(f"{task} {score(model, tokenizer, task):.3f}" for task in TASKS)
            print(f"step {step}  loss {loss.item():.3f}  {scores}", flush=True)


@torch.no_grad()
def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, count: int = 200) -> float:
    """The share, 0 to 1, of `count` full-size prompts that the model answers exactly."""
    was_training = model.training
    model.eval()
    rows = make_examples(task, count, seed=0)
    inputs = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    answers = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    texts = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return sum(text == row["completion"] for text, row in zip(texts, rows, strict=True)) / count


def main() -> None:
    """Train the model and write it, with its tokenizer, into one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=3000, help=f"batches of {BATCH_SIZE} lessons (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the lessons and the starting weights (%(default)s)")
    parser.add_argument("--report", type=int, default=500, help="steps between two lines of scores (%(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    set_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, steps=arguments.steps, seed=arguments.seed, report=arguments.report)
    model.save_pretrained(arguments.output)
    # A tokenizer that has padded a batch would save that setting too.
    build_tokenizer().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
