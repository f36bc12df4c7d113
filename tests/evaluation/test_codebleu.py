"""Strategy: without the package, only what is said of that. With it (`pip install 'peft-cpift[code]'`), rows whose
parts are known by hand: equal texts, empty ones, and names that differ, which change n-grams alone.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from peft_cpift import CpiftError
from peft_cpift.evaluation.codebleu import check_codebleu, code_bleu

LANGUAGES = ["c", "c_sharp", "cpp", "go", "java", "javascript", "php", "python", "ruby", "rust"]
CODE = "def add(a):\n    b = a + 1\n    c = b * a\n    return c"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "codebleu", None)
    with pytest.raises(CpiftError, match=r"'codebleu' of task 'code' needs .*: pip install 'peft-cpift\[code\]'"):
        check_codebleu("code", "python")


@pytest.mark.parametrize("error", [TypeError("an integer is required"), ImportError("no tree_sitter_python")])
def test_a_parser_that_does_not_fit(monkeypatch, error):
    def fail(language):
        raise error

    fake = ModuleType("codebleu.utils")
    fake.AVAILABLE_LANGS, fake.get_tree_sitter_language = ["python", "c_sharp"], fail
    monkeypatch.setitem(sys.modules, "codebleu", ModuleType("codebleu"))
    monkeypatch.setitem(sys.modules, "codebleu.utils", fake)
    with pytest.raises(CpiftError, match=f"tree_sitter_python \\({error}\\): install .*'peft-cpift\\[code\\]'"):
        check_codebleu("code", "python")
    with pytest.raises(CpiftError, match=r"task 'code': .* language 'csharp': did you mean 'c_sharp'"):
        check_codebleu("code", "csharp")
    with pytest.raises(CpiftError, match="language 'lisp': use one of python, c_sharp"):
        check_codebleu("code", "lisp")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_of_the_package_has_a_parser_that_fits(language):
    pytest.importorskip("codebleu")
    check_codebleu("code", language)


def test_scores():
    pytest.importorskip("codebleu")
    assert code_bleu([CODE, CODE], [CODE, CODE], "python") == pytest.approx(1.0)
    renamed = CODE.replace("b", "x")
    assert 0.5 < code_bleu([renamed], [CODE], "python") < 1  # syntax and data flow are those of the reference
    assert code_bleu(["return 1"], [CODE], "python") < code_bleu([renamed], [CODE], "python")
    # All rows together: the mean of rows would be the same for both.
    assert code_bleu(["", CODE], [CODE, CODE], "python") < 1


def test_nothing_is_worth_nothing():
    """The package's own total is 0.25 here: it takes a data flow of 0 for one that is not there."""
    pytest.importorskip("codebleu")
    assert code_bleu([""], [CODE], "python") == pytest.approx(0.0, abs=1e-3)


def test_a_data_flow_that_is_missed_counts():
    codebleu = pytest.importorskip("codebleu")
    parts = codebleu.calc_codebleu([[CODE]], ["return 1"], "python")
    assert parts["dataflow_match_score"] == 0
    four = parts["ngram_match_score"] + parts["weighted_ngram_match_score"] + parts["syntax_match_score"]
    assert code_bleu(["return 1"], [CODE], "python") == pytest.approx(four / 4)


def test_references_without_data_flow_are_scored_by_the_other_parts():
    codebleu = pytest.importorskip("codebleu")
    references, predictions = ["return 1 + 2\nreturn 3"], ["return 1 + 2\nreturn"]
    parts = codebleu.calc_codebleu([[text] for text in references], predictions, "python")
    assert parts["dataflow_match_score"] == 0
    three = parts["ngram_match_score"] + parts["weighted_ngram_match_score"] + parts["syntax_match_score"]
    assert code_bleu(predictions, references, "python") == pytest.approx(three / 3)
    assert code_bleu(references, references, "python") == pytest.approx(1.0)
