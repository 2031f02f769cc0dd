"""From drawn answers to packed rows, GRPO steps and an export; and distillation runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.numerics import Numerics
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.batch import from_fields, target_mask
from dsv4_jax.training.data.packing import decode_row, encode_row
from dsv4_jax.training.data.rollouts import advantages_of, prepare_rollouts, tokenise
from dsv4_jax.training.data.source import Rows, Source
from dsv4_jax.training.distill import Distill, Teacher, token_kl
from dsv4_jax.training.evaluate import scorer
from dsv4_jax.training.forward import forward
from dsv4_jax.training.grpo import Grpo
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.loop import Trainer
from dsv4_jax.training.metrics import read
from dsv4_jax.training.program import Program
from dsv4_jax.training.restore import newest_params
from dsv4_jax.training.run import load_run
from dsv4_jax.training.schedules import Phase, Schedule
from dsv4_jax.training.skills.draw import Sampler
from scripts import export_run, prepare_data, train
from tests.training.runs import ONE_LAYER, SPARSE_ONLY, write_config
from tests.training.support import CONFIG

MODEL = CONFIG.replace(
    vocab_size=320, num_layers=1, compress_ratios=(4,), num_hash_layers=0, num_mtp_layers=0
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(build_byte_tokenizer().to_str())


def line(group, reward, prompt=(5, 6), completion=(7, 8, 9), **more):
    found = {"group": group, "reward": reward, "prompt": list(prompt)}
    found |= {"completion": list(completion), "logprobs": [-0.5] * len(completion)}
    return found | more


def write(path, lines):
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return path


def test_rows_carry_what_was_noted(tmp_path, tokenizer):
    lines = [
        line("a", 1.0, completion=[7, 8, 9, 10]),
        line("a", 0.0, teacher=1),
        line("b", 3.0, completion=[11] * 40),
        line("b", 2.0, completion=[12]),
    ]
    source = write(tmp_path / "drawn.jsonl", lines)
    found = prepare_rollouts([source], tmp_path / "data", tokenizer, [16], progress=lambda _: None)
    assert found[16]["documents"] == 3 and found[16]["too_long"] == 1
    rows = Rows((Source(str(tmp_path / "data")),), 16, 0, tokenizer.vocab_size)
    assert rows.kind == "rollouts"
    batch = from_fields(rows.batch(0, [0]))
    segment, rollout = np.asarray(batch.segment_BT[0]), batch.rollout
    assert rollout is not None and segment.max() == 3
    seen = {}
    for number in (1, 2, 3):
        at = segment == number
        drawn = at & (np.asarray(batch.learn_BT[0]) == 1)
        assert drawn.sum() == at.sum() - 2
        np.testing.assert_array_equal(np.asarray(rollout.old_BT[0])[drawn], -0.5)
        assert not np.asarray(rollout.old_BT[0])[at & ~drawn].any()
        [worth] = set(np.asarray(rollout.advantage_BT[0])[at].tolist())
        [teacher] = set(np.asarray(rollout.teacher_BT[0])[at].tolist())
        seen[int(drawn.sum())] = (worth, teacher)
    # the one that is too long still counts in the mean of its group
    assert seen == {4: (0.5, -1), 3: (-0.5, 1), 1: (-0.5, -1)}


def test_rows_survive_their_encoding(tokenizer):
    row = [
        tokenise(line("a", 1.0), tokenizer, 0.25, "x"),
        tokenise(line("a", 0.0), tokenizer, -0.25, "y"),
    ]
    fields = decode_row(encode_row(row), 12)
    assert fields.shape == (7, 12)
    np.testing.assert_array_equal(fields[0], [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 0, 0])
    np.testing.assert_array_equal(fields[5].view(np.float32), [0.25] * 5 + [-0.25] * 5 + [0, 0])


def test_turns_of_an_answer_share_its_reward():
    lines = [("1", line("a", 1.0, sample="x")), ("2", line("a", 1.0, sample="x"))]
    lines += [("3", line("a", 0.0, sample="y"))]
    assert advantages_of(iter(lines), False) == {("a", "x"): 0.5, ("a", "y"): -0.5}
    found = advantages_of(iter(lines), True)
    np.testing.assert_allclose(list(found.values()), [1, -1], rtol=1e-6)
    with pytest.raises(ValueError, match="several rewards"):
        advantages_of(iter([*lines, ("4", line("a", 0.5, sample="x"))]), False)


def test_messages_are_rendered(tokenizer):
    item = line("a", 1.0, messages=[{"role": "user", "content": "Hi"}])
    del item["prompt"]
    document = tokenise(item, tokenizer, 0.0, "x")
    text = tokenizer.decode(document.tokens[~document.learn].tolist())
    assert text.endswith("Hi<｜Assistant｜></think>")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"logprobs": [-1.0]}, "one for each of 3"),
        ({"logprobs": [-1.0, 0.5, -1.0]}, "at most 0"),
        ({"prompt": []}, "needs 'prompt'"),
        ({"completion": [7, 9999, 8]}, "token id 9999"),
        ({"messages": []}, "either a 'prompt'"),
        ({"teacher": "a"}, "teacher='a'"),
    ],
)
def test_lines_that_are_no_rollouts(change, said, tokenizer):
    with pytest.raises(ValueError, match=f"line 3: .*{said}"):
        tokenise(line("a", 1.0) | change, tokenizer, 0.0, "line 3")


def test_rewards_must_be_numbers(tmp_path, tokenizer):
    for item, said in ((line("a", None), "reward=None"), ({"reward": 1}, "needs a 'group'")):
        source = write(tmp_path / "drawn.jsonl", [item])
        with pytest.raises(ValueError, match=said):
            prepare_rollouts([source], tmp_path / "data", tokenizer, [16])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of no steps with random weights: what rollouts are drawn from."""
    folder = tmp_path_factory.mktemp("rollouts")
    run = load_run(str(write_config(folder, SPARSE_ONLY, model=ONE_LAYER)), ["seed=1"])
    trainer = Trainer(dataclasses.replace(run, model=MODEL), folder / "start")
    trainer.train(until=1)
    trainer.close()
    return folder, dataclasses.replace(run, model=MODEL, start_from=str(folder / "start"))


def sampler_of(params, max_tokens=6):
    num = Numerics("plain", "float32")
    return Sampler(MODEL, num, params, 1, 64, max_tokens)


@pytest.mark.slow
def test_what_is_drawn_is_as_likely_as_noted():
    params = init_params(MODEL, InitConfig(), jax.random.key(0), False)
    sampler = sampler_of(params)
    drawn = sampler.draw([5, 6, 7], 4, jax.random.key(1))
    assert [d.ids for d in drawn] == [d.ids for d in sampler.draw([5, 6, 7], 4, jax.random.key(1))]
    assert len({tuple(d.ids) for d in drawn}) == 4
    program = Program(MODEL, index_loss=False, mtp=False)
    for found in drawn:
        fields = np.zeros((4, 1, 16), np.int32)
        size = 3 + len(found.ids)
        fields[0, 0, :size] = [5, 6, 7, *found.ids]
        fields[1, 0, :size], fields[2, 0, :size] = 1, np.arange(size)
        losses = scorer(program)(params, from_fields(fields))["loss"][0]
        np.testing.assert_allclose(-losses[2 : size - 1], found.log_probs, atol=1e-4)
    with pytest.raises(ValueError, match="leave"):
        sampler_of(params, max_tokens=64)
    with pytest.raises(ValueError, match="a prompt of 60 tokens"):
        sampler.draw([5] * 60, 2, jax.random.key(0))


def small(run, folder, objective, data, steps=80, lr=5e-3):
    return dataclasses.replace(
        run,
        objective=objective,
        data={"train": (Source(str(folder / data)),)},
        phases=(Phase("grpo", steps * 4 * 32, 32, 4),),
        schedule=Schedule(lr=lr, end_lr=lr, warmup_steps=0, bias_speed=0.0),
    )


def draw_even(run_dir, seed):
    """Rollouts of which those are right whose first id is even."""
    sampler, lines = sampler_of(newest_params(run_dir, MODEL)), []
    for group in range(8):
        prompt = [10 + group, 20, 30]
        for answer in sampler.draw(prompt, 16, jax.random.key(100 * seed + group)):
            reward = float(answer.ids[0] % 2 == 0)
            lines.append(line(group, reward, prompt, answer.ids) | {"logprobs": answer.log_probs})
    return lines


@pytest.fixture(scope="module")
def drawn(start):
    """What the start draws, packed into `drawn` beside it."""
    folder, lines = start[0], draw_even(start[0] / "start", 1)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(build_byte_tokenizer().to_str())
    write(folder / "drawn.jsonl", lines)
    args = ["--rollouts", "--out", str(folder / "drawn"), "--lengths", "32"]
    args += ["--tokenizer", str(folder / "tokenizer"), str(folder / "drawn.jsonl")]
    assert prepare_data.main(args) == 0
    return lines


def mean_reward(lines):
    return np.mean([line["reward"] for line in lines])


@pytest.mark.slow
def test_rewarded_answers_become_likely(start, drawn):
    """Draw, judge, pack, train, draw again, export: answers whose first id is even are right."""
    folder, run = start
    trainer = Trainer(small(run, folder, Grpo(kl=0.01), "drawn"), folder / "grpo")
    assert trainer.train()
    trainer.close()
    lines = read(folder / "grpo")
    assert {"kl", "clipped", "masked"} <= set(lines[0]) and "recall" not in lines[0]
    assert abs(lines[0]["kl"]) < 1e-4 < lines[-1]["kl"]  # it starts at the reference
    before, after = mean_reward(drawn), mean_reward(draw_even(folder / "grpo", 2))
    assert before < 0.65 and after > before + 0.2
    export_run.export_run(str(folder / "grpo"), str(folder / "out"), None, "bf16")
    assert (folder / "out" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("single_sample", [False, True])
def test_a_student_comes_to_its_teacher(start, drawn, single_sample):
    """By samples it comes less far: they are noisy, and right only while the student drew them."""
    folder, run = start
    steps, lr, left = (12, 3e-4, 0.95) if single_sample else (80, 5e-3, 0.5)
    trainer = Trainer(run, folder / "teacher")
    trainer.train(until=8)
    trainer.close()
    objective = Distill((Teacher(str(folder / "teacher")),), single_sample)
    name = f"student-{single_sample}"
    trainer = Trainer(small(run, folder, objective, "drawn", steps, lr), folder / name)
    trainer.train()
    trainer.close()
    assert "kl" not in read(folder / name)[0]
    assert kl_to_teacher(folder, name) < left * kl_to_teacher(folder, "start")


def kl_to_teacher(folder, name):
    """Mean over the tokens that were drawn."""
    rows = Rows((Source(str(folder / "drawn")),), 32, 0, MODEL.vocab_size)
    batch = from_fields(rows.batch(0, range(16)))
    program = Program(MODEL, index_loss=False, mtp=False)
    pairs = []
    for model in (name, "teacher"):
        params = newest_params(folder / model, MODEL)
        y_BTD = forward(program, params, batch).y_BTD
        pairs += [y_BTD.reshape(-1, y_BTD.shape[-1]), params["top"]["head"]]
    weight_U = np.asarray(target_mask(batch, 1)).reshape(-1)
    return np.average(token_kl(*pairs), weights=weight_U)


def test_runs_refuse_what_they_cannot_learn_from(start, tokenizer, tmp_path):
    folder, run = start
    prepare_rollouts(
        [write(tmp_path / "x.jsonl", [line("a", 1.0)])],
        tmp_path / "x",
        tokenizer,
        [32],
        progress=lambda _: None,
    )
    with pytest.raises(ValueError, match="holds documents: objective=Grpo"):
        Trainer(small(run, folder, Grpo(), "data"), tmp_path / "run")
    with pytest.raises(ValueError, match="holds rollouts: they are for"):
        Trainer(small(run, tmp_path, None, "x"), tmp_path / "run")
    with pytest.raises(ValueError, match="holds on to a reference"):
        dataclasses.replace(run, objective=Grpo(), start_from=None)
    assert dataclasses.replace(run, objective=Grpo(kl=0.0)).others() == ()
    assert dataclasses.replace(run, objective=Grpo("r")).others() == ("r",)
    with pytest.raises(ValueError, match="has a loss of its own"):
        phase = Phase("x", 32, 32, 1, attention="dense", learn="indexer")
        dataclasses.replace(run, objective=Grpo(kl=0.0), phases=(phase,))


def test_scripts_refuse(tmp_path, capsys):
    args = [str(tmp_path), "--by-deviation", "--out", "x", "--tokenizer", "y", "--lengths", "8"]
    assert prepare_data.main(args) == 1
    capsys.readouterr()
    assert train.main(["--config", "tiny", "objective.kl=1.0", "--show"]) == 1
    assert "objective.kl: there is no such field" in capsys.readouterr().err
