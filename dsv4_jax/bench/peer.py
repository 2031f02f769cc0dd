"""Runs one case of transformers' DeepseekV4ForCausalLM: `PYTHON peer.py CONFIG CASE`.

A script for a Python with torch and transformers, float32 on CPU with random weights. Hash-router
tables, which transformers leaves zero, are filled with distinct experts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DynamicCache,
)

sys.path.insert(0, str(Path(__file__).parent))
from case import DECODE_CHUNK, Case, measure, peak_gb  # pyright: ignore # noqa: E402

UNKNOWN_TO_PEER = ("architectures", "torch_dtype", "quantization_config", "expert_dtype")


def build(path: str):
    """The model in evaluation mode, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    raw = json.loads(Path(path).read_text())
    config = DeepseekV4Config(**{k: v for k, v in raw.items() if k not in UNKNOWN_TO_PEER})
    model = DeepseekV4ForCausalLM(config).float().eval()
    for module in model.modules():
        if type(module).__name__ == "DeepseekV4HashRouter":
            order = torch.rand(config.vocab_size, module.num_experts).argsort(1)
            module.tid2eid.copy_(order[:, : module.top_k])
    return config, model


def run(path: str, case: Case) -> None:
    config, model = build(path)
    before_gb = peak_gb()
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.length)
    tokens = torch.randint(2, config.vocab_size, shape, generator=generator)

    def prompt(chunk: int):
        cache, out = DynamicCache(config=config), None
        for start in range(0, case.length, chunk or case.length):
            part = tokens[:, start : start + (chunk or case.length)]
            out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert out is not None
        return out.logits[:, -1], cache

    if case.kind == "prefill":
        measure(case, lambda: prompt(case.chunk), before_gb)
        return
    logits, cache = prompt(DECODE_CHUNK)
    token = logits.argmax(-1, keepdim=True)

    def repetition() -> None:
        nonlocal token
        for _ in range(case.new_tokens):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    measure(case, repetition, before_gb)


if __name__ == "__main__":
    with torch.inference_mode():
        run(sys.argv[1], Case(**json.loads(sys.argv[2])))
