"""What the HTTP layer counts."""

import httpx

from dsv4_jax.serving.counters import BUILD
from tests.serving.fakes import MODEL, FakeModel, answer, counted, make_service
from tests.serving.live import serving

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "q"}]}


def test_empty_answers_numbers_of_answers_build_and_phase():
    model = FakeModel(answer(""), answer("fine"))
    service = make_service(model)
    with serving(service) as address:
        for n in (1, 3):
            reply = httpx.post(f"{address}/v1/chat/completions", json=ASK | {"n": n})
            assert reply.status_code == 200
        text = httpx.get(f"{address}/metrics").text
    assert counted(text, "dsv4:empty_completions_total") == 1
    assert counted(text, "dsv4:request_params_n_count") == 2
    assert counted(text, "dsv4:request_params_n_sum") == 4
    assert counted(text, "dsv4:engine_phase", phase="ready") == 1
    assert counted(text, "dsv4:build_info", **BUILD) == 1


def test_only_the_current_phase_is_told():
    service = make_service(FakeModel("x"))
    service.phase = "draining"
    text = service.metrics().decode()
    assert text.count("engine_phase{") == counted(text, "dsv4:engine_phase", phase="draining") == 1
