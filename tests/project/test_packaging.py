"""What pyproject.toml promises of both distributions, as far as one can see without building them (see
test_wheels.py).
"""

import re
import subprocess
import sys
import tomllib

import atod_kernels
import pytest

import atod_fast
from helpers.paths import ROOT

FAST = tomllib.loads((ROOT / "pyproject.toml").read_text())
KERNELS = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("table", "package"), [(FAST, atod_fast), (KERNELS, atod_kernels)], ids=["atod_fast", "atod_kernels"]
)
def test_the_version_is_written_once(table, package):
    name = package.__name__
    assert table["project"]["dynamic"] == ["version"] and "version" not in table["project"]
    assert table["tool"]["setuptools"]["dynamic"] == {"version": {"attr": f"{name}.__version__"}}
    assert package.__version__ not in (ROOT / "setup.py").read_text() + (ROOT / "CITATION.cff").read_text()


def test_the_kernels_know_nothing_of_the_trainer():
    assert KERNELS["project"]["dependencies"] == ["torch>=2.11"]
    (wanted,) = (line for line in FAST["project"]["dependencies"] if line.startswith("atod_kernels"))
    low, high = (
        tuple(map(int, bound.strip("<>=").split("."))) for bound in wanted.removeprefix("atod_kernels").split(",")
    )
    assert low <= tuple(map(int, atod_kernels.__version__.split("."))) < high


@pytest.mark.parametrize("script", FAST["project"]["scripts"])
def test_a_console_script_prints_its_help_without_torch(script):
    module, function = FAST["project"]["scripts"][script].split(":")
    code = f"""
import sys
from {module} import {function}
sys.argv = [{script!r}, "--help"]
try:
    {function}()
finally:
    print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout.startswith(f"usage: python -m {script.replace('atod-', 'atod_fast.')} ")


def test_a_console_script_exits_with_the_codes_of_its_module():
    code = (
        "import sys; from atod_fast.scripts import export; sys.argv = ['atod-export', 'nowhere', '--out', 'x']; "
        "export()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("atod_fast: nowhere is neither a checkpoint nor a run")


def test_the_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Add one") : text.index("Paths are relative")]
    named = {name for name in re.findall(r"`([\w./]+)`", table) if name.endswith((".py", "/"))}
    folders = ROOT, ROOT / "atod_fast", ROOT / "kernels/atod_kernels"
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert len(named) > 20
    assert not [name for name in named - tests if not any((folder / name).exists() for folder in folders)]
