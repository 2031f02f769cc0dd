"""The settings of the server, as `settings.py` reads them."""

from dsv4_jax.serving.schema import EFFORTS
from dsv4_jax.serving.settings import Option, integer, one_of

NUMERICS = ("reference", "plain")
DTYPES = ("bfloat16", "float32")
PROFILES = ("auto", "preview", "official")


def choices(names: tuple[str, ...]) -> str:
    return "{" + ",".join(names) + "}"


OPTIONS = (
    Option("checkpoint", "model", "made by convert_hf.py", metavar="DIR", unset="the demo"),
    Option(
        "max-len",
        "model",
        "context limit in tokens",
        read=integer(1),
        metavar="N",
        unset="the model's own, at most 131072",
    ),
    Option("slots", "model", "requests at a time", 8, integer(1), "N"),
    Option(
        "cache-tokens",
        "model",
        "tokens of context kept, in use or for reuse",
        read=integer(1),
        metavar="N",
        unset="two full contexts",
    ),
    Option("numerics", "model", "arithmetic", "reference", one_of(*NUMERICS), choices(NUMERICS)),
    Option("dtype", "model", "of activations", "bfloat16", one_of(*DTYPES), choices(DTYPES)),
    Option("host", "HTTP", "address to listen on", "127.0.0.1", metavar="H"),
    Option("port", "HTTP", "0 takes any free one", 8000, integer(0, 65535), "P"),
    Option(
        "api-key",
        "HTTP",
        "clients need one of these; repeatable",
        default=(),
        metavar="K",
        is_repeatable=True,
        is_secret=True,
        unset="none needed",
    ),
    Option(
        "served-model-name",
        "HTTP",
        "name that clients use; repeatable",
        default=(),
        metavar="NAME",
        is_repeatable=True,
        unset="the folder's name",
    ),
    Option(
        "default-effort",
        "prompt",
        f"thinking where a request names none: {', '.join(EFFORTS)}",
        "high",
        one_of(*EFFORTS),
        "E",
    ),
    Option(
        "prompt-profile",
        "prompt",
        "prompts the model was trained on; auto looks at the checkpoint",
        "auto",
        one_of(*PROFILES),
        choices(PROFILES),
    ),
)
