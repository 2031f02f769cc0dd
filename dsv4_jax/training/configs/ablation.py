"""CSA, HCA and MTP at the smallest size that shows what each part does; `scripts/ablate.py`."""

from dsv4_jax import presets
from dsv4_jax.config import CSA, SWA
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

LENGTH, ROWS = 256, 8
STEP = ROWS * LENGTH

RUN = RunConfig(
    name="ablation",
    model=presets.tiny().replace(
        dim=64,
        num_layers=2,
        compress_ratios=(CSA, 32, SWA),
        head_dim=32,
        num_hash_layers=0,  # the load of hash layers cannot be balanced
        rope_dim=16,
        q_rank=32,
        o_rank=32,
        expert_dim=32,
        window=16,
        index_dim=32,
        index_topk=8,
        max_len=1024,
    ),
    data={"train": (Source("runs/ablation/data/train"),)},
    phases=(
        Phase("dense", 110 * STEP, LENGTH, ROWS, attention="dense", learn="trunk"),
        Phase("warm-up", 15 * STEP, LENGTH, ROWS, attention="dense", learn="indexer"),
        Phase("sparse", 40 * STEP, LENGTH, ROWS),
        Phase("decay", 35 * STEP, LENGTH, ROWS, quantise=True),
    ),
    schedule=Schedule(lr=1e-2, end_lr=1e-3, warmup_steps=20, decay_from=0.825),
    micro_rows=4,
    scan=False,
    checkpoint_every=60,
    log_every=20,
)
