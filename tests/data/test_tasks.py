"""Strategy: write small files, load them, and compare every row with what was written; then break the files."""

from __future__ import annotations

import json
import shutil
import string
import time

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from peft_cpift import CpiftError
from peft_cpift.data import sources
from peft_cpift.data import tasks as rows
from peft_cpift.evaluation.evaluate import completion_losses
from peft_cpift.recipe.reading import parse_recipe

CHATML = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ end }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


# For a model that knows few characters: the user is ?, the assistant a.
TERSE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ 'a' if m.role == 'assistant' else '?' }}{{ m.content }}END"
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}]


def load(tree, tokenizer=None):
    return rows.load_tasks(parse_recipe(tree), tokenizer or joining_tokenizer())


def write_rows(folder, tasks):
    """Files of several tasks with the same rows for training and scoring, and the tasks that name them."""
    for name, (own, _) in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    files = {name: {key: str(folder / f"{name}.jsonl") for key in ("train", "test")} for name in tasks}
    return {name: {"files": files[name], **task} for name, (_, task) in tasks.items()}


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_rows_are_rendered_into_the_prompt_template(tree, task_folder):
    loaded = load({**tree, "prompt": "Q: {{ prompt }} A:"})
    written = [json.loads(line) for line in (task_folder / "sums_train.jsonl").read_text().splitlines()]
    assert loaded["sums"].train["prompt"] == [f"Q: {row['prompt']} A:" for row in written]
    assert loaded["sums"].train["completion"] == [row["completion"] for row in written]
    assert loaded["sums"].train.column_names == ["prompt", "completion"]


def test_samples_are_distinct_rows_and_follow_the_seed(tree):
    first, same, other = (load({**tree, "seed": s})["letters"].train[:] for s in (1, 1, 2))
    assert len(first["prompt"]) == 16
    assert first == same
    assert first != other


def test_hub_data_is_named_split_and_rendered_by_its_columns(tree, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return Dataset.from_list([{"question": "1+1?", "turns": [{"text": "2"}]}])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    hub = {"name": "org/set", "subset": "main", "train": "train[:90%]", "test": "validation"}
    task = {"hub": hub, "prompt": "{{ question }}", "completion": "{{ turns[0].text }}"}
    tree |= {"data": None, "tasks": {"a": task, "b": task}}
    loaded = load(tree)
    assert asked[:2] == [("org/set", "main", "train[:90%]", None), ("org/set", "main", "validation", None)]
    assert loaded["a"].train[:] == {"prompt": ["1+1?"], "completion": ["2"]}


def test_calibration_sets_are_equally_large_parts_of_the_training_rows(tree):
    data = load(tree)
    sets = rows.calibration_sets(data, 0.25, 0, joining_tokenizer(), None)
    assert {name: len(part) for name, part in sets.items()} == {"sums": 5, "letters": 5, "larger": 5}  # 21 / 4
    for name, part in sets.items():
        pairs = set(zip(data[name].train["prompt"], data[name].train["completion"], strict=True))
        assert set(zip(part["prompt"], part["completion"], strict=True)) <= pairs


def test_a_scarce_task_gives_all_it_has_and_leaves_the_others_calibration_sets_large(tree, tmp_path):
    many, few = ([{"prompt": "?", "completion": str(n)} for n in range(count)] for count in (40, 5))
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (many, {}), "b": (few, {}), "c": (many[:33], {})})}
    sets = rows.calibration_sets(load(tree), 0.5, 1, joining_tokenizer(), None)
    assert {name: len(part) for name, part in sets.items()} == {"a": 13, "b": 5, "c": 13}  # half of 26
    assert set(sets["b"]["completion"]) == set("01234")


def test_calibration_sets_hold_only_rows_that_training_keeps(tree, tmp_path):
    own = [{"prompt": "1+" * n, "completion": str(n)} for n in range(1, 21)]
    short = [{"prompt": "?", "completion": str(n)} for n in range(20)]
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (own, {}), "b": (short, {})})}
    data = load(tree)
    # 2, 4 and 6 tokens are shorter than 7, and leave room.
    for fraction, expected in ((0.1, 2), (0.5, 3)):
        sets = rows.calibration_sets(data, fraction, 1, joining_tokenizer(), 7)
        assert [len(part) for part in sets.values()] == [expected, 20 * fraction]
        assert set(sets["a"]["completion"]) <= {"1", "2", "3"}
        assert len(set(sets["a"]["completion"])) == expected


def test_held_out_rows_that_are_trained_on_are_told(tree, tmp_path):
    own = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(6)]
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (own, {}), "b": (own[:2], {})})}
    (tmp_path / "apart.jsonl").write_text(json.dumps({"prompt": "9+1=", "completion": "10"}) + "\n")
    tree["tasks"]["b"]["files"]["test"] = str(tmp_path / "apart.jsonl")
    said = [text.partition(":")[0] for text in rows.check_held_out(load(tree))]
    assert said == [
        "6 of 6 rows that task 'a' is scored on are among those that task 'a' is trained on",
        "2 of 6 rows that task 'a' is scored on are among those that task 'b' is trained on",
    ]


def test_rows_that_are_cut_are_told(tree, tmp_path):
    own = [{"prompt": "?" * n, "completion": "abc"} for n in range(1, 11)]
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (own, {}), "b": (PAIRS, {})})}
    tree["evaluation"] = {"max_length": 12}
    recipe, data = parse_recipe(tree), load(tree)
    # With their end rows have 5 to 14 tokens.
    assert rows.check_cuts(recipe, data, joining_tokenizer(), 8) == [
        "6 of 10 training rows of task 'a' are longer than training.max_length (8) and lose their end; 3 of them, "
        "whose completion begins beyond it, are left out",
        "2 of 10 held-out rows of task 'a' are longer than evaluation.max_length (12) and lose their end; 0 of them, "
        "whose completion begins beyond it, have no part in the loss",
    ]
    assert len(rows.check_cuts(recipe, data, joining_tokenizer(), None)) == 1
    assert [rows.count_begun(data["a"].test, joining_tokenizer(), limit) for limit in (None, 8, 2)] == [10, 7, 1]


def test_rows_beyond_the_model_s_positions_are_told(tree, tmp_path):
    own = [{"prompt": "?" * n, "completion": "abc"} for n in range(1, 11)]
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (own, {}), "b": (PAIRS, {})})}
    tree["evaluation"] = {"max_length": 12}
    recipe = parse_recipe(tree)
    limits = (recipe, load(tree), joining_tokenizer())
    # With their end rows have 5 to 14 tokens, of which 12 of a held-out one are read.
    told = "rows of task 'a' have up to {} tokens, but '{}' has {} positions: set {}.max_length to {} at most"
    assert rows.check_positions(*limits, 13, 11) == [
        told.format(13, recipe.model, 11, "training", 11),
        told.format(12, recipe.model, 11, "evaluation", 11),
    ]
    assert rows.check_positions(*limits, None, 13) == [told.format(14, recipe.model, 13, "training", 13)]
    assert rows.check_positions(*limits, None, 14) == []
    assert rows.check_positions(*limits, 8, 11) == [told.format(12, recipe.model, 11, "evaluation", 11)]
    assert rows.check_positions(*limits, None, None) == []


def test_fewer_rows_than_asked_for_are_told(tree):
    tree["tasks"] = {"sums": {"train_samples": 25}, "letters": {}}
    with pytest.warns(UserWarning, match="the train data of task 'sums' has 24 rows, and not the 25 asked for"):
        load(tree)


def test_lengths_are_those_of_the_rows_that_training_keeps():
    data = Dataset.from_list([{"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "b"}])
    assert rows.training_lengths(data, joining_tokenizer(), None) == [6, 3]
    assert rows.training_lengths(data, joining_tokenizer(), 4) == [4, 3]
    assert rows.training_lengths(data, joining_tokenizer(), 3) == [3]


def test_limits_that_leave_no_completion_are_named(tree):
    recipe = parse_recipe(tree)
    data = rows.load_tasks(recipe, joining_tokenizer())
    with pytest.raises(CpiftError, match=r"train data of task 'sums' begins within training\.max_length=4: raise it"):
        rows.check_tokens(recipe, data, joining_tokenizer(), 4)
    recipe.evaluation.max_length = 4
    with pytest.raises(CpiftError, match=r"test data of task 'sums' begins within evaluation\.max_length=4: raise it"):
        rows.check_tokens(recipe, data, joining_tokenizer(), None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ prompt + 5 }}", "row 0 .* does not fit"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ other }}", "'other' is"),
    ],
)
def test_templates_that_do_not_fit_their_rows_are_named(tree, monkeypatch, template, message):
    monkeypatch.setattr(
        sources, "load_dataset", lambda *a, **k: Dataset.from_list([{"prompt": "a", "completion": "b"}])
    )
    tree |= {"data": None, "tasks": {name: {"hub": {"name": "x"}, "prompt": template} for name in "ab"}}
    with pytest.raises(CpiftError, match=message):
        load(tree)


def joining_tokenizer(*joined: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that makes one token of each of the given pairs."""
    characters = sorted(set(string.printable))
    vocabulary = {token: i for i, token in enumerate([*characters, *joined])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(p) for p in joined]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_prompt_that_the_tokenizer_joins_with_its_completion_is_named(tree, task_folder):
    recipe = parse_recipe({**tree, "prompt": "{{ prompt }} "})
    data = rows.load_tasks(recipe, joining_tokenizer())
    rows.check_tokens(recipe, data, joining_tokenizer("= "), 64)  # inside the prompt: no harm
    joined = " " + data["letters"].train["completion"][5]
    first = data["letters"].train["completion"][:].index(joined[1])
    row = {"prompt": data["letters"].train["prompt"][first].rstrip(), "completion": joined[1]}
    stored = (task_folder / "letters_train.jsonl").read_text().splitlines()
    number = [json.loads(line) for line in stored].index(row)  # and not its place in the sample
    assert number != first
    with pytest.raises(CpiftError, match=f"row {number} of the train data of task 'letters': .* in '{joined}'; end"):
        rows.check_tokens(recipe, data, joining_tokenizer(joined), 64)


def test_choices_are_checked_too(tree):
    tree["tasks"]["larger"]["choices"] = ["a", "b", "z"]
    recipe = parse_recipe({**tree, "prompt": "{{ prompt }} "})
    with pytest.raises(CpiftError, match=r"row \d of the test data of task 'larger': .* in ' z'"):
        rows.check_tokens(recipe, rows.load_tasks(recipe, joining_tokenizer()), joining_tokenizer(" z"), 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("{not json\n", "is not JSON lines"),
        ("\n\n", "is not JSON lines"),
        ('{"prompt": "a", "completion": null}\n', "row 0 of the train data of task 'sums', .* is null"),
        ('{"prompt": "a"}\n', "row 0 of the train data of task 'sums', .* 'completion' is undefined"),
        (
            '{"question": "1", "completion": "2"}\n',
            r"task 'sums', .* does not fit its template: 'prompt' is undefined; its columns are question",
        ),
        (
            '{"prompt": "1", "completion": " "}\n',
            "every row of the train data of task 'sums', .* has an empty completion",
        ),
        ('{"prompt": "1", "completion": "two"}\n', "row 0 of the train data of task 'sums' does not match 'answer'"),
    ],
)
def test_broken_files_are_named(tree, task_folder, tmp_path, text, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in task_folder.iterdir():
        (folder / file.name).write_text(file.read_text())
    (folder / "sums_train.jsonl").write_text(text)
    with pytest.raises(CpiftError, match=message):
        load({**tree, "data": str(folder)})


def test_a_completion_outside_the_choices_is_named(tree):
    tree["tasks"]["larger"]["choices"] = ["a", "c"]
    with pytest.raises(CpiftError, match="'larger' has the completion 'b', which is not among its choices"):
        load(tree)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 18 \n", None, "18"),
        ("so 3\n#### 7\n#### 18", "#### (.*)", "18"),
        ("no mark", "#### (.*)", None),
        ("#### 5 apples", r"#### (\d+)( \w+)?", "5"),
    ],
)
def test_extract_answer(text, pattern, answer):
    assert rows.extract_answer(text, pattern) == answer


def test_plain_text_has_no_prompt_and_no_frame(tree, tmp_path, tokenizer):
    tasks = write_rows(tmp_path, {"a": ([{"body": "abc"}, {"body": "d"}], {"text": "{{ body }}!"}), "b": (PAIRS, {})})
    tree |= {"data": None, "tasks": tasks, "prompt": "Q {{ prompt }}", "chat_template": "model"}
    tokenizer.chat_template = CHATML
    data = load(tree, tokenizer)
    assert data["a"].train[:] == {"prompt": ["", ""], "completion": ["abc!", "d!"]}
    assert data["b"].train["prompt"][0] == "<u>Q 1+1=<a>"
    rows.check_tokens(parse_recipe(tree), data, tokenizer, 64)
    with pytest.raises(CpiftError, match="row 0 of the train data of task 'a' has an empty prompt"):
        rows.check_tokens(parse_recipe({**tree, "tasks": {"a": tasks["b"], "b": tasks["b"]}}), data, tokenizer, 64)


def test_a_folder_for_all_tasks_replaces_their_forms(tree):
    tree["tasks"] |= {"letters": {"text": "{{ body }}"}, "larger": {"messages": "turns"}}
    data = load(tree)
    assert data["larger"].train["prompt"][0].endswith("?")
    assert set(data["letters"].train["prompt"]) == {""}
    assert all(len(text) == 3 and text[1] == "-" for text in data["letters"].train["completion"])


def test_conversations_and_prompts_go_through_the_chat_template(tree, tmp_path, tokenizer):
    chats = [
        {"turns": talk("a", "b", "c", " d ", "e")},
        {"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    # In one file all rows have the same columns.
    tasks = write_rows(
        tmp_path, {"a": (chats[:1], {"messages": "turns"}), "b": (chats[1:], {"messages": "turns"}), "c": (PAIRS, {})}
    )
    tokenizer.chat_template = CHATML.replace("{{ end }}", "{{ eos_token }}")
    data = load(tree | {"data": None, "tasks": tasks, "prompt": "{{ prompt }}?", "chat_template": "model"}, tokenizer)
    assert data["a"].test[:] == {"prompt": ["<u>a<eos><a>b<eos><u>c<eos><a>"], "completion": ["d"], "answer": ["d"]}
    assert data["b"].train[:] == {"prompt": ["<u>a<eos><a>"], "completion": ["b"]}
    assert data["c"].train[0] == {"prompt": "<u>1+1=?<eos><a>", "completion": "2"}


def test_scores_have_the_answer_and_choices_as_they_follow_the_prompt(tree, tokenizer):
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", " {{ m.content }}").replace("{{ end }}", "j")
    task = load({**tree, "chat_template": "model"}, tokenizer)["larger"]
    assert task.choices == [" a", " b"]
    assert set(task.test["answer"]) == {"a", "b"}
    assert task.test["completion"] == [f" {answer}j" for answer in task.test["answer"]]
    assert load(tree)["larger"].choices == ["a", "b"]
    assert load(tree)["sums"].choices is None


def test_errors_of_conversations_and_columns_name_task_source_and_row(tree, tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    tree |= {"data": None, "chat_template": "model"}
    bad = [{"turns": talk("a", "b"), "n": 1}, {"turns": talk("a"), "n": 2}]
    tasks = write_rows(tmp_path, {"a": (bad, {"messages": "turns"}), "b": (PAIRS, {})})
    with pytest.raises(
        CpiftError,
        match=r"row 1 of the train data of task 'a', .*a\.jsonl, does not fit 'messages': it has no last answer",
    ):
        load({**tree, "tasks": tasks}, tokenizer)
    tasks["a"]["messages"] = "talks"
    with pytest.raises(CpiftError, match=r"task 'a', .*a\.jsonl, has no column 'talks' .* its columns are turns, n$"):
        load({**tree, "tasks": tasks}, tokenizer)
    tasks["a"] = {"files": tasks["a"]["files"], "text": "{{ body }}"}
    with pytest.raises(CpiftError, match=r"a\.jsonl, does not fit .*'body' is undefined; its columns are turns, n$"):
        load({**tree, "tasks": tasks}, tokenizer)


def test_rows_without_a_completion_are_left_out_with_a_warning(tree, tmp_path):
    own = [*PAIRS, {"prompt": "1+", "completion": " "}, *PAIRS, {"prompt": "2+", "completion": ""}]
    tree |= {"data": None, "tasks": write_rows(tmp_path, {"a": (own, {}), "b": (PAIRS, {})})}
    with pytest.warns(UserWarning, match="2 of 6 rows of the train data of task 'a' .* left out, first row 2"):
        data = load(tree)
    assert len(data["a"].train) == len(data["a"].test) == 4
    # The numbers in errors are those of the rows as they are stored.
    tree["tasks"]["a"] |= {"metric": "exact_match", "answer": r"(\d)"}
    own[3] = {"prompt": "3+", "completion": "none"}
    write_rows(tmp_path, {"a": (own, {})})
    with pytest.warns(UserWarning, match="left out"), pytest.raises(CpiftError, match=r"row 3 of the .* 'answer'"):
        load(tree)


def test_the_digest_is_of_the_rows_alone(tree, tmp_path, monkeypatch):
    digests = lambda task: (task.train_digest, task.test_digest)  # noqa: E731
    first = {name: digests(task) for name, task in load(tree).items()}
    assert len(set(first.values())) == 3
    moved = tmp_path / "moved"
    shutil.copytree(tree["data"], moved)
    assert {name: digests(task) for name, task in load({**tree, "data": str(moved)}).items()} == first
    for number, split in enumerate(("train", "test")):
        file = moved / f"sums_{split}.jsonl"
        text = file.read_text()
        file.write_text("".join(text.splitlines(keepends=True)[::-1]))
        changed = digests(load({**tree, "data": str(moved)})["sums"])
        assert [changed[n] != first["sums"][n] for n in range(2)] == [n == number for n in range(2)]
        file.write_text(text)
    monkeypatch.setattr(rows, "BATCH", 7)
    sums = load(tree)["sums"]
    swapped = rows.TaskData(sums.test.remove_columns("answer"), sums.train)
    assert swapped.train_digest != first["sums"][0]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("max_length", [None, 8, 4])
@pytest.mark.parametrize("end", ["j", "{{ eos_token }}", "{{ eos_token }} "])
def test_training_sees_the_tokens_that_are_counted_and_scored(
    tree, tmp_path, tiny_model, tokenizer, begins, max_length, end
):
    if begins:
        tokenizer.bos_token = "<unk>"
        mark = [("<unk>", tokenizer.unk_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<unk> $A", "<unk> $A $B", mark)
    tokenizer.chat_template = TERSE.replace("END", end)
    tasks = write_rows(
        tmp_path,
        {
            "text": ([{"body": "abcdefghij"}, {"body": "a"}, {"body": "ab<eos>"}], {"text": "{{ body }}"}),
            "chat": ([{"turns": talk("1", "2")}, {"turns": talk("1", "2", "3", "4567")}], {"messages": "turns"}),
        },
    )
    tree |= {"data": None, "tasks": tasks, "chat_template": "model"}
    recipe = parse_recipe(tree)
    data = rows.load_tasks(recipe, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, task in data.items():
        lengths = rows.training_lengths(task.train, tokenizer, max_length)
        if not lengths:  # TRL cannot train on nothing
            with pytest.raises(CpiftError, match="begins within"):
                rows.check_tokens(recipe, {name: task}, tokenizer, max_length)
            continue
        rows.check_tokens(recipe, {name: task}, tokenizer, max_length)
        args = SFTConfig(
            str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
        )
        trained = SFTTrainer(model, args, train_dataset=task.train, processing_class=tokenizer).train_dataset
        assert [len(row) for row in trained["input_ids"]] == lengths
        for row in trained["input_ids"]:
            assert row.count(tokenizer.unk_token_id) == begins
            assert max_length is not None or row[-1] == tokenizer.eos_token_id
            assert row[-2:] != [tokenizer.eos_token_id] * 2
        _, scored = completion_losses(
            model, tokenizer, task.train["prompt"], task.train["completion"], max_length=max_length
        )
        # The first token of a row has nothing before it from which it could be predicted.
        learned = [sum(label != -100 for label in row[1:]) for row in trained["labels"]]
        assert [count for count in scored.tolist() if count] == learned


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(
        st.tuples(st.text("ab ", min_size=1, max_size=4), st.text("ab ", min_size=1, max_size=4)),
        min_size=1,
        max_size=6,
    ),
    joined=st.sets(st.sampled_from(["aa", "ab", "b ", " a"])),
)
def test_rows_pass_if_and_only_if_prompts_keep_their_tokens(pairs, joined, monkeypatch, tree):
    monkeypatch.setattr(rows, "BATCH", 2)
    tokenizer = joining_tokenizer(*sorted(joined))
    data = Dataset.from_list([{"prompt": a, "completion": b} for a, b in pairs])
    task = {"a": rows.TaskData(data, data)}
    recipe = parse_recipe({**tree, "tasks": {"a": {}, "b": {}}})
    heads = [tokenizer(a).input_ids for a, _ in pairs]
    odd = [i for i, (a, b) in enumerate(pairs) if tokenizer(a + b).input_ids[: len(heads[i])] != heads[i]]
    if odd:
        with pytest.raises(CpiftError, match=f"row {odd[0]} of the train data"):
            rows.check_tokens(recipe, task, tokenizer, None)
    else:
        rows.check_tokens(recipe, task, tokenizer, None)


def test_one_short_prompt_anywhere_is_enough(tree, monkeypatch):
    monkeypatch.setattr(rows, "BATCH", 1)
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "abcdef", "completion": "b"}])
    recipe = parse_recipe({**tree, "tasks": {"a": {}, "b": {}}})
    rows.check_tokens(recipe, {"a": rows.TaskData(data, data)}, joining_tokenizer(), 4)
    odd = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}])
    with pytest.raises(CpiftError, match="row 1 of the train data of task 'a' has an empty prompt"):
        rows.check_tokens(recipe, {"a": rows.TaskData(odd, data)}, joining_tokenizer(), 4)


def test_choices_bind_the_rows_that_are_scored_alone(tree, task_folder, tmp_path):
    shutil.copytree(task_folder, tmp_path / "data")
    file = tmp_path / "data" / "larger_train.jsonl"
    file.write_text(file.read_text() + '{"prompt": "1-1?", "completion": "c"}\n')
    assert "c" in load({**tree, "data": str(tmp_path / "data")})["larger"].train["completion"]


def test_many_rows_are_checked_in_seconds(tree):
    data = Dataset.from_list([{"prompt": "abc def " * 4, "completion": "ghi"}] * 10_000)
    recipe = parse_recipe({**tree, "tasks": {"a": {}, "b": {}}})
    began = time.perf_counter()
    rows.check_tokens(recipe, {"a": rows.TaskData(data, data.select(range(1)))}, joining_tokenizer(), None)
    assert time.perf_counter() - began < 10
