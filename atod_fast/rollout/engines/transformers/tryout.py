"""Chooses how to generate with a model: the first way whose log-probs equal those of plain forward passes.

The try-out is a short rollout with every situation of a real one: a prompt, several tokens, a sequence that joins, a
trajectory's next turn, a prompt that shares only a head with what is cached, tokens beyond the sliding window. It runs
the engine itself, so that nothing a rollout does is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel

from atod_fast.errors import UserError
from atod_fast.models import recurrent
from atod_fast.rollout.engines.protocol import Completion, Engine, Request, Sampling
from atod_fast.rollout.engines.transformers.forward import FORWARDS, CacheForward, CannotRun, MakeForward

TOKENS = 36  # of the longest sequence
WINDOW = 7  # the size to which sliding windows and chunks are reduced meanwhile
# Mean difference of a completion's log-probs from the plain ones, relative to the log-probs' standard deviation over
# the vocabulary.
TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.1}
EXACT = 1e-3

Told = list[tuple[list[int], Completion]]  # prompt and answer


def choose(model: PreTrainedModel, max_model_len: int, make: Callable[[MakeForward, int], Engine]) -> MakeForward:
    """Return the first of `FORWARDS` that computes the model correctly with its present attention.

    make(forward, length): makes an engine for at least two sequences of at most `length` tokens. `choose` uses no
    global random numbers and leaves the model as it was.

    Raises:
        UserError: none is correct.
    """
    length, why = min(max_model_len, TOKENS), ""
    if model.device.type == "meta":
        return CacheForward  # it has no values to compare
    try:
        if not _finite(model):
            return FORWARDS[0]  # nothing can be compared; the first completion will raise
    except Exception as error:
        _refuse(model, _line(error))
    with _narrowed(model, max_model_len), _sharp(model):
        attention = _attention(model)
        for forward in FORWARDS:
            try:
                vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
                told = _play(make(forward, length), length, vocabulary)
                model.set_attn_implementation(attention)
                if _agree(model, told):
                    return forward
                why = "its log-probs differ from those of a plain forward pass"
            except Exception as error:  # the model's code may raise anything
                why = _line(error)
            finally:
                model.set_attn_implementation(attention)
    _refuse(model, why)


def _attention(model: PreTrainedModel) -> str:
    """Return the name of the attention with which a model computes."""
    return model.config._attn_implementation or "eager"


def _refuse(model: PreTrainedModel, why: str) -> NoReturn:
    raise UserError(
        f"rollout.engine=transformers cannot run a {model.config.model_type} model ({why}); use another model, "
        "or rollout.engine=vllm"
    )


def _line(error: Exception) -> str:
    """Return the first line of an error's message, after its class unless it is a CannotRun."""
    said = str(error).strip().splitlines()
    if isinstance(error, CannotRun):
        return said[0]
    return f"{type(error).__name__}: {said[0][:120]}" if said else type(error).__name__


def _play(engine: Engine, length: int, vocabulary: int) -> Told:
    """Play a trajectory of three turns and one of one turn; return prompts and completions."""
    draw = np.random.default_rng(0)
    response = max(1, min(5, length // 7))
    prompt = draw.integers(0, vocabulary, length)
    other = draw.integers(0, vocabulary, length)[: length - response].tolist()
    engine.begin(Sampling(temperature=1.0, max_tokens=response, stop_ids=()))

    def answers(count: int) -> list[Completion]:
        done: list[Completion] = []
        while len(done) < count:
            done += engine.step()
        return done

    first = prompt[: max(1, length // 3)].tolist()
    engine.add(Request(0, first, seed=1))
    joined = engine.step()  # the other one joins behind it
    engine.add(Request(1, other, seed=2))
    done = {completion.key: completion for completion in (*joined, *answers(2 - len(joined)))}
    told = [(first, done[0]), (other, done[1])]
    engine.release(1)
    going_on = [*first, *done[0].ids, *prompt[length // 3 :].tolist()][: length - response]
    changed = [*going_on[: len(going_on) // 2], *other][: length - response]
    for seed, following in enumerate((going_on, changed), 3):
        engine.add(Request(0, following, seed))
        told.append((following, answers(1)[0]))
    engine.end()
    return told


@torch.inference_mode()
def _finite(model: PreTrainedModel) -> bool:
    return bool(
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
        .logits.isfinite()
        .all()
    )


@torch.inference_mode()
def _agree(model: PreTrainedModel, told: Told) -> bool:
    """Return whether the completions' log-probs equal those of plain forward passes."""
    for prompt, completion in told:
        ids = torch.tensor([prompt + completion.ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logp = logits.log_softmax(-1)
        plain = logp.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        apart = (plain - torch.tensor(completion.logprobs)).abs().mean()
        spread = logp.std(-1).mean().cpu()
        if not apart <= TOLERANCE.get(model.dtype, EXACT) * spread + 1e-5:
            return False
    return True


@contextmanager
def _sharp(model: PreTrainedModel) -> Iterator[None]:
    """Keep a recurrent model in fp32 within the context: 16-bit rounding could hide the loss of its state.

    Its weights take twice the memory meanwhile, on their own device.
    """
    if model.dtype not in TOLERANCE or not recurrent(model):
        yield
        return
    tensors = [
        (tensor, tensor.dtype) for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in TOLERANCE
    ]
    attention = _attention(model)
    if attention == "flash_attention_2":
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    for tensor, _ in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
        model.set_attn_implementation(attention)


@contextmanager
def _narrowed(model: PreTrainedModel, max_model_len: int) -> Iterator[None]:
    """Shrink sliding windows, chunks and attention-temperature steps that sequences could exceed, within the context.

    Short sequences then test what lies beyond them, whatever their size.
    """
    places: Sequence[object] = (model.config.get_text_config(decoder=True), *model.modules())
    found = [
        (place, name, vars(place)[name])
        for place in places
        for name in ("sliding_window", "attention_chunk_size", "floor_scale")
        if type(vars(place).get(name)) is int and WINDOW < vars(place)[name] < max_model_len
    ]
    for place, name, _ in found:
        setattr(place, name, WINDOW)
    try:
        yield
    finally:
        for place, name, size in found:
            setattr(place, name, size)
