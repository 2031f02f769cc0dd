"""The model once more, in numpy and float64, token by token, as its description reads.

Nothing is shared with the program except parameters, configuration and rotary frequencies. No
rounding, no caches, no tiles; slow, and meant for a few dozen tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.quant import QuantizedArray, dequantize
from dsv4_jax.rope import frequencies

Tree = dict[str, Any]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class Oracle:
    """`logits(ids)` of the main model and `mtp_logits(ids)`: row i sees ids[i + 1]."""

    def __init__(self, cfg: ModelConfig, units: dict[str, Tree]) -> None:
        def dense(a: Any) -> np.ndarray:
            value = dequantize(a, jnp.dtype("float32")) if isinstance(a, QuantizedArray) else a
            return np.asarray(value).astype(np.float64)

        self.cfg = cfg
        is_leaf = lambda node: isinstance(node, QuantizedArray)  # noqa: E731
        self.units = jax.tree.map(dense, units, is_leaf=is_leaf)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        top = self.units["top"]
        h = self.streams(ids)
        return self.rms(self.collapse(h, top["hc_head"]), top["norm"]) @ top["head"].T

    def streams(self, ids: np.ndarray) -> np.ndarray:
        cfg = self.cfg
        h = np.repeat(self.units["top"]["embed"][ids][:, None], cfg.hc_mult, axis=1)
        for layer in range(cfg.num_layers):
            h = self.block(h, ids, self.units[f"layer_{layer:02d}"], cfg.ratio(layer))
        return h

    def mtp_logits(self, ids: np.ndarray) -> np.ndarray:
        top, mtp = self.units["top"], self.units["mtp_0"]
        h, after = self.streams(ids)[:-1], ids[1:]
        e = self.rms(top["embed"][after], mtp["enorm"]) @ mtp["e_proj"].T
        x = e[:, None] + self.rms(h, mtp["hnorm"]) @ mtp["h_proj"].T
        x = self.block(x, after, mtp, 0)
        return self.rms(self.collapse(x, mtp["hc_head"]), mtp["norm"]) @ top["head"].T

    def rms(self, x: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + self.cfg.norm_eps)

    def mixing(self, h: np.ndarray, fn: np.ndarray) -> np.ndarray:
        flat = h.reshape(len(h), -1)
        return flat @ fn.T / np.sqrt((flat * flat).mean(-1, keepdims=True) + self.cfg.norm_eps)

    def collapse(self, h: np.ndarray, w: Tree) -> np.ndarray:
        pre = sigmoid(self.mixing(h, w["fn"]) * w["scale"] + w["base"]) + self.cfg.hc_eps
        return np.einsum("tm,tmd->td", pre, h)

    def around(self, h: np.ndarray, w: Tree, norm: np.ndarray, sub_block: Any) -> np.ndarray:
        x, post, comb = self.feed(h, w, norm)
        return self.spread(sub_block(x), h, post, comb)

    def feed(
        self, h: np.ndarray, w: Tree, norm: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input of a sub-block, and the coefficients with which its output is spread."""
        n, eps = self.cfg.hc_mult, self.cfg.hc_eps
        m, base, (a, b, c) = self.mixing(h, w["fn"]), w["base"], w["scale"]
        pre = sigmoid(m[:, :n] * a + base[:n]) + eps
        post = 2 * sigmoid(m[:, n : 2 * n] * b + base[n : 2 * n])
        comb = softmax((m[:, 2 * n :] * c + base[2 * n :]).reshape(-1, n, n), axis=2) + eps
        comb = comb / (comb.sum(1, keepdims=True) + eps)
        for _ in range(self.cfg.hc_iters - 1):
            comb = comb / (comb.sum(2, keepdims=True) + eps)
            comb = comb / (comb.sum(1, keepdims=True) + eps)
        return self.rms(np.einsum("tm,tmd->td", pre, h), norm), post, comb

    def spread(
        self, out: np.ndarray, h: np.ndarray, post: np.ndarray, comb: np.ndarray
    ) -> np.ndarray:
        return post[:, :, None] * out[:, None] + np.einsum("tij,tid->tjd", comb, h)

    def block(self, h: np.ndarray, ids: np.ndarray, w: Tree, ratio: int) -> np.ndarray:
        h = self.around(
            h, w["hc_attn"], w["attn_norm"], lambda x: self.attention(x, w["attn"], ratio)
        )
        return self.around(h, w["hc_ffn"], w["ffn_norm"], lambda x: self.moe(x, ids, w["ffn"]))

    def rotate(self, x: np.ndarray, at: np.ndarray, ratio: int, sign: int = 1) -> np.ndarray:
        """x [tokens, ..., channels]; pairs (0, 1), (2, 3), … of the last channels turn."""
        freqs = frequencies(self.cfg, compressed=ratio > 0)
        angle = (at.astype(np.float32)[:, None] * freqs).astype(np.float64)
        angle = sign * angle.reshape(len(at), *(1,) * (x.ndim - 2), len(freqs))
        out, begin = x.copy(), x.shape[-1] - self.cfg.rope_dim
        even, odd = x[..., begin::2], x[..., begin + 1 :: 2]
        out[..., begin::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., begin + 1 :: 2] = even * np.sin(angle) + odd * np.cos(angle)
        return out

    def compress(self, x: np.ndarray, w: Tree, ratio: int) -> np.ndarray:
        values = x @ w["wkv"].T
        scores = x @ w["wgate"].T + w["ape"][np.arange(len(x)) % ratio]
        size, rows = len(w["norm"]), []
        for j in range(len(x) // ratio):
            own = slice(j * ratio, (j + 1) * ratio)
            v, s = values[own, -size:], scores[own, -size:]
            if ratio == CSA and j > 0:
                before = slice((j - 1) * ratio, j * ratio)
                v = np.concatenate([values[before, :size], v])
                s = np.concatenate([scores[before, :size], s])
            rows.append((softmax(s, axis=0) * v).sum(0))
        rows = self.rms(np.array(rows).reshape(-1, size), w["norm"])
        return self.rotate(rows, np.arange(len(rows)) * ratio, ratio)

    def attention(self, x: np.ndarray, w: Tree, ratio: int) -> np.ndarray:
        cfg, at = self.cfg, np.arange(len(x))
        latent = self.rms(x @ w["wq_a"].T, w["q_norm"])
        q = self.rms((latent @ w["wq_b"].T).reshape(len(x), cfg.num_heads, cfg.head_dim), 1.0)
        q = self.rotate(q, at, ratio)
        kv = self.rotate(self.rms(x @ w["wkv"].T, w["kv_norm"]), at, ratio)
        rows = self.compress(x, w["compressor"], ratio) if ratio else kv[:0]
        keys = self.compress(x, w["indexer"]["compressor"], ratio) if ratio == CSA else rows
        out = np.zeros_like(q)
        for t in at:
            visible = np.arange((t + 1) // ratio) if ratio else np.arange(0)
            if ratio == CSA:
                visible = self.select(x[t], latent[t], keys[visible], w["indexer"], t)
            seen = np.concatenate([kv[max(t - cfg.window + 1, 0) : t + 1], rows[visible]])
            scores = q[t] @ seen.T * cfg.head_dim**-0.5
            probs = softmax(np.concatenate([scores, w["sink"][:, None]], axis=1), axis=1)
            out[t] = probs[:, :-1] @ seen
        out = self.rotate(out, at, ratio, sign=-1).reshape(len(x), cfg.o_groups, -1)
        wo_a = w["wo_a"].reshape(cfg.o_groups, cfg.o_rank, -1)
        return np.einsum("tgc,goc->tgo", out, wo_a).reshape(len(x), -1) @ w["wo_b"].T

    def select(
        self, x: np.ndarray, latent: np.ndarray, keys: np.ndarray, w: Tree, t: int
    ) -> np.ndarray:
        """Numbers of the kept rows of one query; of equal scores the lowest row."""
        cfg = self.cfg
        q = (latent @ w["wq_b"].T).reshape(1, cfg.index_heads, cfg.index_dim)
        q = self.rotate(q, np.array([t]), CSA)[0]
        weights = w["weights_proj"] @ x * cfg.index_dim**-0.5 * cfg.index_heads**-0.5
        scores = (np.maximum(q @ keys.T, 0) * weights[:, None]).sum(0)
        return np.sort(np.argsort(-scores, kind="stable")[: cfg.index_topk])

    def moe(self, x: np.ndarray, ids: np.ndarray, w: Tree) -> np.ndarray:
        cfg, gate, out = self.cfg, w["gate"], []
        for xt, token in zip(x, ids, strict=True):
            scores = np.sqrt(np.log1p(np.exp(gate["weight"] @ xt)))
            if "tid2eid" in gate:
                chosen = gate["tid2eid"][token].astype(int)
            else:
                order = np.argsort(-(scores + gate["bias"]), kind="stable")
                chosen = order[: cfg.experts_per_token]
            total = self.expert(xt, w["shared"], None, 1.0)
            for e in chosen:
                weight = scores[e] / scores[chosen].sum() * cfg.routed_scale
                total = total + self.expert(xt, w["experts"], e, weight)
            out.append(total)
        return np.array(out)

    def expert(self, x: np.ndarray, w: Tree, e: int | None, weight: float) -> np.ndarray:
        w1, w2, w3 = (w[k] if e is None else w[k][e] for k in ("w1", "w2", "w3"))
        gate, up, limit = w1 @ x, w3 @ x, self.cfg.swiglu_limit
        if limit:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return w2 @ (gate * sigmoid(gate) * up * weight)
