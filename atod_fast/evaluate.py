"""Success of a checkpoint on held-out tasks.

    python -m atod_fast.evaluate runs/demo/hf eval.tasks=2000 eval.temperature=0.5 --out evaluation.json --transcripts episodes.jsonl
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
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from atod_fast import files, ranks
from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.interrupt import Interrupt, Interrupted
from atod_fast.models import load_config, load_tokenizer, stop_ids
from atod_fast.observe import transcripts
from atod_fast.observe.console import Console
from atod_fast.records import Trajectory, outcomes, success_by_type
from atod_fast.rollout import player
from atod_fast.rollout.actor import Actor, dated, make_engine
from atod_fast.rollout.duration import limit
from atod_fast.settings import check_engines, check_env, check_model

EPISODE = ("task", "task_id", "task_type", "success", "score", "failure")


def evaluate(model: str, config: Config, console: Console, interrupt: Interrupt) -> list[Trajectory]:
    """Trajectories of `model` on the first `eval.tasks` held-out tasks at `eval.temperature`, on every rank. Collective."""
    device, _ = ranks.start()
    with ranks.together():
        engines = check_engines(config, ranks.world_size())
        check_env(config)
        shape, tokenizer = load_config(model), load_tokenizer(model)
        check_model(config, model, shape.to_dict())
    config = dated(config)
    with ranks.together():
        columns = shape.get_text_config().vocab_size
        actor = Actor(config, tokenizer, columns, stop_ids(model), rank=ranks.rank(), ranks=ranks.world_size())
    ranks.be_patient(limit(config, engines, instant=actor.world("eval").instant))
    engine = make_engine(config, model, device, say=console.say)
    ranks.doing("evaluating")
    console.say(f"{model}: {config.eval.tasks} tasks of {config.env.name}")
    return player.play(partial(actor.evaluate, engine), "evaluating", config, console, interrupt)


def summary(trajectories: list[Trajectory]) -> dict:
    """Success overall and by task type, the world's mean score where it has one, mean turns, share of invalid actions; each
    episode in task order, and the outcomes as one text of 0 and 1.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return {
        "tasks": len(trajectories),
        **outcomes(trajectories),
        "success_by_type": success_by_type(trajectories),
        "invalid_actions": sum(not turn.valid for turn in turns) / len(turns) if turns else 0.0,
        "outcomes": "".join("1" if t.success else "0" for t in trajectories),
        "episodes": [{key: getattr(t, key) for key in EPISODE} | {"turns": len(t.turns)} for t in trajectories],
    }


def make_place(option: str, path: Path) -> None:
    """Make the folder of the file `path`, and see that it can be written: before the episodes are played, not after.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; give a file that can be written") from None


@record
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 an unexpected error, 2 bad usage or input, 3 a guard stopped it (log-probs that are not
    finite, an engine that broke down, too many failed environments, a missing rank), 130 interrupted.
    """
    speaks, started = ranks.rank() == 0, False
    with Interrupt() as interrupt:
        try:
            arguments, config = cli.parse_evaluation(sys.argv[1:] if argv is None else argv, __doc__)
            started = True
            if arguments.out and arguments.out == arguments.transcripts:
                raise UserError(f"--out and --transcripts are both {arguments.out}; give two files")
            for option, path in (("--out", arguments.out), ("--transcripts", arguments.transcripts)):
                if path is not None and speaks:
                    make_place(option, path)
            trajectories = evaluate(arguments.model, config, Console(speaks), interrupt)
            if speaks:
                report(arguments, config, trajectories)
            return 0
        except KeyboardInterrupt:  # the second
            return Interrupted.exit_code
        except (Exception, SystemExit) as error:
            if not started and isinstance(error, SystemExit):  # --help
                raise
            stopped, line = ranks.ending(error)
        finally:
            ranks.stop()
        if speaks:
            print(f"atod_fast: {line or 'interrupted'}", file=sys.stderr)
        return stopped.exit_code


def report(arguments: argparse.Namespace, config: Config, trajectories: list[Trajectory]) -> None:
    """Print the summary, and write the files that were asked for."""
    found = summary(trajectories)
    score = f", mean score {found['score']:.3f}," if "score" in found else ""
    print(f"{arguments.model}: success {found['success']:.1%}{score} on {found['tasks']} tasks at temperature {config.eval.temperature:g}")
    for kind, success in found["success_by_type"].items():
        print(f"  {kind or 'task'}: {success:.1%}")
    print(f"  {found['turns']:.1f} turns an episode, {found['invalid_actions']:.1%} of actions invalid, {found['failed_environments']} environments failed")
    try:
        if arguments.out:
            facts = {"model": arguments.model, "temperature": config.eval.temperature, "env": config.env.model_dump(mode="json")}
            files.write(arguments.out, json.dumps(facts | found, indent=1) + "\n")
        if arguments.transcripts:
            transcripts.write(arguments.transcripts, trajectories, load_tokenizer(arguments.model))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a file that can be written") from None


if __name__ == "__main__":
    sys.exit(main())
