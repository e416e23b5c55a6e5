"""Search-QA's dialect: shortened texts, and a scripted expert that knows what to search for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from atod_fast.envs.dialect import Dialect, Player, Step
from atod_fast.envs.searchqa.env import SearchQA
from atod_fast.envs.searchqa.generator import PEOPLE, generate
from atod_fast.envs.searchqa.text import NOTHING_FOUND

VERBS = ("search", "answer")

_WORD = re.compile(r"[a-z]+")
# A passage's title is dropped: its first sentence repeats it.
_TITLE = re.compile(r'doc \d+: "[^"\n]*"')
_DROPPED = frozenset("information a the of in by as is was it does".split())
_BLOCK = re.compile(r"<(search|answer)>(.*)</\1>")


def compact(observation: str) -> list[str]:
    """Return the informative words of a question or of search results, lower-cased; only letters."""
    return [word for word in _WORD.findall(_TITLE.sub("", observation.lower())) if word not in _DROPPED]


def command(words: Sequence[str]) -> str:
    """Return the command that words make: `search red lamp` -> `<search>red lamp</search>`.

    Words that begin with neither verb stay as they are; they are no command.
    """
    verb, *rest = words or [""]
    return f"<{verb}>{' '.join(rest)}</{verb}>" if verb in VERBS else " ".join(words)


def spoken(command: str) -> list[str]:
    """Return the words of a command; the inverse of `command`."""
    return _BLOCK.sub(r"\1 \2", command).lower().split()


@lru_cache(maxsize=1)
def vocabulary() -> list[str]:
    """Return, sorted, every word that a shortened observation or a command can hold, with any seed of `generate`."""
    words = {*VERBS, *compact(NOTHING_FOUND)}
    for world in (generate(0), generate(1)):  # seeds of different parity have different things
        words.update(word for question in world.questions for word in compact(question.text))
        words.update(word for passage in world.passages for word in compact(passage.contents))
    return sorted(words)


def player(env: SearchQA) -> Player:
    """Return a player that searches for what the question needs, one passage after the other, and then answers."""
    question = env.question

    def play(steps: Sequence[Step], observation: str) -> str:
        seen = [*(step.observation for step in steps), observation]
        query = next((query for query in question.queries if not any(f'"{query}"' in text for text in seen)), None)
        return f"<answer>{question.answers[0]}</answer>" if query is None else f"<search>{query}</search>"

    return play


def junk(env: SearchQA, observation: str, rng: Random) -> str:
    """Return a bad action: a useless search, or words without tags. Never an answer, which would end the episode."""
    thing = env.question.queries[0].lower()
    name = rng.choice(PEOPLE).lower()
    return rng.choice(
        [
            f"<search>{rng.choice(thing.split())}</search>",
            f"<search>{name}</search>",
            f"<search>{name} {thing}</search>",
            thing,
            name,
        ]
    )


DIALECT = Dialect(
    read=compact,
    command=command,
    words=spoken,
    vocabulary=lambda env, count: vocabulary(),
    expert=player,
    junk=junk,
)
