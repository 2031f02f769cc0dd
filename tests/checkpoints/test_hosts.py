"""Several hosts: what each converts and reads, planned for 100 GB and done for small ones."""

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import plan, resume
from checkpoints.convert import Host, convert, convert_share, prepare
from checkpoints.errors import CheckpointError
from checkpoints.manifest import read_manifest
from checkpoints.names import official_tensors
from dsv4_jax import presets
from dsv4_jax.params import unit_specs
from dsv4_jax.placement import explain
from scripts import convert_hf, preflight
from sharding.mesh import MeshShape, MeshSizes
from sharding.shards import Shards
from tests.checkpoints.support import BASE, ROOT, stored_arrays
from tests.sharding.test_processes import free_port

HOSTS = 16
LARGE = presets.v4_flash().replace(  # 101 GB in few tensors
    num_layers=30,
    compress_ratios=(0, 0, *(4, 128) * 14, 0),
    num_experts=64,
    expert_dim=8192,
    num_hash_layers=0,
)


def described(mesh):
    return Shards(MeshSizes(MeshShape.parse(mesh)))


def write_headers(root, cfg):
    """An official directory of full size whose files have headers and holes instead of data."""
    root.mkdir()
    weight_map, headers, ends = {}, {}, {}
    for entry in official_tensors(cfg):
        file = f"{entry.unit}.safetensors"
        weight_map[entry.name], start = file, ends.get(file, 0)
        ends[file] = start + entry.nbytes
        fields = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, ends[file]]}
        headers.setdefault(file, {})[entry.name] = fields
    for file, header in headers.items():
        text = json.dumps(header).encode()
        (root / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(root / file, 8 + len(text) + ends[file])
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(cfg.to_hf()))
    return sum(ends.values())


def test_hosts_share_the_conversion_of_100_gb(tmp_path):
    total = write_headers(tmp_path / "src", LARGE)
    assert total > 100e9
    job = prepare(tmp_path / "src", tmp_path / "dst", "keep", Host(3, HOSTS))
    sizes = {unit: job.unit_bytes(unit) for unit in job.entries}
    shares = [plan.units_of(sizes, HOSTS, index) for index in range(HOSTS)]
    assert job.units == shares[3]
    assert sorted(sum(shares, [])) == sorted(unit_specs(LARGE))  # every unit once
    read = [sum(e.nbytes for unit in share for e in job.entries[unit]) for share in shares]
    written = [sum(sizes[unit] for unit in share) for share in shares]
    assert sum(read) == total
    assert max(read) <= 1.1 * total / HOSTS
    assert max(written) <= 1.1 * sum(written) / HOSTS


@pytest.mark.parametrize(
    ("model", "mesh", "groups"),
    [
        ("large", "expert=8,tensor=8", 2),
        ("large", "expert=32,tensor=2", 1),
        ("large", "fsdp=2,expert=16,tensor=2", 1),
        ("v4-flash", "expert=16,tensor=4", 1),
        ("v4-pro", "expert=8,tensor=8", 2),
        ("v4-pro", "context=64", 1),
    ],
)
def test_hosts_read_their_part_of_100_gb(model, mesh, groups):
    """Experts once in all, a part of what heads are split over, and the rest everywhere.

    groups: hosts that it takes to hold all heads. Their borders may lie inside a chunk.
    """
    cfg, shards = LARGE if model == "large" else presets.PRESETS[model](), described(mesh)
    per_host, (everything,) = plan.reads(cfg, shards, HOSTS), plan.reads(cfg, shards, 1)
    assert sum(everything) == sum(plan.unit_bytes(cfg, unit) for unit in unit_specs(cfg)) > 100e9
    assert sum(host.experts for host in per_host) == everything.experts
    assert max(host.experts for host in per_host) <= 1.1 * everything.experts / HOSTS
    whole = sum(
        row.total_bytes
        for row in explain(cfg, shards)
        if "ffn/experts" not in row.name and row.device_bytes == row.total_bytes
    )
    split = everything.others - whole
    print(f"{mesh}: {per_host[0]}, whole {whole / 1e9:.2f} GB, split {split / 1e9:.2f} GB")
    assert max(host.others for host in per_host) <= whole + 1.2 * split / groups


def test_units_go_to_whom_has_least():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 1}
    assert [plan.units_of(sizes, 2, i) for i in range(2)] == [["a", "d"], ["b", "c", "e"]]
    assert plan.units_of(sizes, 1, 0) == list(sizes)
    assert plan.units_of(sizes, 7, 6) == []
    with pytest.raises(ValueError, match="host 2 must be at least 0 and less than 2"):
        plan.units_of(sizes, 2, 2)
    with pytest.raises(ValueError, match="64 devices do not divide among 24 hosts"):
        plan.reads(LARGE, described("expert=8,tensor=8"), 24)


def test_preflight_explains_what_hosts_read(capsys):
    arguments = "--model v4-flash --topology v6e:2x4 --mesh expert=8 --explain".split()
    assert preflight.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "loading: each of 2 hosts reads up to 84.30 of 159.60 GB: 75.30 GB of experts, 9.01 GB of "
        "all else"
    )


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_convert_together(tmp_path, monkeypatch, converted, count):
    monkeypatch.setattr(resume, "POLL_S", 0.01)
    dst, hosts = tmp_path / "dst", [Host(i, count) for i in reversed(range(count))]
    with ThreadPoolExecutor(count) as pool:
        *rest, manifest = pool.map(lambda host: convert_share(BASE, dst, host, verify=True), hosts)
    assert rest == [None] * (count - 1)
    assert manifest == read_manifest(dst) == read_manifest(converted["base"])
    assert stored_arrays(dst) == stored_arrays(converted["base"])
    assert not (dst / ".convert").exists()


def test_a_host_that_was_killed_continues(tmp_path, monkeypatch, converted):
    monkeypatch.setattr(resume, "POLL_S", 0.01)
    dst, write_record = tmp_path / "dst", resume.write_record

    def die(*_):
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(resume, "await_hosts", die)
        with pytest.raises(KeyboardInterrupt):  # host 0, with its share done
            convert_share(BASE, dst, Host(0, 2))
        patch.setattr(resume, "write_record", die)
        with pytest.raises(KeyboardInterrupt):  # host 1, with a unit and no record
            convert_share(BASE, dst, Host(1, 2))
        assert not (dst / "manifest.json").exists()
        patch.undo()
        written = []
        patch.setattr(resume, "write_record", lambda *a: written.append(a[1]) or write_record(*a))
        first = pool.submit(convert_share, BASE, dst, Host(0, 2))
        assert convert_share(BASE, dst, Host(1, 2)) is None
        assert first.result() == read_manifest(converted["base"])
        assert written == prepare(BASE, dst, "keep", Host(1, 2)).units
    assert stored_arrays(dst) == stored_arrays(converted["base"])


def test_hosts_that_do_not_fit_together_are_told(tmp_path, monkeypatch, capsys):
    dst = tmp_path / "dst"
    monkeypatch.setattr(resume, "PLAN_WAIT_S", 0.0)
    with pytest.raises(CheckpointError, match="host 0 has not begun to convert the same source"):
        convert_share(BASE, dst, Host(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(resume, "await_hosts", lambda *_: convert_share(BASE, dst, Host(1, 2)))
        convert_share(BASE, dst, Host(0, 2))
    with pytest.raises(CheckpointError, match="holds a complete checkpoint already"):
        convert_share(BASE, dst, Host(1, 2))
    monkeypatch.setattr(resume, "POLL_S", 0.01)
    await_hosts = resume.await_hosts
    monkeypatch.setattr(
        resume,
        "await_hosts",
        lambda *args: convert_share(BASE, dst, Host(1, 2)) or await_hosts(*args),
    )
    with pytest.raises(CheckpointError, match="host 1 was started with another --verify"):
        convert_share(BASE, dst, Host(0, 2), verify=True, overwrite=True)
    assert convert_hf.main([str(BASE), str(dst), "--hosts", "2", "--host-index", "2"]) == 1
    assert "--host-index 2 must be at least 0 and less than --hosts 2" in capsys.readouterr().err


READ = """
import sys
import jax
import tensorstore

address, count, index, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
    jax.distributed.initialize(address, count, index)
from checkpoints import plan
from checkpoints.load import load_checkpoint
from sharding.mesh import MeshShape, make_mesh
from sharding.shards import Shards

shards = Shards(make_mesh(MeshShape(expert=4)))
cfg, _ = load_checkpoint(path, shards=shards)
name = "/tensorstore/kvstore/file/bytes_read"
(metric,) = tensorstore.experimental_collect_matching_metrics(name)
print()  # Gloo leaves lines open
print(metric["values"][0]["value"], sum(plan.reads(cfg, shards)[index]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_processes_read_what_is_planned(tmp_path, count):
    convert(BASE, tmp_path / "dst", experts="bf16")
    address = f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", READ, address, str(count), str(index), tmp_path / "dst"],
            cwd=ROOT,
            env=dict(os.environ, JAX_PLATFORMS="cpu"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        answers = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for answer in answers:
        read, planned = map(int, answer.splitlines()[-1].split())
        print(f"read {read:,} bytes, planned {planned:,}")
        assert 0.9 * planned <= read <= 1.1 * planned + (256 << 10)  # with metadata
