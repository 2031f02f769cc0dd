"""Asking a model questions and playing its tools; the evaluation script; bypassing the indexer."""

import json
from itertools import islice

import jax
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.batch import unpacked
from dsv4_jax.training.forward import forward
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.program import Program
from dsv4_jax.training.skills.corpus import examples
from dsv4_jax.training.skills.replay import is_formed, judge, questions, replay
from dsv4_jax.training.skills.score import Chosen, cases, chooser, score
from scripts import evaluate


def chats(mix, count, thinking=0.5, tokens=200):
    stream = examples(mix, 3, "held-out", 0, tokens, lambda text: len(text.split()), (), thinking)
    return [example.item() for example in islice(stream, count)]


def parrot(item):
    """A model that answers as the reference does, from whatever it has been asked so far."""

    def ask(messages, tools, thinking):
        assert tools == item.get("tools", [])
        assert thinking == item["thinking"]
        return item["messages"][len(messages)]

    return ask


def test_a_model_like_the_reference_is_exact():
    mix = {"chain": 1.0, "calculator": 1.0, "lookup": 1.0, "copy": 1.0, "talk": 1.0}
    for item in chats(mix, 60):
        for question in questions(item):
            verdict = judge(parrot(item), item, question)
            assert verdict.exact
            assert verdict.formed is (True if question.uses_tools else None)


def test_questions_of_thinking_chats():
    """Earlier answers of a thinking chat were never learnt with their reasoning."""
    for item in chats({"talk": 1.0}, 30):
        found = list(questions(item))
        asked = sum(m["role"] == "user" for m in item["messages"])
        assert len(found) == (1 if item["thinking"] else asked)
        assert found[-1].messages[-1]["role"] == "user"


def test_wrong_answers_and_broken_calls():
    [item] = chats({"chain": 1.0}, 1)
    [question] = questions(item)
    silent = judge(lambda *_: {"role": "assistant", "content": "No."}, item, question)
    assert silent == (False, True)
    call = json.loads(json.dumps(item["messages"][1]["tool_calls"][0]))
    assert is_formed(call, item["tools"])
    call["function"]["arguments"] = "{"
    assert not is_formed(call, item["tools"])
    endless = judge(lambda *_: {"role": "assistant", "tool_calls": [call]}, item, question)
    assert endless == (False, False)
    call["function"] = {"name": "nothing", "arguments": "{}"}
    assert not is_formed(call, item["tools"])


def test_replay_counts_by_skill_and_mode():
    items = chats({"copy": 1.0, "refusal": 1.0}, 40)
    found = replay(lambda *_: {"role": "assistant", "content": "x"}, [(i, 128) for i in items])
    assert sum(row["answers"] for row in found["rows"]) == sum(
        len(list(questions(i))) for i in items
    )
    assert {row["exact"] for row in found["rows"]} == {0.0}
    assert all("well formed" not in row for row in found["rows"])


@pytest.fixture(scope="module")
def tiny():
    cfg = presets.tiny().replace(dense_format=None, expert_format=None)
    return cfg, init_params(cfg, InitConfig(), jax.random.key(0), scan=False)


def test_score_reads_every_answer():
    tokenizer = Tokenizer(build_byte_tokenizer().to_str())
    items = chats({"copy": 1.0}, 9)
    documents = list(cases([(str(i), item) for i, item in enumerate(items)], tokenizer))
    answers = sum(len(list(questions(item))) for item in items)

    def prophet(params, batch):
        assert params == "weights"
        tokens_BT = np.asarray(batch.tokens_BT)
        return Chosen(np.roll(tokens_BT, -1, axis=1), np.roll(tokens_BT, -2, axis=1))

    found = score(prophet, "weights", documents, tokens_per_batch=1024)
    assert sum(row["answers"] for row in found["rows"]) == answers
    assert {row["exact"] for row in found["rows"]} == {1.0}
    assert (found["tokens"], found["first draft accepted"]) == (1.0, 1.0)


@pytest.mark.slow
def test_chosen_tokens_are_the_best_logits(tiny):
    cfg, params = tiny
    batch = unpacked(jax.random.randint(jax.random.key(1), (2, 64), 2, cfg.vocab_size))
    program = Program(cfg, index_loss=False)
    hidden = forward(program, params, batch)
    chosen = chooser(program)(params, batch)
    head_VD = np.asarray(params["top"]["head"])
    assert np.array_equal(chosen.next_BT, (np.asarray(hidden.y_BTD) @ head_VD.T).argmax(-1))
    assert chosen.draft_BT is not None
    assert np.array_equal(chosen.draft_BT, (np.asarray(hidden.drafts[0]) @ head_VD.T).argmax(-1))


@pytest.mark.slow
def test_random_index_changes_only_what_is_selected(tiny):
    cfg, params = tiny
    tokens_BT = jax.random.randint(jax.random.key(1), (1, 256), 2, cfg.vocab_size)
    batch, run = unpacked(tokens_BT), jax.jit(forward, static_argnums=0)

    def hidden(random):
        program = Program(cfg, index_loss=False, mtp=False, random_index=random)
        return np.asarray(run(program, params, batch).y_BTD)

    usual, random = hidden(False), hidden(True)
    few = 4 * (cfg.index_topk + 1) - 1  # tokens that see no more rows than are kept
    assert np.array_equal(usual[:, :few], random[:, :few])
    assert np.abs(usual[:, few:] - random[:, few:]).max(axis=(0, 2)).min() > 0
    with pytest.raises(ValueError, match="random_index"):
        Program(cfg, random_index=True)


def test_the_script_refuses(capsys):
    assert evaluate.main(["nowhere"]) == 1
    assert "--data" in capsys.readouterr().err
    assert evaluate.main(["nowhere", "--suite", "skills"]) == 1
    assert "--chats" in capsys.readouterr().err
    flags = ["http://127.0.0.1:9", "--suite", "skills", "--chats", "x", "--dense"]
    assert evaluate.main(flags) == 1
    assert "as it is" in capsys.readouterr().err
