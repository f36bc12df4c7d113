"""Shared by the pipeline's tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def fast_collections() -> Iterator[None]:
    """accelerate collects garbage after every training: without this, among all that was imported, half a second."""
    import peft_cpift.pipeline.run  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
