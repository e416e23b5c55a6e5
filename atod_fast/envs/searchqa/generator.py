"""Generate a made-up world to ask about, so that nothing has to be downloaded.

Things have an owner, a maker and a place, people a home and a job.

    Who owns the red lamp?                       one search: its passage tells the owner
    Where does the maker of the red lamp live?   two: the lamp's passage tells the maker, the maker's passage the home

Who owns what, and who lives where, is drawn anew for every seed, and seeds of different parity have no thing in common:
an answer can be looked up, but not remembered.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from atod_fast.envs.searchqa.passages import Passage
from atod_fast.envs.searchqa.questions import Question

ADJECTIVES = (
    "amber big black blue brass broken brown carved clay cold copper empty folded gold gray green heavy iron long new "
    "old painted pink purple red round silver small tall tin white yellow"
).split()
NOUNS = (
    "ball basket bell boat book bottle bowl box chair clock coat comb cup doll drum flute hat key kite knife lamp map "
    "mask mirror pen pipe plate ring rope shoe spoon vase"
).split()
PEOPLE = (
    "Ada Amir Anna Boris Carla Chen Clara Dario Elena Emil Felix Greta Hanna Hugo Ines Ivan Jonas Julia Karim Laila "
    "Leo Lucia Magnus Maya Mira Nadia Nils Olga Omar Paula Petra Rosa Samir Sonja Stella Tomas Vera Viktor Yuki Zara"
).split()
PLACES = (
    "Athens Bergen Cairo Dakar Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon Madrid Milan Oslo Paris Prague Quito "
    "Riga Rome Seoul Sofia Tunis Vienna"
).split()
JOBS = (
    "actor baker barber butcher carpenter cook dancer doctor driver farmer fisher gardener guard judge miller nurse "
    "painter pilot potter sailor singer tailor teacher weaver"
).split()
ASKED = {  # relations to follow, from the thing to the answer -> question
    ("owner",): "Who owns the {thing}?",
    ("maker",): "Who made the {thing}?",
    ("place",): "Where is the {thing} kept?",
    ("owner", "home"): "Where does the owner of the {thing} live?",
    ("maker", "home"): "Where does the maker of the {thing} live?",
    ("owner", "job"): "What is the job of the owner of the {thing}?",
    ("maker", "job"): "What is the job of the maker of the {thing}?",
}
TOLD = {
    "owner": "{subject} is owned by {value}.",
    "maker": "{subject} was made by {value}.",
    "place": "{subject} is kept in {value}.",
    "home": "{subject} lives in {value}.",
    "job": "{subject} works as a {value}.",
}


@dataclass(frozen=True)
class World:
    """Things and people with their facts, and the questions and passages about them."""

    facts: dict[str, dict[str, str]]  # name -> relation -> value
    questions: list[Question]
    passages: list[Passage]


def generate(seed: int, hops: int = 2) -> World:
    """Return the world of `seed` with all questions of at most `hops` (1 or 2) searches, shuffled."""
    rng = Random(f"searchqa {seed}")
    things = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    things = [thing for thing in things if zlib.crc32(thing.encode()) % 2 == seed % 2]
    facts = {
        thing: {"owner": rng.choice(PEOPLE), "maker": rng.choice(PEOPLE), "place": rng.choice(PLACES)}
        for thing in things
    }
    facts |= {person: {"home": rng.choice(PLACES), "job": rng.choice(JOBS)} for person in PEOPLE}
    passages = [Passage(str(number), _passage(rng, name, told)) for number, (name, told) in enumerate(facts.items())]
    questions = [question for thing in things for question in _questions(facts, thing, hops)]
    rng.shuffle(questions)
    return World(facts, questions, passages)


def _passage(rng: Random, name: str, told: dict[str, str]) -> str:
    """Return a passage with its sentences in random order, so that the order does not tell what is what."""
    subjects = (name, name) if name in PEOPLE else (f"The {name}", "It", "It")
    relations = rng.sample(list(told), len(told))
    sentences = [
        TOLD[relation].format(subject=subject, value=told[relation])
        for subject, relation in zip(subjects, relations, strict=True)
    ]
    return f'"{name}"\n{" ".join(sentences)}'


def _questions(facts: dict[str, dict[str, str]], thing: str, hops: int) -> Iterator[Question]:
    for relations, asked in ASKED.items():
        if len(relations) <= hops:
            names = [thing]
            for relation in relations:
                names.append(facts[names[-1]][relation])
            *queries, answer = names
            kind = "-of-".join(reversed(relations))
            yield Question(
                f"generated/{thing.replace(' ', '-')}/{kind}",
                asked.format(thing=thing),
                (answer,),
                f"generated-{len(relations)}",
                tuple(queries),
            )
