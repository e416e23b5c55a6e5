"""Where the project's files are, and the data beside it that some tests need and skip without."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
DATA = ROOT.parent / "shared" / "data"
