"""A byte-level chat tokenizer made on the spot, templates of Qwen's and Llama's kind, and a turn made of it."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from atod_fast.records import Turn

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NO_THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + NO_THOUGHT + "{% endif %}"
)
OPENED = CHATML.replace(NO_THOUGHT, "<think>\n")
SPACED = (  # closes a message with a space and the end-of-sequence token, as Llama 2 did
    "<|im_start|>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|endoftext|><|im_start|>{% endif %}{% endfor %}"
)


CORPUS = [
    "You are in the middle of a room. Your task is to: put a mug on the desk. go to desk 1, take mug 1 from desk 1"
] * 3


def make_tokenizer(
    template: str | None = CHATML, eos: str = "<|im_end|>", corpus: list[str] = CORPUS, size: int = 330
) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    inner.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, chat_template=template)


TOKENIZER = make_tokenizer()
IDS = TOKENIZER.get_vocab()
END = IDS["<|im_end|>"]
START = "-= Welcome =-\nYou are in the middle of a room, you see a desk 1.\n\nYour task is to: put a mug on the desk."
ADMISSIBLE = {"admissible_actions": ["go to desk 1", "inventory", "look"]}


def make_turn(observation: str, command: str = "look", stopped: bool = True) -> Turn:
    action = TOKENIZER(f"<action>{command}</action>")["input_ids"] + [END] * stopped
    return Turn([], action, [0.0] * len(action), observation, f"<action>{command}</action>", command, True)
