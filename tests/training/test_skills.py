"""Generated chats: right answers, splits without overlap, lengths, the tokenizer, and scoring."""

import json
import random
import re
from itertools import islice

import numpy as np
import pytest

from dsv4_jax.encoding import constants as C
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import read_items, tokenise
from dsv4_jax.training.skills import arithmetic, tools
from dsv4_jax.training.skills.base import SPLITS, split_of
from dsv4_jax.training.skills.corpus import LEVELS, SKILLS, examples
from dsv4_jax.training.skills.filler import Filler, read_texts
from dsv4_jax.training.skills.score import Case, Tally, bucket, cases
from dsv4_jax.training.skills.vocabulary import train_tokenizer
from scripts import make_skills

ALL = dict.fromkeys(SKILLS, 1.0)
CHATS = {name: share for name, share in ALL.items() if name != "text"}


def words(text):
    return len(text.split())


def found(pattern, text):
    match = re.search(pattern, text)
    assert match, text
    return match


def some(count, split="train", mix=ALL, level=0, tokens=256, seed=0, thinking=0.5):
    return list(islice(examples(mix, seed, split, level, tokens, words, (), thinking), count))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [m["content"] for e in some(800) for m in e.messages]
    return Tokenizer(train_tokenizer(texts, 600).to_str())


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_instance(level):
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for example in some(600, split, level=level):
            assert all(split_of(i) == split for i in example.instances)
            assert example.instances or example.skill in ("small talk", "text")
            seen[split] |= set(example.instances)
    assert all(len(found) > 300 for found in seen.values())
    assert not seen["train"] & seen["held-out"]


def test_a_seed_decides_everything():
    assert [e.item() for e in some(60)] == [e.item() for e in some(60)]
    assert [e.item() for e in some(60)] != [e.item() for e in some(60, seed=1)]


def test_every_skill_comes_in_both_modes():
    kinds = {(e.skill, e.thinking) for e in some(1500, mix=CHATS)}
    assert len(kinds) == 2 * len({skill for skill, _ in kinds}) == 2 * len(CHATS)
    for example in some(300, mix=CHATS):
        last = example.messages[-1]
        assert last["role"] == "assistant"
        assert bool(last.get("reasoning_content")) == example.thinking


@pytest.mark.parametrize(
    ("a", "op", "b"), [(37, "+", 58), (999, "+", 1), (1000, "-", 1), (7, "-", 7)]
)
def test_written_work_is_right(a, op, b):
    lines, digits, over = arithmetic.work(a, op, b).split("\n"), "", "0"
    for line in lines[1:-1]:
        terms, result, written, over = found(
            r"[\w ]+: (.*)=(-?\d+), write (\d) \w+ (\d)", line
        ).groups()
        x, y, z = map(int, re.split(r"[+-]", terms))
        assert int(result) == (x + y + z if op == "+" else x - y - z)
        assert int(result) == (int(over) if op == "+" else -int(over)) * 10 + int(written)
        digits = written + digits
    total = a + b if op == "+" else a - b
    assert int(digits) + 10 ** len(digits) * int(over if op == "+" else 0) == total
    assert lines[-1].endswith(f"so {total}")


def test_text_is_learnt_whole(tokenizer):
    [example] = some(1, mix={"text": 1.0})
    document = tokenise(example.item(), tokenizer, "here")
    assert document.learn.all()
    assert words(example.text) > 100


def test_arithmetic_answers():
    for example in some(200, mix={"arithmetic": 1.0}, level=2):
        for ask, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            a, b = map(int, re.findall(r"\d+", ask["content"]))
            minus = "-" in ask["content"]
            assert int(answer["content"]) == (a - b if minus else a + b)


def test_retrieved_values_stand_in_the_document():
    for example in some(200, mix={"retrieval": 1.0}):
        document = example.messages[0]["content"]
        for ask, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            value = found(r"^It is (\w+)\.$", answer["content"]).group(1)
            fact = next(
                line
                for line in document.split("\n")
                if line.endswith(f"is {value}.") and _is_about(line, ask["content"])
            )
            assert fact.startswith("The ")


def _is_about(fact, ask):
    field, key = found(r"^The (\w+) of (.*) is \w+\.$", fact).groups()
    return any(
        f"{form}" in ask
        for form in (f"the {field} of {key}", f"Which {field} does {key}", f"{field} of {key}?")
    )


def test_lists():
    def parts(example):
        for ask, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            yield re.split(r"[:\n]\s*", ask["content"])[-1].split(), answer["content"]

    for example in some(80, mix={"copy": 1.0}):
        assert all(answer == " ".join(items) for items, answer in parts(example))
    for example in some(80, mix={"reverse": 1.0}):
        assert all(a == f"Reversed: {' '.join(items[::-1])}" for items, a in parts(example))
    for example in some(80, mix={"sort": 1.0}):
        for items, answer in parts(example):
            ordered = answer.removeprefix("Sorted: ").split()
            assert ordered == (sorted(items, key=int) if items[0].isdigit() else sorted(items))
    for example in some(80, mix={"count": 1.0}):
        for ask, answer in zip(example.messages[::2], example.messages[1::2], strict=True):
            head, items = ask["content"].split(" in: ")
            wanted = found(r"(?:times does|Count) (\w+)", head).group(1)
            assert int(answer["content"]) == items.split().count(wanted)


def test_tool_results_are_what_the_tools_answer():
    mix = {"calculator": 1.0, "lookup": 1.0, "chain": 1.0}
    for example in some(120, mix=mix):
        names = {tool["function"]["name"] for tool in example.tools}
        for turn, result in zip(example.messages, example.messages[1:], strict=False):
            for call in turn.get("tool_calls", ()):
                name, arguments = (call["function"][k] for k in ("name", "arguments"))
                assert name in names
                answer = tools.answer(name, json.loads(arguments), example.tables)
                assert answer == result["content"]


def test_asking_a_tool_for_what_it_cannot_do():
    assert tools.answer("calculator", {"expression": "1+1+1"}, {}).startswith("error")
    assert tools.answer("price", {"item": "sun"}, {"price": {}}).startswith("error")
    assert tools.answer("nothing", {}, {}).startswith("error")
    with pytest.raises(ValueError, match="must look like"):
        tools.calculate("2**3")


def test_tokenizer_cuts_digits_and_keeps_the_official_ids(tokenizer):
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert [len(tokenizer.token_bytes(i)) for i in tokenizer.encode_text("12345")] == [1] * 5
    text = "naïve ☂ \r\n  words, 90210!"
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert tokenizer.control_id(C.DSML) >= 600 - len(C.CONTROL_TOKENS)
    with pytest.raises(ValueError, match="size=9999"):
        train_tokenizer(["a b"], 9999)


def test_filler_stays_in_its_split_and_length(tmp_path):
    paragraphs = [f"Paragraph number {i} of a long text." for i in range(400)]
    (tmp_path / "one.txt").write_text("\n\n".join(paragraphs))
    texts = read_texts(tmp_path)
    assert texts == [paragraphs]
    kept = {}
    for split in SPLITS:
        filler = Filler(random.Random(0), split, words, texts, share=1.0)
        lines = [line for _ in range(100) for line in filler(80)]
        assert all(sum(words(line) + 1 for line in filler(80)) <= 80 for _ in range(20))
        kept[split] = set(lines)
        assert len(kept[split]) > 20
    assert not kept["train"] & kept["held-out"]
    with pytest.raises(ValueError, match="no .txt files"):
        read_texts(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"singing": 1.0}}, "unknown skills singing"),
        ({"mix": {"copy": 0.0}}, "shares"),
        ({"split": "test"}, "split='test'"),
        ({"level": 7}, "level=7"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        some(1, **changes)


def test_the_script_writes_chats_that_fit(tmp_path, tokenizer, capsys):
    out = tmp_path / "chats.jsonl"
    (tmp_path / "tokenizer.json").write_text(tokenizer._full.to_str())
    flags = ["--out", str(out), "--tokenizer", str(tmp_path), "--count", "40", "--tokens", "200"]
    flags += ["--mix", "copy=1,retrieval=2"]
    assert make_skills.main(["chats", *flags]) == 0
    items = list(read_items(out))
    assert len(items) == 40
    assert max(len(tokenise(item, tokenizer, where).tokens) for where, item in items) <= 200
    assert {item["skill"] for _, item in items} == {"copy", "retrieval"}
    flags[-1] = "singing=1"
    assert make_skills.main(["chats", *flags]) == 1
    assert "unknown skills" in capsys.readouterr().err


def test_tally_counts_whole_answers(tokenizer):
    example = some(1, mix={"copy": 1.0}, thinking=0.0)[0]
    [case] = cases([("here", example.item())], tokenizer)
    tokens, learn = case.document.tokens, case.document.learn
    right = np.append(tokens[1:], 0)
    tally = Tally()
    tally.add(case, right, np.append(right[1:], 0))
    wrong = right.copy()
    wrong[np.flatnonzero(learn)[-1] - 1] += 1  # the end of the last answer
    tally.add(case, wrong, None)
    answers = len(example.messages) // 2
    [row] = tally.report()["rows"]
    assert (row["answers"], row["length"]) == (2 * answers, bucket(len(tokens)))
    assert row["exact"] == (2 * answers - 1) / (2 * answers)
    assert tally.report()["first draft accepted"] == 1.0
    assert isinstance(case, Case)
    with pytest.raises(ValueError, match="needs 'skill'"):
        list(cases([("here", {"text": "x"})], tokenizer))
