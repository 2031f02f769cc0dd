"""Fixture checkpoints, their prompts, and one way to run them in any chunking."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import store
from checkpoints.convert import convert
from dsv4_jax.cache import Cache, init_cache
from dsv4_jax.config import ModelConfig
from dsv4_jax.model import draft, group_params, prefill
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import ParamSpec, is_spec, unit_specs
from dsv4_jax.quant import QuantizedArray

DATA = Path(__file__).parents[1] / "data" / "tiny_v4"
PLAIN = Numerics("plain", "float32")
REFERENCE_F32 = Numerics("reference", "float32")
REFERENCE = Numerics("reference", "bfloat16")
# Lengths beside those of the prompts at which a state is compared and continued.
LENGTHS = (4, 7, 8, 9, 127, 128, 129, 255, 256, 257)
CHUNKS = (1, 3, 64, 127, 128)
CONTINUED = 4  # tokens that are decoded behind each of them
JUNK = 3  # token id in padding


@dataclass(frozen=True)
class Prompt:
    """Token ids to prefill, then ids to feed one by one."""

    name: str
    tokens: list[int]
    decode: list[int]

    @property
    def ids(self) -> np.ndarray:
        return np.array(self.tokens + self.decode, np.int32)


@dataclass(frozen=True)
class Model:
    """A fixture checkpoint: configuration, grouped parameters, and what the reference said."""

    cfg: ModelConfig
    params: Any
    units: dict[str, Any]
    prompts: list[Prompt]
    prefix: str

    def expected(self, variant: str) -> dict[str, np.ndarray]:
        """Arrays of `logits_{variant}.npz` of this checkpoint."""
        return load_npz(f"{self.prefix}logits_{variant}.npz")

    @cached_property
    def measured(self) -> dict[str, Any]:
        return json.loads((DATA / f"{self.prefix}measured.json").read_text())


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return dict(file)


def load_model(folder: str, target: Path) -> Model:
    """Converts a fixture checkpoint to `target` and loads it, as a user would."""
    prefix = "base_" if folder.endswith("base") else ""
    convert(DATA / folder, target)
    cfg = store.load_config(target)
    units = dict(store.load_units(target, cfg))
    listed = json.loads((DATA / f"{prefix}prompts.json").read_text())["prompts"]
    prompts = [Prompt(p["name"], p["tokens"], p["decode_tokens"]) for p in listed]
    return Model(cfg, group_params(cfg, units.__getitem__), units, prompts, prefix)


def with_lengths(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts, and prefixes of the longest one that are continued by its own next tokens."""
    ids = max(prompts, key=lambda p: len(p.tokens)).tokens
    return prompts + [Prompt(f"first{n}", ids[:n], ids[n : n + CONTINUED]) for n in LENGTHS]


def random_units(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of every unit in their stored formats, drawn so that every part matters."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> Any:
        if spec.init == "hash":
            rows = [rng.permutation(cfg.num_experts)[: spec.shape[1]] for _ in range(spec.shape[0])]
            return jnp.asarray(np.array(rows, np.int32))
        if (fmt := spec.fmt(cfg)) is None:
            center, spread = {"ones": (1, 0.1), "zeros": (0, 0.5)}.get(spec.init, (0, 0))
            values = center + (spread or spec.shape[-1] ** -0.5) * rng.normal(size=spec.shape)
            return jnp.asarray(values.astype(np.float32)).astype(spec.dtype)
        stored: QuantizedArray = spec.abstract(cfg)  # type: ignore[assignment]
        codes = rng.integers(0, 256, stored.codes.shape, np.uint8)
        size = 3 if fmt == "fp4" else 100  # of a typical code
        if fmt == "fp8":
            codes = np.where(codes & 127 == 127, 0, codes).astype(np.uint8)  # no NaN
        exponent = np.log2(spec.shape[-1] ** -0.5 / size) + rng.uniform(-1, 1, stored.scales.shape)
        scales = np.exp2(np.round(exponent)).astype(np.float32)
        if stored.scales.dtype == jnp.float32:
            scales *= rng.uniform(1, 1.5, scales.shape).astype(np.float32)
        return QuantizedArray(
            jnp.asarray(codes.view(stored.codes.dtype)),
            jnp.asarray(scales.astype(stored.scales.dtype)),
            fmt,
        )

    return {
        name: jax.tree.map(draw, tree, is_leaf=is_spec) for name, tree in unit_specs(cfg).items()
    }


@dataclass
class Run:
    """Logits at every position (`[B, positions, V]`), and the state behind the prompts."""

    main: np.ndarray
    mtp: np.ndarray
    prompt_cache: Any
    prompts: list[Prompt]

    def part(self, name: str, part: str) -> np.ndarray:
        """Rows of one prompt as the fixture numbers them."""
        row = [p.name for p in self.prompts].index(name)
        size = len(self.prompts[row].tokens)
        logits = self.mtp if part.startswith("mtp_") else self.main
        begin = size - (1 if part.startswith("mtp_") else 0)
        return logits[row, begin:] if part.endswith("decode") else logits[row, :begin]


@dataclass
class Runner:
    """Feeds all prompts as one padded batch; each chunk length is compiled once."""

    model: Model
    num: Numerics
    prompts: list[Prompt]
    compiled: dict[int, Future] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max(len(p.tokens) for p in self.prompts)

    @property
    def max_len(self) -> int:
        return max(len(p.ids) for p in self.prompts) + 1

    def empty(self) -> Cache:
        return init_cache(self.model.cfg, len(self.prompts), self.max_len, self.num)

    def prepare(self, width: int, pool: Executor | None = None) -> Future:
        """The compiled step for chunks of `width` tokens; compiles in `pool`, if one is given."""
        if width not in self.compiled:
            step = jax.jit(partial(_step, self.model.cfg, self.num), donate_argnames="cache")
            ids = jax.ShapeDtypeStruct((len(self.prompts), width), jnp.int32)
            count = jax.ShapeDtypeStruct((len(self.prompts),), jnp.int32)
            cache = jax.eval_shape(self.empty)
            lowered = step.lower(self.model.params, ids, ids, count, count, cache=cache)
            future: Future = pool.submit(lowered.compile) if pool else Future()
            if not pool:
                future.set_result(lowered.compile())
            self.compiled[width] = future
        return self.compiled[width]

    def feed(self, cache: Cache, start: np.ndarray, count: np.ndarray, width: int, junk=JUNK):
        """One chunk: `count` ids of every prompt from position `start` on, padded to `width`."""
        ids = np.full((len(self.prompts), width + 1), junk, np.int32)
        mtp_count = np.zeros_like(count)
        for row, prompt in enumerate(self.prompts):
            part = prompt.ids[start[row] : start[row] + count[row] + 1]
            ids[row, : len(part)] = part
            mtp_count[row] = min(count[row], max(len(part) - 1, 0))
        return self.prepare(width).result()(
            self.model.params,
            jnp.asarray(ids[:, :-1]),
            jnp.asarray(ids[:, 1:]),
            jnp.asarray(count),
            jnp.asarray(mtp_count),
            cache=cache,
        )

    def run(self, chunk: int, decode: bool) -> Run:
        """Prompts in chunks of `chunk`, then (with `decode`) the ids that follow them."""
        size = np.array([len(p.tokens) for p in self.prompts], np.int32)
        total = np.array([len(p.ids) for p in self.prompts], np.int32)
        shape = (len(self.prompts), self.max_len, self.model.cfg.vocab_size)
        result = Run(np.zeros(shape, np.float32), np.zeros(shape, np.float32), None, self.prompts)
        cache = self.empty()
        start = np.zeros_like(size)
        while (start < size).any():
            cache = self._advance(result, cache, start, size, chunk)
        result.prompt_cache = jax.tree.map(np.array, cache)
        while decode and (start < total).any():
            cache = self._advance(result, cache, start, total, 1)
        return result

    def _advance(self, result: Run, cache: Cache, start: np.ndarray, end: np.ndarray, width: int):
        count = np.clip(end - start, 0, width).astype(np.int32)
        main, mtp, cache = self.feed(cache, start, count, width)
        main, mtp = np.asarray(main), np.asarray(mtp)
        for row in range(len(start)):
            here = slice(start[row], start[row] + count[row])
            result.main[row, here] = main[row, : count[row]]
            result.mtp[row, here] = mtp[row, : count[row]]
        start += count
        return cache


def _step(cfg, num, params, tokens_BT, next_BT, count_B, mtp_count_B, *, cache):
    out, cache = prefill(cfg, num, params, tokens_BT, cache, count_B, all_logits=True)
    mtp, cache = draft(
        cfg, num, params, out.streams_BTMD, next_BT, cache, mtp_count_B, all_logits=True
    )
    return out.logits, mtp.logits, cache


def row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def rms_ratio(got: np.ndarray, want: np.ndarray) -> float:
    """Root-mean-square error over the root-mean-square of what was wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error over the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())
