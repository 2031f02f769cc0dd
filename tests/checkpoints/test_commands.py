"""The two scripts as a user runs them: output, exit status, full disks, kill -9."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.convert import verify_units
from checkpoints.errors import CheckpointError
from checkpoints.manifest import load_config, read_manifest
from checkpoints.progress import Progress
from scripts import convert_hf, export_hf
from tests.checkpoints.support import BASE, INSTRUCT, ROOT, run_script, tensor_files

MAINS = {"convert_hf.py": convert_hf.main, "export_hf.py": export_hf.main}


@pytest.mark.parametrize("name", MAINS)
def test_help_is_grouped_and_names_every_flag(name):
    done = run_script(name, "--help")
    assert done.returncode == 0 and not done.stderr
    flags = {
        "convert_hf.py": "SRC DST --experts --workers --verify --overwrite --hosts --host-index",
        "export_hf.py": "SRC DST --format --overwrite",
    }[name]
    assert all(flag in done.stdout for flag in flags.split())
    assert "result:" in done.stdout


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize(
    "arguments", [[], ["only-one"], ["a", "b", "--nonsense"], ["a", "b", "c"]], ids=str
)
def test_usage_errors_exit_with_2(name, arguments):
    with pytest.raises(SystemExit) as caught:
        MAINS[name](arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("flags", [["--experts", "int4"], ["--workers", "0"], ["--workers", "x"]])
def test_bad_values_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        convert_hf.main(["a", "b", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_wrong_flag_in_a_fresh_process():
    done = run_script("convert_hf.py", "a", "b", "--wrong")
    assert done.returncode == 2 and "unrecognized arguments: --wrong" in done.stderr


def test_there_and_back_as_modules(tmp_path):
    for module, *arguments in (
        ("convert_hf", INSTRUCT, "dst", "--verify", "--workers", "2"),
        ("export_hf", "dst", "back"),
    ):
        command = [sys.executable, "-m", f"scripts.{module}", *map(str, arguments)]
        environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert tensor_files(tmp_path / "back") == tensor_files(INSTRUCT)
    assert "6 shards" in done.stdout


def test_failures_are_one_line_and_exit_with_1(tmp_path, capsys):
    dst = tmp_path / "dst"
    assert convert_hf.main([str(tmp_path / "none"), str(dst)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("convert_hf.py: error: ")
    assert convert_hf.main([str(BASE), str(dst)]) == 0
    assert "dst: 3 units" in capsys.readouterr().out
    assert convert_hf.main([str(BASE), str(dst)]) == 1
    assert "--overwrite" in capsys.readouterr().err.splitlines()[-1]
    assert convert_hf.main([str(BASE), str(dst), "--overwrite"]) == 0
    assert export_hf.main([str(BASE), str(tmp_path / "back")]) == 1
    assert "must be converted first: python scripts/convert_hf.py" in capsys.readouterr().err
    assert convert_hf.main([str(dst), str(tmp_path / "twice")]) == 1
    assert "no official checkpoint directory" in capsys.readouterr().err


def test_an_interruption_says_how_to_continue(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoints.convert.read_unit", interrupt)
    assert convert_hf.main([str(BASE), str(tmp_path / "dst")]) == 1
    assert "interrupted; run the same command to continue" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size, where the machine lets us."""
    point = tmp_path / "small"
    point.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
        done = os.geteuid() == 0 and shutil.which("mount") and subprocess.run(command)
        if not done or done.returncode:
            pytest.skip("mounting a small file system needs privileges")
        return point

    yield mount
    if point.is_mount():
        subprocess.run(["umount", str(point)], check=True)


UNFORESEEN = """
import sys
from checkpoints import files
files.check_space = lambda *_: None
from scripts.{script} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("is_foreseen", [True, False])
@pytest.mark.parametrize("script", ["convert_hf", "export_hf"])
def test_full_disk(small_disk, converted, script, is_foreseen):
    disk = small_disk("3m")
    src = INSTRUCT if script == "convert_hf" else converted["instruct"]
    start = ["-m", f"scripts.{script}"] if is_foreseen else ["-c", UNFORESEEN.format(script=script)]
    done = subprocess.run(
        [sys.executable, *start, str(src), str(disk / "dst")],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    progress = ("warning: ", "convert: ", "export: ")
    errors = [line for line in done.stderr.splitlines() if not line.startswith(progress)]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(f"{script}.py: error: ")
    assert "no space left on the device" in errors[0]
    with pytest.raises(CheckpointError):
        load_config(disk / "dst")
    assert not (disk / "dst" / "model.safetensors.index.json").exists()


DRIVER = """
import sys
from scripts.convert_hf import main
import checkpoints.convert
print("ready", flush=True)
sys.stdin.readline()
sys.exit(main(sys.argv[1:]))
"""


def start_conversion(dst: Path) -> subprocess.Popen[str]:
    """A process about to convert the fixture; it begins at once, imports being done."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(INSTRUCT), str(dst)],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


def finish(process: subprocess.Popen[str]) -> int:
    with process:
        return process.wait(timeout=120)


def kill_repeatedly(tmp_path, converted, kills):
    """Kills conversions at random moments until `kills` of them died, then lets one finish."""
    rng = random.Random(kills)
    latest, killed, dst = 1.0, 0, tmp_path / "dst0"
    while killed < kills:
        process = start_conversion(dst)
        time.sleep(rng.uniform(0, latest))
        process.kill()
        if finish(process) == 0:
            latest *= 0.7  # it was through before: kill earlier
        else:
            killed += 1
        if (dst / "manifest.json").exists():  # through, or killed while tidying up
            check_result(dst, converted)
            dst = tmp_path / f"dst{killed}_{latest}"
    if not (dst / "manifest.json").exists():
        assert finish(start_conversion(dst)) == 0
    check_result(dst, converted)


def check_result(dst, converted):
    manifest = read_manifest(dst)
    assert manifest == read_manifest(converted["instruct"])
    verify_units(dst, load_config(dst), manifest.units, Progress("verify", quiet=True))


def test_kill_three_times(tmp_path, converted):
    kill_repeatedly(tmp_path, converted, 3)


@pytest.mark.slow
def test_kill_twenty_times(tmp_path, converted):
    kill_repeatedly(tmp_path, converted, 20)
