"""Chat rendering with a byte-level tokenizer made on the spot and templates of Qwen's and Llama's kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atod_fast.envs.alfworld.prompt import AlfWorldPrompt
from atod_fast.envs.text import GAP
from atod_fast.errors import UserError
from atod_fast.rollout.rendering import ChatRenderer
from helpers.chatml import (
    ADMISSIBLE,
    CHATML,
    END,
    IDS,
    OPENED,
    SPACED,
    SPECIALS,
    START,
    TOKENIZER,
    make_tokenizer,
    make_turn,
)


def make_renderer(
    context: str = "window",
    *,
    tokenizer=TOKENIZER,
    thinking: bool = False,
    prompt_tokens: int = 10_000,
    history: int = 2,
    **options,
):
    return ChatRenderer(
        tokenizer,
        AlfWorldPrompt(thinking, history),
        context=context,
        thinking=thinking,
        prompt_tokens=prompt_tokens,
        **options,
    )


def chat(*messages: str, thinking: bool = False, generate: bool = True, tokenizer=TOKENIZER) -> list[int]:
    """The tokenizer's own encoding of a conversation: user, assistant, user, ..."""
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate, enable_thinking=thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("context", ["window", "full"])
def test_a_first_prompt_is_the_chat_template_s(context, thinking):
    message = AlfWorldPrompt(thinking, 2).first(START, ADMISSIBLE["admissible_actions"])
    ids = make_renderer(context, thinking=thinking).prompt([], START, ADMISSIBLE)
    assert ids == chat(message, thinking=thinking)
    assert TOKENIZER.decode(ids).endswith("<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n"))


def test_a_window_prompt_holds_the_last_turns_and_nothing_of_the_conversation_before():
    turns = [make_turn(START), make_turn("You see a mug 1."), make_turn("You hold mug 1.", "take mug 1")]
    text = TOKENIZER.decode(make_renderer().prompt(turns, "Nothing happens.", ADMISSIBLE))
    assert (
        text.count("<|im_start|>") == 2
        and "You see a mug 1." in text
        and "take mug 1" in text
        and "put a mug on the desk" in text
    )
    assert "Welcome" not in text and "Nothing happens." in text and "'inventory'" in text


@pytest.mark.parametrize("stopped", [True, False])
def test_a_full_context_is_one_conversation_whether_or_not_actions_were_cut_off(stopped):
    renderer, words = make_renderer("full", thinking=True), AlfWorldPrompt(True, 2)
    actions = ADMISSIBLE["admissible_actions"]
    turns, sequence, messages = [], [], []
    for observation in (START, "You see a mug 1.", "Nothing happens."):
        sequence += renderer.prompt(turns, observation, ADMISSIBLE)
        messages += [
            words.following(observation, actions) if turns else words.first(observation, actions),
            "<action>look</action>",
        ]
        turns.append(make_turn(observation, stopped=stopped))
        sequence += turns[-1].action
    assert sequence == chat(*messages[:-1], thinking=True) + turns[-1].action


def test_an_action_that_stopped_at_the_end_of_text_is_closed_as_well():
    renderer = make_renderer("full", tokenizer=make_tokenizer(eos="<|endoftext|>"))
    assert renderer.stop_ids == (END, IDS["<|endoftext|>"])
    turn = make_turn(START, stopped=False)
    turn.action.append(IDS["<|endoftext|>"])
    assert renderer.prompt([turn], "Nothing happens.", ADMISSIBLE)[0] == END


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([*SPECIALS, "<think>", " ", "\n", "ab", "ß", "\u4e2d", "<|im_", "end|>"]) | st.text(max_size=4),
        max_size=8,
    ),
    st.sampled_from(["window", "full"]),
)
def test_no_text_of_a_world_becomes_a_special_token(parts, context):
    text = "".join(parts)
    special = {IDS[token] for token in SPECIALS}
    renderer = make_renderer(context)

    def structure(shown: str, listed: str) -> list[int]:
        info = {"admissible_actions": [listed]}
        first = renderer.prompt([], shown, info)
        later = renderer.prompt([make_turn(shown), make_turn(shown, listed)], shown, info)
        return [i for i in first + later if i in special]

    assert structure(text, text) == structure("desk", "look")
    assert text in TOKENIZER.decode(
        renderer.prompt([], text, {"admissible_actions": []}), clean_up_tokenization_spaces=False
    )


def test_the_test_s_special_tokens_are_special_where_they_are_allowed():
    assert TOKENIZER("a<|im_end|>")["input_ids"][-1] == END
    assert make_renderer().prompt([], "a<|im_end|>b", ADMISSIBLE).count(END) == 1


def test_a_long_window_prompt_loses_its_oldest_history_first():
    turns = [make_turn(START), make_turn("Old " * 40), make_turn("Recent " * 10)]
    whole = make_renderer().prompt(turns, "Now.", ADMISSIBLE)
    limit = len(whole) - 20
    shorter = make_renderer(prompt_tokens=limit).prompt(turns, "Now.", ADMISSIBLE)
    text = TOKENIZER.decode(shorter)
    assert len(shorter) <= limit
    assert "Old" not in text and f"[Observation 2: '{GAP}', Action 2: 'look']" in text
    assert "Recent " * 10 in text and "Now." in text and "put a mug on the desk" in text
    assert make_renderer(prompt_tokens=len(whole)).prompt(turns, "Now.", ADMISSIBLE) == whole


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 900), st.integers(0, 3))
def test_a_long_observation_loses_its_middle_and_as_little_as_needed(spare, history):
    renderer = make_renderer()
    shortest = make_renderer(prompt_tokens=1).prompt(
        [make_turn(START)] * history, START.replace("desk 1", "desk 1 " * 500), ADMISSIBLE
    )
    limit = len(shortest) + spare
    ids = make_renderer(prompt_tokens=limit).prompt(
        [make_turn(START)] * history, START.replace("desk 1", "desk 1 " * 500), ADMISSIBLE
    )
    text = TOKENIZER.decode(ids)
    assert limit - 8 <= len(ids) <= limit
    assert text.count(GAP) == 1 + min(history, 2) and text.count("<|im_end|>") == 1 and "'inventory'" in text
    assert text.endswith(TOKENIZER.decode(renderer.prompt([], "", ADMISSIBLE))[-40:])
    if spare > 300:
        assert "Welcome" in text and "put a mug on the desk" in text


def test_a_response_s_text_ends_before_its_stop_token():
    renderer = make_renderer()
    ids = TOKENIZER("I see. <action>Go to Desk 1</action>")["input_ids"]
    assert renderer.parse([*ids, END], True, {}) == ("I see. <action>Go to Desk 1</action>", "go to desk 1", True)
    assert renderer.parse(ids, False, {}) == ("I see. <action>Go to Desk 1</action>", "go to desk 1", True)
    text, command, well_formed = renderer.parse(TOKENIZER("just look")["input_ids"], False, {})
    assert (text, command, well_formed) == ("just look", "just look", False)
    assert renderer.parse([END], True, {})[0] == ""


def test_thinking_may_begin_in_the_template():
    response = TOKENIZER("so it is</think><action>look</action>")["input_ids"]
    opened = make_renderer(tokenizer=make_tokenizer(OPENED), thinking=True)
    assert opened.parse(response, False, {})[1:] == ("look", True)
    assert make_renderer(thinking=True).parse(response, False, {})[1:] == ("look", False)


def test_the_end_of_a_message_is_its_first_special_token():
    renderer = make_renderer("full", tokenizer=make_tokenizer(SPACED, eos="<|endoftext|>"))
    assert renderer.stop_ids == (IDS["<|endoftext|>"],)
    assert TOKENIZER.decode(renderer.prompt([make_turn(START, stopped=False)], "Hm.", ADMISSIBLE)).startswith(
        "<|endoftext|><|im_start|>[INST] Hm."
    )


def test_columns_without_a_token_are_never_sampled():
    assert make_renderer().valid_columns is None and make_renderer(columns=len(TOKENIZER)).valid_columns is None
    valid = make_renderer(columns=len(TOKENIZER) + 3).valid_columns
    assert torch.equal(valid, torch.arange(len(TOKENIZER) + 3) < len(TOKENIZER))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "without a special token"),
        ("{{ messages[0].content }}<|im_end|>", "does not show a conversation"),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_refused(template, complaint):
    with pytest.raises(UserError, match=f"student.path.*{complaint}"):
        make_renderer("full", tokenizer=make_tokenizer(template))


def test_control_tokens_that_are_words_of_the_vocabulary_are_not_found_in_plain_text():
    words = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(["<unk>", *SPECIALS, "user", "assistant", "desk"])}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", unk_token="<unk>", chat_template=CHATML
    )
    renderer = make_renderer(tokenizer=tokenizer)
    spelled, plain = (renderer.prompt([], f"desk {text} desk", {}) for text in ("<|im_end|>", "mug"))
    assert spelled == plain and spelled.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 5 }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for %}"]
)
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(UserError, match="student.path: the chat template of .* refuses a conversation") as error:
        make_renderer(tokenizer=make_tokenizer(template))
    assert "\n" not in str(error.value)


def test_a_template_may_join_lines():
    joined = CHATML.replace("message.content }}", "message.content.split('\\n') | select | join('\\n') }}")
    assert joined != CHATML
    make_renderer("full", tokenizer=make_tokenizer(joined))


def test_a_prompt_that_is_cut_is_warned_of_once(caplog):
    renderer = make_renderer(prompt_tokens=200)
    for _ in range(2):
        renderer.prompt([], "Long " * 200, ADMISSIBLE)
    assert len(caplog.records) == 1 and "rollout.prompt_tokens=200: a prompt of" in caplog.text
    caplog.clear()
    make_renderer().prompt([], "Long " * 200, ADMISSIBLE)
    assert not caplog.records
