import pytest

from dsv4_jax.serving.engine.prefill import MAX_SKIPS, choose_chunk, cut_points, prefill_order
from dsv4_jax.serving.engine.request import Request
from tests.serving.engine.harness import prompt

CHUNKS, BATCHES = (128, 512, 2048), (1, 2, 4)


@pytest.mark.parametrize(
    ("pieces", "budget", "shape"),
    [
        ([5], 2048, (128, 1)),
        ([128], 2048, (128, 1)),
        ([129], 2048, (512, 1)),
        ([5000], 8192, (2048, 1)),
        ([5000], 2047, (512, 1)),
        ([5000], 100, (128, 1)),  # never less than the smallest shape
        ([5000], -10, (128, 1)),
        ([100, 100, 100], 2048, (128, 3)),
        ([100, 100, 100, 100, 100], 2048, (128, 4)),
        ([100, 5000], 2048, (512, 2)),
        ([100, 5000], 4096, (2048, 2)),
        ([100, 5000, 5000, 5000], 2048, (512, 4)),
        ([2000, 2000], 2048, (2048, 1)),
    ],
)
def test_the_shape_with_the_most_useful_work_is_chosen(pieces, budget, shape):
    assert choose_chunk(pieces, budget, CHUNKS, BATCHES) == shape


def test_one_row_at_a_time():
    assert choose_chunk([100, 5000], 4096, CHUNKS, (1,)) == (128, 1)


def made(length, order=0, skipped=0, points=()) -> Request:
    request = Request(id="r", prompt=prompt(length), max_tokens=1, checkpoints=points)
    request.target, request.order, request.skipped = length, order, skipped
    return request


def test_the_shortest_goes_first_unless_another_waited_long():
    short, long, overdue = made(100, 2), made(900, 1), made(5000, 3, skipped=MAX_SKIPS)
    assert prefill_order([long, overdue, short]) == [overdue, short, long]
    twin = made(100, 1)
    assert prefill_order([short, twin]) == [twin, short]


def cuts(request, resumed=0, split=0, cached=()):
    return cut_points(request, resumed, 512, split, lambda point: point in cached)


def test_checkpoints_are_taken_where_others_will_resume():
    assert cuts(made(100)) == []
    assert cuts(made(128)) == [], "the same prompt could not use its own end"
    assert cuts(made(129)) == [128]
    assert cuts(made(1500)) == [512, 1024, 1408]
    assert cuts(made(1500, points=[300, 301, 1500, 100])) == [256, 512, 1024, 1408]
    assert cuts(made(1500), resumed=512) == [1024, 1408]
    assert cuts(made(1500), split=896) == [512, 896, 1024, 1408]
    assert cuts(made(1500), cached=(512, 1408)) == [1024]
    assert cuts(made(1536, points=[1536])) == [512, 1024, 1536]
