"""Compiled programs on disk, so that a restart does not compile them again."""

from __future__ import annotations

import os
from pathlib import Path

import jax

OFF = "off"


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/dsv4_jax/xla`, by default below `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is not absolute does not count
    return (base if base.is_absolute() else Path.home() / ".cache") / "dsv4_jax" / "xla"


def use_compile_cache(folder: str | None) -> Path | None:
    """Keeps every compiled program in `folder`; must be called before anything is compiled.

    Args:
        folder: None is the folder JAX was already told to use, else `default_folder`; "off" turns
            the cache off.

    Returns:
        The folder; None without a cache.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    known: str | None = jax.config.values["jax_compilation_cache_dir"]
    path = Path(folder or known or default_folder())
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise ValueError(
            f"--compile-cache {path}: {error.strerror}; name another folder, or 'off'"
        ) from None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
