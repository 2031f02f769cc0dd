"""A byte-level BPE tokenizer with the official control tokens and cutting rules; single digits."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import _CJK, _DIGITS, _SPECIAL, _WORDS

ONE_DIGIT = r"\p{N}"


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of exactly `size` ids, learnt from texts.

    Its file holds the official rules (digits in groups of up to three); it was learnt with digits
    cut apart, so no merge joins two of them and the ids are the same.

    Raises:
        ValueError: the texts do not hold enough different words.
    """
    named = [token for token in C.CONTROL_TOKENS if token not in _SPECIAL]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _cuts(ONE_DIGIT)
    trainer = BpeTrainer(
        vocab_size=size - len(named),
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    if learner.get_vocab_size() != size - len(named):
        raise ValueError(f"the texts yield {learner.get_vocab_size()} tokens, not {size}")
    learner.pre_tokenizer = _cuts(_DIGITS)
    learner.decoder = decoders.ByteLevel()
    learner.post_processor = processors.ByteLevel(trim_offsets=False)
    learner.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    learner.add_tokens([AddedToken(token, normalized=True) for token in named])
    return learner


def _cuts(digits: str) -> pre_tokenizers.PreTokenizer:
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in (digits, _CJK, _WORDS)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])
