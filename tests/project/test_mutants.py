"""The list of bench/mutants.py fits the code: each mutant can be made and has tests."""

import pytest
from mutants import MUTANTS, TESTS, Mutant, mutated

from helpers.paths import ROOT


@pytest.mark.parametrize("file", MUTANTS)
def test_each_mutant_can_be_made_and_has_tests(file):
    source = (ROOT / "atod_fast" / file).read_text(encoding="utf-8")
    for mutant in MUTANTS[file]:
        text = mutated(file, mutant)
        assert text != source, mutant.name
        compile(text, file, "exec")
    assert all((ROOT / "tests" / name).is_file() for name in TESTS[file])


def test_names_are_unique():
    names = [mutant.name for mutants in MUTANTS.values() for mutant in mutants]
    assert len(names) == len({*names})


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("import", "[0-9]+")])
def test_a_mutant_without_one_place_is_named(old, times):
    with pytest.raises(SystemExit, match=f"mutant lost: {old!r} occurs {times} times in atod_fast/train.py"):
        mutated("train.py", Mutant("lost", "", old, ""))
