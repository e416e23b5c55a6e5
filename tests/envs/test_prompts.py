"""Prompts and projections of the three worlds, word for word as verl-agent's."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atod_fast.envs import make
from atod_fast.envs.alfworld.prompt import AlfWorldPrompt
from atod_fast.envs.prompt import PlainPrompt, prompt_for
from atod_fast.envs.searchqa.prompt import SearchPrompt
from atod_fast.envs.webshop.prompt import WebShopPrompt
from atod_fast.errors import UserError
from atod_fast.records import Turn

INTRO = "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.\n\nYour task is to: put a mug in desk."
ADMISSIBLE = ["go to desk 1", "help", "inventory", "look"]

FIRST = """
You are an expert agent operating in the ALFRED Embodied Environment.
Your current observation is: -= Welcome to TextWorld, ALFRED! =-

You are in the middle of a room.

Your task is to: put a mug in desk.
Your admissible actions of the current situation are: ['go to desk 1'
 'inventory'
 'look'].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. \
This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, \
you should choose an admissible action for current step and present it within <action> </action> tags.
"""

LATER = """
You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: put a mug in desk.
Prior to this step, you have already taken 3 step(s). \
Below are the most recent 2 observations and the corresponding actions you took: \
[Observation 2: 'seen 2', Action 2: 'did 2']
[Observation 3: 'seen 3', Action 3: 'did 3']
You are now at step 4 and your current observation is: You see {a mug 1}.
Your admissible actions of the current situation are: ['go to desk 1'
 'inventory'
 'look'].

Now it's your turn to take an action.
You should choose an admissible action for current step and present it within <action> </action> tags.
"""


def turn(n: int) -> Turn:
    return Turn([], [], [], observation=f"seen {n}", text="", command=f"did {n}", well_formed=True)


def test_first_message_has_no_history_and_leaves_help_out():
    assert AlfWorldPrompt(thinking=True, history=2).message(INTRO, [], INTRO, ADMISSIBLE) == FIRST
    assert AlfWorldPrompt(thinking=True, history=2).first(INTRO, ADMISSIBLE) == FIRST


def test_later_messages_show_the_task_and_the_last_turns_by_number():
    past = [turn(n) for n in (1, 2, 3)]
    assert AlfWorldPrompt(thinking=False, history=2).message(INTRO, past, "You see {a mug 1}.", ADMISSIBLE) == LATER


@given(st.integers(0, 6), st.integers(1, 9), st.booleans())
def test_history_is_the_last_turns_and_the_task_is_always_in_sight(history, steps, thinking):
    past = [turn(n) for n in range(1, steps + 1)]
    message = AlfWorldPrompt(thinking, history).message(INTRO, past, "here", ADMISSIBLE)
    shown = [n for n in range(1, steps + 1) if f"Action {n}: 'did {n}'" in message]
    assert shown == list(range(1, steps + 1))[max(0, steps - history) :]
    assert "Your task is to: put a mug in desk." in message and "'help'" not in message
    assert ("<think>" in message) == thinking


def test_in_one_growing_conversation_later_messages_are_short():
    prompt = AlfWorldPrompt(thinking=True, history=2)
    assert prompt.following("You see a mug 1.", ADMISSIBLE) == (
        "You see a mug 1.\nYour admissible actions of the current situation are: ['go to desk 1'\n 'inventory'\n"
        " 'look']."
    )


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>so</think><action> Go to DESK 1 </action>", True, ("go to desk 1", True)),
        ("<action>look</action>", False, ("look", True)),
        ("<action>look</action>", True, ("look", False)),
        ("<think>never closed <action>look</action>", True, ("look", False)),
        ("<THINK>loud</THINK><action>look</action>", True, ("look", False)),
        ("<ACTION>look</ACTION>", False, ("look", True)),
        ("<action>look</action> <action>inventory</action>", False, ("look", True)),
        ("<action>look", False, ("<action>look", False)),
        ("I would rather Go to the desk number 1", False, ("rather go to the desk number 1", False)),
        ("</action> then <action>look", False, ("", True)),
        ("", False, ("", False)),
        ("<think>看</think><action>look</action>", True, ("look", False)),
        ("<action>look</action> 好", False, ("look", False)),
    ],
)
def test_projection(text, thinking, expected):
    assert AlfWorldPrompt(thinking, 2).project(text) == expected


@given(st.text(max_size=80), st.booleans())
def test_projection_takes_any_text(text, thinking):
    command, valid = AlfWorldPrompt(thinking, 0).project(text)
    assert command == command.lower() and (valid or len(command) <= len(text) + 30)
    wrapped = f"<think></think><action>{text}</action>"
    if "<" not in text and text.isascii():
        assert AlfWorldPrompt(thinking, 0).project(wrapped) == (text.lower().strip(), True)


# --- WebShop

SEARCHING = "WebShop [SEP] Instruction: [SEP] Find me {blue} tea [SEP] Search"
FOUND = (
    "Instruction: [SEP] Find me {blue} tea [SEP] Back to Search [SEP] Page 1 (Total results: 1) "
    "[SEP] Next > [SEP] B1 [SEP] Tea [SEP] $3"
)
CLICKS = ["click[back to search]", "click[next >]", "click[b1]"]

SHOP_FIRST = """
You are an expert autonomous agent operating in the WebShop e‑commerce environment. 
Your task is to: Find me {blue} tea.
Your current observation is: 'Search'.
Your admissible actions of the current situation are: 
[
'search[<your query>]',
'click[search]',
].

Now it's your turn to take one action for the current step.
You should first reason step-by-step about the current situation, \
then think carefully which admissible action best advances the shopping goal. \
This reasoning process MUST be enclosed within <think> </think> tags. 
Once you've finished your reasoning, \
you should choose an admissible action for current step and present it within <action> </action> tags.
"""

SHOP_LATER = """
You are an expert autonomous agent operating in the WebShop e‑commerce environment.
Your task is to: Find me {blue} tea.
Prior to this step, you have already taken 3 step(s). \
Below are the most recent 2 observations and the corresponding actions you took: \
[Observation 2: ''Search'', Action 2: 'search[tea]']
[Observation 3: 'seen 3', Action 3: 'did 3']
You are now at step 4 and your current observation is: \
'Back to Search' [SEP] 'Page 1 (Total results: 1)' [SEP] 'Next >' [SEP] 'B1' [SEP] 'Tea' [SEP] '$3'.
Your admissible actions of the current situation are: 
[
'click[back to search]',
'click[next >]',
'click[b1]',
].

Now it's your turn to take one action for the current step.
You should choose an admissible action for current step and present it within <action> </action> tags.
"""


def shopped(observation: str, command: str) -> Turn:
    return Turn([], [], [], observation=observation, text="", command=command, well_formed=True)


def test_a_shop_is_told_as_verl_agent_tells_it():
    first = ["search[<your query>]", "click[search]"]
    assert WebShopPrompt(thinking=True, history=2).message(SEARCHING, [], SEARCHING, first) == SHOP_FIRST
    assert WebShopPrompt(thinking=True, history=2).first(SEARCHING, first) == SHOP_FIRST
    past = [turn(1), shopped(SEARCHING, "search[tea]"), turn(3)]
    assert WebShopPrompt(thinking=False, history=2).message(SEARCHING, past, FOUND, CLICKS) == SHOP_LATER


def test_a_shop_prompt_without_history_still_tells_the_task():
    message = WebShopPrompt(thinking=False, history=0).message(SEARCHING, [turn(1)], FOUND, CLICKS)
    assert message == WebShopPrompt(thinking=False, history=2).message(SEARCHING, [], FOUND, CLICKS)
    assert (
        "Your task is to: Find me {blue} tea.\nYour current observation is: 'Back to Search'" in message
        and "Prior" not in message
    )


def test_a_shop_prompt_that_grows_too_long_loses_its_history():
    past = [shopped(FOUND + "x" * 12_000, "click[b1]")]
    message = WebShopPrompt(thinking=True, history=2).message(SEARCHING, past, FOUND, CLICKS)
    assert message == WebShopPrompt(thinking=True, history=0).message(SEARCHING, past, FOUND, CLICKS)
    assert "xxx" in WebShopPrompt(thinking=True, history=2).message(
        SEARCHING, [shopped(FOUND + "x" * 9_000, "click[b1]")], FOUND, CLICKS
    )


def test_in_one_growing_conversation_a_shop_shows_its_page():
    assert WebShopPrompt(thinking=True, history=2).following(FOUND, CLICKS) == (
        "'Back to Search' [SEP] 'Page 1 (Total results: 1)' [SEP] 'Next >' [SEP] 'B1' [SEP] 'Tea' [SEP] '$3'\n"
        "Your admissible actions of the current situation are: \n[\n'click[back to search]',\n'click[next >]',\n"
        "'click[b1]',\n]."
    )


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>so</think><action>Search[Blue Tea]</action>", True, ("search[blue tea]", True)),
        ("<action> click[b1] </action>", False, ("click[b1]", True)),
        ("<action>click[b1]</action>", True, ("click[b1]", False)),
        ("<action>click[b1]</action> 好", False, ("click[b1]", False)),
        ("I would click on the button Buy Now", False, ("n the button buy now", False)),
    ],
)
def test_projection_of_a_shoppers_answer(text, thinking, expected):
    assert WebShopPrompt(thinking, 2).project(text) == expected


# --- Search-QA

QUESTION = "who owns {the} lamp?"
SEARCH_FIRST = """
You are an expert agent tasked with answering the given question step-by-step.
Your question: who owns {the} lamp?

Now it's your turn to respond for the current step.
You should first conduct reasoning process. This process MUST be enclosed within <think> </think> tags. 
After completing your reasoning, choose only one of the following actions (do not perform both):
(1) If you find you lack some knowledge, you can call a search engine to get more external information \
using format: <search> your query </search>.
(2) If you have enough knowledge to answer the question confidently, \
provide your final answer within <answer> </answer> tags, \
without detailed illustrations. For example, <answer>Beijing</answer>.
"""
SEARCH_LATER = """
You are an expert agent tasked with answering the given question step-by-step.
Your question: who owns {the} lamp?

Prior to this step, you have already taken 2 step(s). \
Below is the interaction history where <search> </search> wrapped your past search queries and \
<information> </information> wrapped the corresponding search results returned by the external search engine. History:
Step 1:<search>lamp</search> <information>Doc 1</information>

Step 2:<search>{owner}</search> <information>Doc 2</information>


Now it's your turn to respond for the current step.
Choose only one of the following actions (do not perform both):
(1) If you find you lack some knowledge, you can call a search engine to get more external information \
using format: <search> your query </search>.
(2) If you have enough knowledge to answer the question confidently, \
provide your final answer within <answer> </answer> tags, \
without detailed illustrations. For example, <answer>Beijing</answer>.
"""
SEARCHES = [
    shopped(QUESTION, "<search>lamp</search>"),
    shopped("<information>Doc 1</information>", "<search>{owner}</search>"),
]


def test_a_question_and_its_searches_are_told_as_verl_agent_tells_them():
    assert SearchPrompt(thinking=True, history=4).message(QUESTION, [], QUESTION, []) == SEARCH_FIRST
    assert SearchPrompt(thinking=True, history=4).first(QUESTION, []) == SEARCH_FIRST
    assert (
        SearchPrompt(thinking=False, history=4).message(QUESTION, SEARCHES, "<information>Doc 2</information>", [])
        == SEARCH_LATER
    )
    one = SearchPrompt(thinking=False, history=1).message(QUESTION, SEARCHES, "<information>Doc 2</information>", [])
    assert one == SEARCH_LATER.replace("Step 1:<search>lamp</search> <information>Doc 1</information>\n\n", "")
    assert (
        SearchPrompt(thinking=True, history=0).message(QUESTION, SEARCHES, "<information>Doc 2</information>", [])
        == SEARCH_FIRST
    )


def test_of_a_question_that_was_cut_to_fit_no_more_is_told():
    prompt = SearchPrompt(thinking=True, history=4)
    assert prompt.message("who " * 900, [], "who [... cut ...] who", []) == prompt.first("who [... cut ...] who", [])


def test_in_one_growing_conversation_search_results_stand_alone():
    assert (
        SearchPrompt(thinking=True, history=4).following("<information>Doc 1</information>", [])
        == "<information>Doc 1</information>"
    )
    assert "no valid action" in SearchPrompt(thinking=True, history=4).following("", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>so</think><search> Red Lamp </search>", ("<search>Red Lamp</search>", True)),
        ("<answer>Ada</answer>", ("<answer>Ada</answer>", True)),
        ("<ANSWER>Ada</Answer>", ("<answer>Ada</answer>", True)),
        ("<search>a\nb</search> and more", ("<search>a\nb</search>", True)),
        ("<search>a</search><search>b</search>", ("<search>a</search>", False)),
        ("<answer>a</answer><search>b</search>", ("<search>b</search>", False)),
        ("<search>a</search><answer>b</answer>", ("<search>a</search>", False)),
        ("<search>a", ("", False)),
        ("a</search><answer>b</answer>", ("", False)),
        ("Ada", ("", False)),
    ],
)
def test_projection_of_a_searchers_answer(text, expected):
    assert SearchPrompt(thinking=True, history=4).project(text) == expected


@given(
    st.lists(
        st.sampled_from(
            ["<search>", "</search>", "<answer>", "</answer>", "<Search>", "</ANSWER>", "x", " ", "<", "\n"]
        ),
        max_size=9,
    ).map("".join)
)
@example("<search>x</answer></search>")
def test_a_well_formed_search_or_answer_is_one_the_world_takes(text):
    parse_command = pytest.importorskip("atod_fast.envs.searchqa.env").parse_command
    command, valid = SearchPrompt(thinking=False, history=4).project(text)
    assert valid == (bool(command) and len(re.findall("<search>|<answer>", text, re.IGNORECASE)) == 1)
    kind, words = parse_command(command) or (None, None)
    assert not valid or (kind is not None and f"<{kind}>{words}</{kind}>" == command)


def test_a_world_brings_its_own_prompt_or_has_one_here():
    class Own:
        def prompt(self, thinking, history):
            return PlainPrompt(thinking, history, "mine")

    own = prompt_for("x:Own", Own(), thinking=True, history=3)
    assert (own.instructions, own.thinking, own.history) == ("mine", True, 3)
    found = prompt_for("alfworld", make("alfworld", generate=1), thinking=True, history=3)
    assert isinstance(found, AlfWorldPrompt) and found.thinking and found.history == 3
    pytest.importorskip("bm25s")
    assert isinstance(prompt_for("webshop", make("webshop", generate=30), thinking=True, history=3), WebShopPrompt)
    assert isinstance(prompt_for("searchqa", make("searchqa", generate=1), thinking=True, history=3), SearchPrompt)
    with pytest.raises(UserError, match="env.name='x:World' has no prompt; .*PlainPrompt"):
        prompt_for("x:World", object(), thinking=False, history=2)
