"""Choose how a model is shown an environment: the renderer named in its tokenizer_config.json, else chat messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date

from transformers import PreTrainedTokenizerBase

from atod_fast.config import Config
from atod_fast.demo.rendering import compact_renderer
from atod_fast.envs.prompt import prompt_for
from atod_fast.envs.protocol import Environment
from atod_fast.errors import UserError
from atod_fast.rollout.rendering import ChatRenderer, Renderer

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
    return ChatRenderer(
        tokenizer,
        prompt_for(config.env.name, env, thinking=rollout.thinking, history=rollout.history),
        context=rollout.context,
        thinking=rollout.thinking,
        prompt_tokens=rollout.prompt_tokens,
        columns=columns,
        stop_ids=stop_ids,
        day=date.fromisoformat(rollout.date) if rollout.date else None,
    )
