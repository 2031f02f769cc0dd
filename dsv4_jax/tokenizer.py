"""Text to token ids and back, safely: a client's text never becomes a control token.

Two tokenizers are built from one `tokenizer.json`. The full one knows the added tokens (turns,
think, DSML, …) and only ever looks them up by name; the plain one has that list removed and encodes
text. Skipping "special" tokens would not do: most control tokens do not carry that flag.
"""

import codecs
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.segments import Segment

TextPolicy = Literal["text", "control", "reject"]

_REPLACEMENT = "\ufffd".encode()


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or text or ids it cannot convert."""


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        source: where it came from, for messages.
        sha256: of the file, in hexadecimal.
        vocab_size: largest id plus one.
        control_ids: ids of every added token; text never encodes to one of them.
    """

    def __init__(self, spec: str | bytes, source: str = "tokenizer.json") -> None:
        """Builds it from the text of a `tokenizer.json`; `source` names it in errors."""
        raw = spec.encode() if isinstance(spec, str) else spec
        self.source = source
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._full, self._plain, self._added = _build_pair(raw, source)
        self._bytes = _token_bytes(self._full, self._added)
        self.vocab_size = len(self._bytes)
        self._control = self._added | self._named_controls()
        self.control_ids = frozenset(self._control.values())
        self._cache = _SegmentCache()
        missing = [token for token in C.CHAT_TOKENS if self._find(token) is None]
        if missing:
            raise TokenizerError(f"{source}: lacks the control tokens {', '.join(missing)}")

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer beside a checkpoint."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"{file} does not exist: this checkpoint can be run on token ids only; for text, "
                "copy the tokenizer.json of the original checkpoint there"
            )
        return cls(file.read_bytes(), str(file))

    @property
    def is_official(self) -> bool:
        """Whether this is, to the byte, the tokenizer published with DeepSeek-V4."""
        return self.sha256 == C.OFFICIAL_TOKENIZER_SHA256

    @property
    def bos_id(self) -> int:
        return self.control_id(C.BOS)

    @property
    def eos_id(self) -> int:
        return self.control_id(C.EOS)

    def control_id(self, token: str) -> int:
        """The id of a control token, by its string (see `encoding.constants`)."""
        found = self._find(token)
        if found is None:
            raise TokenizerError(f"{self.source}: lacks the control token {token}")
        return found

    def encode_text(self, text: str, special_tokens_in_text: TextPolicy = "text") -> list[int]:
        """Token ids of client text; nothing is added in front or behind.

        Args:
            text: any text without lone surrogates.
            special_tokens_in_text: what the spelling of an added token means: "text" encodes it
                like other text, "control" as that token (for trusted text only), "reject" refuses.
        """
        if special_tokens_in_text == "control":
            return _encode(self._full, text)
        if special_tokens_in_text == "reject":
            self._refuse_control_tokens(text)
        elif special_tokens_in_text != "text":
            raise TokenizerError(
                f"special_tokens_in_text={special_tokens_in_text!r} must be text, control or reject"
            )
        return list(self._cache.get(text, self._encode_plain))

    def encode_segments(
        self, segments: Iterable[Segment], special_tokens_in_text: TextPolicy = "text"
    ) -> list[int]:
        """Token ids of a rendered prompt: control segments by id, text as `encode_text`."""
        ids: list[int] = []
        for segment in segments:
            if segment.is_control:
                ids.append(self.control_id(segment.text))
            else:
                ids.extend(self.encode_text(segment.text, special_tokens_in_text))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one id contributes to the output; ids without a token count as U+FFFD."""
        if token_id < 0:
            raise TokenizerError(f"token id {token_id} is negative")
        known = token_id < len(self._bytes)
        return self._bytes[token_id] if known else _REPLACEMENT

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. `skip_control` leaves out added tokens."""
        kept = (i for i in ids if not (skip_control and i in self.control_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def incremental_decoder(self, skip_control: bool = False) -> "IncrementalDecoder":
        """A decoder for one stream of ids."""
        skipped = self.control_ids if skip_control else frozenset()
        return IncrementalDecoder(self.token_bytes, skipped)

    def _find(self, token: str) -> int | None:
        return self._full.token_to_id(token)

    def _named_controls(self) -> dict[str, int]:
        """The protocol's tokens, which a file may hold in its model instead of the added list."""
        found = {token: self._find(token) for token in C.CONTROL_TOKENS}
        return {token: index for token, index in found.items() if index is not None}

    def _encode_plain(self, text: str) -> list[int]:
        ids = _encode(self._plain, text)
        if not self.control_ids.isdisjoint(ids):
            raise TokenizerError(f"{self.source}: its model spells control tokens from plain text")
        return ids

    def _refuse_control_tokens(self, text: str) -> None:
        for token in self._control:
            if token in text:
                raise TokenizerError(f"text contains the control token {token}")


class IncrementalDecoder:
    """Turns a stream of ids into text as soon as it is complete.

    A token may end inside a UTF-8 sequence; such bytes wait for the next token. The pieces always
    add up to what decoding the whole stream gives.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], skipped: frozenset[int] = frozenset()
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """Bytes of an unfinished character."""
        return self._utf8.getstate()[0]

    def push(self, token_id: int) -> str:
        """Text that is complete with this token."""
        return "" if token_id in self._skipped else self.push_bytes(self._token_bytes(token_id))

    def push_bytes(self, data: bytes) -> str:
        """As `push`, for bytes that are already looked up."""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the stream: an unfinished character becomes U+FFFD. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _SegmentCache:
    """Encodings of long texts (system prompts, tool lists), least recently used dropped first."""

    def __init__(self, min_chars: int = 512, max_chars: int = 1 << 22) -> None:
        self.min_chars = min_chars
        self.max_chars = max_chars
        self._chars = 0
        self._entries: OrderedDict[str, Sequence[int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str, encode: Callable[[str], list[int]]) -> Sequence[int]:
        if not self.min_chars <= len(text) <= self.max_chars:
            return encode(text)
        with self._lock:
            if text in self._entries:
                self._entries.move_to_end(text)
                return self._entries[text]
        ids = tuple(encode(text))
        with self._lock:
            if text not in self._entries:
                self._chars += len(text)
            self._entries[text] = ids
            while self._chars > self.max_chars:
                dropped, _ = self._entries.popitem(last=False)
                self._chars -= len(dropped)
        return ids


def _build_pair(
    raw: bytes, source: str
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, dict[str, int]]:
    """The full tokenizer, the one without added tokens, and the added tokens with their ids."""
    try:
        spec: dict[str, Any] = json.loads(raw)
        decoder_kinds = json.dumps(spec.get("decoder"))
        added = {entry["content"]: entry["id"] for entry in spec.get("added_tokens") or []}
        full = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        plain = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{source}: not a usable tokenizer file: {error}") from error
    if '"ByteLevel"' not in decoder_kinds:
        raise TokenizerError(f"{source}: only byte-level tokenizers are supported")
    for tokenizer in (full, plain):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return full, plain, added


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError) as error:
        raise TokenizerError(f"text cannot be encoded: {error}") from None


def _token_bytes(tokenizer: tokenizers.Tokenizer, added: dict[str, int]) -> list[bytes]:
    """The bytes of every id. Model tokens spell bytes as letters, added tokens are literal."""
    letters = _byte_of_letter()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = [_REPLACEMENT] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        if token not in added and all(letter in letters for letter in token):
            table[index] = bytes(letters[letter] for letter in token)
        else:
            table[index] = token.encode()
    return table


def _byte_of_letter() -> dict[str, int]:
    """The letters byte-level tokenizers write for bytes: printable Latin-1 stands for itself.

    The other 68 bytes get the letters from U+0100 on, in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(own))
    table = {chr(byte): byte for byte in own}
    table |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return table
