"""A second tier: what the device evicts comes back, and only what belongs there."""

from dsv4_jax.serving.engine.request import Request
from tests.serving.engine.harness import Engine, prompt, small_config


def turn(engine, tokens, tenant="a"):
    request = Request(id="r", prompt=tokens, max_tokens=4, tenant=tenant)
    engine.submit(request)
    engine.run()
    engine.check()
    return request


def test_an_evicted_prefix_is_loaded_again():
    engine = Engine(host=True)
    assert turn(engine, prompt(600)).cached_tokens == 0
    engine.cache.flush()
    assert not engine.cache.nodes
    assert turn(engine, prompt(700)).cached_tokens == 512
    assert turn(engine, prompt(700), tenant="b").cached_tokens == 0


def test_a_page_of_several_units_is_loaded_as_far_as_it_matches():
    engine = Engine(host=True, page_tokens=512, num_pages=17)
    request = Request("r", prompt(1100), max_tokens=4, tenant="a", checkpoints=(256, 640, 1024))
    engine.submit(request)
    engine.run()
    engine.cache.flush()
    assert turn(engine, prompt(700)).cached_tokens == 640
    engine.cache.flush()
    assert turn(engine, prompt(300)).cached_tokens == 256
    assert turn(engine, prompt(1100)).cached_tokens == 1024


def test_an_evicted_checkpoint_of_pages_that_stayed_is_loaded_again():
    engine = Engine(host=True, checkpoints=1)
    turn(engine, prompt(300))
    turn(engine, prompt(300, seed=1))
    assert engine.device.saved == 1 and len(engine.cache.nodes) == 4
    assert turn(engine, prompt(300)).cached_tokens == 256


def test_without_room_a_prefix_is_loaded_in_part_or_not_at_all():
    engine = Engine(small_config(max_len=1300), num_pages=12, host=True)
    turn(engine, prompt(1000))
    engine.cache.flush()
    engine.submit(Request(id="other", prompt=prompt(700, seed=3), max_tokens=200, tenant="a"))
    for _ in range(10):
        engine.step()
    engine.submit(Request(id="r", prompt=prompt(1100), max_tokens=4, tenant="a"))
    engine.run()
    assert len(engine.finished) == 3
    engine.check_idle()
