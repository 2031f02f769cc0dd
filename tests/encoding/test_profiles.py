"""Which effort text a request gets, and how a checkpoint tells its profile."""

import json

import pytest

from dsv4_jax.encoding import EncodingError, detect_profile, detect_profile_in, resolve_effort
from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.profiles import effort_text

OFFICIAL_SOURCE = 'import json\nREASONING_EFFORT_PROMPTS: dict = {\n    "low": "",\n}\n'
PREVIEW_SOURCE = 'REASONING_EFFORT_MAX = (\n    "text"\n)\n'

TEXTS = {
    # requested: text in preview, text in official
    None: ("", C.EFFORT_ABSOLUTE),
    "none": ("", ""),
    "minimal": ("", ""),
    "low": ("", ""),
    "medium": ("", C.EFFORT_ABSOLUTE),
    "high": ("", C.EFFORT_ABSOLUTE),
    "xhigh": (C.EFFORT_ABSOLUTE, C.EFFORT_ABSOLUTE),
    "max": (C.EFFORT_ABSOLUTE, C.EFFORT_BEYOND),
    "ultra": (C.EFFORT_ABSOLUTE, C.EFFORT_BEYOND),
}


@pytest.mark.parametrize("requested", TEXTS)
def test_requested_effort(requested):
    texts = [effort_text(resolve_effort(requested, p), p) for p in ("preview", "official")]
    assert tuple(texts) == TEXTS[requested]


def test_default_effort_matters_in_the_official_profile_only():
    assert resolve_effort(None, "official", default_effort="low") == "low"
    assert resolve_effort(None, "preview", default_effort="max") is None


@pytest.mark.parametrize("requested", ["", "highest", 3, ["max"]])
def test_unknown_effort(requested):
    with pytest.raises(EncodingError, match="reasoning_effort: .* is not one of none, minimal"):
        resolve_effort(requested, "official")


def test_unknown_profile():
    with pytest.raises(EncodingError, match="profile: 'new' must be"):
        resolve_effort("max", "new")
    with pytest.raises(EncodingError, match="profile: 'new' must be"):
        detect_profile({"dsv4_prompt_profile": "new"})


def test_detection_from_evidence():
    assert detect_profile({}) == "preview"
    assert detect_profile({}, PREVIEW_SOURCE) == "preview"
    assert detect_profile({}, OFFICIAL_SOURCE) == "official"
    assert detect_profile({}, f"# {OFFICIAL_SOURCE.splitlines()[1]}") == "preview"
    assert detect_profile({"dsv4_prompt_profile": "preview"}, OFFICIAL_SOURCE) == "preview"


def test_detection_in_a_directory(tmp_path):
    assert detect_profile_in(tmp_path) == "preview"
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "a_test.py").write_text("raise SystemExit('never executed')\n")
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(OFFICIAL_SOURCE)
    assert detect_profile_in(tmp_path) == "official"
    (tmp_path / "config.json").write_text(json.dumps({"dsv4_prompt_profile": "preview"}))
    assert detect_profile_in(tmp_path) == "preview"
