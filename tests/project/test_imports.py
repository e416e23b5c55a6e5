"""Imports run one way: which part of the code may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from atod_fast.envs import BUILT_IN
from helpers.paths import ROOT

PACKAGES = {"atod_fast": ROOT, "atod_kernels": ROOT / "kernels"}


def module_name(file: Path, base: Path) -> str:
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(file, base): file for package, base in PACKAGES.items() for file in (base / package).rglob("*.py")
}


def statements(node: ast.AST, types: bool, functions: bool) -> Iterator[ast.AST]:
    """Yield the statements in `node`; without `types` not those for type checkers, without `functions` not those in
    functions."""
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if (types or not for_types) and (functions or not in_function):
            yield child
            yield from statements(child, types, functions)


@cache
def imports(module: str, *, types: bool = True, functions: bool = True) -> frozenset[str]:
    """Return the imports of `module`: modules of this project, and other packages' dotted names as written."""
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")), types, functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, module)
            names = {f"{source}.{alias.name}" for alias in node.names}
            foreign = source.split(".")[0] not in PACKAGES
            found |= {name if name in MODULES or foreign else source for name in names}
    return frozenset(found - {module})


def absolute(node: ast.ImportFrom, module: str) -> str:
    """Return the absolute name of the module that `node`, in `module`, imports from."""
    if not node.level:
        return node.module
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def ours(*names: str) -> tuple[str, ...]:
    return tuple(f"atod_fast.{name}" for name in names)


ENVIRONMENTS = tuple(target.rpartition(":")[0].rpartition(".")[0] for target in BUILT_IN.values())
# Part: what none of its modules imports, not even in a function or for types.
KNOWS_NO = {
    "atod_fast.rollout": (
        *ENVIRONMENTS,
        *ours("envs.prompt", "envs.dialect", "demo", "renderers", "policy", "objective"),
    ),
    "atod_fast.envs": (
        "torch",
        "transformers",
        *ours("rollout", "demo", "models", "policy", "objective", "batches", "ranks"),
    ),
    "atod_fast.demo": ours("policy", "objective", "renderers"),
    "atod_fast.objective": ("torch.distributed", *ours("rollout", "policy", "envs", "demo", "observe", "ranks")),
    "atod_fast.policy": ours("envs", "rollout", "demo", "observe", "renderers"),
    "atod_fast.observe": ours("policy", "rollout", "envs", "demo", "objective", "renderers"),
    "atod_fast.records": ("torch", "transformers"),
    "atod_kernels": ("atod_fast",),
}


@pytest.mark.parametrize("part", KNOWS_NO)
def test_no_import_runs_against_the_order(part):
    inside = [module for module in MODULES if within(module, (part,))]
    against = {f"{module} -> {name}" for module in inside for name in imports(module) if within(name, KNOWS_NO[part])}
    assert inside and not against


def reached(start: str) -> set[str]:
    """Return the modules that importing `start` loads, and the names of other packages' modules."""
    found, left = set(), [start]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            parents = {module.rpartition(".")[0]} & MODULES.keys()
            left += [*parents, *(imports(module, types=False, functions=False) if module in MODULES else ())]
    return found


def test_environments_load_without_torch():
    for module in MODULES:
        if within(module, ("atod_fast.envs",)):
            assert not {name for name in reached(module) if within(name, ("torch", "transformers"))}, module


def order(graph: dict[str, set[str]]) -> list[str]:
    try:
        return [*TopologicalSorter(graph).static_order()]
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_no_module_is_needed_by_what_it_imports():
    order({module: set(imports(module, types=False)) & MODULES.keys() for module in MODULES})


def test_no_package_is_needed_by_what_it_imports():
    """The folders and single files of `atod_fast`."""

    def part(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if within(module, ("atod_fast",)):
            known = {part(name) for name in imports(module, types=False) if name in MODULES and name != "atod_fast"}
            graph.setdefault(part(module), set()).update(known - {part(module)})
    order(graph)
