"""What the TPU compiler is asked for beyond its defaults."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLE = "LIBTPU_INIT_ARGS"
FLAGS = {"xla_tpu_enable_async_all_to_all": "true"}


def overlap_messages(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets what experts send home travel while the shared expert computes.

    Call it before JAX is used: libtpu reads its flags once. Those that are set already win.
    """
    given = environ.get(VARIABLE, "").split()
    names = {flag.lstrip("-").partition("=")[0] for flag in given}
    more = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    environ[VARIABLE] = " ".join([*given, *more])
