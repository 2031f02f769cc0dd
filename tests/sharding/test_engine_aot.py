"""The engine's programs through the TPU compiler, for a slice that is not there."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv4_jax import presets
from dsv4_jax.numerics import Numerics
from dsv4_jax.preflight.programs import weights_of
from dsv4_jax.sampling import knobs_of, mask_words
from dsv4_jax.serving.engine import device, steps
from dsv4_jax.serving.engine.sizing import page_for, plan_sizes
from pallas_kernels import aot, hlo
from sharding.mesh import MeshShape, make_mesh, topology_devices
from sharding.rules import ENGINE
from sharding.shards import Shards

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(bool(aot.skip_reason()), reason=str(aot.skip_reason())),
]
NUM = Numerics("reference", "bfloat16", "pallas")
MAX_LEN, SLOTS = 65536, 8
# V4-Flash with fewer layers and experts.
CFG = presets.v4_flash().replace(
    num_layers=4, compress_ratios=(0, 4, 128, 4, 0), num_experts=8, num_hash_layers=1
)


def step(topology: str, mesh: str, page_tokens: int) -> tuple[int, dict[str, float]]:
    """Temporary bytes of a decoding step, and bytes moved by kind."""
    shards = Shards(make_mesh(MeshShape.parse(mesh), topology_devices(topology)), ENGINE)
    everywhere = NamedSharding(shards.mesh, PartitionSpec())  # pyright: ignore[reportArgumentType]
    _, sizes = plan_sizes(CFG, MAX_LEN, SLOTS, page_tokens=page_tokens)

    def placed(tree):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), tree
        )

    state = jax.eval_shape(partial(device.init_state, CFG, NUM, sizes))
    batch = device.Batch(
        np.zeros((SLOTS, 3), np.int32),
        np.zeros(SLOTS, np.int32),
        np.zeros((SLOTS, sizes.table_pages), np.int32),
        knobs_of([], SLOTS),
        np.zeros((SLOTS, mask_words(CFG.vocab_size)), np.uint32),
    )
    fn = jax.jit(
        partial(steps.decode, CFG, NUM, shards), donate_argnums=1, out_shardings=everywhere
    )
    with jax.set_mesh(shards.mesh):  # pyright: ignore[reportArgumentType]
        args = weights_of(CFG, shards), placed(dataclasses.replace(state, checkpoints=[]))
        compiled, text = aot.compile_with_text(fn.lower(*args, placed(batch)))
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes, dict(hlo.moved(text))


def test_a_step_on_a_mesh_copies_no_cache():
    assert page_for(NUM) == 512
    temporary, moved = step("v5e:2x2", "expert=2,tensor=2", page_for(NUM))
    rows = SLOTS * MAX_LEN // 4 * (448 + 128)  # of one CSA layer, at full length
    assert temporary < rows
    copied = sum(moved.get(kind, 0) for kind in ("copy", "copy-start", "custom-call"))
    assert copied < rows, moved
