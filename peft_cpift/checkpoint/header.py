"""The header of a safetensors file: where which tensor lies.

The library maps a whole file into memory to read it, which fails where address space is limited, and gives no places;
so the header, a length and a JSON object, is read here, and checked as the library checks it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from peft_cpift.errors import CpiftError

MAX_BYTES = 25_000_000
"""Longest header that is read, enough for 100,000 tensors; parsed, hostile ones can take 25 times as much memory."""
MAX_SIZE = 1 << 63

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors' names of the dtypes whose values are numbers; the packed and the scaled ones are left out."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    """In bytes, from the beginning of the file."""


def read_header(file: Path) -> dict[str, Place]:
    """The places of all tensors in a file.

    Raises:
        CpiftError: the file cannot be read or is damaged, or a tensor's dtype has no plain numbers as values.
    """
    try:
        header, length, size = _read_json(file)
        header.pop("__metadata__", None)
        places = {name: _read_place(name, entry, file, 8 + length) for name, entry in header.items()}
        _check_complete(places, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CpiftError):
            raise
        raise CpiftError(f"cannot read {file}: {str(error)[:300]}") from error
    return places


def read_metadata(file: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors; empty if that is nothing.

    Raises:
        CpiftError: the file cannot be read or is damaged.
    """
    try:
        metadata = _read_json(file)[0].get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no object of texts")
    except (OSError, ValueError, RecursionError) as error:
        raise CpiftError(f"cannot read {file}: {str(error)[:300]}") from error
    return metadata


def make_header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file with these tensors, (shape, dtype) by name, one after another."""
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (shape, dtype) in tensors.items():
        if name in header:
            raise CpiftError(f"a tensor named '{name}' cannot be saved: the format keeps that name for itself")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's padding, which keeps what follows aligned
    return len(text).to_bytes(8, "little") + text


def _read_json(file: Path) -> tuple[dict, int, int]:
    """The header of a file, its length, and the size of the file, in bytes."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = os.fstat(stream.fileno()).st_size
        if not 2 <= length <= min(size - 8, MAX_BYTES):
            raise ValueError(f"its header cannot have {length} bytes")
        header = json.loads(stream.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, length, size


def _read_place(name: str, entry: Mapping, file: Path, begin: int) -> Place:
    name.encode()  # half a surrogate pair is no text
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"the dtype of '{name}' is no name")
    if dtype not in DTYPES:
        raise CpiftError(
            f"tensor '{name}' in {file} has dtype {dtype}, whose values are not plain numbers: save the model in "
            "another dtype"
        )
    if len(shape) > 64 or not all(type(number) is int and 0 <= number < MAX_SIZE for number in (*shape, start, stop)):
        raise ValueError(f"shape and place of '{name}' are not sizes")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"'{name}' of shape {shape} and dtype {dtype} has {stop - start} bytes")
    return Place(DTYPES[dtype], tuple(shape), file, begin + start)


def _check_complete(places: Mapping[str, Place], begin: int, size: int) -> None:
    """Raise ValueError if tensors overlap, leave gaps, or do not end where the file does."""
    end = begin
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if place.offset != end:
            raise ValueError(f"'{name}' does not begin where the tensor before it ends")
        end += math.prod(place.shape) * place.dtype.itemsize
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
