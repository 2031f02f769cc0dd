"""Whether this machine can have an accelerator at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

DEVICE_FILES = ("accel*", "vfio/[0-9]*")  # of TPUs
VENDOR = "0x1ae0"  # of TPUs on the PCI bus
# Whoever sets one of these has an accelerator in mind.
VARIABLES = ("JAX_PLATFORM", "JAX_FORCE_TPU_INIT", "TPU_", "LIBTPU_", "PJRT_")
# Not these: JAX, the TPU library and `sharding.tpu` set them themselves.
NO_HINTS = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH", "LIBTPU_INIT_ARGS")


def use_cpu_if_alone(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Keeps JAX from trying a TPU where there is no trace of one; call it before JAX is used.

    An installed TPU library that finds no TPU complains at length on stderr. A single hint that
    there may be a device, of whatever kind, leaves the choice to JAX.

    Args:
        environ: Variables that may name a device or a platform.
        root: Of the file system.

    Returns:
        Whether the CPU was chosen.
    """
    if _is_named(environ) or _has_tpu(root) or _has_plugins():
        return False
    import jax

    if jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]  # chosen already
        return False
    jax.config.update("jax_platforms", "cpu")
    return True


def _is_named(environ: Mapping[str, str]) -> bool:
    return any(name.startswith(VARIABLES) and name not in NO_HINTS for name in environ)


def _has_tpu(root: Path) -> bool:
    if any(any((root / "dev").glob(pattern)) for pattern in DEVICE_FILES):
        return True
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == VENDOR for path in vendors)


def _has_plugins() -> bool:
    """Whether JAX can use anything but CPU and TPU."""
    return bool(metadata.entry_points(group="jax_plugins")) or bool(util.find_spec("jax_plugins"))
