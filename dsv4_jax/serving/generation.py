"""What a checkpoint says of sampling: defaults for requests that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "generation_config.json"
BOUNDS = {  # as of requests; see `sampling_fields`
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}


def read_generation(folder: str | Path) -> dict[str, Any]:
    """Arguments of `SamplingParams` that the checkpoint's `generation_config.json` names.

    `do_sample: false` is temperature 0. Other fields are about other programs.

    Raises:
        ValueError: the file is no JSON object, or a value is out of range.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object")
    found: dict[str, Any] = {}
    for name, (least, most) in BOUNDS.items():
        if (value := raw.get(name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name}={value!r} must be a number")
        if not least <= value <= most:
            raise ValueError(f"{path}: {name}={value} must lie between {least:g} and {most:g}")
        found[name] = float(value)
    if (top_k := raw.get("top_k")) is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < -1:
            raise ValueError(f"{path}: top_k={top_k!r} must be a count, 0 or -1 for all")
        found["top_k"] = max(top_k, 0)
    if raw.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
