"""ALFWorld's scripted expert wins generated and official games, from any state."""

from __future__ import annotations

from random import Random

import pytest

from atod_fast.envs.alfworld.engine import FastAlfWorld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.expert import LOOKS, AlfWorldExpert
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import TASK_TYPES, Spec, generate
from atod_fast.errors import UserError
from helpers.alfworld import as_2_1_1
from helpers.experts import play


@pytest.mark.parametrize("kind", TASK_TYPES)
@pytest.mark.parametrize("older", [False, True], ids=["2.1.2", "2.1.1"])
def test_alfworld_games_of_every_type_are_won_in_both_wordings(kind, older):
    for number in range(8):
        _, data = generate(Spec(seed=3, task_types=(kind,), scene="full"), number)
        state = FastAlfWorld(Game.parse(as_2_1_1(data) if older else data, "game"))
        observation = state.reset()
        expert = AlfWorldExpert(state)
        for _ in range(50):
            observation, accepted = state.step(expert.act(observation, {}))
            assert accepted
            if state.won:
                break
        assert state.won, (kind, number)


def test_an_alfworld_expert_wins_after_a_bad_player_and_without_knowing_what_it_did():
    env = AlfWorld(generate=40, seed=2, scene="full")
    won = 0
    for task in range(len(env)):
        rng = Random(task)
        observation, info = env.reset(0, task)
        for _ in range(rng.randrange(12)):
            observation, _, over, _, info = env.step(rng.choice(info["admissible_actions"]))
            if over:
                break
        expert = env.expert()
        for _ in range(60):
            if info["won"]:
                break
            observation, _, _, _, info = env.step(expert.act(observation, info))
        won += info["won"]
    assert won == len(env)


def test_an_alfworld_expert_searches_and_does_not_search_for_ever():
    env = AlfWorld(generate=60, seed=4, scene="full", task_types=["pick_and_place_simple"])
    looked = []
    for task in range(len(env)):
        commands, info = play(env, task, 50)
        assert info["won"]
        before = commands[: next(at for at, command in enumerate(commands) if command.startswith("take "))]
        looked.append(sum(command.startswith("go to ") for command in before))
    assert max(looked) <= LOOKS + 2
    assert sum(looked) / len(looked) > 1.5, "it goes straight to what it cannot have seen"


def test_official_alfworld_games_are_won(official):
    env = AlfWorld(games=official)
    played = [play(env, task, 50) for task in range(0, len(env), max(1, len(env) // 40))]
    assert sum(info["won"] for _, info in played) >= 0.95 * len(played)


def test_the_alfworld_expert_refuses_textworld():
    env = AlfWorld(generate=1)
    env.engine = None
    with pytest.raises(UserError, match="engine='fast'"):
        env.expert()
