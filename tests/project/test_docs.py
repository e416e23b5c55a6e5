"""The pages of docs/ and the README against the program: commands, messages, metrics, files, links."""

import ast
import pkgutil
import re
import shlex

import pytest

from atod_fast import cli
from helpers.paths import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "atod_fast").rglob("*.py"))]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """(page, arguments) of every command line on the pages that starts `python -m PROGRAM`, alone or under torchrun."""
    found = []
    for page, text in PAGES.items():
        for language, block in FENCE.findall(text):
            if language in ("", "sh"):
                lines = [part for line in block.replace("\\\n", " ").splitlines() for part in line.split("&&")]
                words = [shlex.split(line, comments=True) for line in lines if f"-m {program}" in line]
                found += [(page, line[line.index(program) + 1 :]) for line in words if program in line]
    return found


@pytest.mark.parametrize(("page", "arguments"), commands("atod_fast.train"))
def test_every_training_command_is_understood(page, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[train]\nsteps = 3\n")
    cli.parse(arguments)


@pytest.mark.parametrize(("page", "arguments"), commands("atod_fast.evaluate"))
def test_every_evaluation_command_is_understood(page, arguments, tmp_path, monkeypatch):
    config = tmp_path / "config.toml"
    config.write_text("[train]\nsteps = 3\n")
    here = [str(config) if argument.endswith("config.toml") else argument for argument in arguments]
    cli.parse_evaluation(here, None)


@pytest.mark.parametrize(("page", "arguments"), commands("atod_fast.collect"))
def test_every_collecting_command_is_understood(page, arguments, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("[train]\nsteps = 3\n")
    here = [str(config) if argument.endswith("config.toml") else argument for argument in arguments]
    cli.parse_collection(here, None)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_or_links_to_exists(page):
    text = FENCE.sub("", PAGES[page])
    generated = {"docs/reference/config.md", "docs/kernels.md", "docs/changelog.md", "docs/index.md"}
    for target in re.findall(r"\]\(([^()\s#:]+)(?:#[^()\s]*)?\)", text):
        path = ((ROOT / page).parent / target).resolve()
        assert path.exists() or path.relative_to(ROOT).as_posix() in generated, f"{page}: {target}"
    for name in re.findall(r"`((?:atod_fast|kernels|bench|tests|docs)/[\w./*-]+)`", text):
        assert list(ROOT.glob(name)), f"{page}: {name}"
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), f"{page}: {name}"
    for name in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE):
        assert pkgutil.resolve_name(name), f"{page}: {name}"


def messages() -> list[str]:
    """The first cell of each row of the page's tables."""
    return re.findall(r"^\| `(.+?)` \| ", PAGES["docs/troubleshooting.md"], re.MULTILINE)


def texts() -> list[str]:
    """Every string of the package, with … in the place of a value."""
    found = []
    for tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w.]+", "…", node.value))
    return found


def test_every_message_of_the_page_is_one_of_the_program():
    known = "\0".join(texts())
    assert len(messages()) > 100
    for message in messages():
        parts = [part for part in message.split("…") if part.strip()]
        assert re.search("[^\0]*".join(map(re.escape, parts)), known), message


def test_the_metrics_page_has_every_key_that_is_written():
    """Keys are literals `section/name` in the loop; times are the phases of its clock."""
    literal = re.compile(r"(train|rollout|turns|profile|schedule|loss|policy|sync|time|perf|memory)/\w+")
    written = {text for text in texts() if literal.fullmatch(text)}
    calls = [node for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.Call)]
    written |= {f"time/{call.args[0].value}" for call in calls if ast.unparse(call.func) == "clock"}
    cells = re.findall(r"^\| (`.+?`) \| ", PAGES["docs/metrics.md"], re.MULTILINE)
    told = set(re.findall(r"`([\w/]+)`", "".join(cells)))
    assert {key for key in told if literal.fullmatch(key)} == written
    assert len(written) > 30


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
