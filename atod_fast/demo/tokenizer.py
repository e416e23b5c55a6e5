"""A word-level tokenizer for the demo's games: every word they can say is one token."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atod_fast.envs.alfworld.engine import NOTHING_HAPPENS, FastAlfWorld
from atod_fast.envs.alfworld.game import Game

CONTROL = PAD, ACT, EOA, UNK, BOS = ("<pad>", "<act>", "<eoa>", "<unk>", "<bos>")
CUT = "..."  # stands for the end of an observation that was left out

_WORD = re.compile(r"[a-z]+|\d+")
_BOILERPLATE = re.compile(r"-= welcome.*?=-|you arrive at .*?\. |looking quickly around you|your (?=task is to)")
_DROPPED = frozenset("a the you and of it to next in on see is around middle room are from using some".split())


def compact(observation: str) -> list[str]:
    """The words of an observation that tell states apart, lower-cased: letters or digits, so never a control token."""
    return [word for word in _WORD.findall(_BOILERPLATE.sub("", observation.lower())) if word not in _DROPPED]


def vocabulary(games: Iterable[Game]) -> list[str]:
    """Tokens in id order: control tokens, then every word that a compacted observation or a command of `games` can hold."""
    words = set(compact(NOTHING_HAPPENS))
    for game in games:
        words.update(compact(FastAlfWorld(game).reset()))
        words.update(word for thing in game.kind for word in compact(game.names[thing]))
        words.update(word for sides in game.texts.rules.values() for side in sides for piece in side.pieces for word in compact(piece.literal))
        words.update(word for action in game.domain.actions for word in _WORD.findall(re.sub(r"\{.*?\}", "", game.texts.commands[action])))
    return [*CONTROL, CUT, *sorted(words)]


def build_tokenizer(tokens: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """Token i gets id i; text is split at blanks."""
    model = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOA,
        unk_token=UNK,
        additional_special_tokens=[ACT],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
