"""Documents, packing, preparation on disk, and batches by row number."""

import json

import numpy as np
import pytest
from array_record.python import array_record_module

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import Document, tokenise
from dsv4_jax.training.data.packing import decode_row, encode_row, pack
from dsv4_jax.training.data.prepare import prepare
from dsv4_jax.training.data.source import Prefetch, Rows, Source
from scripts import prepare_data


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(build_byte_tokenizer().to_str())


def documents(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(2, 99, n).astype(np.int32), np.ones(n, bool)) for n in sizes]


def test_packing_loses_nothing():
    given = documents([5, 60, 33, 2, 200, 31, 64, 7, 29] * 20)
    rows = list(pack(given, 64, window=50))
    pieces = sorted(d.tokens.tobytes() for row in rows for d in row)
    expected = sorted(
        d.tokens[i : i + 64].tobytes() for d in given for i in range(0, len(d.tokens), 64)
    )
    assert pieces == expected
    filled = [sum(len(d.tokens) for d in row) for row in rows]
    assert max(filled) <= 64
    assert sum(filled) / (64 * len(rows)) > 0.93


def test_packing_prefers_the_tightest_row():
    rows = list(pack(documents([40, 30, 34, 24]), 64))
    assert sorted(sorted(len(d.tokens) for d in row) for row in rows) == [[24, 40], [30, 34]]


def test_pieces_without_a_target_are_dropped():
    silent = Document(np.arange(9, dtype=np.int32), np.zeros(9, bool))
    first_only = Document(np.arange(2, dtype=np.int32), np.array([True, False]))
    assert list(pack([silent, first_only, *documents([1])], 16)) == []


def test_rows_survive_their_encoding():
    a, b = documents([5, 3])
    b = b._replace(learn=np.array([False, True, True]))
    row = decode_row(encode_row([a, b]), 10)
    assert row[0].tolist() == [*a.tokens, *b.tokens, 0, 0]
    assert row[1].tolist() == [1] * 5 + [2] * 3 + [0, 0]
    assert row[2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert row[3].tolist() == [1] * 5 + [0, 1, 1, 0, 0]


def learnt(item, tokenizer):
    """What is learnt, as text."""
    document = tokenise(item, tokenizer, "here")
    return tokenizer.decode(document.tokens[document.learn].tolist())


def test_only_answers_of_chats_are_learnt(tokenizer):
    turns = [
        {"role": "system", "content": "sys"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first", "reasoning_content": "hmm"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second", "reasoning_content": "aha"},
    ]
    chat = learnt({"messages": turns}, tokenizer)
    assert chat == f"first{C.EOS}second{C.EOS}"
    # the first answer's reasoning is not rendered any more, so it would teach not to think
    thinking = learnt({"messages": turns, "thinking": True}, tokenizer)
    assert thinking == f"aha{C.THINK_END}second{C.EOS}"


def test_tool_calls_are_learnt_and_results_are_not(tokenizer):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns = [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "RESULT"},
        {"role": "assistant", "content": "done"},
    ]
    text = learnt({"messages": turns, "tools": [tool]}, tokenizer)
    assert "invoke" in text and text.endswith(f"done{C.EOS}") and "RESULT" not in text


@pytest.mark.parametrize("item", [3, {"texts": "x"}, {"messages": [{"role": "nobody"}]}])
def test_strange_items_are_refused(item, tokenizer):
    with pytest.raises(ValueError, match="here"):
        tokenise(item, tokenizer, "here")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [{"text": "".join(rng.choice(list("abc "), 50))} for _ in range(60)]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "b.txt").write_text("hello " * 40)
    writer = array_record_module.ArrayRecordWriter(str(root / "c.array_record"), "group_size:1")
    writer.write(b"a record of text")
    writer.write(json.dumps({"text": "another one"}).encode())
    writer.close()
    totals = prepare([root], root / "out", tokenizer, [64, 128], progress=lambda _: None)
    return root / "out", totals


def test_preparation_counts(prepared):
    _, totals = prepared
    for length in (64, 128):
        assert totals[length]["documents"] == 63
        assert totals[length]["tokens"] == 60 * 52 + 242 + 18 + 13
    assert totals[128]["rows"] < totals[64]["rows"]


def test_rows_are_a_function_of_their_number(prepared):
    path, totals = prepared
    source = (Source(str(path)),)
    rows, again = Rows(source, 64, 7, 320), Rows(source, 64, 7, 320)
    batch = rows.batch(0, range(8))
    assert batch.shape == (4, 8, 64) and batch[0].max() < 320
    np.testing.assert_array_equal(again.batch(3, range(5)), batch[:, 3:])
    assert (Rows(source, 64, 8, 320).batch(0, range(8)) != batch).any()
    epoch = totals[64]["rows"]
    first = {r.tobytes() for r in rows.batch(0, range(epoch))[0]}
    second = {r.tobytes() for r in rows.batch(epoch, range(epoch))[0]}
    assert first == second and (rows.batch(0, range(4)) != rows.batch(epoch, range(4))).any()


def test_hosts_read_their_rows_of_a_batch(prepared):
    rows = Rows((Source(str(prepared[0])),), 64, 7, 320)
    np.testing.assert_array_equal(rows.batch(4, [1, 6]), rows.batch(4, range(8))[:, [1, 6]])


def test_mixtures_keep_their_weights(prepared, tmp_path, tokenizer):
    (tmp_path / "z.txt").write_text("z" * 2000)
    prepare([tmp_path], tmp_path / "out", tokenizer, [64], progress=lambda _: None)
    sources = (Source(str(prepared[0]), 3.0), Source(str(tmp_path / "out"), 1.0))
    batch = Rows(sources, 64, 0, 320).batch(0, range(40))
    z = tokenizer.encode_text("z")[0]
    assert ((batch[0] == z).sum(axis=1) > 30).sum() == 10


def test_prefetched_batches_are_the_same(prepared):
    rows, ahead = Rows((Source(str(prepared[0])),), 64, 7, 320), Prefetch()
    for first in (0, 4, 8, 20, 24):
        found = ahead.get(rows, first, 4, range(1, 4))
        np.testing.assert_array_equal(found, rows.batch(first, range(1, 4)))
    ahead.close()


def test_missing_length_and_small_vocabulary(prepared):
    with pytest.raises(ValueError, match="prepare_data.py with --lengths 32"):
        Rows((Source(str(prepared[0])),), 32, 0, 320)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        Rows((Source(str(prepared[0])),), 64, 0, 100)


def test_script(tmp_path, capsys):
    build_byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("some text")
    args = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "o"), "--lengths", "16"]
    args += ["--tokenizer", str(tmp_path)]
    assert prepare_data.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["16"]["rows"] == 1
    assert prepare_data.main(args) == 1
    assert "holds packed rows already" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text("{oops")
    assert prepare_data.main(
        [str(tmp_path / "b.jsonl"), *args[1:2], str(tmp_path / "p"), *args[3:]]
    )
    assert "b.jsonl:1" in capsys.readouterr().err


def test_texts_with_a_hole_end_with_what_belongs_there(tokenizer):
    item = {"prefix": "a = ", "suffix": "\n", "middle": "1"}
    text = learnt(item, tokenizer)
    assert text == f"{C.BOS}{C.FIM_BEGIN}a = {C.FIM_HOLE}\n{C.FIM_END}1{C.EOS}"
    with pytest.raises(ValueError, match="here: needs the texts 'prefix'"):
        tokenise({"middle": "1", "prefix": 2}, tokenizer, "here")
