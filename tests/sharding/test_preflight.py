"""Preflight: answers by size alone, the report, and (with libtpu) what the compiler says."""

import json

import jax
import pytest

from dsv4_jax import presets
from dsv4_jax.preflight import command, kept, measure, render, slices, traffic
from dsv4_jax.preflight.compile import Report
from dsv4_jax.preflight.programs import Sizes
from pallas_kernels import aot
from scripts import preflight
from sharding.mesh import MeshShape, MeshSizes, make_mesh, topology_devices
from sharding.shards import Shards

REASON = aot.skip_reason()
SHORT = {"num_layers": 5, "compress_ratios": (0, 4, 128, 4, 128, 0), "num_hash_layers": 1}
SIZES = Sizes(64, 8192, 2048)
TRAIN = ["--model", "tiny", "--program", "train"]


def run(capsys, *args):
    code = preflight.main(["--topology", "v6e:2x4", *args])
    return code, capsys.readouterr()


def test_estimates_name_the_best_mesh_and_the_smallest_slice(capsys):
    code, out = run(capsys, "--model", "v4-flash", "--estimate")
    assert code == 0
    assert out.out.splitlines()[1].split()[:2] == ["expert=2,tensor=4", "yes"]
    assert "smallest v6e slice that holds it: v6e:2x4" in out.out


def test_pro_does_not_fit_eight_chips(capsys):
    code, out = run(capsys, "--model", "v4-pro", "--estimate", "--json")
    assert code == 0 and not any(row["fits"] for row in json.loads(out.out))
    _, out = run(capsys, "--model", "v4-pro", "--estimate")
    assert "smallest v6e slice that holds it: v6e:8x8" in out.out


def test_explain_lists_every_parameter(capsys):
    code, out = run(capsys, "--model", "tiny", "--explain", "--mesh", "expert=8", "--json")
    rows = json.loads(out.out)
    assert code == 0
    experts = next(row for row in rows if row["name"].endswith("experts/w1.codes"))
    assert experts["placement"][-3:] == ["expert", None, None]
    assert experts["device_bytes"] * 8 == experts["total_bytes"]
    _, out = run(capsys, "--model", "v4-flash", "--explain", "--mesh", "expert=8")
    assert "25.920 GiB of weights on each device" in out.out


def test_explain_lists_what_training_keeps(capsys):
    train = (*TRAIN, "--mesh", "fsdp=2,expert=4", "--batch", "8")
    code, out = run(capsys, *train, "--explain", "--json")
    assert code == 0
    rows = json.loads(out.out)
    experts = next(row for row in rows if row["name"].endswith("experts/w1"))
    assert experts["dtype"] == "float32" and experts["slots"] == ["momentum"]
    assert experts["device_bytes"] * 8 == experts["total_bytes"]
    assert experts["slot_bytes"] == experts["device_bytes"]
    embed = next(row for row in rows if row["name"] == "top: embed")
    assert embed["slots"] == ["mu", "nu"] and embed["slot_bytes"] == 2 * embed["device_bytes"]
    code, out = run(capsys, *train, "--estimate", "--json")
    found = json.loads(out.out)
    assert code == 0 and found["fits"] and found["floor"]["compute"] > 0
    assert found["weights"] == sum(row["device_bytes"] for row in rows)
    assert found["slots"] == sum(row["slot_bytes"] for row in rows)
    for how in ("--explain", "--estimate"):
        code, out = run(capsys, *train, how)
        assert code == 0 and "of slots on each device" in out.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "v5-huge"], "--model v5-huge: no such file, and none of v4-flash"),
        (["--model", "tiny", "--program", "dance"], "program 'dance' must be one of decode"),
        (["--model", "tiny", "--mesh", "expert=4", "--explain"], "has 4 devices, v6e:2x4 has 8"),
        (["--model", "tiny", "--batch", "0"], "--batch 0 must be positive"),
        (["--model", "tiny", "--context", "9999999"], "must lie between 1 and the model's 8192"),
        (["--model", "tiny", "--program", "prefill", "--chunk", "0"], "--chunk 0 must lie"),
        (
            ["--model", "tiny", "--topology", "v6e-8", "--estimate"],
            "'v6e-8' must look like",
        ),
        (["--model", "tiny", "--batch", "3", "--mesh", "expert=8", "--estimate"], "batch of 3"),
        (["--model", "tiny", "--program", "train"], "--program train needs --mesh"),
        (TRAIN + ["--mesh", "tensor=8"], "does not divide into 8 parts (axes tensor)"),
        (TRAIN + ["--mesh", "fsdp=8", "--micro-rows", "0"], "--micro-rows 0 must be positive"),
        (TRAIN + ["--mesh", "fsdp=4", "--explain"], "has 4 devices, v6e:2x4 has 8"),
    ],
)
def test_mistakes_are_explained_in_one_line(args, message, capsys):
    code, out = run(capsys, *args)
    assert code == 2 and message in out.err and out.err.count("\n") == 1


def test_a_page_has_bars_and_no_markup_from_outside():
    report = Report("<b>", "v6e:2x4", 8, "expert=8", "decode", 64, 8192, 1, 2**35, 2**34, 2**30)
    report.fits, report.floor = True, {"compute": 0.001, "HBM": 0.02, "ICI": 0.0001}
    report.sent = {"all-gather": 2 * 10**7}
    page = render.page([report])
    assert page.count("<rect") == 5 + 3 and "&lt;b&gt;" in page and "<b>" not in page
    assert "HBM " in render.text(report) and report.limit == "HBM"
    assert json.loads(json.dumps(report.to_json()))["tokens_per_s"] == 64 / 0.02


HLO = """HloModule step

%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %x = f32[8,64]{1,0} get-tuple-element(%p), index=1
  %r = f32[8,64]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,64]{1,0}) tuple(%i, %r)
}

%cond (p: (s32[], f32[8,64])) -> pred[] {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%offloaded (b: f32[8,64]) -> f32[16,64] {
  %b = f32[8,64]{1,0} parameter(0)
  ROOT %h = f32[16,64]{1,0} all-gather(%b), replica_groups={{0,1},{2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (b: f32[8,64]) -> f32[1,64] {
  %b = f32[8,64]{1,0} parameter(0)
  %sum = f32[8,64]{1,0} all-reduce(%b), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %mine = f32[1,64]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: f32[8,64]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %g = f32[64,64]{1,0} all-gather(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %c = f32[16,64]{1,0} custom-call(%a), custom_call_target="?", called_computations={%offloaded}
  %w = (s32[], f32[8,64]{1,0}) while(%t), condition=%cond, body=%body
  %f = f32[1,64]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %o = f32[8,64]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_count_as_often_as_they_run():
    sent = measure.collectives(HLO)
    gathered = 64 * 64 * 4 * 7 // 8 + 16 * 64 * 4 // 2
    summed = {"all-reduce": 10 * 2 * 3 * 8 * 64, "reduce-scatter": 7 * 64 * 4}
    assert sent == {"all-gather": gathered} | summed


def test_the_formula_grows_with_the_group():
    cfg = presets.v4_flash()

    def sent(mesh, fresh=1, batch=64):
        shards = Shards(MeshSizes(MeshShape.parse(mesh)))
        return sum(traffic.sent_bytes(cfg, shards, SIZES._replace(batch=batch), fresh).values())

    assert sent("data=8") == 0
    assert sent("expert=2") < sent("expert=4")
    assert sent("expert=4", 2) == 2 * sent("expert=4", 1)
    assert sent("context=8", 8192, 1) > sent("context=8", 8192 // 2, 1) > 0


def test_slices_grow():
    for kind in slices.SENDS:
        sizes = [slices.devices_of(name) for name in slices.slices_of(kind)]
        assert sizes == sorted(sizes)
    assert slices.devices_of("TPU7x:2x2x1") == 8


@pytest.mark.tpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_slices_lie_along_the_outer_axes():
    devices = topology_devices("v5p:2x2x1", slices=2)
    mesh = make_mesh(MeshShape(data=2, expert=4), devices)
    assert [device.slice_index for device in mesh.devices.ravel()] == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="2 slices must divide data or fsdp"):
        make_mesh(MeshShape(expert=8), devices)
    with pytest.raises(ValueError, match="'v6e:3x5' does not exist"):
        topology_devices("v6e:3x5")


@pytest.mark.tpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_gather_over_a_whole_slice_sends_each_part_once():
    aot.prepare_environment()
    shards = Shards(make_mesh(MeshShape(context=64), topology_devices("v5p:4x4x4")))
    parts = jax.sharding.PartitionSpec("context")
    run = jax.shard_map(
        lambda x: shards.join(x, "context", 0),
        mesh=shards.mesh,
        in_specs=parts,
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )
    at = jax.NamedSharding(shards.mesh, parts)
    rows = jax.ShapeDtypeStruct((1 << 18, 128), jax.numpy.int8, sharding=at)
    _, text = aot.compile_with_text(jax.jit(run).lower(rows))
    assert measure.collectives(text) == {"all-gather": (1 << 25) * 63 // 64}


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize(
    ("mesh", "program", "sizes"),
    [
        ("expert=8", "decode", SIZES),
        ("expert=2,context=2,tensor=2", "decode", SIZES),
        ("expert=8", "decode", SIZES._replace(batch=8)),
        ("context=8", "prefill", Sizes(1, 32768, 2048)),
    ],
)
def test_the_compiler_confirms_bytes_sent(mesh, program, sizes):
    """Short models with real kernels, compiled for eight v6e chips."""
    cfg = presets.v4_flash().replace(**SHORT)
    shape = MeshShape.parse(mesh)
    exchange = "ragged" if sizes.batch == 8 else None
    report = command.compile_one("short", cfg, "v6e:2x4", program, sizes, shape, exchange)
    assert report.fits, report.reason
    assert "sparse_attention" in report.moved and "grouped_swiglu" in report.moved
    assert 0.5 * report.flops < sum(report.kernels.values()) <= report.flops
    formula, sent = sum(report.formula.values()), sum(report.sent.values())
    assert abs(formula - sent) <= 0.1 * sent, (report.formula, report.sent)


class Lowered:
    """A lowered program as far as keys need one."""

    def __init__(self, text):
        self.as_text = lambda: text


def test_answers_belong_to_a_program_and_its_surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(kept.importlib.metadata, "version", lambda name: "1.0")
    key = kept.key_of(Lowered("program"), "v6e:2x4")
    assert key == kept.key_of(Lowered("program"), "v6e:2x4")
    others = {kept.key_of(Lowered("other"), "v6e:2x4"), kept.key_of(Lowered("program"), "v6e:4x4")}
    with monkeypatch.context() as patch:
        patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_async_collective_fusion=false")
        others.add(kept.key_of(Lowered("program"), "v6e:2x4"))
    monkeypatch.setattr(kept.importlib.metadata, "version", lambda name: "1.1")
    others.add(kept.key_of(Lowered("program"), "v6e:2x4"))
    assert len(others) == 4 and key not in others
    answer = kept.Answer("text", 1, 2, 3, 4, "", 5.0, 6.0)
    assert kept.find(tmp_path / "new", key) is None
    kept.keep(tmp_path / "new", key, answer)
    assert kept.find(tmp_path / "new", key) == answer
    (path,) = (tmp_path / "new").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged or of another version .*: delete it"):
        kept.find(tmp_path / "new", key)


@pytest.mark.tpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_same_program_is_compiled_once(tmp_path, monkeypatch):
    cfg = presets.v4_flash().replace(
        num_layers=1, compress_ratios=(0, 0), num_hash_layers=0, num_experts=8
    )
    where = (cfg, "v6e:2x4", "decode", Sizes(8, 8192, 1), MeshShape.parse("expert=8"))
    first = command.compile_one("short", *where, cache=tmp_path)
    monkeypatch.setattr(aot, "compile_with_text", None)
    second = command.compile_one("short", *where, cache=tmp_path)
    assert first.fits and first.temporaries and first.sent and not first.reused
    assert second.reused and "compiled earlier in" in render.text(second)
    assert second.to_json() == first.to_json() | {"reused": True}
