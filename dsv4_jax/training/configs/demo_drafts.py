"""The demo model's second run: its MTP block alone, so that second guesses stand as well.

Everything else stays as the first run left it, rounded as it will be exported.
Data lie under `runs/demo/data` (see docs/demo_model.md).
"""

from dsv4_jax.training.configs.demo import MODEL, mix
from dsv4_jax.training.optimizer import OptimizerConfig
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

RUN = RunConfig(
    name="demo_drafts",
    model=MODEL,
    data={"drafts": mix(middlec=0.55, drillc=0.25, quizc=0.2)},
    phases=(
        Phase("drafts", 1_228_800, 512, 4, learn="mtp", drafts=2, quantise=True, data="drafts"),
    ),
    # λ scales the only loss there is
    schedule=Schedule(
        lr=3e-3, end_lr=1e-4, warmup_steps=10, decay_from=0.3, mtp=1.0, mtp_decayed=1.0
    ),
    optimizer=OptimizerConfig(vector_decay=0.0),
    micro_rows=2,
    scan=False,
    checkpoint_every=100,
    start_from="runs/demo/run",
)
