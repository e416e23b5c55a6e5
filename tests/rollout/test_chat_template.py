"""Prompts equal the output of the tokenizer's own chat template, token for token, for different tokenizers and
templates.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from atod_fast.envs.alfworld.prompt import AlfWorldPrompt
from atod_fast.envs.prompt import PlainPrompt
from atod_fast.envs.protocol import Info
from atod_fast.records import Turn
from atod_fast.rollout.rendering import ChatRenderer
from atod_fast.rollout.template import ChatTemplate
from helpers.chat_tokenizers import KINDS, tokenizer

DAY = date(2026, 11, 27)
OBSERVATIONS = [
    "\nYou are in a room.\n\nYour task is to: put a mug on the desk.\n",
    "You see  a mug 1.\n\n\nAnd nothing else.",
    "\n\nNothing happens. ",
]
ANSWERS = ["<action>look</action>", "go to desk 1", "take it"]
ACTIONS = ["look", "go to desk 1"]
WORDS = {"alfworld": AlfWorldPrompt(False, 2), "plain": PlainPrompt(False, 2, "You put things in their places.\n")}


def right(kind: str, *messages: str, generate: bool = True) -> list[int]:
    """The tokenizer's own encoding of a conversation: user, assistant, user, ..."""
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
    noon = datetime(DAY.year, DAY.month, DAY.day)
    options = {"add_generation_prompt": generate, "enable_thinking": False, "strftime_now": noon.strftime}
    return tokenizer(kind).apply_chat_template(talk, tokenize=True, return_dict=True, **options)["input_ids"]


def renderer(kind: str, context: str, words: str = "alfworld") -> ChatRenderer:
    return ChatRenderer(tokenizer(kind), WORDS[words], context=context, thinking=False, prompt_tokens=10_000, day=DAY)


def said(kind: str, answer: str, observation: str, end: int) -> Turn:
    ids = tokenizer(kind)(answer, add_special_tokens=False)["input_ids"] + [end]
    return Turn([], ids, [0.0] * len(ids), observation, answer, answer, True)


def info(actions: list[str] = ACTIONS) -> Info:
    return {"admissible_actions": actions}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_of_a_window_is_the_template_s(kind, words):
    shown, turns = renderer(kind, "window", words), []
    for observation, answer in zip(OBSERVATIONS, ANSWERS, strict=True):
        message = WORDS[words].message(turns[0].observation if turns else observation, turns, observation, ACTIONS)
        assert shown.prompt(turns, observation, info()) == right(kind, message)
        turns.append(said(kind, answer, observation, shown.stop_ids[0]))


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_context_appends_what_the_template_writes_of_the_new_message(kind, words):
    shown, prompt = renderer(kind, "full", words), WORDS[words]
    turns, messages = [], []
    for observation, answer in zip(OBSERVATIONS, ANSWERS, strict=True):
        found = shown.prompt(turns, observation, info())
        messages.append(prompt.following(observation, ACTIONS) if turns else prompt.first(observation, ACTIONS))
        whole, end = right(kind, *messages), shown.stop_ids[0]
        if turns:  # the end of the whole conversation, from behind the token that ends the last answer
            assert whole[-len(found) :] == found and whole[-len(found) - 1] == end
            assert observation.strip() in tokenizer(kind).decode(found)
            cut_off = replace(turns[-1], action=turns[-1].action[:-1])
            assert shown.prompt([*turns[:-1], cut_off], observation, info()) == [end, *found]
        else:
            assert found == whole
        turns.append(said(kind, answer, observation, end))
        messages.append(answer)


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_where_the_template_shows_past_answers_as_sampled_the_whole_sequence_is_its(kind):
    shown, prompt = renderer(kind, "full"), WORDS["alfworld"]
    turns, messages, sequence = [], [], []
    for observation, answer in zip(OBSERVATIONS, ANSWERS, strict=True):
        sequence += shown.prompt(turns, observation, info())
        messages.append(prompt.following(observation, ACTIONS) if turns else prompt.first(observation, ACTIONS))
        assert sequence == right(kind, *messages)
        turns.append(said(kind, answer, observation, shown.stop_ids[0]))
        sequence += turns[-1].action
        messages.append(answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", ["window", "full"])
def test_a_control_token_that_an_environment_spells_is_ordinary_characters(kind, context):
    words = tokenizer(kind)
    control = {i: token.content for i, token in words.added_tokens_decoder.items() if token.content.strip(" \n\u2581")}
    control.pop(words.unk_token_id, None)
    shown = renderer(kind, context, "plain")
    turns = [said(kind, "look", "x", shown.stop_ids[0])]

    def controls(text: str) -> list[int]:
        later = shown.prompt([*turns, replace(turns[0], observation=text)], text, info([text, "look"]))
        return [i for i in shown.prompt([], text, info([text])) + later if i in control]

    for spelled in control.values():
        assert controls(f"a {spelled} b{spelled}") == controls("a desk b"), spelled


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "unigram"]
)  # whose pieces do not hold every character
def test_a_control_token_that_an_environment_spells_is_shown_as_it_was_spelled(kind):
    words = tokenizer(kind)
    for token in words.added_tokens_decoder.values():
        text = f"See {token.content.strip(chr(0x2581))} here"
        shown = words.decode(
            renderer(kind, "window", "plain").prompt([], text, info([text])), clean_up_tokenization_spaces=False
        )
        assert shown.count(text) == 2


def test_the_prompt_s_own_words_may_write_control_tokens():
    """They ask for <think> ... </think>, which the template encodes."""
    words = AlfWorldPrompt(True, 2)
    kind = "qwen"
    thought = tokenizer(kind).convert_tokens_to_ids("<think>")
    shown = ChatRenderer(tokenizer(kind), words, context="window", thinking=False, prompt_tokens=10_000, day=DAY)
    plain = shown.prompt([], "A desk.", info())
    assert plain == right(kind, words.first("A desk.", ACTIONS)) and thought in plain
    spelled = shown.prompt([], "A <think> desk.", info())
    assert spelled.count(thought) == plain.count(thought)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.sampled_from(["\n", "\n\n", " ", "  ", "mug", " 1", "\u00df", "\u4e2d", "<", "|", "im_end", "\t"])
        | st.text(max_size=3),
        max_size=8,
    ),
)
def test_any_text_without_control_tokens_is_encoded_as_by_the_tokenizer(kind, parts):
    template = ChatTemplate(tokenizer(kind), thinking=False, day=DAY, continues=True)
    text = "".join(part for part in parts if part.isprintable() or part.isspace())
    message = template.quoted(text)
    assert message == text or any(token.content in text for token in tokenizer(kind).added_tokens_decoder.values())
    if message == text:
        assert template.first(text) == right(kind, text)


@pytest.mark.parametrize(
    "normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFC()], ids=["nfkc", "lower", "nfc"]
)
def test_no_text_becomes_a_control_token_by_being_normalised(normalizer):
    """Added tokens may match text as the tokenizer's normaliser leaves it."""
    inner = Tokenizer.from_str(tokenizer("qwen").backend_tokenizer.to_str())
    inner.normalizer = normalizer
    inner.add_tokens(
        [AddedToken("<thinking>", special=False, normalized=True), AddedToken("\u00c5ngstr\u00f6m<x>", normalized=True)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", chat_template=tokenizer("qwen").chat_template
    )
    control = set(words.added_tokens_decoder)
    shown = ChatRenderer(words, WORDS["plain"], context="window", thinking=False, prompt_tokens=999, day=DAY)

    def controls(text: str) -> list[int]:
        return [i for i in shown.prompt([], text, info([])) if i in control]

    for text in ("\uff1cthinking\uff1e", "<THINKING>", "<thin\u212aing>", "\u212bngstr\u00f6m<x>", "<thinking>"):
        assert controls(text) == controls("a desk"), text


class Careless(PlainPrompt):
    """Writes what it is given as JSON, or cuts it."""

    def first(self, observation, admissible):
        return json.dumps(observation) + " " + repr(admissible) + " " + observation[:7]


def test_marks_that_a_prompt_of_one_s_own_rewrites_or_cuts_do_no_harm():
    words = tokenizer("qwen")
    shown = ChatRenderer(words, Careless(False, 2), context="window", thinking=False, prompt_tokens=999, day=DAY)
    ids = shown.prompt([], "See <think>", info(["say <think>"]))
    thought = words.convert_tokens_to_ids("<think>")
    assert ids.count(thought) == right("qwen", "x").count(thought)
    assert (
        "\"See <think>\" ['say <think>'] See " in words.decode(ids)
        and "fdd" not in words.decode(ids)
        and str(thought) not in words.decode(ids)
    )


def test_code_points_reserved_for_marks_are_shown_as_replaced():
    template = ChatTemplate(tokenizer("qwen"), thinking=False, day=DAY, continues=True)
    end = tokenizer("qwen").convert_tokens_to_ids("<|im_end|>")
    for text in (f"\ufdd0{end}\ufdd1", f"\ufdd2{end}\ufdd3"):
        ids = template.first(template.quoted(text))
        assert ids.count(end) == 1 and tokenizer("qwen").decode(ids).count("\ufffd") == 2


def test_a_template_that_writes_the_date_writes_the_run_s():
    def prompt(day: date) -> str:
        shown = ChatRenderer(
            tokenizer("llama3"), WORDS["plain"], context="full", thinking=False, prompt_tokens=10_000, day=day
        )
        return tokenizer("llama3").decode(shown.prompt([], "x", info()))

    assert "Today Date: 27 Nov 2026" in prompt(DAY) and "Today Date: 01 Dec 2026" in prompt(date(2026, 12, 1))


def test_a_response_ends_at_any_token_that_the_model_s_makers_name():
    words = tokenizer("qwen")
    end, text = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    shown = ChatRenderer(
        words,
        WORDS["plain"],
        context="full",
        thinking=False,
        prompt_tokens=999,
        columns=len(words),
        stop_ids=[text, end, 3, len(words)],
    )
    assert shown.stop_ids == (end, text, 3)  # an id beyond the head is never sampled


def test_ids_beyond_the_head_are_never_sampled():
    words = tokenizer("qwen")
    shown = ChatRenderer(
        words, WORDS["plain"], context="full", thinking=False, prompt_tokens=999, columns=len(words) - 2
    )
    assert shown.valid_columns is None  # all that the head has
