"""Measure an index for Search-QA: build time, memory, size on disk, and the time of a query.

    python bench/searchqa_index.py [--passages 1000000] [--words 100] [--queries 300] [--folder FOLDER]

The corpus is made up: passages of --words words, whose frequencies follow Zipf's law over a million words. It is
written and indexed in a temporary folder (below --folder), which needs about 3 kB a passage during the build. Building
and searching each run in a process of their own, whose peak memory is reported; that of searching includes the pages
of the index that the queries touched, which the system may drop at any time. Queries are 3 to 8 words, drawn like
those of the passages but without the 100 most frequent. Writes bench/results/searchqa_index.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from machine import processor, version

from atod_fast.envs.searchqa.store import load

RESULTS = Path(__file__).parent / "results" / "searchqa_index.json"
VOCABULARY, COMMON = 1_000_000, 100
SYLLABLES = (
    "ba be bi bo bu da de di do du ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru".split()
)


def words() -> np.ndarray:
    """Return VOCABULARY distinct words of four syllables, as an array of objects."""
    places = len(SYLLABLES) ** np.arange(4)
    return np.array(
        ["".join(SYLLABLES[n // place % len(SYLLABLES)] for place in places) for n in range(VOCABULARY)], object
    )


def zipf() -> np.ndarray:
    weight = 1 / (np.arange(VOCABULARY) + 2.7)
    return np.cumsum(weight) / weight.sum()


def write_corpus(path: Path, passages: int, length: int) -> None:
    rng, names, cumulative = np.random.default_rng(0), words(), zipf()
    with path.open("w") as file:
        for number in range(passages):
            chosen = names[np.searchsorted(cumulative, rng.random(length))]
            file.write(
                json.dumps({"id": str(number), "contents": f'"{chosen[0]} {chosen[1]}"\n{" ".join(chosen)}'}) + "\n"
            )


def search(folder: Path, queries: int) -> dict:
    """Return the milliseconds to open the index and to answer each query, in this process."""
    rng, names, cumulative = np.random.default_rng(1), words(), zipf()
    start = time.perf_counter()
    index = load(folder)
    opened = time.perf_counter() - start
    taken = []
    for _ in range(queries):
        draws = cumulative[COMMON] + rng.random(rng.integers(3, 9)) * (1 - cumulative[COMMON])
        query = " ".join(names[np.searchsorted(cumulative, draws)])
        start = time.perf_counter()
        index.search(query, 3)
        taken.append(1e3 * (time.perf_counter() - start))
    quantiles = {f"p{level}": float(np.percentile(taken, level)) for level in (50, 95, 99)}
    return {
        "open_ms": 1e3 * opened,
        "query_ms": quantiles | {"first": taken[0]},
        "peak_mb": _peak_mb(resource.RUSAGE_SELF),
    }


def _peak_mb(whom: int) -> float:
    return resource.getrusage(whom).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)  # only search this index and print the facts
    args = parser.parse_args()
    if args.search:
        print(json.dumps(search(args.search, args.queries)))
        return

    with TemporaryDirectory(dir=args.folder) as name:
        corpus, index = Path(name) / "corpus.jsonl", Path(name) / "index"
        write_corpus(corpus, args.passages, args.words)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "atod_fast.envs.searchqa.index", corpus, "--out", index], check=True)
        built, children = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, peak = children.ru_utime + children.ru_stime, _peak_mb(resource.RUSAGE_CHILDREN)
        command = [sys.executable, __file__, "--search", index, "--queries", str(args.queries)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result = {
            "passages": args.passages,
            "words": args.words,
            "corpus_mb": corpus.stat().st_size / 1e6,
            "index_mb": sum(file.stat().st_size for file in index.iterdir()) / 1e6,
            "build": {"seconds": built, "cpu_seconds": cpu, "peak_mb": peak},
            "search": found,
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            },
            "versions": {
                "python": platform.python_version(),
                "numpy": version("numpy"),
                "bm25s": version("bm25s"),
                "PyStemmer": version("PyStemmer"),
            },
        }
    query = found["query_ms"]
    print(
        f"{args.passages:,} passages of {args.words} words: corpus {result['corpus_mb']:,.0f} MB, "
        f"index {result['index_mb']:,.0f} MB"
    )
    print(f"build   {built:8.1f} s   {peak:8,.0f} MB at most, {cpu:.1f} s of one core")
    print(f"open    {found['open_ms']:8.1f} ms  {found['peak_mb']:8,.0f} MB at most, with the queries")
    print(f"query   {query['p50']:8.2f} ms  median, {query['p95']:.2f} at 95%, {query['p99']:.2f} at 99%")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
