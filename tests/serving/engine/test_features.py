"""Everything a request can ask for, alone and in company: the same bits."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from dsv4_jax.generator import Generator
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.loop import EngineError
from dsv4_jax.serving.masks import words_of
from dsv4_jax.serving.model import Allowed, Token
from tests.serving.engine.conftest import forget_prefixes, little_room, metric, settled

NEW = 20
STEPS = 96  # of the long ones, which outgrow their pages


class Ladder:
    """Allows ids of one residue, another after each token; nothing matters after `length`."""

    def __init__(self, length: int = 10_000, fails_at: int = -1, refuses_at: int = -1) -> None:
        self.seen: list[int] = []
        self.fills = 0
        self.length, self.fails_at, self.refuses_at = length, fails_at, refuses_at

    def fill(self, words_W: np.ndarray) -> bool:
        assert self.fills == len(self.seen), "fill and advance do not alternate"
        self.fills += 1
        if len(self.seen) == self.fails_at:
            raise RuntimeError("fill broke")
        if len(self.seen) >= self.length:
            return False
        words_W[:] = 0
        for token in range(len(self.seen) % 7, 320, 7):
            words_W[token // 32] |= np.uint32(1 << token % 32)
        return True

    def advance(self, token: int) -> None:
        if len(self.seen) == self.refuses_at:
            raise RuntimeError("advance broke")
        if len(self.seen) < self.length:
            assert token % 7 == len(self.seen) % 7, "a token that was not allowed"
        self.seen.append(token)


def cases(count: int) -> list[tuple[SamplingParams, bool]]:
    """Settings, and whether a guide comes along."""
    return [
        (SamplingParams(count, temperature=0.0, logprobs=3), False),
        (SamplingParams(count, seed=1), False),
        (SamplingParams(count, seed=2, top_p=0.8, top_k=40, min_p=0.01, logprobs=0), False),
        (SamplingParams(count, seed=3, presence_penalty=0.9, frequency_penalty=0.4), False),
        (SamplingParams(count, temperature=0.0, repetition_penalty=1.4, logprobs=20), False),
        (SamplingParams(count, seed=5, logit_bias=((5, 3.0), (9, -9.0)), logprobs=1), False),
        (SamplingParams(count, seed=6, prompt_logprobs=2), False),
        (SamplingParams(count, seed=7, logprobs=2), True),
        (SamplingParams(count, temperature=0.0, frequency_penalty=1.0), True),
    ]


def make_prompt(index: int, length: int) -> list[int]:
    return np.random.default_rng(index).integers(3, 300, length).tolist()


def ask(engine, prompt, params, guided, tenant="") -> tuple[list[Token], object]:
    guide = Ladder() if guided else None
    stream = engine.stream(prompt, params, frozenset(), tenant=tenant, guide=guide)
    tokens = list(stream)
    assert guide is None or guide.seen == [token.id for token in tokens]
    return tokens, stream.prompt_logprobs


def ask_all(engine, length, count, at_once, tenant=""):
    jobs = [
        (make_prompt(i, length + i), params, guided)
        for i, (params, guided) in enumerate(cases(count))
    ]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda job: ask(engine, *job, tenant), jobs))


def test_every_feature_gives_the_same_bits_alone_in_company_and_after_preemption(engine):
    alone = ask_all(engine, 100, STEPS, at_once=1)
    assert all(len(tokens) == STEPS for tokens, _ in alone)
    together = ask_all(engine, 100, STEPS, at_once=9, tenant="other")
    assert together == alone
    before = metric(engine, "num_preemptions_total")
    with little_room(engine, pages=4):
        squeezed = ask_all(engine, 100, STEPS, at_once=9, tenant="third")
    assert squeezed == alone
    assert metric(engine, "num_preemptions_total") > before + 2


def test_logprobs_are_the_models_own(engine):
    prompt = make_prompt(1, 300)
    params = SamplingParams(
        NEW, seed=1, temperature=2.0, logprobs=20, prompt_logprobs=3, logit_bias=((7, 4.0),)
    )
    tokens, scores = ask(engine, prompt, params, guided=False)
    log = [*prompt, *(token.id for token in tokens)]
    programs = engine.runner.programs
    cfg = engine.test_config
    logits = Generator(cfg, Numerics(), programs.params, engine.max_len).logits(log[:-1])
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert scores[0] is None and len(scores) == len(prompt)
    for i, token in enumerate([*scores[1:], *tokens]):
        assert token.id == log[i + 1]
        assert abs(token.logprob - want[i, token.id]) < 0.05
        assert len(token.top) == (3 if i + 1 < len(prompt) else 20)
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)
        assert abs(values[0] - want[i].max()) < 0.05


@pytest.mark.parametrize("length", [1, 2, 128, 129, 256, 257])
def test_a_prompt_is_judged_without_an_answer(engine, length):
    prompt = make_prompt(2, length)
    whole = make_prompt(2, 300)[:length]
    stream = engine.stream(prompt, SamplingParams(0, prompt_logprobs=1), frozenset())
    assert list(stream) == []
    assert stream.cached_tokens == 0
    assert [score and score.id for score in stream.prompt_logprobs] == [None, *whole[1:]]


def test_prompt_logprobs_do_not_depend_on_what_is_cached(engine):
    prompt, params = make_prompt(3, 400), SamplingParams(2, seed=1, prompt_logprobs=5)
    first = ask(engine, prompt, params, guided=False)
    plain = ask(engine, prompt, SamplingParams(2, seed=1), guided=False)
    assert ask(engine, prompt, params, guided=False) == first
    assert plain == (first[0], None)


def test_guided_rows_wait_for_their_token_and_others_do_not(engine):
    steps: list[tuple[bool, bool]] = []
    run = engine.runner.run

    def watch(plan):
        guided = {row.request.guided for row in plan.decode}
        steps.append((True in guided, False in guided))
        return run(plan)

    engine.runner.run = watch
    try:
        with ThreadPoolExecutor(2) as pool:
            free = pool.submit(ask, engine, [5], SamplingParams(60, seed=1), False)
            bound = pool.submit(ask, engine, [6], SamplingParams(25, seed=1), True)
            assert len(free.result()[0]) == 60 and len(bound.result()[0]) == 25
    finally:
        engine.runner.run = run
    both = sum(guided and other for guided, other in steps)
    alone = sum(other and not guided for guided, other in steps)
    assert both >= 10 and alone >= 10


def test_a_guide_that_lets_go(engine):
    guide = Ladder(length=3)
    stream = engine.stream([5, 6], SamplingParams(8, seed=4), frozenset(), guide=guide)
    tokens = [token.id for token in stream]
    assert [token % 7 for token in tokens[:3]] == [0, 1, 2] and guide.seen == tokens


class Nothing(Ladder):
    def fill(self, words_W):
        words_W[:] = 0
        return True


@pytest.mark.parametrize("guide", [Ladder(fails_at=0), Ladder(fails_at=4), Nothing()])
def test_a_guide_that_fails_costs_its_request_only(engine, guide):
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(ask, engine, [5], SamplingParams(40, seed=1), False)
        stream = engine.stream([6], SamplingParams(10, seed=1), frozenset(), guide=guide)
        with pytest.raises(EngineError) as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, RuntimeError | ValueError)
        assert len(other.result()[0]) == 40
    assert len(ask(engine, [6], SamplingParams(10, seed=1), True)[0]) == 10


def test_a_guide_that_refuses_a_token_costs_its_request_only(engine):
    guide = Ladder(refuses_at=3)
    stream = engine.stream([6], SamplingParams(10, seed=1), frozenset(), guide=guide)
    with pytest.raises(EngineError, match="error"):
        list(stream)
    assert len(guide.seen) == 3
    assert metric(engine, "grammar_errors_total") > 0


def test_choices_share_the_prefix_of_the_first(engine):
    prompt = make_prompt(9, 400)
    forget_prefixes(engine)
    first = engine.stream(prompt, SamplingParams(NEW, seed=0), frozenset())
    others = [
        engine.stream(prompt, SamplingParams(NEW, seed=i), frozenset(), after=first)
        for i in range(1, 4)
    ]
    said = [[token.id for token in stream] for stream in (first, *others)]
    assert first.cached_tokens == 0
    assert first.prompt_done == len(first.request.prompt)
    assert [stream.cached_tokens for stream in others] == [384] * 3
    assert len({tuple(tokens) for tokens in said}) == 4
    forget_prefixes(engine)
    for i, tokens in enumerate(said):
        again = engine.stream(prompt, SamplingParams(NEW, seed=i), frozenset())
        assert [token.id for token in again] == tokens


def test_a_choice_does_not_wait_for_a_first_that_was_cancelled(engine):
    first = engine.stream([1, 2], SamplingParams(900, seed=0), frozenset())
    second = engine.stream([1, 2], SamplingParams(4, seed=1), frozenset(), after=first)
    first.close()
    assert len(list(second)) == 4 and len(list(first)) <= 900


def test_output_is_kept_where_it_is_asked_for(engine):
    for keep in (False, True):
        forget_prefixes(engine)
        prompt = make_prompt(11, 200)
        params = SamplingParams(100, seed=3)
        stream = engine.stream(prompt, params, frozenset(), keep_output=keep)
        answer = [token.id for token in stream]
        following = [*prompt, *answer, 5, 6, 7]
        turn = engine.stream(following, SamplingParams(2, seed=1), frozenset())
        assert len(list(turn)) == 2
        assert turn.cached_tokens == (256 if keep else 128)


def test_ids_outside_the_vocabulary_are_refused(engine):
    with pytest.raises(ValueError, match="vocabulary of 320"):
        engine.stream([320], SamplingParams(1), frozenset())
    with pytest.raises(ValueError, match="logit_bias names id 400"):
        engine.stream([1], SamplingParams(1, logit_bias=((400, 1.0),)), frozenset())


def test_streams_can_be_closed_from_anywhere_and_dropped(engine):
    stream = engine.stream([1], SamplingParams(1000, seed=1), frozenset())
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        stream.close()
        stream.close()
        assert len(rest.result()) < 999
    dropped = engine.stream([1], SamplingParams(1000, seed=1), frozenset())
    next(dropped)
    del dropped
    with settled(engine):
        assert not engine.scheduler.slots.live


def test_what_may_not_be_drawn_is_not(engine):
    """A fixed mask, and another for the first tokens, also beside a request without any."""
    prompt, even = make_prompt(4, 40), words_of(range(0, 320, 2), 320)
    few = words_of([10, 20, 30], 64)  # shorter than the vocabulary: the rest is out
    allowed = Allowed(even, few, early=5)
    params = SamplingParams(NEW, seed=2, temperature=2.0)

    def draw(index: int) -> list[int]:
        rules = allowed if index else None
        return [t.id for t in engine.stream(prompt, params, frozenset(), allowed=rules)]

    with ThreadPoolExecutor(2) as pool:
        free, bound = pool.map(draw, range(2))
    assert any(token % 2 for token in free) and free == draw(0)
    assert set(bound[:5]) <= {10, 20, 30} and bound == draw(1)
    assert all(token % 2 == 0 for token in bound) and set(bound[5:]) - {10, 20, 30}


def test_a_mask_that_is_too_long_is_refused(engine):
    with pytest.raises(ValueError, match="too long for this model"):
        engine.stream([5], SamplingParams(1), frozenset(), allowed=Allowed(words_of([1], 10_000)))
