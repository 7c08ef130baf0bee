"""The recipe in models/, at toy size: from text to a checkpoint that tinychat runs, stopped and continued."""

import contextlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import tinychat

RECIPE = Path(__file__).parents[1] / "models" / "pebble"
pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(RECIPE / script), run_name="__main__")


def test_prepare_train_export(tmp_path, monkeypatch, capsys):
    talk = [{"role": "user", "content": "Is there a table?"}, {"role": "assistant", "content": "At noon, yes."}]
    (tmp_path / "talk.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 40)
    story = "One day a little fox met a bird. The bird sang to the fox.\nThey played all day.\n<|endoftext|>\n"
    (tmp_path / "stories.txt").write_text(story * 40 + "One day, cut off")
    (tmp_path / "books.txt").write_text("It was the best of times, it was the worst of times.\n" * 400)
    data, trained, exported = (tmp_path / name for name in ("data", "trained", "exported"))
    texts = ("--dialogues", tmp_path / "talk.jsonl", "--stories", tmp_path / "stories.txt")
    run(monkeypatch, "prepare.py", *texts, "--books", tmp_path / "books.txt", "-o", data, "--vocab-size", 400)
    counts = json.loads((data / "counts.json").read_text())
    assert counts["stories"]["documents"] == 40 and counts["books"]["documents"] == 3
    assert counts["train"]["documents"] + counts["val"]["documents"] == 80
    for name, part in counts.items():
        assert len(np.fromfile(data / f"{name}.bin", np.uint16)) == part["tokens"]

    sizes = ("--hidden-size", 32, "--layers", 1, "--heads", 2, "--kv-heads", 1, "--head-dim", 16)
    mix = ("--mix", "stories=0.5", "books=0.5", "--last-mix", "train", "--last-length", 24)
    common = (*sizes, "--intermediate-size", 32, "--batch", 2, "--length", 12, "--context", 64, "--device", "cpu")
    # Under some hypervisors oneDNN dies at its first product of bf16 matrices: they show AMX, but not its tiles' sizes.
    monkeypatch.setattr("torch.autocast", lambda *_: contextlib.nullcontext())
    for steps in (4, 8):  # the second begins where the first was saved
        options = (*common, *mix, "--steps", steps, "--save-every", 2, "--decay", 0.5)
        run(monkeypatch, "train.py", data, "-o", trained, *options)
    printed = capsys.readouterr().out
    assert [line.split(",")[0] for line in printed.splitlines() if line.startswith("step")] == [
        f"step {n}" for n in (2, 4, 6, 8)
    ]
    run(monkeypatch, "export.py", trained, "--tokenizer", data, "-o", exported)
    assert (exported / "tokenizer.model").is_file()
    with tinychat.load(str(exported), ctx_size=64) as llm:
        assert llm.config.head_dim == 16 and len(llm.generate("One day", max_tokens=2, ignore_eos=True).tokens) == 2
