"""Collect conversations to learn from: play a model, or an environment's scripted expert, on training tasks.

    python -m atod_fast.collect expert --preset alfworld-1.7b --out demos.jsonl n=1000
    python -m atod_fast.collect runs/demo/hf --config runs/demo/config.toml --out played.jsonl n=500 train.seed=1
    torchrun --nproc_per_node 2 -m atod_fast.collect demo:teacher --out played.jsonl --all

Writes JSON lines, one for each conversation of an episode with success. An expert uses hidden state.
"""

from __future__ import annotations

import sys

from atod_fast import cli

if __name__ == "__main__":
    cli.answer_early(lambda argv: cli.parse_collection(argv, __doc__))

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.distributed.elastic.multiprocessing.errors import record

from atod_fast import entry, files, ranks
from atod_fast.config import Config
from atod_fast.config.settings import check_env
from atod_fast.envs.experts import Demonstrated, check_expert
from atod_fast.envs.prompt import prompt_for
from atod_fast.envs.protocol import Environment
from atod_fast.errors import UserError
from atod_fast.evaluate import prepare
from atod_fast.interrupt import Interrupt, Interrupted
from atod_fast.models import load_config, load_tokenizer, stop_ids
from atod_fast.observe.console import Console
from atod_fast.records import Trajectory, outcomes, success_by_type
from atod_fast.renderers import make_renderer
from atod_fast.rollout.actor import Actor, Progress, dated
from atod_fast.rollout.agent import Episode
from atod_fast.rollout.duration import limit
from atod_fast.rollout.engines.protocol import Engine
from atod_fast.rollout.player import Player
from atod_fast.rollout.rendering import Renderer
from atod_fast.rollout.scripted import Recorder, Script, Untokenized

AT_ONCE = 512  # episodes of all ranks that are played before their lines are written
CONCURRENCY = 64  # episodes that an expert plays at a time, if rollout.concurrency says nothing


def conversations(trajectory: Trajectory, recorder: Recorder, tokens: bool) -> Iterator[dict[str, Any]]:
    """Yield the lines of an episode: with context `full` one, with context `window` one for each turn.

    Each has the facts of the whole episode. tokens: add the ids of prompts and responses.
    """
    turns = trajectory.turns
    parts = [[turn] for turn in turns] if trajectory.context == "window" else [turns]
    shown = [recorder.messages[tuple(np.asarray(turn.prompt).tolist())] for turn in turns]
    for first, part in enumerate(parts):
        messages = []
        for turn, asked in zip(part, shown[first : first + len(part)], strict=True):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.text}]
        line: dict[str, Any] = {
            "messages": messages,
            "valid": [turn.valid for turn in part],
            "stopped": [turn.stopped for turn in part],
            "task": trajectory.task,
            "task_id": trajectory.task_id,
            "task_type": trajectory.task_type,
            "part": trajectory.part,
            "episode": trajectory.group,
            "turn": first,
            "turns": len(turns),
            "reward": trajectory.reward,
            "success": trajectory.success,
            "score": trajectory.score,
            "truncated": trajectory.truncated,
        }
        if tokens:
            line["prompt_ids"] = [np.asarray(turn.prompt).tolist() for turn in part]
            line["response_ids"] = [np.asarray(turn.action).tolist() for turn in part]
        yield line


def with_model(model: str, config: Config, console: Console, split: str) -> tuple[Actor, Engine, Environment, Recorder]:
    """Return what plays `model` on env.`split`: actor, engine, environment, renderer. Collective."""
    actor, engine = prepare(model, config, console, split)
    return actor, engine, actor.world(split), Recorder(actor.renderer)


def with_expert(config: Config, split: str, plain: bool) -> tuple[Actor, Engine, Environment, Recorder]:
    """Return what plays the expert of env.`split`: actor, engine, environment, renderer. Collective.

    The renderer is that of student.path; with `plain` messages are not tokenized.

    Raises:
        UserError: the environment has no expert, or the student's tokenizer cannot be loaded or used.
    """
    ranks.start()
    config = dated(config)
    rollout, path = config.rollout, config.student.path

    def renderer(env: Environment) -> Renderer:
        check_expert(config.env.name, env)
        if plain:
            words = prompt_for(config.env.name, env, thinking=rollout.thinking, history=rollout.history)
            return Untokenized(words, context=rollout.context, thinking=rollout.thinking)
        try:
            shape, tokenizer, stops = load_config(path), load_tokenizer(path), stop_ids(path)
        except UserError as error:
            raise UserError(f"{error}; student.path= writes messages without tokens") from None
        return make_renderer(config, tokenizer, shape.get_text_config().vocab_size, env, stops)

    with ranks.together():
        check_env(config)
        actor = Actor(config, renderer, rank=ranks.rank(), ranks=ranks.world_size(), split=split)
        env = actor.world(split)
    concurrency = rollout.concurrency or CONCURRENCY
    script = Script(actor.renderer, longest=rollout.longest, most=rollout.response_tokens, concurrency=concurrency)
    return actor, script, Demonstrated(env), script


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[TextIO]:
    """Open a file that appears as `path` at the end of the block; on an error nothing appears.

    Raises:
        UserError: it exists and is not to be replaced, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise UserError(f"--out {path} exists; give another file, or --overwrite")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        if error.filename not in (None, str(path), str(path.parent), str(files.partial(path))):
            raise
        raise UserError(f"--out {path}: {error.strerror}; give a file that can be written") from None


def collect(arguments: argparse.Namespace, config: Config, console: Console, interrupt: Interrupt) -> None:
    """Play and write as the command line says, then print what was found. Collective.

    The lines are in the order of the episodes, whatever the number of ranks. An interruption keeps the lines of the
    episodes played before.

    Raises:
        UserError: a setting, the model, the environment or the file cannot be used, or no episode succeeded.
    """
    expert, split = arguments.model == "expert", arguments.split
    with ExitStack() as stack:
        ranks.start()
        with ranks.together():
            place = new_file(arguments.out, arguments.overwrite) if ranks.rank() == 0 else nullcontext()
            file = stack.enter_context(place)
        actor, engine, env, recorder = (
            with_expert(config, split, arguments.plain)
            if expert
            else with_model(arguments.model, config, console, split)
        )
        count = arguments.n or len(env)
        if expert and count > len(env):
            raise UserError(
                f"n={count} exceeds the {len(env)} tasks of env.{split}, each of which an expert plays alike; lower n"
            )
        sized = config.eval.model_copy(update={"tasks": min(count, AT_ONCE)})
        ranks.be_patient(
            limit(config.model_copy(update={"eval": sized}), ranks.world_size(), engine.concurrency, env.instant)
        )
        ranks.doing("collecting")
        console.say(f"{arguments.model}: {count} episodes of {config.env.name}, env.{split}")
        player = Player(actor.config, progress=console.progress, interrupt=interrupt, say=console.say)
        episodes = actor.to_collect(split, count)
        everyone: list[Trajectory] = []
        written = 0
        try:
            for start in range(0, count, AT_ONCE):
                part = episodes[start : start + AT_ONCE]
                label = f"collecting, {start} of {count} done"
                played, lines = _play(actor, engine, env, recorder, player, label, part, tokens=not arguments.plain)
                everyone += played
                for number, line in lines:
                    if arguments.all or played[number - start].success:
                        written += 1
                        if file is not None:
                            file.write(line + "\n")
        except Interrupted as stopped:
            if not written:
                raise
            stopped.add_note(f"interrupted after {len(everyone)} of {count} episodes")
            _finish(stack, console, arguments, everyone, written)
            raise
        if not written:
            raise UserError(f"none of {count} episodes succeeded, so {arguments.out} is not written; --all keeps them")
        _finish(stack, console, arguments, everyone, written)


def _play(
    actor: Actor,
    engine: Engine,
    env: Environment,
    recorder: Recorder,
    player: Player,
    label: str,
    episodes: Sequence[Episode],
    tokens: bool,
) -> tuple[list[Trajectory], list[tuple[int, str]]]:
    """Play `episodes`; return all ranks' trajectories, and the lines of those that did not fail, by episode."""
    mine: list[Trajectory] = []

    def act(progress: Progress) -> list[Trajectory]:
        mine[:] = actor.collect(engine, env, recorder, episodes, progress)
        return mine

    everyone = player.play(label, act)
    lines = [
        (trajectory.group, json.dumps(line))
        for trajectory in mine
        if trajectory.failure is None
        for line in conversations(trajectory, recorder, tokens)
    ]
    recorder.messages.clear()
    gathered = [(number, line) for part in ranks.everyones(json.dumps(lines)) for number, line in json.loads(part)]
    return everyone, sorted(gathered, key=lambda pair: pair[0])


def _finish(
    stack: ExitStack, console: Console, arguments: argparse.Namespace, played: Sequence[Trajectory], written: int
) -> None:
    """Make the file of --out appear, and print what was played."""
    with ranks.together():
        stack.close()
    found = outcomes(played)
    score = f", mean score {found['score']:.3f}" if "score" in found else ""
    console.say(f"{arguments.model}: success {found['success']:.1%}{score} in {len(played)} episodes")
    for kind, success in success_by_type(played).items():
        console.say(f"  {kind or 'task'}: {success:.1%}")
    console.say(f"  {found['turns']:.1f} turns an episode, {found['failed_environments']} environments failed")
    console.say(f"wrote {written} conversations to {arguments.out}")


def start(asked: tuple[argparse.Namespace, Config], interrupt: Interrupt) -> None:
    """Collect as the command line says."""
    collect(*asked, Console(ranks.rank() == 0), interrupt)


@record
def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code, as `evaluate.main` does."""
    arguments = sys.argv[1:] if argv is None else argv
    return entry.run(lambda: cli.parse_collection(arguments, __doc__), start, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
