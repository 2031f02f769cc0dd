"""The byte tokenizer of the demo checkpoint."""

import json

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import VOCAB_SIZE, build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer


def test_layout(demo):
    assert demo.vocab_size == VOCAB_SIZE == 320
    assert [demo.control_id(token) for token in (C.BOS, C.EOS, C.PAD)] == [0, 1, 2]
    named = [demo.control_id(token) for token in C.CONTROL_TOKENS]
    assert named == [0, 1, 2, *range(259, 259 + len(C.CONTROL_TOKENS) - 3)]
    assert sorted(demo.token_bytes(i)[0] for i in range(3, 259)) == list(range(256))
    assert not demo.is_official


def test_low_ids_agree_with_the_official_vocabulary(demo, official):
    for index in range(259):
        assert demo.token_bytes(index) == official.token_bytes(index)


def test_special_flags_agree_with_the_official_file(official):
    entries = json.loads(build_byte_tokenizer().to_str())["added_tokens"]
    theirs = {
        token.content: (token.special, token.normalized)
        for token in official._full.get_added_tokens_decoder().values()
    }
    ours = {entry["content"]: (entry["special"], entry["normalized"]) for entry in entries}
    for token in C.CONTROL_TOKENS:
        assert ours[token] == theirs[token], token
    assert ours["<｜place▁holder▁no▁0｜>"] == theirs["<｜place▁holder▁no▁0｜>"]


def test_text_is_cut_as_by_the_official_tokenizer(official):
    text = "It's 12345 + x_y=日本語かな, naïve…\r\n\n  end! [a]\\b \t z"
    ours = build_byte_tokenizer().pre_tokenizer.pre_tokenize_str(text)
    assert ours == official._full.pre_tokenizer.pre_tokenize_str(text)


def test_survives_saving(tmp_path, demo):
    build_byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_dir(tmp_path)
    text = "Grüße 🙂"
    assert loaded.encode_text(text) == demo.encode_text(text)
    assert len(loaded.encode_text(text)) == len(text.encode())
