"""A byte-level BPE tokenizer with the official control tokens and cutting rules; single digits."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer

SPECIAL = (C.BOS, C.EOS, C.PAD)
NAMED = tuple(token for token in C.CONTROL_TOKENS if token not in SPECIAL)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of exactly `size` ids, learnt from texts; its first ids are the official ones.

    Its file holds the official rules, which cut digits in groups of up to three; it was learnt with
    all digits apart, so no merge joins two of them and the ids are the same.

    Raises:
        ValueError: the texts do not hold enough different words, or `size` has no room for bytes.
    """
    official = build_byte_tokenizer().pre_tokenizer
    assert official is not None
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([digits, official])  # type: ignore[attr-defined]
    trainer = BpeTrainer(
        vocab_size=size - len(NAMED),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    found = learner.get_vocab_size() + len(NAMED)
    if found != size:
        raise ValueError(f"size={size}: the texts yield {found} tokens")
    learner.pre_tokenizer = official  # type: ignore[attr-defined]
    learner.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    learner.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[attr-defined]
    learner.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    learner.add_tokens([AddedToken(token, normalized=True) for token in NAMED])
    return learner
