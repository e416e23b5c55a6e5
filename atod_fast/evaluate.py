"""Measure the success rate of a model on held-out tasks.

    python -m atod_fast.evaluate runs/demo/hf eval.tasks=2000 --out evaluation.json --transcripts episodes.jsonl
    python -m atod_fast.evaluate Qwen/Qwen3-0.6B --preset own env.name=guess:Guess env.eval='{tasks=400, seed=1}'
    torchrun --nproc_per_node 2 -m atod_fast.evaluate demo:teacher

Episodes have the same seeds for every model, so that two models can be compared game by game.
"""

from __future__ import annotations

import sys

from atod_fast import cli

if __name__ == "__main__":
    cli.answer_early(lambda argv: cli.parse_evaluation(argv, __doc__))

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from atod_fast import entry, files, ranks
from atod_fast.config import Config
from atod_fast.config.settings import check_engines, check_env, check_model
from atod_fast.errors import UserError
from atod_fast.interrupt import Interrupt
from atod_fast.models import check_quantised, load_config, load_tokenizer, skeleton
from atod_fast.observe import transcripts
from atod_fast.observe.console import Console
from atod_fast.plan.room import room_alone
from atod_fast.plan.shapes import whole_shape_of
from atod_fast.preflight import check_alike, model_files
from atod_fast.records import Trajectory, outcomes, success_by_part, success_by_type
from atod_fast.rollout.actor import Actor, dated
from atod_fast.rollout.engines import make_engine
from atod_fast.rollout.engines.protocol import Engine
from atod_fast.rollout.player import Player
from atod_fast.run import open_actor
from atod_fast.runtime import Runtime

EPISODE = ("task", "task_id", "task_type", "success", "score", "failure")


def evaluate(model: str, config: Config, console: Console, interrupt: Interrupt) -> list[Trajectory]:
    """Play the first `eval.tasks` held-out tasks with `model` at `eval.temperature`. Collective.

    Returns all ranks' trajectories on every rank. Raises UserError if the model or the settings cannot be used.
    """
    actor, engine = prepare(model, config, console, "eval")
    ranks.doing("evaluating")
    console.say(f"{model}: {config.eval.tasks} tasks of {config.env.name}")
    player = Player(actor.config, progress=console.progress, interrupt=interrupt, say=console.say)
    return player.play("evaluating", partial(actor.evaluate, engine))


def prepare(model: str, config: Config, console: Console, split: str) -> tuple[Actor, Engine]:
    """Return this rank's actor with env.`split` open, and the engine of `model`. Collective; it starts the ranks.

    Raises UserError if the model or the settings cannot be used.
    """
    device, _ = ranks.start()
    with ranks.together():
        check_engines(config, ranks.world_size(), ranks.node_size())
        check_env(config)
        shape, tokenizer = load_config(model), load_tokenizer(model)
        check_model(config, model, shape.to_dict())
        check_quantised(model, shape)
        facts = model_files(model, skeleton(shape, model))
    check_alike({f"model path {model!r}": facts})
    config = dated(config)
    runtime = Runtime.of(config, device, shapes={"student": shape}, ranks=ranks.world_size())
    runtime = replace(runtime, room=room_alone(config, whole_shape_of(skeleton(shape, model)), runtime))
    actor = open_actor(config, runtime, model, tokenizer, shape.get_text_config().vocab_size, [split])
    parts = runtime.engine, replace(runtime.student, path=model), device, runtime.room
    return actor, make_engine(config, *parts, say=console.say)


def summary(trajectories: list[Trajectory]) -> dict:
    """Return the summary of an evaluation.

    That is: success overall, by part of a mix and by task type, the mean score if the environment gives scores, mean
    turns, the share of invalid actions, each episode in task order, and the outcomes as one text of 0 and 1.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return {
        "tasks": len(trajectories),
        **outcomes(trajectories),
        **({"success_by_part": parts} if (parts := success_by_part(trajectories)) else {}),
        "success_by_type": success_by_type(trajectories),
        "invalid_actions": sum(not turn.valid for turn in turns) / len(turns) if turns else 0.0,
        "outcomes": "".join("1" if t.success else "0" for t in trajectories),
        "episodes": [{key: getattr(t, key) for key in EPISODE} | {"turns": len(t.turns)} for t in trajectories],
    }


def make_place(option: str, path: Path) -> None:
    """Make the folder of the file `path` and open the file for writing, before any episode is played.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; give a file that can be written") from None


def start(asked: tuple[argparse.Namespace, Config], interrupt: Interrupt) -> None:
    """Evaluate as the command line says, then print and write the results."""
    arguments, config = asked
    speaks = ranks.rank() == 0
    if arguments.out and arguments.out == arguments.transcripts:
        raise UserError(f"--out and --transcripts are both {arguments.out}; give two files")
    for option, path in (("--out", arguments.out), ("--transcripts", arguments.transcripts)):
        if path is not None and speaks:
            make_place(option, path)
    trajectories = evaluate(arguments.model, config, Console(speaks), interrupt)
    if speaks:
        report(arguments, config, trajectories)


@record
def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0 done, 1 an unexpected error, 2 bad usage or input, 3 a guard stopped it (log-probs that are not finite, an engine
    that broke down, too many failed environments, a missing rank), 130 interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return entry.run(lambda: cli.parse_evaluation(arguments, __doc__), start, interrupted="interrupted")


def report(arguments: argparse.Namespace, config: Config, trajectories: list[Trajectory]) -> None:
    """Print the summary, and write the files of `--out` and `--transcripts`."""
    found = summary(trajectories)
    score = f", mean score {found['score']:.3f}," if "score" in found else ""
    where = f"{found['tasks']} tasks at temperature {config.eval.temperature:g}"
    print(f"{arguments.model}: success {found['success']:.1%}{score} on {where}")
    for kind, success in sorted((found["success_by_type"] | found.get("success_by_part", {})).items()):
        print(f"  {kind or 'task'}: {success:.1%}")
    invalid, failed = f"{found['invalid_actions']:.1%}", found["failed_environments"]
    print(f"  {found['turns']:.1f} turns an episode, {invalid} of actions invalid, {failed} environments failed")
    try:
        if arguments.out:
            facts = {
                "model": arguments.model,
                "temperature": config.eval.temperature,
                "env": config.env.model_dump(mode="json"),
            }
            files.write(arguments.out, json.dumps(facts | found, indent=1) + "\n")
        if arguments.transcripts:
            transcripts.write(arguments.transcripts, trajectories, load_tokenizer(arguments.model))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a file that can be written") from None


if __name__ == "__main__":
    sys.exit(main())
