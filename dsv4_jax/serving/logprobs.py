"""Log-probabilities of tokens, in the shapes clients know."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsv4_jax.serving.model import Token

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have
TokenBytes = Callable[[int], bytes]


def chat_logprobs(tokens: Iterable[Token], token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """Returns one object per token, as in chat completions."""
    entries = []
    for token in tokens:
        best = [_entry(index, value, token_bytes) for index, value in token.top]
        entry = _entry(token.id, token.logprob or 0.0, token_bytes)
        entries.append({**entry, "top_logprobs": best})
    return entries


def legacy_logprobs(
    tokens: Sequence[Token], start: int, token_bytes: TokenBytes
) -> dict[str, list[Any]]:
    """Returns the four lists of the older completions; offsets count characters from `start`.

    A token without a logprob is the first of a prompt.
    """
    texts = [text_of(token.id, token_bytes) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {text_of(index, token_bytes): _finite(value) for index, value in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def text_of(token: int, token_bytes: TokenBytes) -> str:
    """Returns a token's text; one that is only part of a character is written `bytes:\\x..`."""
    data = token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = list(token_bytes(token))
    return {"token": text_of(token, token_bytes), "logprob": _finite(logprob), "bytes": data}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)
