"""The two prompt profiles and the reasoning-effort texts that tell them apart.

The text that the April preview used for "max" became "high" with the release of 0731, which has a
stronger text for "max". Rendering one profile for a checkpoint of the other silently loses a tier.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.errors import EncodingError

Profile = Literal["preview", "official"]

# Effort names as the published encoders take them; None is their default.
_TEXTS: dict[str, dict[str | None, str]] = {
    "preview": {None: "", "high": "", "max": C.EFFORT_ABSOLUTE},
    "official": {None: "", "low": "", "high": C.EFFORT_ABSOLUTE, "max": C.EFFORT_BEYOND},
}

# Effort names as API clients send them -> encoder names. "none" also means chat mode, which the
# caller decides.
_REQUESTED: dict[str, tuple[tuple[tuple[str, ...], str | None], ...]] = {
    "preview": (
        (("none", "minimal", "low", "medium", "high"), None),
        (("xhigh", "max", "ultra"), "max"),
    ),
    "official": (
        (("none", "minimal", "low"), "low"),
        (("medium", "high", "xhigh"), "high"),
        (("max", "ultra"), "max"),
    ),
}

# How a checkpoint's bundled encoder names its effort texts, at the start of a line.
_TABLE_OF_THREE = re.compile(r"^REASONING_EFFORT_PROMPTS\b", re.MULTILINE)
_SINGLE_MAXIMUM = re.compile(r"^REASONING_EFFORT_MAX\b", re.MULTILINE)
_MAX_SOURCE_BYTES = 1 << 20


def effort_text(reasoning_effort: str | None, profile: Profile) -> str:
    """What a thinking-mode prompt begins with, for an effort name of the encoder itself."""
    texts = _TEXTS[_checked(profile)]
    if reasoning_effort not in texts:
        names = ", ".join(repr(name) for name in texts)
        raise EncodingError(
            "reasoning_effort",
            f"{reasoning_effort!r} is not one of {names} (profile {profile!r}); "
            "resolve_effort maps the names of API clients",
        )
    return texts[reasoning_effort]


def resolve_effort(
    requested: str | None, profile: Profile, default_effort: str = "high"
) -> str | None:
    """The encoder's effort name for what a client requested.

    A client that names none gets `default_effort` in the official profile, nothing in preview.
    """
    tiers = _REQUESTED[_checked(profile)]
    if requested is None:
        if profile == "preview":
            return None
        requested = default_effort
    for names, effort in tiers:
        if requested in names:
            return effort
    known = ", ".join(name for names, _ in tiers for name in names)
    raise EncodingError("reasoning_effort", f"{requested!r} is not one of {known}")


def detect_profile(config: Mapping[str, Any], encoder_source: str | None = None) -> Profile:
    """The profile of a checkpoint, from evidence it carries; without any, "preview".

    Args:
        config: its config.json; conversion stores `dsv4_prompt_profile` there.
        encoder_source: text of its bundled prompt encoder, which is read and never executed.
    """
    if (stored := config.get("dsv4_prompt_profile")) is not None:
        return _checked(stored)
    if encoder_source is not None and _TABLE_OF_THREE.search(encoder_source):
        return "official"
    return "preview"


def detect_profile_in(directory: str | Path) -> Profile:
    """`detect_profile` for a checkpoint directory, official or converted."""
    root = Path(directory)
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    for path in sorted([*root.glob("encoding/*.py"), *root.glob("encoding*.py")]):
        if path.stat().st_size <= _MAX_SOURCE_BYTES:
            source = path.read_text(encoding="utf-8", errors="replace")
            if _TABLE_OF_THREE.search(source) or _SINGLE_MAXIMUM.search(source):
                return detect_profile(config, source)
    return detect_profile(config)


def _checked(profile: object) -> Profile:
    if not isinstance(profile, str) or profile not in _TEXTS:
        raise EncodingError("profile", f"{profile!r} must be 'preview' or 'official'")
    return cast(Profile, profile)
