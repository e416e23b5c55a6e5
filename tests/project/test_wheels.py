"""The two distributions: their contents, and that installing, upgrading or removing one leaves the other unchanged."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

from helpers.paths import ROOT

pytest.importorskip("build", reason="needs the extra `dev`")
pytestmark = pytest.mark.wheels

SOURCES = {"atod_fast": ".", "atod_kernels": "kernels"}  # folder of each distribution's pyproject.toml
LATER = "0.1.99"
TRY = {
    "atod_kernels": "import atod_kernels, torch; atod_kernels.turn_weights(*torch.rand(2, 3), torch.tensor([0, 3]))",
    "atod_fast": "import atod_fast.cli, atod_fast.train; atod_fast.cli.parse(['--preset', 'alfworld-1.7b'])",
}


def tracked(folder="."):
    """Paths of the files under `folder` that are, or can be, committed."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


def build(source, out, *options):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """{(name, version): wheel}, in this version built out of the sdist alone, and in a later one."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name, folder in SOURCES.items():
        build(tree / folder, out)
        init = tree / folder / name / "__init__.py"
        text, count = re.subn(r'^__version__ = ".*"$', f'__version__ = "{LATER}"', init.read_text(), flags=re.M)
        assert count == 1
        init.write_text(text)
        build(tree / folder, out, "--wheel")
    assert len(list(out.glob("*.tar.gz"))) == 2
    return {tuple(wheel.name.split("-")[:2]): wheel for wheel in out.glob("*.whl")}


@pytest.fixture
def env(tmp_path):
    """A throw-away environment that sees what is installed here except the two packages and what starts them up."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "env"


def pip(env, *arguments):
    command = [sys.executable, "-m", "pip", "--python", env / "bin/python", *arguments]
    subprocess.run(command, capture_output=True, text=True, check=True)


def install(env, wheel):
    pip(env, "install", "--no-index", "--no-deps", wheel)


def remove(env, name):
    pip(env, "uninstall", "--yes", name)


def run(env, *command):
    """What the program of the environment prints."""
    done = subprocess.run(
        [env / "bin" / command[0], *command[1:]], capture_output=True, text=True, cwd=env, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(env, name):
    """Return {path: content} of the package and its metadata, without files that Python generates."""
    (site,) = (env / "lib").glob("python*/site-packages")
    found = [
        file
        for folder in site.glob(f"{name}*")
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    ]
    return {file.relative_to(site): file.read_bytes() for file in found}


def first(wheels, name):
    return next(wheel for (of, version), wheel in wheels.items() if of == name and version != LATER)


@pytest.mark.parametrize("name", SOURCES)
def test_a_wheel_holds_its_package_whole_and_nothing_else(wheels, name):
    folder = Path(SOURCES[name])
    package = {str(Path(file).relative_to(folder)) for file in tracked(str(folder / name))}
    with ZipFile(first(wheels, name)) as wheel:
        found = {file for file in wheel.namelist() if ".dist-info/" not in file}
    assert found == package and f"{name}/py.typed" in found


@pytest.mark.parametrize(("name", "needs"), [("atod_fast", True), ("atod_kernels", False)])
def test_the_trainer_needs_the_kernels_and_not_the_other_way_round(wheels, name, needs):
    with ZipFile(first(wheels, name)) as wheel:
        (metadata,) = (file for file in wheel.namelist() if file.endswith("METADATA"))
        told = message_from_string(wheel.read(metadata).decode())
    plain = [line for line in told.get_all("Requires-Dist") if "extra" not in line]
    assert any(line.startswith(("atod_kernels", "atod_fast")) for line in plain) is needs
    assert told["License-Expression"] == "Apache-2.0" and told["Description-Content-Type"] == "text/markdown"


def test_installing_upgrading_and_removing_one_leaves_the_other(wheels, env):
    for name in SOURCES:
        install(env, first(wheels, name))
    for name, other in (("atod_fast", "atod_kernels"), ("atod_kernels", "atod_fast")):
        before = files(env, other)
        for wheel in (wheels[name, LATER], first(wheels, name)):  # there and back
            install(env, wheel)
            assert files(env, other) == before
            for package in SOURCES:
                run(env, "python", "-c", TRY[package])
        remove(env, name)
        assert files(env, other) == before and not files(env, name)
        if name == "atod_fast":
            run(env, "python", "-c", TRY[other])
        install(env, first(wheels, name))
        run(env, "python", "-c", TRY["atod_fast"])


def test_the_console_scripts_are_those_of_the_modules(wheels, env):
    for name in SOURCES:
        install(env, first(wheels, name))
    version = first(wheels, "atod_fast").name.split("-")[1]
    for module in ("train", "evaluate", "collect", "export"):
        script = f"atod-{module}"
        assert run(env, script, "--version") == f"atod_fast {version}\n"
        assert run(env, script, "--help") == run(env, "python", "-m", f"atod_fast.{module}", "--help")
    remove(env, "atod_fast")
    assert not list((env / "bin").glob("atod-*"))
