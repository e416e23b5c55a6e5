"""Run a command on one rank: parse its arguments, print its error on one line, return its exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import TypeVar

from atod_fast import ranks
from atod_fast.interrupt import Interrupt, Interrupted, last_word

Options = TypeVar("Options")


def run(
    parse: Callable[[], Options],
    act: Callable[[Options, Interrupt], object],
    *,
    interrupted: str,
    killed: str = "",
) -> int:
    """Call `act(parse(), interrupt)` and return the exit code: 0, or that of the error raised.

    Rank 0 prints the error on one line of stderr, then the error's notes. `interrupted` is the line for an interruption
    without notes, `killed` the line for a second Ctrl-C. Destroys the process groups at the end.

    Raises:
        SystemExit: `parse` answered `--help` or the like.
    """
    speaks, started = ranks.rank() == 0, False
    with Interrupt() as interrupt:
        try:
            with nullcontext() if speaks else redirect_stdout(io.StringIO()):  # --help is printed once
                options = parse()
            started = True
            act(options, interrupt)
            return 0
        except KeyboardInterrupt:  # the second
            if speaks and killed:
                print(f"atod_fast: {killed}", file=sys.stderr)
            return Interrupted.exit_code
        except (Exception, SystemExit) as error:
            if not started and isinstance(error, SystemExit):  # --help
                raise
            stopped, line = ranks.ending(error)
        finally:
            ranks.stop()
        notes = getattr(stopped, "__notes__", [])
        if speaks:
            if not isinstance(stopped, Interrupted):
                print(f"atod_fast: {line}", file=sys.stderr, flush=True)
            elif not notes:
                print(f"atod_fast: {interrupted}", file=sys.stderr)
            for note in notes:
                last_word(note)
        return stopped.exit_code
