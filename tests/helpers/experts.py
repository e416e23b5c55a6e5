"""Play an environment's scripted expert."""

from __future__ import annotations

from atod_fast.envs.experts import COMMAND, Demonstrated


def play(env, task: int, most: int) -> tuple[list[str], dict]:
    """Return the commands and the last info of an episode that the expert plays; each command is accepted."""
    shown = Demonstrated(env)
    _, info = shown.reset(0, task)
    commands = []
    over = False
    while not over and len(commands) < most:
        commands.append(info[COMMAND])
        _, _, over, _, info = shown.step(commands[-1])
        assert info["is_action_valid"], commands
    assert COMMAND not in info or not over
    return commands, info
