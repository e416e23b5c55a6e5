"""Index a corpus for searching in place, once for all runs:

    python -m atod_fast.envs.searchqa.index wiki.jsonl --out wiki-index

The corpus is JSON lines {"id", "contents"} or {"id", "title", "text"}. Give the folder as env.options.retriever, or to
the server. Reading is streamed; memory is needed for the score matrix, about 40 bytes for each pair of a passage and a
term.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from atod_fast.envs.searchqa.passages import Passage, read_passages
from atod_fast.envs.searchqa.store import build
from atod_fast.errors import UserError


def index(corpus: Sequence[Path], out: Path, *, bad_lines: int) -> int:
    """Build the index, with a progress bar on a terminal, and return the number of passages."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=sum(path.stat().st_size for path in corpus if path.is_file()))

        def passages() -> Iterator[Passage]:
            yield from read_passages(
                corpus, option="corpus", bad_lines=bad_lines, read=lambda size: bar.advance(task, size)
            )
            bar.stop()  # bm25s shows bars of its own

        return build(passages(), out, show_progress=console.is_terminal)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad usage or input, 130 interrupted by Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m atod_fast.envs.searchqa.index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", nargs="+", type=Path, help="JSON-lines files")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to create")
    parser.add_argument(
        "--bad-lines", type=int, default=10, metavar="N", help="skip up to N malformed lines (default 10)"
    )
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        count = index(arguments.corpus, arguments.out, bad_lines=arguments.bad_lines)
    except UserError as error:
        print(f"atod_fast: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"atod_fast: --out {str(arguments.out)!r} cannot be written ({error}); choose another place",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {count:,} passages, {size / 1e6:,.0f} MB, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
