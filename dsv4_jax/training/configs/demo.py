"""The demo model: every layer kind of V4, taught skills from generated chats.

Data lie under `runs/demo/data` (see docs/demo_model.md). A phase may be made longer, or phases be
added behind it, while the run goes on: the steps that are done keep their numbers.
"""

from dsv4_jax.config import CSA, SWA, ModelConfig, Yarn
from dsv4_jax.presets import HCA_RATIO
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.optimizer import OptimizerConfig
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

MODEL = ModelConfig(
    vocab_size=4096,
    dim=128,
    num_layers=5,
    compress_ratios=(SWA, SWA, CSA, HCA_RATIO, CSA, SWA),
    num_heads=4,
    head_dim=128,  # compressed rows hold several tokens each
    rope_dim=64,
    q_rank=128,
    o_groups=2,
    o_rank=64,
    num_experts=8,
    experts_per_token=2,
    expert_dim=64,
    num_hash_layers=1,
    routed_scale=1.5,
    window=64,
    rope_theta=100.0,  # all frequencies tell neighbours apart: heads that look back form sooner
    index_heads=4,
    index_dim=64,
    index_topk=64,
    yarn=Yarn(original_len=8192),
    max_len=32768,
)
ROOT = "runs/demo/data"


def mix(**shares: float) -> tuple[Source, ...]:
    """Sources of a phase, by their folders."""
    return tuple(Source(f"{ROOT}/{name}", share) for name, share in shares.items())


RUN = RunConfig(
    name="demo",
    model=MODEL,
    data={
        "copy": mix(copy=0.93, text=0.07),
        "short": mix(short=0.5, quizs=0.46, text=0.04),
        "middle": mix(quiz=0.3, facts=0.15, middle=0.3, drill=0.25),
        "skills": mix(drillb=0.4, middleb=0.35, quiz=0.15, facts=0.1),
        "more": mix(drillc=0.35, middlec=0.35, quizc=0.2, facts=0.1),
        "indexers": mix(quiz1k=1.0),
        "sparse": mix(quiz1k=0.5, tools1k=0.25, drill=0.25),
        "decay": mix(quiz2k=0.55, tools1k=0.2, drill=0.25),
        "long": mix(long=1.0),
    },
    phases=(
        # long lists to copy first: most of what is learnt asks for looking back at what followed
        Phase("copy", 430_080, 256, 4, attention="dense", learn="trunk", data="copy"),
        Phase("short", 1_228_800, 256, 4, attention="dense", learn="trunk", data="short"),
        Phase("middle", 1_331_200, 512, 4, attention="dense", learn="trunk", data="middle"),
        Phase("skills", 3_072_000, 512, 4, attention="dense", learn="trunk", data="skills"),
        Phase("more", 4_505_600, 512, 4, attention="dense", learn="trunk", data="more"),
        Phase("indexers", 163_840, 1024, 2, attention="dense", learn="indexer", data="indexers"),
        Phase("sparse", 921_600, 1024, 2, data="sparse"),
        Phase("decay", 737_280, 2048, 1, data="decay", quantise=True),
        Phase("long", 98_304, 8192, 1, data="long", quantise=True),
        Phase("end", 65_536, 2048, 1, data="decay", quantise=True),
    ),
    schedule=Schedule(lr=1e-2, end_lr=2e-4, warmup_steps=50, decay_from=0.845),
    # V4's attention is as sharp as its norms are large; at this rate decay would shrink them
    optimizer=OptimizerConfig(vector_decay=0.0),
    micro_rows=2,  # what a layer keeps then stays in the cache of a core
    scan=False,  # unrolled layers run faster on a CPU
    checkpoint_every=100,
)
