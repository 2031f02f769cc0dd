"""The prefix cache against a model of it that knows every token of every page."""

import random
from dataclasses import dataclass

import pytest

from dsv4_jax.serving.engine.checkpoints import CheckpointPool
from dsv4_jax.serving.engine.node import Hit, Node
from dsv4_jax.serving.engine.pages import PageAllocator
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.units import UNIT, UnitChain
from tests.serving.engine.harness import prompt


@dataclass
class Sequence:
    tenant: str
    tokens: list[int]
    chain: UnitChain
    hit: Hit
    pages: list[int]
    pin: Node | None


class Model:
    """Sequences that use a cache, and what pages and checkpoints hold: (tenant, tokens so far)."""

    def __init__(self, num_pages=200, units=1, checkpoints=200):
        self.pages = PageAllocator(num_pages, units * UNIT)
        self.pool = CheckpointPool(checkpoints)
        self.cache = PrefixCache(self.pages, self.pool, "model")
        self.units = units
        self.rows: dict[tuple[int, int], tuple] = {}
        self.states: dict[int, tuple] = {}
        self.published: set[tuple] = set()
        self.resumable: set[tuple] = set()

    def prefix(self, sequence_or_tenant, tokens, units):
        return sequence_or_tenant, tuple(tokens[: units * UNIT])

    def chain(self, tenant, tokens):
        chain = self.cache.chain(tenant)
        chain.extend(tokens)
        return chain

    def look_up(self, tenant, tokens, limit) -> Hit:
        """A lookup whose pages and state are checked, and which is then given up."""
        hit = self.cache.acquire(self.chain(tenant, tokens), limit)
        self.check_hit(tenant, tokens, limit, hit)
        self.cache.abandon(hit)
        return hit

    def check_hit(self, tenant, tokens, limit, hit):
        count = hit.tokens // UNIT
        assert hit.tokens % UNIT == 0 and hit.tokens <= hit.matched <= limit
        assert len(hit.pages) == count // self.units
        assert (hit.copy_from is not None) == (count % self.units > 0)
        table = [*hit.pages, *([hit.copy_from] if hit.copy_from is not None else [])]
        for unit in range(count):
            page, inner = divmod(unit, self.units)
            assert self.rows[table[page], inner] == self.prefix(tenant, tokens, unit + 1)
        if hit.node is not None:
            assert hit.node.checkpoint is not None
            assert self.states[hit.node.checkpoint] == self.prefix(tenant, tokens, count)

    def expected(self, tenant, tokens, limit) -> tuple[int, int]:
        """Resumable and matched tokens if nothing was ever evicted."""
        known = [
            count
            for count in range(limit // UNIT + 1)
            if all(self.prefix(tenant, tokens, n) in self.published for n in range(1, count + 1))
        ]
        with_state = [n for n in known if self.prefix(tenant, tokens, n) in self.resumable]
        return max(with_state, default=0) * UNIT, max(known) * UNIT

    def start(self, tenant, tokens) -> Sequence | None:
        """Opens a sequence on what is cached; None if the pages do not suffice."""
        chain = self.chain(tenant, tokens)
        hit = self.cache.acquire(chain, len(tokens) - 1)
        self.check_hit(tenant, tokens, len(tokens) - 1, hit)
        table = [*hit.pages, *([hit.copy_from] if hit.copy_from is not None else [])]
        for page in table:
            self.pages.share(page)
        new = self.pages.pages_for(len(tokens)) - len(hit.pages)
        if not self.cache.evict(new):
            for page in table:
                self.pages.release(page)
            self.cache.abandon(hit)
            return None
        pages = [*hit.pages, *self.pages.allocate(new)]
        if hit.copy_from is not None:
            for inner in range(hit.tokens // UNIT % self.units):
                self.rows[pages[len(hit.pages)], inner] = self.rows[hit.copy_from, inner]
            self.pages.release(hit.copy_from)
        if hit.node is not None:
            self.cache.restored(hit.node)
        return Sequence(tenant, tokens, chain, hit, pages, hit.node)

    def commit(self, sequence, units):
        """Computes and publishes the first `units` units."""
        for unit in range(sequence.hit.tokens // UNIT, units):
            page, inner = divmod(unit, self.units)
            place = sequence.pages[page], inner
            self.rows[place] = self.prefix(sequence.tenant, sequence.tokens, unit + 1)
        sequence.pin = self.cache.publish(sequence.chain, sequence.pages, units, sequence.pin)
        for count in range(1, units + 1):
            self.published.add(self.prefix(sequence.tenant, sequence.tokens, count))

    def checkpoint(self, sequence, units):
        handle = self.cache.take_checkpoint()
        if handle is not None:
            self.states[handle] = self.prefix(sequence.tenant, sequence.tokens, units)
            self.cache.attach(sequence.chain, units * UNIT, handle)
            self.resumable.add(self.prefix(sequence.tenant, sequence.tokens, units))

    def end(self, sequence):
        for page in sequence.pages:
            self.pages.release(page)
        if sequence.pin is not None:
            self.cache.unpin(sequence.pin)

    def check(self):
        self.pages.check()
        self.cache.check()
        assert sorted(self.cache.checkpoints) == sorted(self.pool.taken)


def sequence_of(rng, depth=6):
    """Tokens that share beginnings with others often: two variants of every unit."""
    units = [[rng.randrange(2)] * UNIT for _ in range(rng.randint(0, depth))]
    return [token for unit in units for token in unit] + [9] * rng.randint(1, UNIT)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_lookups_agree_with_brute_force(units):
    rng = random.Random(units)
    model = Model(num_pages=2000, units=units, checkpoints=2000)
    for _ in range(400):
        tenant, tokens = rng.choice("ab"), sequence_of(rng)
        sequence = model.start(tenant, tokens)
        assert sequence is not None
        count = rng.randint(0, len(tokens) // UNIT)
        if count * UNIT >= sequence.hit.tokens:
            model.commit(sequence, count)
            if count and rng.random() < 0.3:
                model.checkpoint(sequence, rng.randint(1, count))
        model.end(sequence)
        model.check()
        tenant, tokens = rng.choice("abc"), sequence_of(rng)
        limit = rng.randint(0, len(tokens))
        hit = model.look_up(tenant, tokens, limit)
        assert (hit.tokens, hit.matched) == model.expected(tenant, tokens, limit)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_eviction_storms_never_return_wrong_pages(units):
    rng = random.Random(units)
    model = Model(num_pages=16, units=units, checkpoints=5)
    running: list[Sequence] = []
    hits = refusals = 0
    for _ in range(3000):
        if len(running) < 6 and rng.random() < 0.6:
            sequence = model.start(rng.choice("ab"), sequence_of(rng, depth=4 * units))
            refusals += sequence is None
            if sequence is not None:
                hits += sequence.hit.tokens > 0
                running.append(sequence)
        elif running:
            sequence = rng.choice(running)
            first, last = sequence.hit.tokens // UNIT, len(sequence.tokens) // UNIT
            model.commit(sequence, rng.randint(first, last))
            if sequence.pin is not None and rng.random() < 0.5:
                model.checkpoint(sequence, sequence.pin.depth)
            if rng.random() < 0.5:
                running.remove(sequence)
                model.end(sequence)
        tokens = sequence_of(rng)
        hit = model.look_up("a", tokens, len(tokens))
        resumable, matched = model.expected("a", tokens, len(tokens))
        assert hit.tokens <= resumable and hit.matched <= matched
        model.check()
    assert hits > 100 and refusals > 20
    for sequence in running:
        model.end(sequence)
    model.cache.flush()
    assert model.pages.num_free == 15 and not model.pool.taken


def filled(length, points, **sizes) -> Model:
    """One finished sequence of tenant a, with checkpoints behind some units."""
    model = Model(**sizes)
    sequence = model.start("a", prompt(length))
    assert sequence is not None
    model.commit(sequence, length // UNIT)
    for units in points:
        model.checkpoint(sequence, units)
    model.end(sequence)
    return model


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257, 383, 384, 385, 512, 640])
def test_a_hit_ends_at_the_last_checkpoint_within_reach(length):
    hit = filled(512, [1, 3, 4]).look_up("a", prompt(length), length - 1)
    reach = [0, *(point for point in (128, 384, 512) if point <= length - 1)]
    assert hit.tokens == reach[-1]
    assert hit.matched == min((length - 1) // UNIT, 4) * UNIT


def test_without_a_checkpoint_nothing_is_resumed():
    hit = filled(512, []).look_up("a", prompt(512), 511)
    assert hit == Hit(matched=384)


def test_other_tenants_and_models_see_nothing():
    model = filled(512, [4])
    assert model.look_up("b", prompt(600), 599) == Hit()
    chain = UnitChain("other", "a")
    chain.extend(prompt(600))
    assert model.cache.acquire(chain, 599) == Hit()


def test_equal_keys_of_different_tokens_are_a_miss_and_not_overwritten():
    model = filled(512, [4])
    forged = model.chain("a", prompt(600))
    forged.ids = [b"other" for _ in forged.ids]
    assert model.cache.acquire(forged, 599) == Hit()
    pages = model.pages.allocate(4)
    assert model.cache.publish(forged, pages, 4, None) is None
    model.cache.attach(forged, 512, handle := model.pool.take() or 0)
    assert handle not in model.pool.taken
    assert model.look_up("a", prompt(600), 599).tokens == 512


def test_a_hit_inside_a_page_asks_for_a_copy_of_its_first_rows():
    model = filled(700, [3, 5], units=4)
    hit = model.look_up("a", prompt(700), 639)
    assert (hit.tokens, len(hit.pages)) == (384, 0)
    assert hit.copy_from is not None
    hit = model.look_up("a", prompt(700), 640)
    assert (hit.tokens, len(hit.pages)) == (640, 1)


def test_a_longer_page_replaces_the_one_it_was_copied_from():
    model = filled(256, [2], units=4)
    first = model.look_up("a", prompt(512), 511).copy_from
    sequence = model.start("a", prompt(512))
    assert sequence is not None and sequence.pages != [first]
    model.commit(sequence, 4)
    model.end(sequence)
    model.check()
    assert {node.page for node in model.cache.nodes.values()} == set(sequence.pages)
    assert model.pages.num_free == model.pages.num_usable - 1
    assert model.look_up("a", prompt(512), 511).copy_from == sequence.pages[0]


def test_what_is_in_use_is_not_evicted():
    model = filled(512, [2, 4], checkpoints=2)
    chain = model.chain("a", prompt(300))
    hit = model.cache.acquire(chain, 299)
    model.cache.flush()
    assert sorted(node.depth for node in model.cache.nodes.values()) == [1, 2]
    taken = [model.cache.take_checkpoint(), model.cache.take_checkpoint()]
    assert hit.node is not None and hit.node.checkpoint not in taken and taken[1] is None
    model.cache.abandon(hit)
    model.cache.flush()
    assert not model.cache.nodes


def test_checkpoints_go_by_age_then_by_what_they_save():
    model = filled(1024, [1, 2, 8], checkpoints=3)
    [near, *_] = [node for node in model.cache.nodes.values() if node.depth == 2]
    model.cache.take_checkpoint()
    kept = {n.depth for n in model.cache.nodes.values() if n.checkpoint is not None}
    assert kept == {2, 8} and near.gap == UNIT  # equal costs: the older one goes


def test_leaves_that_nobody_can_resume_behind_go_first():
    model = filled(1024, [4])
    model.cache.evict(model.pages.num_free + 4)
    assert model.look_up("a", prompt(1024), 1023).tokens == 512
    model.cache.evict(model.pages.num_free + 1)
    assert model.look_up("a", prompt(1024), 1023) == Hit(matched=384)
    assert not model.pool.taken


def test_recently_used_prefixes_stay():
    model = Model(num_pages=9)
    for seed in range(2):
        sequence = model.start("a", prompt(500, seed))
        assert sequence is not None
        model.commit(sequence, 3)
        model.checkpoint(sequence, 3)
        model.end(sequence)
    model.look_up("a", prompt(500, 0), 499)
    model.cache.evict(5)
    assert model.look_up("a", prompt(500, 0), 499).tokens == 384
    assert model.look_up("a", prompt(500, 1), 499).tokens == 0


def test_the_list_of_candidates_does_not_grow_with_use():
    model = filled(512, [4])
    for _ in range(1000):
        model.look_up("a", prompt(600), 599)
    assert len(model.cache._heap) < 200
    model.check()
