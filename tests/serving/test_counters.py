"""What the HTTP layer counts."""

import httpx

from tests.serving.fakes import MODEL, FakeModel, answer, make_service
from tests.serving.live import serving

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "q"}]}


def test_empty_answers_numbers_of_answers_build_and_phase():
    model = FakeModel(answer(""), answer("fine"))
    service = make_service(model)
    with serving(service) as address:
        for n in (1, 3):
            reply = httpx.post(f"{address}/v1/chat/completions", json=ASK | {"n": n})
            assert reply.status_code == 200
        text = httpx.get(f"{address}/metrics").text.splitlines()
    assert "dsv4:empty_completions_total 1.0" in text
    assert "dsv4:request_params_n_count 2.0" in text and "dsv4:request_params_n_sum 4.0" in text
    assert 'dsv4:engine_phase{phase="ready"} 1.0' in text
    assert any(line.startswith("dsv4:build_info{") and "jaxlib=" in line for line in text)


def test_only_the_current_phase_is_told():
    service = make_service(FakeModel("x"))
    service.phase = "draining"
    phases = [line for line in service.metrics().decode().splitlines() if "engine_phase{" in line]
    assert phases == ['dsv4:engine_phase{phase="draining"} 1.0']
