"""A tokenizer without training data: one token per byte, and the protocol's control tokens.

It serves the demo checkpoint. Ids 0–258 agree with the official vocabulary (BOS, EOS, pad, then the
256 bytes in the order byte-level tokenizers list them); the control tokens follow at 259 and unused
placeholders fill up to `VOCAB_SIZE`.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from dsv4_jax.encoding import constants as C

VOCAB_SIZE = 320  # a multiple of 64, so that the vocabulary splits over a device mesh

_SPECIAL = (C.BOS, C.EOS, C.PAD)

# How the official tokenizer cuts text before merging: digits in groups of up to three, runs of CJK
# and kana, then words, punctuation and white space. Without merges the cuts change no ids.
_DIGITS = r"\p{N}{1,3}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_byte_tokenizer() -> Tokenizer:
    """The byte tokenizer, `VOCAB_SIZE` ids; write it with `.save("tokenizer.json")`.

    As in the official file only BOS, EOS, pad and the placeholders carry the `special` flag.
    """
    vocab = {token: index for index, token in enumerate(_SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in (_DIGITS, _CJK, _WORDS)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(tokenizer)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
    named = [token for token in C.CONTROL_TOKENS if token not in _SPECIAL]
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in named])
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    holders = [f"<｜place▁holder▁no▁{index}｜>" for index in range(missing)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in holders])
