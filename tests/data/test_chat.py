"""Strategy: render conversations by templates as models have them, written here, and compare strings and tokens with
transformers' own rendering of the whole conversation; then conversations and templates that cannot be used."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_cpift import CpiftError
from peft_cpift.data.chat import split_conversation, use_chat_template
from peft_cpift.data.tasks import load_tasks
from peft_cpift.recipe.reading import parse_recipe

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen 3: an empty block of thoughts before the last answer, which the generation prompt does not have.
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
# As Gemma: begins with the start of the sequence, trims contents, and its end of turn is not the end of the sequence.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2 and Mistral: no generation prompt, a space before the answer, and each turn in a sequence of its own.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "one?"}]


def character_tokenizer(template: str | None, *, adds_bos: bool = True, eos: str = "<|im_end|>"):
    """A tokenizer of single bytes and a few special tokens, which begins every text with <s> if asked."""
    tokens = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def chat_recipe(template: str = "model"):
    return parse_recipe(
        {"model": "m", "output": "o", "data": "d", "tasks": {"a": {}, "b": {}}} | {"chat_template": template}
    )


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "completion"),
    [
        (CHATML, "<|im_end|>", "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n", "1 "),
        (CHATML, "</s>", "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n", "1 <|im_end|>\n"),
        (
            THINKING,
            "<|im_end|>",
            "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "1 ",
        ),
        (TRIMMING, "</s>", "<|im_start|>user\none?<end_of_turn>\n<|im_start|>assistant\n", "1<end_of_turn>\n"),
        (BRACKETS, "</s>", "[INST] one? [/INST]", " 1 "),
    ],
)
def test_prompt_and_completion_as_the_templates_of_models_write_them(template, eos, prompt, completion):
    tokenizer = character_tokenizer(template, eos=eos)
    chat = use_chat_template(tokenizer, chat_recipe())
    assert chat.render(USER, "1 ") == (prompt, completion)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("template", [CHATML, THINKING, TRIMMING, BRACKETS])
def test_tokens_are_the_templates_own_with_one_beginning_and_one_end(template, eos, adds_bos):
    tokenizer = character_tokenizer(template, eos=eos, adds_bos=adds_bos)
    messages = [*USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "sure?"}]
    answer = {"role": "assistant", "content": "so it is"}
    prompt, completion = use_chat_template(tokenizer, chat_recipe()).render(messages, answer["content"])
    got = tokenizer(prompt + completion).input_ids
    whole = tokenizer.apply_chat_template([*messages, answer], return_dict=True).input_ids
    if adds_bos and whole[0] != tokenizer.bos_token_id:
        whole = [tokenizer.bos_token_id, *whole]
    if tokenizer.eos_token_id in whole[-2:]:  # which training adds, and Qwen's newline after it is never predicted
        whole = whole[: -1 - whole[::-1].index(tokenizer.eos_token_id)]
    assert got == whole
    assert got[: len(tokenizer(prompt).input_ids)] == tokenizer(prompt).input_ids


@pytest.mark.parametrize("name", ["llama3", "llama3_2", "gemma", "gemma3", "qwen2_5", "qwen3", "phi3"])
def test_templates_of_real_models_are_understood(name):
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip("this version of TRL has no such file")
    tokenizer = character_tokenizer(None, eos="</s>")
    chat = use_chat_template(tokenizer, chat_recipe(str(file)))
    prompt, completion = chat.render(USER, "so it is")
    whole = [*USER, {"role": "assistant", "content": "so it is"}]
    written = tokenizer.apply_chat_template(whole, tokenize=False, date_string="26 Jul 2024")
    assert prompt + completion == written.removeprefix("<s>").split("</s>")[0]
    assert completion.startswith("so it is")
    assert chat.render_choice("so it is") + chat.end == completion
    assert "one?" in prompt


@pytest.mark.parametrize("answer", ["A", " A", "A\n", " <end_of_turn>", " two words "])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("template", [CHATML, THINKING, TRIMMING, BRACKETS])
def test_a_choice_follows_the_prompt_as_the_answer_does(template, eos, answer):
    chat = use_chat_template(character_tokenizer(template, eos=eos), chat_recipe())
    _, completion = chat.render(USER, answer)
    assert chat.render_choice(answer) + chat.end == completion


def test_a_choice_is_trimmed_and_led_in_where_the_template_does_so_and_has_no_end():
    trimming = use_chat_template(character_tokenizer(TRIMMING, eos="</s>"), chat_recipe())
    assert (trimming.render_choice(" A\n"), trimming.end) == ("A", "<end_of_turn>\n")
    brackets = use_chat_template(character_tokenizer(BRACKETS, eos="</s>"), chat_recipe())
    assert (brackets.render_choice("A "), brackets.end) == (" A ", "")


def choices_recipe(folder: Path, choices: list[str], answers: list[str]):
    """Two tasks of the same rows, one scored by its choices."""
    lines = [json.dumps({"prompt": "q", "completion": answer}) + "\n" for answer in answers]
    for name in ("a", "b"):
        for split in ("train", "test"):
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines))
    tasks = {"a": {"metric": "choice", "choices": choices}, "b": {}}
    tree = {"model": "m", "output": "o", "data": str(folder), "tasks": tasks, "chat_template": "model"}
    return parse_recipe(tree)


@pytest.mark.filterwarnings("ignore:.* is scored on are among those")
@pytest.mark.parametrize("template", [CHATML, THINKING, TRIMMING, BRACKETS])
def test_the_choices_of_a_task_are_written_as_its_completions(tmp_path, template):
    choices = [" yes", " no", " not sure "]
    data = load_tasks(choices_recipe(tmp_path, choices, choices), character_tokenizer(template, eos="</s>"))
    assert [choice + data["a"].end for choice in data["a"].choices] == data["a"].train["completion"][:]
    assert data["a"].test["answer"][:] == choices
    assert data["b"].choices is None


@pytest.mark.filterwarnings("ignore:.* is scored on are among those")
def test_choices_that_cannot_be_told_apart_or_are_changed_are_refused(tmp_path):
    recipe = choices_recipe(tmp_path, ["yes", "no", " no"], ["yes"])
    assert load_tasks(recipe, character_tokenizer(CHATML))["a"].choices == ["yes", "no", " no"]
    with pytest.raises(CpiftError, match=r"'choices' of task 'a' are .*, of which the chat template writes several"):
        load_tasks(recipe, character_tokenizer(TRIMMING))
    upper = CHATML.replace("m.content", "m.content | replace('shout', 'SHOUT')")
    with pytest.raises(CpiftError, match=r"'choices' of task 'a' do not fit .*: the chat template changes the answer"):
        load_tasks(choices_recipe(tmp_path, ["yes", "shout"], ["yes"]), character_tokenizer(upper))


def test_a_date_does_not_make_rows_differ_from_day_to_day(tmp_path):
    dated = "{{ date_string or strftime_now('%d') }} " + CHATML
    prompt, _ = use_chat_template(character_tokenizer(dated), chat_recipe()).render(USER, "1")
    assert prompt.startswith("26 Jul 2024 ")
    with pytest.raises(CpiftError, match="writes today's date"):
        use_chat_template(character_tokenizer("{{ strftime_now('%d') }} " + CHATML), chat_recipe())


def test_a_file_becomes_the_tokenizers_template_and_is_saved_with_it(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    tokenizer = character_tokenizer(None)
    use_chat_template(tokenizer, chat_recipe(str(tmp_path / "chat.jinja")))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").chat_template == CHATML


def test_without_a_chat_template_the_tokenizers_own_is_left_alone():
    tokenizer, recipe = character_tokenizer(CHATML), chat_recipe()
    recipe.chat_template = None
    assert use_chat_template(tokenizer, recipe) is None
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for", "is not a Jinja template"),
        ("", "does not write a question"),
        ("no contents", "does not write a question"),
        ("{{ messages[0].content }} {{ messages | length }}", "does not write a question"),
        # The prompt alone is not the beginning of the whole.
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "does not write a question"),
        ("{{ raise_exception('never') }}", "cannot write a question and its answer: never"),
        ("{{ messages[7].content }}", "cannot write a question and its answer"),
        ("{{ ''.__class__.__mro__ }}", "cannot write a question and its answer"),
    ],
)
def test_files_that_are_no_usable_template_are_named(tmp_path, text, message):
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    with pytest.raises(CpiftError, match=message) as caught:
        use_chat_template(character_tokenizer(None), chat_recipe(str(file)))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_templates_are_named(tmp_path):
    with pytest.raises(CpiftError, match="the tokenizer of 'm' has none: give a Jinja file"):
        use_chat_template(character_tokenizer(None), chat_recipe())
    with pytest.raises(CpiftError, match=r"cannot read chat_template .*none\.jinja"):
        use_chat_template(character_tokenizer(None), chat_recipe(str(tmp_path / "none.jinja")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{{ m.content }}", None),
        ("{{ m.content | upper if m.content == 'shout' else m.content }}", "changes the answer"),
        # What a template that drops thoughts from earlier turns does to a user's message that holds some.
        ("{{ m.content if messages | length == 1 else m.content.split('|')[-1] }}", "writes the prompt otherwise"),
    ],
)
def test_conversations_that_a_template_changes_are_refused(change, message):
    tokenizer = character_tokenizer(CHATML.replace("{{ m.content }}", change))
    chat = use_chat_template(tokenizer, chat_recipe())
    messages = [{"role": "user", "content": "a|b"}]
    if message is None:
        assert chat.render(messages, "shout")[1] == "shout"
    else:
        with pytest.raises(ValueError, match=message):
            chat.render(messages, "shout")


@pytest.mark.parametrize(
    ("value", "asked", "said"),
    [
        ([("user", "q"), ("assistant", " a\n")], ["q"], "a"),
        (
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
            ["s", "q", "a", "r"],
            "b",
        ),
        ([("user", "q"), ("assistant", "a"), ("user", "r")], ["q"], "a"),
        ([("user", "q"), ("assistant", "a"), ("system", "s")], ["q"], "a"),
    ],
)
@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
def test_the_last_answer_is_split_from_what_comes_before(value, asked, said, form):
    turns = [dict(zip(form, turn, strict=True)) for turn in value]
    untouched = copy.deepcopy(turns)
    messages, answer = split_conversation(turns)
    assert [m["content"] for m in messages] == asked
    assert [m["role"] for m in messages] == [role for role, _ in value][: len(asked)]
    assert answer == said
    assert turns == untouched


def test_sharegpts_names_are_known():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert split_conversation(turns) == ([{"role": "user", "content": "q"}], "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "not a list of messages"),
        (None, "not a list of messages"),
        (["text"], "not a list of messages"),
        ([], "no last answer"),
        ([{"role": "user", "content": "q"}], "no last answer"),
        ([{"role": "assistant", "content": "a"}], "no last answer"),
        ([{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "no last answer"),
        ([*USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "no last answer"),
        ([*USER, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}], "role 'tool'"),
        ([*USER, {"role": "assistant", "content": None}], "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "content of type list"),
        ([{"speaker": "user", "content": "q"}], "role None"),
    ],
)
def test_what_is_no_conversation_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        split_conversation(value)


contents = st.text(alphabet="ab \n|é<", min_size=1).filter(str.strip)


@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), system=st.none() | contents)
def test_any_conversation_comes_back_from_what_is_rendered(turns, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    chatml = use_chat_template(character_tokenizer(CHATML), chat_recipe())
    before, said = split_conversation(messages)
    prompt, completion = chatml.render(before, said)
    assert (before, said) == (messages[:-1], turns[-1][1].strip())
    assert completion == said
    assert prompt.startswith("<|im_start|>" + messages[0]["role"] + "\n" + messages[0]["content"])
    assert prompt.count("<|im_start|>") == len(messages)
