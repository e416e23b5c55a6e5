"""The transformers engine against plain forward passes of the same model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atod_fast.errors import GuardError, UserError
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling
from atod_fast.rollout.engines.transformers.engine import TransformersEngine, draw

VOCABULARY, STOP = 53, 1
KINDS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def make_model(kind: str = "qwen3", *, tied: bool = True, kv_heads: int = 2, seed: int = 0, **options):
    """A random model, sharp enough that its distributions are far from uniform."""
    config, model = KINDS[kind]
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 12,
    }
    torch.manual_seed(seed)
    made = model(
        config(
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            dtype="float32",
            eos_token_id=STOP,
            **sizes | options,
        )
    )
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


MODEL = make_model()
EXACT = make_model().double()  # so that no rounding hides a wrong column


def make_engine(model=MODEL, *, slots: int = 8, **options) -> TransformersEngine:
    return TransformersEngine(copy.deepcopy(model), slots=slots, max_model_len=96, device="cpu", **options)


def sampling(temperature: float = 1.0, max_tokens: int = 6, stop_ids=(STOP,), valid_columns=None) -> Sampling:
    return Sampling(temperature, max_tokens, tuple(stop_ids), valid_columns)


def answer(engine: TransformersEngine, requests: list[Request]) -> dict[int, Completion]:
    for request in requests:
        engine.add(request)
    done: dict[int, Completion] = {}
    while len(done) < len(requests):
        done |= {completion.key: completion for completion in engine.step()}
    return done


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, int(rng.integers(1, longest))).tolist() for _ in range(count)]


@torch.no_grad()
def plain_logprobs(prompt: list[int], ids: list[int], temperature: float, valid=None, model=MODEL) -> torch.Tensor:
    """Return log-probs of `ids` after `prompt` from one forward pass over the whole sequence."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("kind", "tied", "kv_heads"), [("qwen3", True, 4), ("qwen3", False, 2), ("qwen2", True, 1), ("llama", False, 2)]
)
def test_greedy_decoding_equals_generate(kind, tied, kv_heads):
    model = make_model(kind, tied=tied, kv_heads=kv_heads, seed=3)
    engine = make_engine(model)
    stops = [STOP, 7, 19, 23, 31, 40]
    engine.begin(sampling(temperature=0, max_tokens=12, stop_ids=stops))
    asked = prompts(8, seed=4)
    answers = answer(engine, [Request(key, prompt, seed=0) for key, prompt in enumerate(asked)])
    for key, prompt in enumerate(asked):
        generated = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert answers[key].ids == generated
        assert answers[key].stopped == (generated[-1] in stops)
    assert len({len(one.ids) for one in answers.values()}) > 1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    masked=st.booleans(),
    grows=st.booleans(),
    slots=st.integers(1, 4),
    pass_tokens=st.sampled_from([6, 4096]),
)
def test_log_probs_equal_a_full_forward_whoever_joins_when_and_whatever_is_cached(
    seed, temperature, masked, grows, slots, pass_tokens
):
    """Trajectories of random length join at random steps, with growing sequences or prompts that share a prefix."""
    rng = np.random.default_rng(seed)
    valid = torch.from_numpy(rng.random(VOCABULARY) < 0.7) if masked else None
    if masked:
        valid[[STOP, 5]] = True
    engine = make_engine(EXACT, slots=slots, pass_tokens=pass_tokens)
    engine.begin(sampling(temperature, max_tokens=5, stop_ids=(STOP, 5, 9, 11), valid_columns=valid))

    def text(low: int, high: int) -> list[int]:
        return rng.integers(2, VOCABULARY, int(rng.integers(low, high))).tolist()

    heads = [text(1, 20) for _ in range(5)]
    asked = {key: head + text(0, 8) for key, head in enumerate(heads)}
    turns = dict.fromkeys(asked, 0)
    later = list(asked)
    under_way = 0
    while later or under_way:
        while later and rng.random() < 0.5:
            key = later.pop()
            engine.add(Request(key, asked[key], seed=100 * key + turns[key]))
            under_way += 1
        for done in engine.step():
            prompt = asked[done.key]
            under_way -= 1
            turns[done.key] += 1
            assert done.stopped == (done.ids[-1] in (STOP, 5, 9, 11)) and (done.stopped or len(done.ids) == 5)
            assert valid is None or valid[done.ids].all()
            np.testing.assert_allclose(
                done.logprobs, plain_logprobs(prompt, done.ids, temperature, valid, EXACT), atol=1e-5
            )
            if turns[done.key] == 3:
                engine.release(done.key)
            else:
                asked[done.key] = (prompt + done.ids if grows else heads[done.key]) + text(1, 9)
                later.append(done.key)


@pytest.mark.parametrize("grows", [True, False])
def test_only_the_uncached_suffix_is_computed(grows):
    engine = make_engine()
    engine.begin(sampling(max_tokens=4, stop_ids=()))
    fed: list[int] = []
    engine._model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].numel()))
    head = prompts(1, longest=2)[0] * 20
    first = answer(engine, [Request(0, head + [7, 8], seed=0)])[0]
    assert sum(fed) == 22 + 3  # the last sampled token is not fed
    fed.clear()
    answer(engine, [Request(0, head + [7, 8] + first.ids + [9] if grows else head + [9, 8, 7], seed=1)])
    assert sum(fed) == (2 if grows else 3) + 3
    engine.release(0)
    fed.clear()
    answer(engine, [Request(1, head + [5, 6], seed=1)])  # another trajectory in that slot
    assert sum(fed) == 2 + 3


def test_draws_have_the_model_s_frequencies():
    """Evenly spaced uniform numbers yield n * p draws of every column, give or take one."""
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    banned = torch.zeros(VOCABULARY, dtype=torch.bool)
    banned[[0, 3, 4, VOCABULARY - 1]] = True
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row in logits:
        for temperature in (0.5, 1.0, 1.5):
            ids, logprobs = draw(row.repeat(n, 1), temperature, banned, uniform)
            expected = (row / temperature).masked_fill(banned, -torch.inf).softmax(-1)
            assert (torch.bincount(ids, minlength=VOCABULARY) - n * expected).abs().max() <= 1.01
            torch.testing.assert_close(logprobs, expected.log()[ids])


def test_the_ends_of_the_unit_interval_draw_valid_columns():
    uniform = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for size in (2, 3, 10, 1000):
        banned = torch.zeros(size + 2, dtype=torch.bool)
        banned[[0, -1]] = True
        ids, _ = draw(torch.randn(2, size + 2), 1.0, banned, uniform)
        assert ids.tolist() == [1, size]


def test_an_engine_samples_from_the_distribution():
    engine = make_engine(slots=100)
    engine.begin(sampling(max_tokens=1))
    prompt, n = [3, 14, 15], 2000
    counts = np.zeros(VOCABULARY)
    for start in range(0, n, 100):
        for key, done in answer(engine, [Request(key, prompt, seed=key) for key in range(start, start + 100)]).items():
            counts[done.ids[0]] += 1
            engine.release(key)
    with torch.no_grad():
        expected = n * MODEL(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected) + 1).all()  # four standard deviations


def test_equal_seeds_repeat_bit_for_bit_and_global_generators_do_not_matter():
    def play(shift: int) -> dict[int, Completion]:
        torch.manual_seed(shift)
        np.random.seed(shift)
        engine = make_engine()
        engine.begin(sampling(max_tokens=8))
        return answer(
            engine, [Request(key, prompt, seed=key + 1000 * (shift == 2)) for key, prompt in enumerate(prompts(8))]
        )

    assert play(0) == play(1)
    assert play(0) != play(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_who_else_is_asked(temperature):
    answers = []
    for slots in (1, 3, 16):
        engine = make_engine(slots=slots)
        engine.begin(sampling(temperature, max_tokens=8))
        done: dict[int, list[int]] = {}
        for key, prompt in enumerate(prompts(12, seed=9)):
            engine.add(Request(key, prompt, seed=key))
        while len(done) < 12:
            for completion in engine.step():
                done[completion.key] = completion.ids
                engine.release(completion.key)
        answers.append(done)
    assert answers[0] == answers[1] == answers[2]


def test_a_released_request_leaves_no_trace():
    engine = make_engine(slots=2)
    asked = prompts(3, seed=2, longest=12)
    engine.begin(sampling(0.0, max_tokens=8, stop_ids=()))
    alone = answer(engine, [Request(2, asked[2], seed=0)])[2]
    engine.begin(sampling(0.0, max_tokens=8, stop_ids=()))
    for key, prompt in enumerate(asked):
        engine.add(Request(key, prompt, seed=0))
    assert engine.step() == []
    engine.release(0)
    done = []
    while len(done) < 2:
        done += engine.step()
    np.testing.assert_allclose(done[-1].logprobs, alone.logprobs, atol=1e-5)
    assert [one.key for one in done] == [1, 2] and done[-1].ids == alone.ids and engine.step() == []


def test_a_request_without_room_for_its_response_is_refused():
    engine = make_engine()
    engine.begin(sampling(max_tokens=6))
    engine.add(Request(0, [5] * 90, seed=0))
    with pytest.raises(UserError, match="rollout.prompt_tokens.* 91 tokens.* 90"):
        engine.add(Request(1, [5] * 91, seed=0))
    with pytest.raises(ValueError, match="still being answered"):
        engine.add(Request(0, [5], seed=0))


def test_models_the_engine_cannot_run_are_refused():
    with pytest.raises(UserError, match="rollout.prompt_tokens.*200.*128"):
        TransformersEngine(copy.deepcopy(MODEL), slots=1, max_model_len=200, device="cpu")
    engine = make_engine()
    with pytest.raises(ValueError, match="valid_columns"):
        engine.begin(sampling(valid_columns=torch.ones(VOCABULARY + 1, dtype=torch.bool)))


def test_logits_that_are_not_finite_stop_the_rollout():
    model = copy.deepcopy(MODEL)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    engine = make_engine(model)
    engine.begin(sampling())
    with pytest.raises(GuardError, match="not finite"):
        answer(engine, [Request(0, [3, 4], seed=0)])


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_are_those_that_act(tied):
    old, new = make_model(tied=tied, seed=1), make_model(tied=tied, seed=2)
    engine = make_engine(old)
    engine.begin(sampling(0.0))
    before = answer(engine, [Request(0, [3, 4, 5], seed=0)])[0]
    engine.load_weights(new.state_dict().items())  # a tied head comes under its own name too
    engine.begin(sampling(0.0))
    after = answer(engine, [Request(0, [3, 4, 5], seed=0)])[0]
    np.testing.assert_allclose(after.logprobs, plain_logprobs([3, 4, 5], after.ids, 0.0, model=new), atol=1e-5)
    assert after.ids != before.ids
    engine.load_weights(old.state_dict().items())
    engine.begin(sampling(0.0))
    assert answer(engine, [Request(0, [3, 4, 5], seed=0)])[0] == before


def test_weights_must_be_the_model_s_own():
    engine = make_engine(make_model(tied=False))
    weights = dict(make_model(tied=False).state_dict())
    with pytest.raises(GuardError, match="sends 'model.extra'"):
        engine.load_weights((weights | {"model.extra": torch.zeros(1)}).items())
    with pytest.raises(GuardError, match="did not send 2 .* among them lm_head.weight, model.norm.weight"):
        engine.load_weights(
            (name, weight) for name, weight in weights.items() if name not in ("model.norm.weight", "lm_head.weight")
        )
    with pytest.raises(GuardError, match=r"model.norm.weight has shape \(47,\)"):
        engine.load_weights((weights | {"model.norm.weight": torch.zeros(47)}).items())
