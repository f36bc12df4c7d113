"""Conversations: what the model is asked and what it answers, and both as its chat template writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml

from peft_cpift.errors import CpiftError
from peft_cpift.recipe.tree import Recipe

Conversation = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
# ShareGPT's names, which usually come with the from/value form.
OTHER_NAMES = {"human": "user", "gpt": "assistant"}
# What a template's own code can raise, `raise_exception` in it included.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
# A template that writes today's date would give other rows on another day. Llama's take the date from a variable, for
# which they have this default; the clock is taken away from all.
FIXED_DATE = {"date_string": "26 Jul 2024", "strftime_now": None}
QUESTION = [{"role": "user", "content": "a question"}]
PROBE = "the answer to be found"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what it puts around an answer."""

    tokenizer: PreTrainedTokenizerBase
    lead: str
    """Between the generation prompt and the answer, such as a space or an empty block of thoughts."""
    tail: str
    """After the answer, such as an end of turn."""
    bos: str
    """The beginning of a sequence if the tokenizer adds it to every text by itself, else nothing."""

    def render(self, messages: Conversation, answer: str) -> tuple[str, str]:
        """A conversation's prompt and completion, as strings that the tokenizer turns into the template's tokens.

        The prompt ends with the template's generation prompt, and with the lead but for spaces, which tokenizers join
        with the word that follows. Both leave out what is added when they are tokenized: the beginning of the sequence
        (by the tokenizer, where it does so), and its end (by training).

        Args:
            messages: `role` and `content` each, the last from the user.

        Raises:
            ValueError: the template refuses the conversation, or does not write prompt and answer one after the other.
        """
        prompt, whole = _render_both(self.tokenizer, messages, answer)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template writes the prompt otherwise when an answer follows: use a template whose prompt "
                "is the beginning of the whole"
            )
        written = whole[len(prompt) :]
        inner = written.removeprefix(self.lead).removesuffix(self.tail)
        if inner not in (answer, answer.strip()) or written != self.lead + inner + self.tail:
            raise ValueError("the chat template changes the answer: use a template that writes it as it is")
        prompt = prompt.removeprefix(self.bos) + self.lead.rstrip(" ")
        return prompt, self.lead[len(self.lead.rstrip(" ")) :] + inner + self.end

    def render_choice(self, answer: str) -> str:
        """The completion that `render` writes for an answer, but for its end: a candidate as it follows any prompt.

        Raises:
            ValueError: the template does not write the answer as it is.
        """
        return self.render(QUESTION, answer)[1].removesuffix(self.end)

    @property
    def end(self) -> str:
        """What is after the answer in a completion: the tail, up to the end of the sequence."""
        return self.tail.split(self.tokenizer.eos_token)[0]


def use_chat_template(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate | None:
    """Give the tokenizer the recipe's chat template, so that it is saved with the result, and try it.

    Returns:
        The template, or None if the recipe has none; the tokenizer's own is then neither used nor changed.

    Raises:
        CpiftError: the model has no template, the file is missing or no template, or the template does not write a
            prompt and then the answer, or writes today's date.
    """
    if recipe.chat_template is None:
        return None
    if recipe.chat_template == "model":
        if tokenizer.chat_template is None:
            raise CpiftError(
                f"'chat_template' is 'model', but the tokenizer of '{recipe.model}' has none: give a Jinja file"
            )
        source = f"the chat template of '{recipe.model}'"
    else:
        source = f"chat_template {recipe.chat_template}"
        try:
            tokenizer.chat_template = Path(recipe.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CpiftError(f"cannot read {source}: {error}; give a Jinja file, or 'model'") from error
    try:
        prompt, whole = _render_both(tokenizer, QUESTION, PROBE)
    except jinja2.TemplateSyntaxError as error:
        raise CpiftError(f"{source} is not a Jinja template: {error.message}") from error
    except TEMPLATE_ERRORS as error:
        cause = " ".join(str(error).split())
        if isinstance(error, TypeError) and "strftime_now" in str(tokenizer.chat_template):
            cause = "it writes today's date, so that rows would differ from day to day; give a file without it"
        raise CpiftError(f"{source} cannot write a question and its answer: {cause}") from error
    lead, found, tail = whole.removeprefix(prompt).partition(PROBE)
    if not found or not prompt or not whole.startswith(prompt):
        raise CpiftError(
            f"{source} does not write a question, its generation prompt and then the answer: use a template whose "
            "prompt is the beginning of the whole"
        )
    begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return ChatTemplate(tokenizer, lead, tail, tokenizer.bos_token if begins else "")


def split_conversation(value: Any) -> tuple[Conversation, str]:
    """What comes before a conversation's last answer, and that answer without white space around it.

    Turns after the last answer are left out. Roles and contents may stand under `role` and `content` or under `from`
    and `value`.

    Raises:
        ValueError: the value is no conversation, or in it no answer follows a user's message.

    Example:
        >>> split_conversation([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}])
        ([{'role': 'user', 'content': '1+1?'}], '2')
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError("it is not a list of messages with 'role' and 'content', or 'from' and 'value'")
    turns = maybe_convert_to_chatml({"messages": [dict(turn) for turn in value]})["messages"]
    messages = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        role = OTHER_NAMES.get(role, role)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"a message has role {role!r} and content of type {type(content).__name__}: use text")
        messages.append({"role": role, "content": content})
    last = max((number for number, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    if last == 0 or messages[last - 1]["role"] != "user":
        raise ValueError("it has no last answer that follows a user's message")
    return messages[:last], messages[last]["content"].strip()


def _render_both(tokenizer: PreTrainedTokenizerBase, messages: Conversation, answer: str) -> tuple[str, str]:
    whole = [*messages, {"role": "assistant", "content": answer}]
    return (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **FIXED_DATE),
        tokenizer.apply_chat_template(whole, tokenize=False, **FIXED_DATE),
    )
