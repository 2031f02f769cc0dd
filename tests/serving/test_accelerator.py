"""Whether serve.py leaves the choice of devices to JAX."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from dsv4_jax.serving import accelerator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A root with devices that are no TPUs, and a JAX nobody has spoken to."""
    import jax

    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()
    (card := tmp_path / "sys/bus/pci/devices/0000:00:01.0").mkdir(parents=True)
    (card / "vendor").write_text("0x8086\n")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    monkeypatch.setattr(accelerator, "_has_plugins", lambda: False)
    yield tmp_path
    jax.config.update("jax_platforms", before)


def test_a_machine_without_any_trace_uses_the_cpu(machine):
    assert accelerator.use_cpu_if_alone({"HOME": "/", "TPU_SKIP_MDS_QUERY": "1"}, machine)
    import jax

    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize("name", ["dev/accel0", "dev/vfio/0", "sys/bus/pci/devices/1/vendor"])
def test_a_device_leaves_the_choice_to_jax(name, machine):
    (machine / name).parent.mkdir(exist_ok=True)
    (machine / name).write_text(f"{accelerator.VENDOR}\n")
    assert not accelerator.use_cpu_if_alone({}, machine)


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME"])
def test_a_variable_leaves_the_choice_to_jax(variable, machine):
    assert not accelerator.use_cpu_if_alone({variable: ""}, machine)


def test_a_plugin_leaves_the_choice_to_jax(machine, monkeypatch):
    monkeypatch.setattr(accelerator, "_has_plugins", lambda: True)
    assert not accelerator.use_cpu_if_alone({}, machine)


def test_an_earlier_choice_stays(machine):
    import jax

    jax.config.update("jax_platforms", "tpu,cpu")
    assert not accelerator.use_cpu_if_alone({}, machine)
    assert jax.config.jax_platforms == "tpu,cpu"


@pytest.mark.skipif(not util.find_spec("libtpu"), reason="needs libtpu, which is what complains")
def test_the_tpu_library_stays_silent():
    code = (
        "from dsv4_jax.serving.accelerator import use_cpu_if_alone as ask\n"
        "import jax; print(ask() and jax.devices()[0].platform)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if done.stdout == "False\n":
        pytest.skip("this machine has an accelerator")
    assert (done.stdout, done.stderr) == ("cpu\n", "")
