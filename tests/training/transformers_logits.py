"""Logits of transformers' DeepseekV4ForCausalLM, for `test_golden.py`.

    PYTHON tests/training/transformers_logits.py CHECKPOINT TOKENS.npy OUT.npy

A script for a Python with torch and transformers (and, for quantised checkpoints, accelerate).
CHECKPOINT is an official-layout directory of any format, decoded when it is loaded and run in
float32 on CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def main(checkpoint: str, tokens: str, out: str) -> None:
    import torch
    from transformers import AutoConfig, DeepseekV4ForCausalLM, FineGrainedFP8Config

    choices: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if hasattr(AutoConfig.from_pretrained(checkpoint), "quantization_config"):
        choices["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = DeepseekV4ForCausalLM.from_pretrained(checkpoint, **choices).float().eval()
    with torch.no_grad():
        ids = torch.from_numpy(np.load(tokens).astype(np.int64))
        np.save(out, model(input_ids=ids, use_cache=False).logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
