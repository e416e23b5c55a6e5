"""Choose how a model is shown an environment: the renderer named in its tokenizer_config.json, else chat messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date

from transformers import PreTrainedTokenizerBase

from atod_fast.config import Config
from atod_fast.demo.rendering import compact_renderer
from atod_fast.envs.mix.env import Mix
from atod_fast.envs.prompt import prompt_for
from atod_fast.envs.protocol import Environment, Prompt
from atod_fast.errors import UserError
from atod_fast.rollout.rendering import ByPart, ChatRenderer, Renderer

# Values of `atod_renderer` in a tokenizer_config.json.
RENDERERS: dict[str, Callable[[Config, PreTrainedTokenizerBase, Environment], Renderer]] = {"compact": compact_renderer}


def make_renderer(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    columns: int,
    env: Environment,
    stop_ids: Sequence[int] = (),
) -> Renderer:
    """Return the renderer that shows `env` to the model of `tokenizer`.

    columns: width of the model's head; columns without a token are never sampled. stop_ids: see `ChatRenderer`.

    Raises:
        UserError: the named renderer is unknown or cannot show `env`; the tokenizer names none and has no usable chat
            template; or the environment has no prompt.
    """
    name, model = tokenizer.init_kwargs.get("atod_renderer"), tokenizer.name_or_path
    if name is not None:
        if name not in RENDERERS:
            file, known = f"tokenizer_config.json of {model!r}", ", ".join(RENDERERS)
            raise UserError(f"student.path: atod_renderer={name!r} in {file} is none of {known}; correct it")
        return RENDERERS[name](config, tokenizer, env)
    if tokenizer.chat_template is None:
        raise UserError(
            f"student.path: tokenizer {model!r} has no chat template; use a chat or instruct model (a demo model "
            'built by an earlier version: add "atod_renderer": "compact" and, for its environment, "atod_environment": '
            '"alfworld", "searchqa" or "webshop" to its tokenizer_config.json)'
        )
    rollout = config.rollout

    def chat(prompt: Prompt, thinking: bool) -> ChatRenderer:
        return ChatRenderer(
            tokenizer,
            prompt,
            context=rollout.context,
            thinking=thinking,
            prompt_tokens=rollout.prompt_tokens,
            columns=columns,
            stop_ids=stop_ids,
            day=date.fromisoformat(rollout.date) if rollout.date else None,
        )

    if not isinstance(env, Mix):
        prompt = prompt_for(config.env.name, env, thinking=rollout.thinking, history=rollout.history)
        return chat(prompt, rollout.thinking)
    by_thinking: dict[bool, ChatRenderer] = {}  # templates are large, and are shared by parts that think alike
    shown: dict[str, Renderer] = {}
    for label, part in env.parts.items():
        thinking = rollout.thinking if part.thinking is None else part.thinking
        history = rollout.history if part.history is None else part.history
        with part.named():
            prompt = prompt_for(part.name, env.envs[label], thinking=thinking, history=history)
        if thinking not in by_thinking:
            by_thinking[thinking] = chat(prompt, thinking)
        shown[label] = by_thinking[thinking].worded(prompt)
    return ByPart(shown)
