"""Likeness of generated code to given code, by the package `codebleu`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from peft_cpift.errors import CpiftError


def check_codebleu(task: str, language: str) -> None:
    """Check that CodeBLEU can be computed for a language.

    Args:
        task: its name, for the message.
        language: as the package `codebleu` calls it, such as `python` or `c_sharp`.

    Raises:
        CpiftError: the package is not installed, does not know the language, or cannot use the language's parser.
    """
    try:
        from codebleu.utils import AVAILABLE_LANGS, get_tree_sitter_language
    except ImportError as error:
        raise CpiftError(
            f"metric 'codebleu' of task '{task}' needs the package codebleu: pip install 'peft-cpift[code]'"
        ) from error
    if language not in AVAILABLE_LANGS:
        near = difflib.get_close_matches(language, AVAILABLE_LANGS, n=1)
        cure = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(AVAILABLE_LANGS)}"
        raise CpiftError(f"task '{task}': codebleu does not know the language '{language}': {cure}")
    try:
        get_tree_sitter_language(language)
    # TypeError: a parser made for a newer tree-sitter than codebleu's.
    except (ImportError, TypeError) as error:
        raise CpiftError(
            f"task '{task}': codebleu cannot use the parser tree_sitter_{language} ({error}): install the versions "
            "that go together, pip install 'peft-cpift[code]'"
        ) from error


def code_bleu(predictions: Sequence[str], references: Sequence[str], language: str) -> float:
    """CodeBLEU of predicted code, over all rows together, in [0, 1].

    The mean of the four parts that the package computes: matches of n-grams, of n-grams with keywords weighted, of
    syntax trees and of data flow. Where no reference has any data flow, the mean of the other three; the package's own
    total counts a data flow of 0 as 1, also where the references have one that no prediction meets.

    Args:
        predictions, references: N strings each, N >= 1.
        language: one that `check_codebleu` accepts.

    Source: CodeBLEU (arXiv 2009.10297), parts weighted equally.
    """
    from codebleu import calc_codebleu
    from codebleu.dataflow_match import corpus_dataflow_match

    parts = calc_codebleu([[text] for text in references], list(predictions), language)
    names = ["ngram_match_score", "weighted_ngram_match_score", "syntax_match_score"]
    if parts["dataflow_match_score"] or corpus_dataflow_match([[text] for text in references], references, language):
        names.append("dataflow_match_score")
    return sum(parts[name] for name in names) / len(names)
