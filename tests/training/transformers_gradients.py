"""Loss and gradients of transformers' DeepseekV4ForCausalLM, for `test_golden.py`.

    PYTHON tests/training/transformers_gradients.py CHECKPOINT PROMPTS.json OUT.npz

A script for a Python with torch and transformers. CHECKPOINT is an official-layout directory in
bfloat16, run in float32 on CPU; the loss is the mean cross-entropy of the next token of one prompt.
Of every parameter the file holds, under our name of it, the gradient's sum of magnitudes and its
values at some flat positions (`probes`).
"""

from __future__ import annotations

import json
import re
import sys

import numpy as np

PROMPT = "p130"
PROBES = 48

RENAMED = [
    (r"^model\.layers\.(\d+)\.", lambda m: f"layer_{int(m[1]):02d}/"),
    (r"^model\.embed_tokens\.weight$", "top/embed"),
    (r"^lm_head\.weight$", "top/head"),
    (r"^model\.norm\.weight$", "top/norm"),
    (r"^model\.hc_head\.hc_", "top/hc_head/"),
    (r"/self_attn\.compressor\.indexer\.scorer\.", "/attn/indexer/"),
    (r"/self_attn\.compressor\.indexer\.q_b_proj", "/attn/indexer/wq_b"),
    (r"/self_attn\.compressor\.indexer\.", "/attn/indexer/compressor/"),
    (r"/self_attn\.compressor\.", "/attn/compressor/"),
    (r"/self_attn\.sinks", "/attn/sink"),
    (r"/self_attn\.q_a_norm", "/attn/q_norm"),
    (r"/self_attn\.", "/attn/"),
    (r"compressor/kv_proj", "compressor/wkv"),
    (r"compressor/gate_proj", "compressor/wgate"),
    (r"compressor/kv_norm", "compressor/norm"),
    (r"position_bias", "ape"),
    (r"/q_a_proj", "/wq_a"),
    (r"/q_b_proj", "/wq_b"),
    (r"/kv_proj", "/wkv"),
    (r"/o_a_proj", "/wo_a"),
    (r"/o_b_proj", "/wo_b"),
    (r"/mlp\.gate\.weight", "/ffn/gate/weight"),
    (r"/mlp\.shared_experts\.gate_proj", "/ffn/shared/w1"),
    (r"/mlp\.shared_experts\.up_proj", "/ffn/shared/w3"),
    (r"/mlp\.shared_experts\.down_proj", "/ffn/shared/w2"),
    (r"/mlp\.experts\.down_proj", "/ffn/experts/w2"),
    (r"/mlp\.experts\.gate_up_proj", "/ffn/experts/w1+w3"),
    (r"/input_layernorm", "/attn_norm"),
    (r"/post_attention_layernorm", "/ffn_norm"),
    (r"/(attn|ffn)_hc\.", r"/hc_\1/"),
]


def our_name(name: str) -> str:
    """`layer_01/attn/wq_a` for `model.layers.1.self_attn.q_a_proj.weight`."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name if name.endswith("gate/weight") else name.removesuffix(".weight")


def positions(size: int) -> np.ndarray:
    """Flat positions that are kept, spread over the whole array."""
    return np.unique(np.linspace(0, size - 1, min(PROBES, size)).round().astype(np.int64))


def digest(gradient: np.ndarray) -> dict[str, np.ndarray]:
    flat = gradient.astype(np.float32).reshape(-1)
    return {"size": np.abs(flat).sum(dtype=np.float64), "probes": flat[positions(len(flat))]}


def main(checkpoint: str, prompts: str, out: str) -> None:
    import torch
    from transformers import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).train()
    with open(prompts) as file:
        listed = {p["name"]: p["tokens"] for p in json.load(file)["prompts"]}
    ids = torch.tensor([listed[PROMPT]])
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    found = {"loss": np.float64(loss.item())}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        key, gradient = our_name(name), parameter.grad.numpy()
        if key.endswith("w1+w3"):
            half = gradient.shape[1] // 2
            pieces = {key[:-5] + "w1": gradient[:, :half], key[:-5] + "w3": gradient[:, half:]}
        else:
            pieces = {key: gradient}
        for piece, value in pieces.items():
            found |= {f"{piece}:{what}": x for what, x in digest(value).items()}
    np.savez_compressed(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
