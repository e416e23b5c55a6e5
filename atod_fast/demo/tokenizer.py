"""A word-level tokenizer for the demo's environments: every word of a dialect is one token."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = PAD, ACT, EOA, UNK, BOS = ("<pad>", "<act>", "<eoa>", "<unk>", "<bos>")
CUT = "..."  # replaces the end of an observation that was cut


def build_tokenizer(words: Sequence[str], max_length: int, environment: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits text at blanks; control tokens, `CUT` and `words` get ids in this order.

    Its configuration names the renderer, `compact`, and the environment of the dialect.
    """
    model = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*CONTROL, CUT, *words])}, unk_token=UNK))
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
        atod_renderer="compact",
        atod_environment=environment,
    )
