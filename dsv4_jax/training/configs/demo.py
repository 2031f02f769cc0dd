"""The demo model: every layer kind of V4, taught skills from generated chats.

Data lie under `runs/demo/data` (see docs/demo_model.md). A phase may be made longer, or phases be
added behind it, while the run goes on: the steps that are done keep their numbers.
"""

from dsv4_jax.config import CSA, SWA, ModelConfig, Yarn
from dsv4_jax.presets import HCA_RATIO
from dsv4_jax.training.data.source import Source
from dsv4_jax.training.run import RunConfig
from dsv4_jax.training.schedules import Phase, Schedule

MODEL = ModelConfig(
    vocab_size=4096,
    dim=128,
    num_layers=5,
    compress_ratios=(SWA, SWA, CSA, HCA_RATIO, CSA, SWA),
    num_heads=4,
    head_dim=128,  # compressed rows hold several tokens each
    rope_dim=32,
    q_rank=64,
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

RUN = RunConfig(
    name="demo",
    model=MODEL,
    data={
        "copy": (Source(f"{ROOT}/copy", 0.93), Source(f"{ROOT}/text", 0.07)),
        "short": (Source(f"{ROOT}/short", 0.95), Source(f"{ROOT}/text", 0.05)),
        "middle": (Source(f"{ROOT}/middle"),),
        "long1k": (Source(f"{ROOT}/long1k"), Source(f"{ROOT}/drill")),
        "long2k": (Source(f"{ROOT}/long2k", 0.65), Source(f"{ROOT}/drill2k", 0.35)),
    },
    phases=(
        # long lists to copy first: most of what is learnt asks for looking back at what followed
        Phase("copy", 430_080, 256, 4, attention="dense", learn="trunk", data="copy"),
        Phase("short", 1_638_400, 256, 4, attention="dense", learn="trunk", data="short"),
        Phase("middle", 3_481_600, 512, 4, attention="dense", learn="trunk", data="middle"),
        Phase("indexers", 204_800, 1024, 2, attention="dense", learn="indexer", data="long1k"),
        Phase("sparse", 1_638_400, 1024, 2, data="long1k"),
        Phase("decay", 1_638_400, 2048, 1, data="long2k", quantise=True),
    ),
    schedule=Schedule(lr=1e-2, end_lr=2e-4, warmup_steps=50, decay_from=0.8186),
    micro_rows=2,  # what a layer keeps then stays in the cache of a core
    scan=False,  # unrolled layers run faster on a CPU
    checkpoint_every=100,
)
