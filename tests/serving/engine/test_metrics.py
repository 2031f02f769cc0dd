from prometheus_client.parser import text_string_to_metric_families

from dsv4_jax.serving.engine.metrics import COUNTERS, GAUGES, Metrics, token_buckets
from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.waiting import QueueLimits
from tests.serving.engine.harness import Engine, prompt, small_config


def samples(metrics: Metrics) -> dict[str, float]:
    """Values by name and own labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + "".join(f" {k}={v}" for k, v in own.items())] = sample.value
    return found


def test_names_labels_and_prefix():
    metrics = Metrics('a "model"', prefix="vllm:")
    metrics.count("request_aborts", phase="queue")
    text = metrics.text().decode()
    line = 'vllm:request_aborts_total{engine="0",model_name="a \\"model\\"",phase="queue"} 1.0'
    assert line in text.splitlines()
    assert "_created" not in text and "# TYPE vllm:prompt_tokens_total counter" in text


def test_facts_and_programs():
    metrics = Metrics()
    metrics.describe("cache_config_info", "Sizes.", num_pages=7, page_tokens=128)
    metrics.step("decode", 0.004)
    metrics.observe("grammar_mask_seconds", 0.2)
    found = samples(metrics)
    assert found["dsv4:cache_config_info num_pages=7 page_tokens=128"] == 1
    assert found["dsv4:step_duration_seconds_bucket le=0.005 program=decode"] == 1
    assert found["dsv4:step_duration_seconds_bucket le=0.002 program=decode"] == 0
    assert found["dsv4:grammar_mask_seconds_sum"] == 0.2


def test_cached_tokens_that_are_computed_again_are_counted():
    """The cache holds 256 tokens of the prompt, but its only state stands behind 128."""
    engine = Engine(small_config(checkpoint_every=4096))
    engine.submit(Request(id="1", prompt=prompt(300), max_tokens=1, checkpoints=[128]))
    engine.run()
    engine.submit(Request(id="2", prompt=prompt(300), max_tokens=1))
    engine.run()
    found = samples(engine.scheduler.metrics)
    assert found["dsv4:prefix_cache_hits_total"] == 128
    assert found["dsv4:prefix_cache_replayed_tokens_total"] == 128


def test_two_engines_count_apart():
    first, second = Metrics(), Metrics()
    first.count("prompt_tokens", 5)
    assert samples(first)["dsv4:prompt_tokens_total"] == 5
    assert samples(second)["dsv4:prompt_tokens_total"] == 0


def test_token_buckets_end_at_the_context_length():
    assert token_buckets(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert token_buckets(256)[-1] == 200


def test_what_a_request_leaves_behind():
    engine = Engine(small_config(queue=QueueLimits(requests=2)))
    first = Request(id="1", prompt=prompt(300), max_tokens=6)
    engine.submit(first)
    engine.run()
    second = Request(id="2", prompt=prompt(300), max_tokens=100)
    engine.submit(second)
    engine.step()
    found = samples(engine.scheduler.metrics)
    assert found["dsv4:num_requests_running"] == 1 and found["dsv4:slot_usage_perc"] == 0.25
    assert found["dsv4:kv_cache_usage_perc"] == 3 / 64
    second.cancel()
    engine.submit(Request(id="3", prompt=prompt(10, 1), max_tokens=1))
    engine.submit(Request(id="4", prompt=prompt(10, 1), max_tokens=1))
    assert engine.scheduler.submit(Request(id="5", prompt=prompt(10), max_tokens=1)) is not None
    assert samples(engine.scheduler.metrics)["dsv4:num_requests_waiting"] == 2
    engine.run()
    found = samples(engine.scheduler.metrics)
    assert found["dsv4:prompt_tokens_total"] == 620
    assert found["dsv4:prefix_cache_hits_total"] == 256
    assert found["dsv4:request_success_total finished_reason=length"] == 3
    assert found["dsv4:request_aborts_total phase=decode"] == 1
    assert found["dsv4:admission_rejections_total reason=queue_full"] == 1
    assert found["dsv4:generation_tokens_total"] == 8 + second.num_generated
    assert found["dsv4:time_to_first_token_seconds_count"] == 3 + (second.num_generated > 0)
    assert found["dsv4:e2e_request_latency_seconds_count"] == 3
    assert found["dsv4:request_time_per_output_token_seconds_count"] == 1
    assert found["dsv4:iteration_tokens_total_count"] == len(engine.plans)
    assert found["dsv4:num_requests_running"] == 0


def test_every_name_is_exposed():
    engine = Engine()
    text = engine.scheduler.metrics.text().decode()
    own = GAUGES.keys() - {"host_cache_usage_perc", "disk_cache_bytes"}  # the loop's
    assert all(f"# TYPE dsv4:{name} gauge" in text for name in own)
    assert all(f"# TYPE dsv4:{name}_total counter" in text for name in COUNTERS)
