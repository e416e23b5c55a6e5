"""The command line: arguments to Options, and `--help`, which documents every key. Does not import torch."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from atod_fast import __version__, machines
from atod_fast.config import Config
from atod_fast.config.settings import (
    FIELDS,
    PRESETS,
    defaults,
    expected,
    load,
    nearest,
    preset_summary,
    section_of,
    show,
)
from atod_fast.errors import UserError
from atod_fast.machines import Machines

WIDTH = 100
_OVERRIDE = re.compile(r"\s*[\w-]+(\.[\w-]+)*\s*=")
_NOTES = """\
Settings come from four sources: the defaults (the demo preset), --preset, CONFIG.toml and the
overrides. A later source overrides an earlier one. objective.preset expands into keys of
objective.*, schedule.* and turns.*, overriding earlier sources; keys set in the same or a later
source override it. The value of an override is TOML, or else plain text. A table of options in a
file replaces the earlier table; section.table.option=value sets one option. Setting another
env.name removes the options of the previous environment.

For your own model in your own environment start from --preset own: the defaults are tuned to the
demo's tiny models, and their train.learning_rate makes a real model forget."""


@dataclass(frozen=True, slots=True)
class Options:
    """What one invocation asks for."""

    config: Config
    overrides: tuple[str, ...] | None  # the settings given; None if a preset or a file was given too
    name: str  # of the run: the CONFIG file's stem, else the preset's name
    run_dir: Path | None
    dry_run: bool
    on: Machines | None  # what a dry run plans for; None: this machine
    resume: str | None  # "auto", a path, or None
    set_aside: bool = False  # whether what came after the resumed checkpoint may be moved away
    command: str = ""  # the command line, for environment.json


def parse(argv: Sequence[str], program: str = "atod_fast.train") -> Options:
    """Read the arguments after the program's name.

    Raises:
        UserError: bad usage or configuration, in one line.
        SystemExit: with code 0, after printing what `--help`, `--version` or `--list-presets` asked for.
    """
    parser = _parser(program)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(_unknown_option(unknown[0], parser))
    if arguments.list_presets:
        print("\n".join(f"{name:15} {preset_summary(name)}" for name in PRESETS))
        raise SystemExit(0)
    overrides = [argument for argument in arguments.settings if _OVERRIDE.match(argument)]
    if arguments.set_aside and arguments.resume is None:
        raise UserError("--set-aside goes with --resume: it moves away what lies beyond the checkpoint that is resumed")
    files = [Path(argument) for argument in arguments.settings if not _OVERRIDE.match(argument)]
    for file in files:
        if str(file) in FIELDS:
            raise UserError(f"{file} has no value; write {file}=VALUE")
    if len(files) > 1:
        raise UserError(
            f"one CONFIG file at most, got {' and '.join(map(str, files))}; an override is written section.key=value"
        )
    file = files[0] if files else None
    on = machines.parse(arguments.on) if arguments.on else None
    if on and not arguments.dry_run:
        raise UserError("--on goes with --dry-run: it plans for other machines; a run uses this one")
    return Options(
        config=load(arguments.preset, file, overrides),
        overrides=tuple(overrides) if arguments.preset is None and file is None else None,
        name=file.stem if file else arguments.preset or "demo",
        run_dir=arguments.run_dir,
        dry_run=arguments.dry_run,
        on=on,
        resume=arguments.resume,
        set_aside=arguments.set_aside,
        command=shlex.join(["python", "-m", program, *argv]),
    )


def parse_evaluation(argv: Sequence[str], description: str | None) -> tuple[argparse.Namespace, Config]:
    """Return the arguments of an evaluation (model, out, transcripts) and its settings. Raises what `parse` raises."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("atod_fast.evaluate", description=description, formatter_class=form)
    parser.add_argument(
        "model", help="Hugging Face model folder (runs/NAME/hf), hub name, or demo:teacher, demo:student"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="section.key=value", help="as for atod_fast.train, whose --help lists the keys"
    )
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings file, such as a run's config.toml")
    parser.add_argument(
        "--preset", metavar="NAME", help="named settings; own: for your own model in your own environment"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the summary and the result of every task here")
    parser.add_argument(
        "--transcripts",
        type=Path,
        metavar="JSONL",
        help="write every episode here, with its prompts and responses",
    )
    arguments = parser.parse_intermixed_args(argv)
    # Only this model is used: a preset that leaves student and teacher to the user needs no others.
    own = [f"{role}.path={arguments.model}" for role in ("student", "teacher")]
    chooses_nothing = ["checkpoint.keep_best=false", "schedule.kappa.kind=linear"]
    return arguments, load(arguments.preset, arguments.config, [*own, *chooses_nothing, *arguments.settings])


def parse_collection(argv: Sequence[str], description: str | None) -> tuple[argparse.Namespace, Config]:
    """Return the arguments of a collection and its settings.

    Arguments: model, out, split, n (episodes; None: one for each task), all, overwrite, and plain: whether an expert
    plays and no student is named, whose tokenizer would render. Raises what `parse` raises.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("atod_fast.collect", description=description, formatter_class=form)
    parser.add_argument("model", metavar="MODEL|expert", help="as for atod_fast.evaluate; or expert, the environment's")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="n=COUNT | section.key=value",
        help="n: episodes to play (default: one for each task); the others as for atod_fast.train",
    )
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings file, such as a run's config.toml")
    parser.add_argument("--preset", metavar="NAME", help="named settings, as for atod_fast.train")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL", help="file for the conversations")
    parser.add_argument("--split", choices=("train", "eval", "dev"), default="train", help="tasks to play")
    parser.add_argument("--all", action="store_true", help="keep episodes without success too")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --out if it exists")
    arguments = parser.parse_intermixed_args(argv)
    counts = [setting.partition("=")[2] for setting in arguments.settings if setting.startswith("n=")]
    arguments.settings = [setting for setting in arguments.settings if not setting.startswith("n=")]
    arguments.n = None
    for count in counts:
        if not (count.isdecimal() and int(count) > 0):
            raise UserError(f"n={count} must be a whole number of at least 1: the episodes to play")
        arguments.n = int(count)
    expert = arguments.model == "expert"
    # No teacher is used, and no split but one.
    chooses_nothing = ["checkpoint.keep_best=false", "schedule.kappa.kind=linear", "eval.tasks=1"]
    roles = ["teacher.path=unused"] if expert else [f"{role}.path={arguments.model}" for role in ("student", "teacher")]
    settings = [*roles, *chooses_nothing, *arguments.settings]
    arguments.plain = False
    try:
        return arguments, load(arguments.preset, arguments.config, settings)
    except UserError:
        if not expert:
            raise
        config = load(arguments.preset, arguments.config, [*settings, "student.path=unnamed"])
        arguments.plain = True  # naming a student mends it: none is named
        return arguments, config


def answer_early(parse: Callable[[Sequence[str]], object]) -> None:
    """Answer `--help`, `--version` and the like, and exit, before torch is imported. Leaves errors to `main`."""
    speaks = os.environ.get("RANK", "0") == "0"
    with suppress(UserError), nullcontext() if speaks else redirect_stdout(io.StringIO()):
        parse(sys.argv[1:])


def key_help() -> str:
    """Return every key by section, with its default, the values it takes and its meaning."""
    lines: list[str] = []
    default = defaults()
    for key, field in FIELDS.items():
        if section_of(field):
            lines += ["", f"{key}: {field.description}"]
            continue
        lines.append(f"  {key} = {show(default[key])}")
        lines += textwrap.wrap(
            f"{expected(field)}: {field.description}", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines[1:])


class Parser(argparse.ArgumentParser):
    """An argument parser with `--version` that raises UserError instead of exiting."""

    def __init__(self, program: str, **options) -> None:
        super().__init__(prog=f"python -m {program}", allow_abbrev=False, **options)
        self.add_argument(
            "--version", action="version", version=f"atod_fast {__version__}", help="print the version and exit"
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser(program: str) -> Parser:
    parser = Parser(
        program,
        usage="%(prog)s [CONFIG.toml] [--preset NAME] [section.key=value ...] [options]",
        description=_NOTES,
        epilog=f"keys, with their defaults:\n\n{key_help()}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=WIDTH),
    )
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.toml | key=value", help="a file of settings; single settings"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"named settings: {', '.join(PRESETS)}")
    parser.add_argument(
        "--run-dir",
        metavar="PATH",
        type=Path,
        help="folder of this run (default: one under runs/, named after CONFIG.toml or the preset)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved settings, and the tokens, memory and (with --on) seconds of a step, then exit",
    )
    parser.add_argument(
        "--on",
        metavar="[NODESx]COUNTxGPU",
        help="with --dry-run: plan for these machines, as 8xh100 or 2x8xh100, with vLLM and liger-kernel installed; "
        f"GPU: {', '.join(machines.GPUS)}",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from a checkpoint, or the newest of a run (auto: of the run folder, or start a new run), "
        "with the run's own settings unless --preset or CONFIG.toml is given",
    )
    parser.add_argument(
        "--set-aside",
        action="store_true",
        help="with --resume of a checkpoint that is not the newest: move what came after it into RUN/set-aside-N",
    )
    parser.add_argument("--list-presets", action="store_true", help="print the presets and exit")
    return parser


def _unknown_option(option: str, parser: Parser) -> str:
    name = option.partition("=")[0].lstrip("-")
    flags = [flag.removeprefix("--") for action in parser._actions for flag in action.option_strings]
    if near := difflib.get_close_matches(name, flags, 1):
        return f"{option} is not an option (see --help); did you mean --{near[0]}?"
    if near := nearest(name, FIELDS):
        return f"{option} is not an option (see --help); a setting is written without dashes: {near}=VALUE"
    return f"{option} is not an option (see --help)"
