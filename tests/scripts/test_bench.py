"""The benchmark runs and reports; its figures are not judged here."""

import json
from pathlib import Path

import pytest

from dsv4_jax import presets
from dsv4_jax.bench import compare
from dsv4_jax.bench.case import Case
from scripts import bench


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(presets.tiny().to_hf()))
    return str(path)


@pytest.mark.slow
def test_a_case_is_measured(config):
    case = Case("decode", 8, batch=2, new_tokens=2, reps=1)
    figures = compare.run_ours(config, case)
    assert figures["tokens_per_cpu_s"] > 0
    assert figures["peak_gb"] >= figures["model_gb"] > 0


def test_rows_without_and_with_a_peer():
    figures = {"tokens_per_cpu_s": 30.0, "peak_gb": 1.0}
    assert compare.line({"case": "prefill 8", "ours": figures}) == "| prefill 8 | 30.0 | 1.00 |"
    row = {"case": "x", "ours": figures, "peer": figures, "ratio": 1.0}
    assert compare.line(row).count("|") == compare.header(True).splitlines()[0].count("|")


def test_what_is_wrong_is_said(capsys, tmp_path):
    assert bench.main(["model", "--config", str(tmp_path / "none.json")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        bench.main(["model", "--lengths", "0"])
    assert error.value.code == 2


def test_the_default_config_is_there():
    assert Path(bench.DEFAULT_CONFIG).is_file()
