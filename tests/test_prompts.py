"""Prompts and projection of ALFWorld, word for word as verl-agent's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_fast.envs import make
from atod_fast.errors import UserError
from atod_fast.rollout.prompts import AlfWorldPrompt, prompt_for
from atod_fast.trajectory import Turn

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
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags.
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""

LATER = """
You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: put a mug in desk.
Prior to this step, you have already taken 3 step(s). Below are the most recent 2 observations and the corresponding actions you took: \
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
    return Turn([], [], [], observation=f"seen {n}", text="", command=f"did {n}", valid=True)


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
        "You see a mug 1.\nYour admissible actions of the current situation are: ['go to desk 1'\n 'inventory'\n 'look']."
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


def test_a_world_brings_its_own_prompt_or_has_one_here():
    class Own:
        def prompt(self, thinking, history):
            return "mine", thinking, history

    assert prompt_for("x:Own", Own(), thinking=True, history=3) == ("mine", True, 3)
    found = prompt_for("alfworld", make("alfworld", generate=1), thinking=True, history=3)
    assert isinstance(found, AlfWorldPrompt) and found.thinking and found.history == 3
    with pytest.raises(UserError, match="env.name='x:World' has no prompt"):
        prompt_for("x:World", object(), thinking=False, history=2)
