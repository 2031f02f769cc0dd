"""Stop strings, however the text is cut."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_jax.serving.stop import StopMatcher

PIECES = st.lists(st.text("ab ", max_size=4), max_size=8)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    passed = ""
    for piece in pieces:
        passed += matcher.push(piece)
        if matcher.is_hit:
            return passed, True
    return passed + matcher.flush(), False


@given(PIECES, STOPS)
@example(["aab"], ["ab"])
@example(["a", "ab"], ["aab", "b"])
@settings(max_examples=500, deadline=None, database=None)
def test_text_passes_up_to_the_first_stop_that_is_complete(pieces, stops):
    text = "".join(pieces)
    passed, is_hit = run(list(text), stops)
    assert is_hit == any(stop in text for stop in stops)
    if not is_hit:
        assert passed == text
    assert text.startswith(passed)
    assert not any(stop in passed for stop in stops)
    assert run(pieces, stops)[1] == is_hit


def test_nothing_is_held_that_cannot_become_a_stop():
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == "one "
    assert matcher.push("T") == "ENT"
    assert matcher.push("EEN") == "E"
    assert matcher.push("D more") == ""
    assert matcher.is_hit


def test_the_earliest_of_several_stops_wins():
    assert run(["xaybz"], ["b", "a"]) == ("x", True)
