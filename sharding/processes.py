"""Processes that share a mesh: how they find each other."""

from __future__ import annotations

from typing import Any

import jax

AUTO = "auto"


def join(coordinator: str | None, hosts: int | None, index: int | None) -> None:
    """Makes this process part of a job; call it before JAX is used. None: it is alone.

    coordinator: address of the first process, "HOST:PORT", or "auto" where the environment says
    who takes part (TPU pods, Slurm, Kubernetes).

    Raises:
        ValueError: settings that contradict each other, or a job that does not come together.
    """
    if coordinator is None:
        if hosts is not None or index is not None:
            raise ValueError("--hosts and --host-index need --coordinator")
        return
    if coordinator == AUTO:
        if hosts is not None or index is not None:
            raise ValueError("--coordinator auto finds --hosts and --host-index itself")
        args: dict[str, Any] = {}
    else:
        if hosts is None or index is None:
            raise ValueError("--coordinator HOST:PORT needs --hosts and --host-index")
        if not 0 <= index < hosts:
            raise ValueError(
                f"--host-index {index} must be at least 0 and less than --hosts {hosts}"
            )
        args = {
            "coordinator_address": coordinator,
            "num_processes": hosts,
            "process_id": index,
        }
    try:
        jax.distributed.initialize(**args)
    except RuntimeError as error:
        raise ValueError(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from error
