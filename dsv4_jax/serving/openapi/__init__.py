"""The description of the API that the server gives out at /openapi.json."""

from dsv4_jax.serving.openapi.document import document

__all__ = ["document"]
