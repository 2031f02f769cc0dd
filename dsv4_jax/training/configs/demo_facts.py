"""The demo model's second run: from the first one's export on, with the rate falling throughout.

Facts that look alike, longer documents, and enough of everything else that nothing is forgotten.
Data lie under `runs/demo/data` (see docs/demo_model.md).
"""

from dsv4_jax.training.configs.demo import MODEL, ROOT
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

KEEP = f"{ROOT}/keep"

RUN = RunConfig(
    name="demo_facts",
    model=MODEL,
    data={
        "facts": (Source(f"{ROOT}/facts", 0.75), Source(KEEP, 0.25)),
        "facts2k": (Source(f"{ROOT}/facts2k", 0.65), Source(KEEP, 0.35)),
        "long": (Source(f"{ROOT}/long"),),
    },
    phases=(
        Phase("facts", 2_457_600, 512, 4, data="facts"),
        Phase("facts2k", 1_105_920, 2048, 1, data="facts2k"),
        Phase("decay", 614_400, 2048, 1, data="facts2k", quantise=True),
        Phase("long", 98_304, 8192, 1, data="long", quantise=True),
    ),
    schedule=Schedule(lr=6e-3, end_lr=2e-4, warmup_steps=50, decay_from=0.15),
    micro_rows=2,
    scan=False,
    checkpoint_every=100,
    start_from="runs/demo/first",  # the export of `demo`, converted
)
