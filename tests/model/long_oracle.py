"""The float64 oracle for very long prompts: whole arrays in plain memory, answers at few positions.

Every layer but the last is computed for all tokens, the last one where it is asked for. Nothing is
kept from chunk to chunk: rows come from all tokens of a layer at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv4_jax.config import CSA, ModelConfig
from tests.model.oracle import Oracle, Tree, softmax

BLOCK = 512  # tokens that are computed together; no part of the result depends on it


class Memory(NamedTuple):
    """What queries of a layer look at: a key of each token at `positions`, and all rows."""

    positions: np.ndarray
    kv: np.ndarray
    rows: np.ndarray
    keys: np.ndarray


class Answer(NamedTuple):
    """Logits at the probes `[probes, V]`: of the main model and of the MTP block."""

    main: np.ndarray
    mtp: np.ndarray


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


class LongOracle(Oracle):
    """`answer(at)`: logits of positions `at` of a prompt.

    forget: rows of so many first tokens are hidden from the last layer, to see whether they matter.
    """

    def __init__(self, cfg: ModelConfig, units: dict[str, Tree], ids: np.ndarray) -> None:
        super().__init__(cfg, units)
        self.ids, self.forget = ids, 0
        every = np.arange(len(ids))
        self.h = np.repeat(self.units["top"]["embed"][ids][:, None], cfg.hc_mult, axis=1)
        for layer in range(cfg.num_layers - 1):
            w, ratio = self.units[f"layer_{layer:02d}"], cfg.ratio(layer)
            self.h = self.layer(self.h, every, every, ids, w, ratio)

    def answer(self, at: np.ndarray) -> Answer:
        cfg, top, mtp = self.cfg, self.units["top"], self.units["mtp_0"]
        near = np.unique(np.clip(at[:, None] - np.arange(cfg.window), 0, None))
        last, every = cfg.num_layers - 1, np.arange(len(self.ids))
        w = self.units[f"layer_{last:02d}"]
        h = self.layer(self.h, every, near, self.ids, w, cfg.ratio(last))
        main = self.rms(self.collapse(h, top["hc_head"]), top["norm"]) @ top["head"].T
        after = self.ids[near + 1]
        e = self.rms(top["embed"][after], mtp["enorm"]) @ mtp["e_proj"].T
        x = e[:, None] + self.rms(h, mtp["hnorm"]) @ mtp["h_proj"].T
        x = self.layer(x, near, at, after, mtp, 0)
        guess = self.rms(self.collapse(x, mtp["hc_head"]), mtp["norm"]) @ top["head"].T
        return Answer(main[np.searchsorted(near, at)], guess)

    def layer(
        self,
        h: np.ndarray,
        positions: np.ndarray,
        at: np.ndarray,
        ids: np.ndarray,
        w: Tree,
        ratio: int,
    ) -> np.ndarray:
        """Streams behind a layer at positions `at`; `h` and `ids` are those at `positions`."""
        where = np.searchsorted(positions, at)
        fed = (self.feed(h[part], w["hc_attn"], w["attn_norm"]) for part in blocks(len(h)))
        x, post, comb = map(np.concatenate, zip(*fed, strict=True))
        memory = self.remember(x, positions, w["attn"], ratio)
        out = np.empty((len(at), *h.shape[1:]))
        for part in blocks(len(at)):
            here = where[part]
            a = self.attend(x[here], at[part], memory, w["attn"], ratio)
            mid = self.spread(a, h[here], post[here], comb[here])
            ffn = lambda y, here=here: self.moe(y, ids[here], w["ffn"])  # noqa: E731
            out[part] = self.around(mid, w["hc_ffn"], w["ffn_norm"], ffn)
        return out

    def remember(self, x: np.ndarray, positions: np.ndarray, w: Tree, ratio: int) -> Memory:
        kv = np.empty((len(x), self.cfg.head_dim))
        for part in blocks(len(x)):
            plain = self.rms(x[part] @ w["wkv"].T, w["kv_norm"])
            kv[part] = self.rotate(plain, positions[part], ratio)
        rows = self.compress(x, w["compressor"], ratio) if ratio else kv[:0]
        keys = self.compress(x, w["indexer"]["compressor"], ratio) if ratio == CSA else rows
        return Memory(positions, kv, rows, keys)

    def compress(self, x: np.ndarray, w: Tree, ratio: int) -> np.ndarray:
        size, count = len(w["norm"]), len(x) // ratio
        out = np.empty((count, size))
        for part in blocks(count):
            begin = max(part.start - 1, 0)  # with the window in front
            windows = x[begin * ratio : part.stop * ratio].reshape(-1, ratio, x.shape[1])
            values, scores = windows @ w["wkv"].T, windows @ w["wgate"].T + w["ape"]
            v, s = values[..., -size:], scores[..., -size:]
            if ratio == CSA:
                none = np.full((1, ratio, size), -np.inf)
                v = np.concatenate([np.roll(values[..., :size], 1, axis=0), v], axis=1)
                s = np.concatenate([np.concatenate([none, scores[:-1, :, :size]]), s], axis=1)
            pooled = (softmax(s, axis=1) * v).sum(1)[part.start - begin :]
            places = np.arange(part.start, part.stop) * ratio
            out[part] = self.rotate(self.rms(pooled, w["norm"]), places, ratio)
        return out

    def attend(
        self, x: np.ndarray, at: np.ndarray, memory: Memory, w: Tree, ratio: int
    ) -> np.ndarray:
        """Attention of tokens `x` at increasing positions `at`."""
        cfg = self.cfg
        latent = self.rms(x @ w["wq_a"].T, w["q_norm"])
        q = self.rms((latent @ w["wq_b"].T).reshape(len(x), cfg.num_heads, cfg.head_dim), 1.0)
        q = self.rotate(q, at, ratio) * cfg.head_dim**-0.5
        seen = at[:, None] - np.arange(cfg.window)
        near = memory.kv[np.searchsorted(memory.positions, np.maximum(seen, 0))]
        scores = [np.where(seen[:, None] >= 0, np.einsum("tnh,twh->tnw", q, near), -np.inf)]
        scores.append(np.broadcast_to(w["sink"][None, :, None], (*q.shape[:2], 1)))
        if ratio == CSA:
            far = [self.chosen(x[i], latent[i], memory, w, at[i]) for i in range(len(x))]
            rows = memory.rows[np.array([self.filled(chosen) for chosen in far])]
            hidden = np.arange(rows.shape[1]) >= np.array([[len(chosen)] for chosen in far])
            scores.append(np.where(hidden[:, None], -np.inf, np.einsum("tnh,tkh->tnk", q, rows)))
        elif ratio:
            rows = memory.rows[: (at[-1] + 1) // ratio]
            hidden = np.arange(len(rows)) >= (at[:, None] + 1) // ratio
            scores.append(np.where(hidden[:, None], -np.inf, q @ rows.T))
        probs = softmax(np.concatenate(scores, axis=2), axis=2)
        out = np.einsum("tnw,twh->tnh", probs[..., : cfg.window], near)
        if ratio:
            form = "tnk,tkh->tnh" if ratio == CSA else "tnk,kh->tnh"
            out += np.einsum(form, probs[..., cfg.window + 1 :], rows, optimize=True)
        out = self.rotate(out, at, ratio, sign=-1).reshape(len(x), cfg.o_groups, -1)
        wo_a = w["wo_a"].reshape(cfg.o_groups, cfg.o_rank, -1)
        return np.einsum("tgc,goc->tgo", out, wo_a).reshape(len(x), -1) @ w["wo_b"].T

    def chosen(self, x: np.ndarray, latent: np.ndarray, memory: Memory, w: Tree, t: int) -> Any:
        begin, end = self.forget // CSA, (t + 1) // CSA
        keys = memory.keys[min(begin, end) : end]
        return min(begin, end) + self.select(x, latent, keys, w["indexer"], t)

    def filled(self, chosen: np.ndarray) -> np.ndarray:
        return np.pad(chosen, (0, self.cfg.index_topk - len(chosen)))

    def moe(self, x: np.ndarray, ids: np.ndarray, w: Tree) -> np.ndarray:
        cfg, gate = self.cfg, w["gate"]
        scores = np.sqrt(np.log1p(np.exp(x @ gate["weight"].T)))
        if "tid2eid" in gate:
            chosen = gate["tid2eid"][ids].astype(int)
        else:
            order = np.argsort(-(scores + gate["bias"]), axis=1, kind="stable")
            chosen = order[:, : cfg.experts_per_token]
        is_used = np.zeros_like(scores)
        np.put_along_axis(is_used, chosen, 1, axis=1)
        weights = scores * is_used * cfg.routed_scale
        weights = weights / (scores * is_used).sum(1, keepdims=True)
        total = self.experts(x, w["shared"], None, np.ones(len(x)))
        for e in range(cfg.num_experts):
            own = is_used[:, e] > 0
            total[own] += self.experts(x[own], w["experts"], e, weights[own, e])
        return total

    def experts(self, x: np.ndarray, w: Tree, e: int | None, weight: np.ndarray) -> np.ndarray:
        """One expert for many tokens."""
        w1, w2, w3 = (w[k] if e is None else w[k][e] for k in ("w1", "w2", "w3"))
        gate, up, limit = x @ w1.T, x @ w3.T, self.cfg.swiglu_limit
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return (gate / (1 + np.exp(-gate)) * up * weight[:, None]) @ w2.T
