"""Variants of a run: what they change, how they are trained, held against each other and shown."""

import io

import pytest

from dsv4_jax.encoding.demo_tokenizer import build_byte_tokenizer
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.ablate import STUDIES, Result, prepare_texts, run_variant, table
from dsv4_jax.training.run import load_run
from scripts import ablate
from tests.training.runs import ONE_LAYER, lines_of, write_config

TOKENIZER = Tokenizer(build_byte_tokenizer().to_str())
PARTS = ("train", "held-out")
ROUNDED = """(Phase("decay", 4 * 8 * 32, 32, 8, quantise=True),)"""


def texts(folder, count):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.md").write_text(f"The number {number} is in file {number}. " * 9)
    return sorted(folder.iterdir())


def test_every_variant_changes_the_run():
    plain = load_run("ablation", [])
    for variants in STUDIES.values():
        found = {name: load_run("ablation", list(own)) for name, own in variants.items()}
        for name, own in variants.items():
            assert (found[name] == plain) == (not own), name
        assert len(set(map(repr, found.values()))) == len(variants)


def test_files_are_held_out_by_name(tmp_path):
    files = texts(tmp_path / "texts", 40)
    prepare_texts(files, tmp_path / "data", TOKENIZER, 32)
    sizes = [len((tmp_path / "data" / f"{part}.jsonl").read_text().split("\n")) for part in PARTS]
    assert sum(sizes) == 40 and 1 <= sizes[1] <= 12
    before = (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns
    prepare_texts(files, tmp_path / "data", TOKENIZER, 32)  # there already
    assert (tmp_path / "data" / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="0 files are too few"):
        prepare_texts([], tmp_path / "other", TOKENIZER, 32)


def test_table():
    lines = table([Result("a", 1.0, 1.5, 0.25, 1.25, 0.5, 0.75)]).split("\n")
    assert lines[2] == "| a | 1.000 | 1.500 | +0.5000 | 25.0% | 1.25 | 0.500 | 0.750 |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_a_variant_is_trained_once_and_evaluated(tmp_path):
    path = write_config(tmp_path, ROUNDED, model=ONE_LAYER)
    prepare_texts(texts(tmp_path / "texts", 40), tmp_path / "packed", TOKENIZER, 32)
    run = load_run(str(path), [f"data.train={tmp_path / 'packed' / 'train'}"])
    first = run_variant(run, "a", tmp_path / "run", 8, io.StringIO())
    trained = lines_of(tmp_path / "run")
    assert len(trained) == 4 and trained[-1]["loss"] < trained[0]["loss"]
    assert 0 < abs(first.gap) < 0.1 and first.drafts == 0  # there is no MTP block
    assert run_variant(run, "a", tmp_path / "run", 8, io.StringIO()) == first
    assert lines_of(tmp_path / "run") == trained


def test_mistakes_are_told_before_anything_is_trained(tmp_path, capsys):
    out = str(tmp_path / "out")
    for mistake, told in ((["--rows", "0"], "--rows 0"), (["model.nope=1"], "model.nope")):
        assert ablate.main(["--out", out, *mistake]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
