"""Draws several answers to a chat's question, judges them, and notes how likely each token was.

All answers to one prompt are drawn side by side, one token of each at a time. Tokens come from the
model's own distribution (temperature 1, the whole vocabulary), so that their log-probabilities are
those of the policy that learns from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv4_jax import model
from dsv4_jax.cache import init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.encoding import CompletionError, parse_message_from_completion_text
from dsv4_jax.numerics import Numerics
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import render
from dsv4_jax.training.skills.replay import Verdict, judge, questions

CHUNK = 64  # tokens of a prompt that run at once; prompts are padded to it


class Drawn(NamedTuple):
    """Token ids, the end of turn included if it was reached, and their log-probabilities."""

    ids: list[int]
    log_probs: list[float]


class Sampler:
    """A model that draws.

    max_len: of prompt and answer together. max_tokens: of an answer.

    Raises:
        ValueError: the lengths do not fit the model or each other.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num: Numerics,
        params: model.Params,
        end: int,
        max_len: int,
        max_tokens: int,
    ) -> None:
        if not 0 < max_tokens < max_len <= cfg.max_len:
            raise ValueError(
                f"max_tokens={max_tokens} must be positive and leave room for a prompt in "
                f"max_len={max_len}, which may be at most the model's {cfg.max_len}"
            )
        self.max_len, self.max_tokens = max_len, max_tokens
        self._end, self._params, self._vocab = end, params, cfg.vocab_size
        self._scan = model.is_scanned(cfg, params)
        room = -(-max_len // CHUNK) * CHUNK
        self._cache = lambda rows: init_cache(cfg, rows, room, num, self._scan)
        self._prefill = jax.jit(partial(model.prefill, cfg, num), donate_argnums=2)
        self._step = jax.jit(partial(_step, cfg, num), donate_argnums=2)
        self._pick = jax.jit(_pick)

    def draw(self, prompt: list[int], answers: int, key: Array) -> list[Drawn]:
        """So many answers to one prompt.

        Raises:
            ValueError: the prompt is empty or leaves no room for an answer.
        """
        if not 0 < len(prompt) <= self.max_len - self.max_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: must be from 1 to {self.max_len} - "
                f"{self.max_tokens}, as answers may have so many"
            )
        cache, logits_BV = self._cache(answers), None
        for start in range(0, len(prompt), CHUNK):
            part = prompt[start : start + CHUNK]
            row = np.zeros(CHUNK, np.int32)
            row[: len(part)] = part
            tokens_BT = jnp.broadcast_to(jnp.asarray(row), (answers, CHUNK))
            real_B = jnp.full(answers, len(part), jnp.int32)
            out, cache = self._prefill(self._params, tokens_BT, cache, real_B)
            logits_BV = out.logits
        assert logits_BV is not None
        keys = jax.random.split(key, self.max_tokens)
        tokens_B, log_probs_B = self._pick(logits_BV, keys[0])
        found = [(np.asarray(tokens_B), np.asarray(log_probs_B))]
        for step_key in keys[1:]:
            if all(self._end in column for column in np.stack([ids for ids, _ in found], 1)):
                break
            tokens_B, log_probs_B, cache = self._step(self._params, tokens_B, cache, step_key)
            found.append((np.asarray(tokens_B), np.asarray(log_probs_B)))
        ids_TB, log_probs_TB = (np.stack(part) for part in zip(*found, strict=True))
        return [self._cut(ids_TB[:, row], log_probs_TB[:, row]) for row in range(answers)]

    def _cut(self, ids_T: np.ndarray, log_probs_T: np.ndarray) -> Drawn:
        ids = ids_T.tolist()
        size = ids.index(self._end) + 1 if self._end in ids else len(ids)
        return Drawn(ids[:size], log_probs_T[:size].tolist())


def _pick(logits_BV: Array, key: Array) -> tuple[Array, Array]:
    log_p_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
    tokens_B = jax.random.categorical(key, log_p_BV).astype(jnp.int32)
    return tokens_B, jnp.take_along_axis(log_p_BV, tokens_B[:, None], axis=1)[:, 0]


def _step(cfg: ModelConfig, num: Numerics, params: Any, tokens_B: Array, cache: Any, key: Array):
    out, cache = model.decode_step(cfg, num, params, tokens_B, cache)
    return *_pick(out.logits, key), cache


def exact(verdict: Verdict) -> float:
    """The reward of an answer: 1 if it is the right one."""
    return float(verdict.exact)


def rollouts(
    sampler: Sampler,
    tokenizer: Tokenizer,
    chats: Iterable[dict[str, Any]],
    answers: int,
    seed: int,
    reward: Callable[[Verdict], float] = exact,
) -> Iterator[dict[str, Any]]:
    """Yields a line of JSON for every turn of every answer to every question of the chats.

    A question is a group. An answer that calls tools has several turns, each with the reward of the
    answer; what the tools say is part of the next turn's prompt. Questions whose prompt leaves no
    room for an answer are passed over.
    """
    keys = (jax.random.fold_in(jax.random.key(seed), number) for number in count())
    for number, item in enumerate(chats):
        for place, question in enumerate(questions(item)):
            prompt = _prompt(tokenizer, question.messages, item)
            if len(prompt) > sampler.max_len - sampler.max_tokens:
                continue
            firsts = sampler.draw(prompt, answers, next(keys))
            for sample, first in enumerate(firsts):
                turns = [(prompt, first)]
                verdict = judge(_actor(sampler, tokenizer, item, turns, keys), item, question)
                for ids, drawn in turns:
                    yield {
                        "group": f"{number}.{place}",
                        "sample": str(sample),
                        "skill": item.get("skill", ""),
                        "prompt": ids,
                        "completion": drawn.ids,
                        "logprobs": drawn.log_probs,
                        "reward": reward(verdict),
                    }


def _prompt(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], item: dict[str, Any]
) -> list[int]:
    return tokenizer.encode_segments(render({**item, "messages": messages}))


def _actor(
    sampler: Sampler,
    tokenizer: Tokenizer,
    item: dict[str, Any],
    turns: list[tuple[list[int], Drawn]],
    keys: Iterator[Array],
) -> Callable[..., dict[str, Any]]:
    """What `judge` asks: the first turn is drawn already, further ones are added to `turns`."""
    waiting = list(turns)

    def ask(messages: list[dict[str, Any]], _tools: Any, thinking: bool) -> dict[str, Any]:
        if waiting:
            return _message(tokenizer, waiting.pop()[1].ids, thinking)
        prompt = _prompt(tokenizer, messages, item)
        if len(prompt) > sampler.max_len - sampler.max_tokens:
            return {"role": "assistant", "content": ""}
        [drawn] = sampler.draw(prompt, 1, next(keys))
        turns.append((prompt, drawn))
        return _message(tokenizer, drawn.ids, thinking)

    return ask


def _message(tokenizer: Tokenizer, ids: list[int], thinking: bool) -> dict[str, Any]:
    """What was drawn as a message; an empty one if it has no right form."""
    try:
        text = tokenizer.decode(ids)
        found = parse_message_from_completion_text(text, "thinking" if thinking else "chat")
    except (CompletionError, UnicodeDecodeError):
        return {"role": "assistant", "content": ""}
    calls = found.pop("tool_calls")
    if calls:
        named = [{"id": f"call_{n}", **call} for n, call in enumerate(calls)]
        found["tool_calls"] = named
    return found
