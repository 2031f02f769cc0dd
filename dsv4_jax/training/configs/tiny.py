"""Every phase of the recipe in minutes on a CPU: dense, indexer warm-up, sparse, long, QAT decay.

python scripts/prepare_data.py TEXT --out runs/tiny-data --tokenizer DIR --lengths 256,512
python scripts/train.py --config tiny --run-dir runs/tiny data.train=runs/tiny-data
"""

from dsv4_jax import presets
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

STEP = 16 * 256  # tokens of a full batch, at either length

RUN = RunConfig(
    name="tiny",
    model=presets.tiny().replace(index_topk=16),
    data={"train": (Source("runs/tiny-data"),)},
    phases=(
        Phase("dense", 300 * STEP, 256, 16, ((8, 20 * STEP),), attention="dense", learn="trunk"),
        Phase("warm-up", 40 * STEP, 256, 16, attention="dense", learn="indexer", lr=1e-2),
        Phase("sparse", 200 * STEP, 256, 16),
        Phase("long", 60 * STEP, 512, 8),
        Phase("decay", 100 * STEP, 512, 8, quantise=True),
    ),
    schedule=Schedule(lr=1e-2, end_lr=1e-3, warmup_steps=20, decay_from=0.857),
    scan=False,  # unrolled layers run faster on a CPU
    checkpoint_every=100,
)
