"""Small tokenizers and chat templates of different kinds, made on the spot after those of well-known families."""

from __future__ import annotations

import json
import string
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are in a room.\n\nYour task is to: put a mug on the desk.\n\n\n  go to desk 1\n",
    "user\n\nmodel\nassistant\nTake the mug 1 from the desk 1. <action>look</action>\n\n",
    "Cutting Knowledge Date, Today Date: 27 Nov 2026\n\nsystem",
] * 4
QWEN_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Drops the reasoning of answers, and opens the last one with an empty thought, as Qwen 3 does.
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _special(*texts: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False, **options) for text in texts]


def _merely_added(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


def _byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def _sentencepiece(prepend: bool) -> Tokenizer:
    """Return BPE that marks blanks as lower blocks and spells what it has no piece for in bytes."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    replace = normalizers.Replace(" ", "\u2581")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prepend else replace
    pieces = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=pieces, show_progress=False, max_token_length=8)
    )
    described = json.loads(inner.to_str())
    vocabulary = described["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    described["model"] |= {"byte_fallback": True, "fuse_unk": True}
    inner = Tokenizer.from_str(json.dumps(described))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _unigram() -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    alphabet = sorted({letter for text in CORPUS for letter in text} | set(string.printable + "\u2581"))
    trainer = trainers.UnigramTrainer(
        vocab_size=240, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of that name in KINDS."""
    options = {}
    match kind:
        case "qwen" | "qwen-reasoning":
            inner, template = _byte_level(), CHATML if kind == "qwen" else REASONING
            inner.add_special_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
            inner.add_tokens(_merely_added("<think>", "</think>", "<tool_call>"))
            options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        case "llama2":
            inner, template = _sentencepiece(prepend=True), INST
            inner.add_tokens(_merely_added("[INST]"))
            options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        case "gemma":
            inner, template = _sentencepiece(prepend=False), GEMMA
            inner.add_special_tokens(_special("<start_of_turn>", "<end_of_turn>"))
            inner.add_tokens(_merely_added("\n\n", "\n\n\n", "\u2581\u2581", "<table>"))
            options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        case "llama3":
            inner, template = _byte_level(), LLAMA3
            inner.add_special_tokens(
                _special("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
            )
            options = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        case "phi":
            inner, template = _sentencepiece(prepend=True), PHI
            inner.add_special_tokens(_special("<|user|>", "<|assistant|>", "<|end|>", rstrip=True))
            options = {"eos_token": "</s>", "unk_token": "<unk>"}
        case "unigram":
            inner, template = _unigram(), CHATML
            inner.add_special_tokens(_special("<|im_start|>", "<|im_end|>"))
            inner.add_tokens(_merely_added("<think>", "</think>"))
            options = {"eos_token": "<|im_end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **options)


KINDS = ("qwen", "qwen-reasoning", "llama2", "gemma", "llama3", "phi", "unigram")
