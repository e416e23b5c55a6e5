"""A training run: its set-up, and how it plays, evaluates, saves and ends. `train.py` has the training loop.

`open_actor` is the part of the set-up that `evaluate.py` shares.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast import preflight, ranks, reporting, rundir, schedules
from atod_fast.cli import Options
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning, same_tasks
from atod_fast.errors import GuardError, RankLost, UserError
from atod_fast.interrupt import Interrupt, Interrupted
from atod_fast.models import stop_ids
from atod_fast.observe.console import Console
from atod_fast.policy import checkpoint
from atod_fast.policy.export import export
from atod_fast.policy.learner import Learner, MiniBatches, Scored
from atod_fast.policy.resync import stream_weights
from atod_fast.records import Trajectory
from atod_fast.renderers import make_renderer
from atod_fast.rollout.actor import Actor, Group, dated
from atod_fast.rollout.duration import limit
from atod_fast.rollout.engines import make_engine
from atod_fast.rollout.engines.protocol import Engine
from atod_fast.rollout.player import Player
from atod_fast.rollout.resampling import resample
from atod_fast.runtime import Runtime, slow_engine

# Largest mean |log-prob difference| of an engine that holds the trainer's weights, by compute precision.
LOGPROB_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def open_actor(
    config: Config,
    runtime: Runtime,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    columns: int,
    splits: Sequence[str],
) -> Actor:
    """Return this rank's actor with the environments of `splits` open, and set how long ranks wait for each other.

    path: the model that plays. columns: width of its head. Collective.

    Raises:
        UserError: on every rank, if an environment cannot be opened or the model's prompt cannot be made on any rank.
    """
    with ranks.together():  # files may be missing on only one machine
        stops = stop_ids(path)
        actor = Actor(
            config,
            partial(make_renderer, config, tokenizer, columns, stop_ids=stops),
            rank=ranks.rank(),
            ranks=ranks.world_size(),
            split=splits[0],
        )
        for split in splits:  # so that errors come before anything is played
            actor.world(split)
    rooms = [runtime.room, runtime.teacher_room] if config.teacher_plays else [runtime.room]
    together = min(room.concurrency for room in rooms)
    ranks.be_patient(limit(config, runtime.engines, together, instant=actor.world(splits[0]).instant))
    return actor


class Run:
    """One training run on this rank.

    Raises (when it is made):
        Finished: the run that was to be resumed has nothing left to do.
        UserError: the settings, a model, an environment or the run folder cannot be used.
    """

    def __init__(self, options: Options, interrupt: Interrupt, callbacks: Sequence[reporting.Callback] = ()):
        self.interrupt = interrupt
        device, _ = ranks.start()
        self.console = console = Console(speaks=ranks.rank() == 0)
        place = rundir.agree(options)
        self.run_dir, resume, finished = place
        config = rundir.agreed_config(options, resume)
        day = ranks.by_first(lambda: checkpoint.read_state(resume).get("date", "") if resume else "")
        self.config = config = dated(config, day)
        console.splits = config.evaluated
        if finished:
            steps, model = config.train.steps, self.run_dir / "hf"
            raise rundir.Finished(
                self.run_dir,
                f"{self.run_dir} is finished: {steps} steps, model {model}; give more train.steps to go on",
            )
        if options.resume == "auto" and not resume:
            console.say(f"--resume auto: {self.run_dir} holds no checkpoint; this is a new run")
        mesh = ranks.mesh(device, config.train.shard)
        with ranks.together():  # before anything is loaded or opened
            found = preflight.look(config, ranks.world_size(), device, node=ranks.node_size(), mesh=mesh)
        preflight.check_alike(found.files)
        self.runtime = runtime = found.runtime
        self.apart = self._has_folder_apart(copies=mesh.ndim == 2)
        torch.manual_seed(config.train.seed)

        for line in (*same_tasks(config), *slow_engine(config, runtime), *found.tight(config)):
            console.say(f"warning: {line}", style="bold yellow")
        student, tokenizer = found.models["student"], found.models["student"].tokenizer
        assert tokenizer is not None, "only a dry run goes without one"
        if warning := demo_values_warning(config, student.parameters):
            console.say(warning, style="bold yellow")
        splits = *config.evaluated, "train"
        self.actor = open_actor(config, runtime, config.student.path, tokenizer, student.columns, splits)
        # Before the trainer's models: a vLLM that sleeps needs its memory while it is built, then frees it.
        parts = runtime.engine, runtime.student, device, runtime.room
        self.engine = make_engine(config, *parts, filled=False, say=console.say)
        self.player = Player(
            config,
            progress=console.progress,
            interrupt=interrupt,
            say=console.say,
            refill=self.resync,
        )
        with ranks.together():
            self.learner = Learner(config, runtime, self.actor.renderer.valid_columns)

        self.done = 0  # steps
        self.before: dict[str, float] = {}  # evaluations before training: the student's, and the teacher's
        self.after: float | None = None  # the student's, when all steps are done
        state = checkpoint.load(resume, self.learner.student, self.learner.optimizer) if resume else {}
        if resume:
            self.done, self.before = state["step"], state["before"]
            console.say(f"resumed from {resume}")
        self.whole_at = self.learner.updates  # number of updates after step `done`; more means a half-done step
        self.skipped_at = self.learner.skipped = state.get("skipped", 0)  # updates in a row up to the end of that step
        self.saved = self.done if place.here else 0  # the newest step with a checkpoint in the run folder
        self.best: checkpoint.Best | None = None  # of the checkpoints there, with checkpoint.keep_best
        self.reporter = reporting.Reporter(self.run_dir, config, console, tokenizer, callbacks)
        with ranks.together():
            if ranks.rank() == 0:
                beyond = self.done if place.here else -1
                rundir.open_folder(
                    self.run_dir,
                    config,
                    beyond,
                    options.command,
                    device,
                    from_step=self.done,
                    say=console.say,
                )
        if config.checkpoint.keep_best and place.here:
            # Only successes on env.dev can be compared with each other.
            told = state.get("best") if "dev/success" in self.before else None
            self.best = checkpoint.agreed_best(self.run_dir, told)
        console.say(f"run folder {self.run_dir}, rollouts by {runtime.engine}")
        self.resync()
        if not resume:
            self.before = self.evaluate_before()
            self.reporter.write({"step": 0, **self.before})
        try:
            self.kappa = schedules.make(config.schedule.kappa, self.before.get("dev/teacher_success", 0.0))
        except UserError as error:
            raise UserError(f"{error}; it played {config.eval.tasks} tasks of env.dev") from None
        self.rho = schedules.make(config.schedule.rho)
        self.learning_rate = schedules.LearningRate(config.train)
        if resume:
            self.kappa.load_state_dict(state.get("adaptive") or {})

    def _has_folder_apart(self, *, copies: bool) -> bool:
        """Return whether this rank is its node's first and its run folder is another than rank 0's. Collective.

        A warning says so if any rank's is. copies: each node has a whole copy of the parameters.
        """
        apart = rundir.apart(self.run_dir)
        if apart:
            self.console.say(
                f"warning: {self.run_dir} is not shared by all nodes (rank {apart[0]} does not see it): rank 0's node "
                f"holds {'all' if copies else 'a part'} of every checkpoint; before you resume, copy them whole to "
                "every node",
                style="bold yellow",
            )
        return ranks.rank() in apart

    # What a step consists of

    def roll_out(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Play the step's episodes, with train.resample_flat in several rounds, then put the engine to sleep.

        Returns all ranks' trajectories on every rank, and the metrics of the rounds.
        """
        everyone = self.player.play(f"step {step}", partial(self.actor.train, self.engine, step))
        metrics: dict[str, float] = {}
        if rounds := self.config.train.resample_flat:

            def play(groups: Sequence[Group], beside: Sequence[Trajectory]) -> list[Trajectory]:
                label = f"step {step}, round {groups[0].attempt} for {len(groups)} flat groups"
                return self.player.play(label, partial(self.actor.train, self.engine, step, groups=groups), beside)

            found = resample(everyone, self.actor.spare_tasks(step), rounds, play)
            everyone = found.trajectories
            metrics = {"rollout/extra_groups": found.played, "rollout/replaced_groups": found.replaced}
        self.engine.sleep()
        return everyone, metrics

    def checked_gap(self, minibatches: MiniBatches[Scored], step: int) -> dict[str, float]:
        """Compare the rollout engine's log-probs with the trainer's.

        Raises:
            GuardError: they differ by more than guard.logprob_gap on average.
        """
        mean, largest = self.learner.logprob_gap(minibatches)
        limit = self.config.guard.logprob_gap or LOGPROB_GAP[self.runtime.student_dtype]
        if not mean <= limit:
            raise GuardError(
                f"step {step}: rollout and trainer log-probs differ by {mean:.2g} on average (limit {limit:g}): the "
                "engine does not hold the trainer's weights, or computes otherwise; check rollout.engine and "
                "student.compute_dtype, or raise guard.logprob_gap"
            )
        return {"sync/logprob_gap": mean, "sync/logprob_gap_max": largest}

    def learnt(self, step: int) -> None:
        """Note that step `step` is complete in the weights."""
        self.done, self.whole_at, self.skipped_at = step, self.learner.updates, self.learner.skipped

    def resync(self) -> int:
        """Wake the rollout engine and send it the student's weights. Returns the bytes sent."""
        sent = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal sent
            for name, weight in stream_weights(self.learner.student):
                sent += weight.nbytes
                yield name, weight

        self.learner.make_room()
        self.engine.load_weights(counted())
        return sent

    @contextmanager
    def reported(
        self,
        metrics: dict,
        trajectories: Sequence[Trajectory],
        signals: Mapping[str, Tensor],
    ) -> Iterator[None]:
        """At the end of the block, write the step's trajectories and its `metrics`, with those that the block added.

        An error in the block is raised after that; RankLost at once, as no collective is possible any more.
        """
        stopped: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            stopped = error
        ranks.doing(f"writing down step {metrics['step']}")
        with ranks.together():
            self.reporter.step(metrics, trajectories, signals)
        if stopped:
            raise stopped

    # Evaluation

    def evaluate(self, engine: Engine, label: str, split: str = "eval", teacher: bool = False) -> dict[str, float]:
        """Play the tasks of env.`split` at eval.temperature with the student (or the teacher) in `engine`.

        Returns the metrics: success, turns, failed environments, score, success by task type.
        """
        label += " on env.dev" * (split == "dev")
        ranks.doing(label)
        everyone = self.player.play(label, partial(self.actor.evaluate, engine, split))
        metrics = reporting.evaluation_metrics(everyone, f"{split}/" + "teacher_" * teacher)
        with ranks.together():
            name = f"{split}_{self.done:06d}" + "_teacher" * teacher
            self.reporter.evaluation(name, self.done, metrics, everyone)
        if lost := sum(t.failure is not None for t in everyone):
            tasks = self.config.eval.tasks
            self.console.say(f"{label}: {lost} of {tasks} environments failed, and count as not solved")
        return metrics

    def evaluate_before(self) -> dict[str, float]:
        """Evaluate the student and, with eval.teacher and a teacher, the teacher before any training.

        Both on env.eval, and on env.dev if a setting uses it. Returns the metrics of all these evaluations.
        """
        config = self.config
        found: dict[str, float] = {}
        for split in config.evaluated:
            found |= self.evaluate(self.engine, "evaluating the student", split)
        if (compute := self.runtime.playing_teacher) is not None:
            # With transformers: vLLM keeps one set of process groups per process, so a second engine could not be taken
            # down without the first one's.
            self.engine.sleep()
            runtime, say = self.runtime, self.console.say
            teacher = make_engine(config, "transformers", compute, runtime.device, runtime.teacher_room, say=say)
            for split in config.evaluated if config.schedule.kappa.kind == "adaptive" else ("eval",):
                found |= self.evaluate(teacher, "evaluating the teacher", split, teacher=True)
            del teacher
            self.resync()
        overall = {key: value for key, value in found.items() if key.endswith(("/success", "/teacher_success"))}
        self.console.say("before training: " + ", ".join(f"{key} {value:.1%}" for key, value in overall.items()))
        return found

    def evaluate_when_due(self, step: int, metrics: dict[str, float]) -> None:
        """At the last step and every eval.every steps, evaluate the student and add the result to `metrics`.

        Also updates what depends on success on env.dev: the adaptive kappa and the best checkpoint.
        """
        config, last = self.config, step == self.config.train.steps
        if not last and not (config.eval.every and step % config.eval.every == 0):
            return
        for split in config.evaluated:
            metrics |= self.evaluate(self.engine, "evaluating", split)
        self.after = metrics["eval/success"] if last else None
        if "dev/success" not in metrics:
            return
        success = metrics["dev/success"]
        self.kappa.observe(success)
        if config.checkpoint.keep_best and (self.best is None or success > self.best.success):
            self.best = checkpoint.Best(step, success)

    # Saving, and how a run ends

    def save_when_due(self, step: int) -> None:
        """Save a checkpoint at the last step, every checkpoint.every steps, and at the best success on env.dev."""
        last, every = step == self.config.train.steps, self.config.checkpoint.every
        best = self.best is not None and self.best.step == step
        if last or best or (every and step % every == 0):
            self.save()

    def save(self) -> None:
        """Save a checkpoint of step `done`, unless there is one. Collective."""
        if self.saved == self.done:
            return
        ranks.doing(f"saving step {self.done}")
        state = {
            "before": self.before,
            "adaptive": self.kappa.state_dict() or None,
            "best": self.best,
            "skipped": self.skipped_at,
            "stop_ids": sorted(self.actor.renderer.stop_ids),
            "date": self.config.rollout.date,
        }
        parts = self.run_dir, self.done, self.learner.student, self.learner.optimizer, state
        checkpoint.save(*parts, keep=self.config.checkpoint.keep, best=self.best, apart=self.apart)
        self.saved = self.done

    @contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """On an error in the block, save a checkpoint and raise the error with a note that says what was saved."""
        try:
            yield
        except (Exception, SystemExit) as error:
            stopped = ranks.understood(error)
            if self.done:  # before the first step the optimiser has no state to save
                stopped.add_note(self.rescue(stopped))
            raise stopped from None

    def rescue(self, stopped: Exception) -> str:
        """Save if possible, and draw the curves. Returns a line that says what is saved and how to resume.

        Saving needs all ranks and the weights of a complete step: an update stopped between two mini-batches leaves
        half a step, from which a run cannot be resumed exactly.
        """
        why = ""
        whole = self.learner.updates == self.whole_at
        if isinstance(stopped, RankLost):
            why = "without the other ranks nothing can be saved"
        elif not ranks.all_stop(whole):
            half = f"step {self.done + 1}'s update was only half done and is discarded"
            why = "another rank was still working and could not join in saving" if whole else half
        else:
            try:
                self.save()
            except Exception as failure:
                why = f"it could not be saved: {ranks.understood(failure)}"
        self.interrupt.ending()
        if ranks.rank() == 0:
            self.reporter.draw()
        line = "interrupted" if isinstance(stopped, Interrupted) else "stopped" if why else "saved"
        line += f" after step {self.done}"
        if why:
            there = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint"
            line += f"; {why}; {there}"
        if self.saved:
            run = shlex.quote(str(self.run_dir))
            line += f"; go on with --run-dir {run} --resume auto"
            line += f"; for a model of it: python -m atod_fast.export {run} --out DIR"
        return line

    def finish(self) -> None:
        """Export the model for transformers, draw the curves, and print success before and after."""
        config, before, say = self.config, self.before, self.console.say
        if self.after is None:  # resumed with every step done
            self.after = self.evaluate(self.engine, "evaluating")["eval/success"]
        ranks.doing("exporting the model")
        model, renderer = self.run_dir / "hf", self.actor.renderer
        for line in export(
            model,
            self.learner.student,
            config.student.path,
            self.reporter.tokenizer,
            renderer.stop_ids,
        ):
            say(line)
        if ranks.rank() != 0:
            return
        words = [f"student before {before['eval/success']:.1%}", f"student after {self.after:.1%}"]
        if "eval/teacher_success" in before:
            words.append(f"teacher {before['eval/teacher_success']:.1%}")
        where = f"held-out success at temperature {config.eval.temperature:g} on {config.eval.tasks} tasks"
        say(f"{where}: " + ", ".join(words))
        if self.best:
            kept = checkpoint.folder(self.run_dir, self.best.step)
            line = f"best success on env.dev {self.best.success:.1%} after step {self.best.step}, kept in {kept}"
            if "dev/success" in before:
                line += f"; before training it was {before['dev/success']:.1%}"
            say(line)
        say(f"model {model}" + (f", curves {self.run_dir / 'curves.png'}" if self.reporter.draw() else ""))
