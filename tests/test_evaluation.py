"""Evaluation: its arithmetic against the definition and against transformers, the protocol, what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cli import run
from tiny_models import memory_weights, tiny
from tokenizer_files import PIECES, sentencepiece_model

import tinychat
from tinychat import tokenizer
from tinychat.backends import reference
from tinychat.engine import Engine
from tinychat.errors import BackendError, TokenizerError, UsageError
from tinychat.evaluation import likelihood

SHARPNESS = math.log(91)
TEXT = "He is in the ring. Hello there, the end is near and nothing is in it at all.\n" * 12


class Counting:
    """A runner whose next token is the last one plus one, with probability 0.91 of ten; it checks its cache."""

    def __init__(self, sharpness=SHARPNESS, vocab_size=10):
        self.filled = self.most = 0
        self.sharpness = sharpness
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.cache = SimpleNamespace(truncate=self._truncate)

    def _truncate(self, slot, length):
        self.filled = length

    def step(self, rows):
        assert rows.positions[0] == self.filled
        self.filled += len(rows)
        out = np.zeros((len(rows.wanted), self.config.vocab_size), np.float32)
        self.most = max(self.most, out.size)
        out[np.arange(len(out)), (rows.tokens[rows.wanted] + 1) % 10] = self.sharpness
        return out


def test_windows_are_the_papers():
    assert likelihood.windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]
    assert likelihood.windows(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5]]  # the rest is left out
    assert likelihood.windows([5, 6], 3) == [[5, 6]]
    assert likelihood.windows([5], 3) == []


def test_perplexity_is_that_of_the_distribution():
    window = [i % 10 for i in range(600)]  # longer than one step
    told = []
    found = likelihood.score(Counting(), [window, window[:50]], told.append)
    assert found.lengths.tolist() == [599, 49] and sum(told) == 648
    assert found.perplexity == pytest.approx(1 / 0.91)
    wrong = likelihood.score(Counting(), [[1, 1, 1]])
    assert wrong.perplexity == pytest.approx(100)
    assert likelihood.perplexity(-1e6) == math.inf


def test_divergence():
    window = [[1, 2, 3, 4]]
    same = likelihood.compare_runs(Counting(), Counting(), window)
    assert same.kl.mean == pytest.approx(0) and same.top1.mean == 1 and same.change.mean == 0
    found = likelihood.compare_runs(Counting(0.0), Counting(), window)
    expected = 0.91 * math.log(0.91 / 0.1) + 9 * 0.01 * math.log(0.01 / 0.1)
    assert found.kl.mean == pytest.approx(expected) and found.top1.mean == 0
    assert found.change.mean == pytest.approx(math.log(0.1 / 0.91))


def test_memory_is_bounded_whatever_the_vocabulary(monkeypatch):
    monkeypatch.setattr(likelihood, "STEP_LOGITS", 1 << 12)
    monkeypatch.setattr(likelihood, "BLOCK_LOGITS", 300)
    runner = Counting(vocab_size=128)
    found = likelihood.score(runner, [[i % 10 for i in range(100)]])
    assert runner.most == 1 << 12 and found.perplexity == pytest.approx((91 + 127) / 91)


def test_output_that_is_not_finite_is_refused():
    with pytest.raises(BackendError, match="not finite"):
        likelihood.score(Counting(math.nan), [[1, 2, 3]])


def test_paired_interval_covers_the_truth_and_knows_its_windows():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        lengths = generator.integers(5, 30, 40)
        shared = np.repeat(generator.standard_normal(40), lengths)  # tokens of a window move together
        gap = 0.1 + shared + generator.standard_normal(len(shared))
        base = likelihood.Score(np.zeros(len(gap)), lengths)
        found = likelihood.compare(likelihood.Score(gap, lengths), base)
        assert found.low < found.mean < found.high
        covered += found.low <= 0.1 <= found.high
    assert 270 <= covered <= 297


def test_different_windows_cannot_be_compared():
    one = likelihood.score(Counting(), [[1, 2, 3]])
    two = likelihood.score(Counting(), [[1, 2], [2, 3]])
    with pytest.raises(ValueError, match="same windows"):
        likelihood.compare(one, two)


def test_intervals_of_few_windows_and_of_one_token():
    generator = np.random.default_rng(0)
    found = [likelihood.estimate(generator.standard_normal(1000), np.asarray([1000])) for _ in range(200)]
    covered = sum(e.low <= 0 <= e.high for e in found)  # one window: its blocks count
    assert 180 <= covered < 200
    one = likelihood.estimate(np.asarray([2.0]), np.asarray([1]))
    assert one.mean == 2 and one.low == -math.inf and one.high == math.inf


# ---- models ----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


def save(folder, seed=0, **overrides):
    model, _ = tiny("llama", seed=seed, **{**SIZES, **overrides})
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(PIECES))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny checkpoint and another like it, with transformers' models of both, and a file of text."""
    folder = tmp_path_factory.mktemp("models")
    one, other = save(folder / "one"), save(folder / "other", seed=1)
    (folder / "text.txt").write_text(TEXT)
    return SimpleNamespace(folder=folder, one=one, other=other, text=folder / "text.txt")


def log_probabilities(model, windows):
    """fp64 [predictions, vocab_size], by transformers."""
    with torch.inference_mode():
        found = [model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1) for window in windows]
    return torch.cat(found)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_agrees_with_transformers(models, device):
    if device == "cpu":
        pytest.importorskip("tinychat._cpu", reason="the compiled kernels are not built")
    ids = tokenizer.load(models.folder / "one").encode(TEXT)
    assert ids[0] == 1  # the beginning token, once, before the whole text
    windows = [ids[start : start + 100] for start in range(0, len(ids) - 99, 100)]
    assert len(windows) >= 4 and len(ids) % 100
    targets = torch.tensor([token for window in windows for token in window[1:]])
    ours, theirs = (log_probabilities(m, windows) for m in (models.one, models.other))
    mine = ours.gather(1, targets[:, None]).mean()

    found = tinychat.evaluate(
        models.folder / "one", models.text, against=models.folder / "other", window=100, device=device
    )
    assert found.tokens == len(targets) and found.windows == len(windows)
    assert found.left_out == len(ids) % 100 and found.begins == "<s>"
    assert found.perplexity == pytest.approx(float((-mine).exp()), rel=1e-4)
    assert found.kl_divergence == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=0.01
    )
    expected = mine - theirs.gather(1, targets[:, None]).mean()
    assert found.change.mean == pytest.approx(float(expected), abs=1e-4)


def test_an_engine_is_evaluated_as_it_is_and_stays_usable(models):
    weights = memory_weights(models.one, models.one.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    words = tokenizer.load(models.folder / "one")
    llm = Engine(reference.build(weights, ctx_size=64), words, description="tiny")
    before = llm.generate("Hello", max_tokens=5, temperature=0).text
    found = tinychat.evaluate(llm, TEXT, max_tokens=200)
    assert found.window == 64 and found.windows == 3 and found.settings == {}
    assert found.model == "tiny" and found.text == "the text given"
    assert llm.generate("Hello", max_tokens=5, temperature=0).text == before
    with pytest.raises(UsageError, match="one engine"):
        tinychat.evaluate(llm, TEXT, against=llm)


def test_a_text_shorter_than_a_window_is_one_window(models):
    found = tinychat.evaluate(models.folder / "one", "Hello", device="reference")
    assert found.windows == 1 and found.left_out == 0
    assert found.tokens == found.window - 1


def test_what_cannot_be_evaluated(models, tmp_path):
    one = models.folder / "one"
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"abc\xff")
    empty.write_text(" \n")
    for text, message in (
        (tmp_path / "none.txt", "none.txt does not exist"),
        (tmp_path, "is a directory"),
        (binary, "not UTF-8: byte 3 is 0xff"),
        (empty, "is empty"),
        ("", "is empty"),
        (str(models.text), "give a Path"),
    ):
        with pytest.raises(UsageError, match=message):
            tinychat.evaluate(one, text)
    for options, message in (
        ({"window": 1}, "window is 1; it must be a whole number, 2 or more"),
        ({"window": 257}, "windows of 257 tokens do not fit in a context of 256"),
        ({"window": 65, "ctx_size": 64}, "do not fit in the context asked for, 64"),
        ({"ctx_size": 1000}, "the model has 256 positions"),
        ({"max_tokens": 1}, "max_tokens is 1"),
    ):
        with pytest.raises(UsageError, match=message):
            tinychat.evaluate(one, TEXT, **options)


def test_models_of_different_vocabularies_cannot_be_compared(models, tmp_path):
    save(tmp_path / "wide", vocab_size=321)
    with pytest.raises(TokenizerError, match="a vocabulary of 320 tokens, the other of 321"):
        tinychat.evaluate(models.folder / "one", TEXT, against=tmp_path / "wide")
    shutil.copytree(models.folder / "other", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").write_bytes(sentencepiece_model(PIECES[:-3] + PIECES[-1:-4:-1]))
    with pytest.raises(TokenizerError, match="different tokens of the text"):
        tinychat.evaluate(models.folder / "one", TEXT, against=tmp_path / "other")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "other" / name).unlink()
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        tinychat.evaluate(tmp_path / "other", TEXT)


def test_command_line(models, capsys):
    arguments = ["--text", str(models.text), "--window", "50", "--max-tokens", "220", "--device", "reference"]
    both = ["--against", str(models.folder / "other"), "--json"]
    assert run("eval", str(models.folder / "one"), *arguments, *both) == 0
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    found = json.loads(last)
    assert found["tokens"] == 4 * 49 and found["windows"] == 4
    assert found["kl_divergence"] > 0 and 0 <= found["top1_agreement"] <= 1 < found["perplexity"]
    assert (found["head"], found["activations"], found["kv_dtype"]) == (16, 16, "fp32")
    assert "output head as stored, 16-bit activations, fp32 KV cache" in table
    assert "begins with <s>" in table and "KL(other || model)" in table
    assert run("eval", str(models.folder / "one"), *arguments, "--head", "8", "--kv-type", "int8") == 0
    assert "8-bit head, 16-bit activations, int8 KV cache" in capsys.readouterr().out


def test_command_line_mistakes(models, capsys):
    assert run("eval", str(models.folder / "one")) == 2
    assert "--text" in capsys.readouterr().err
    assert run("eval", str(models.folder / "one"), "--text", "/no/such/file") == 2
    assert "/no/such/file does not exist" in capsys.readouterr().err
    assert run("eval", str(models.folder / "one"), "--text", str(models.text), "--against", "./nowhere") == 1
    assert "nowhere" in capsys.readouterr().err


def test_evaluating_on_the_cpu_backend_imports_no_torch(models):
    pytest.importorskip("tinychat._cpu", reason="the compiled kernels are not built")
    program = (
        "import sys, tinychat, pathlib\n"
        f"tinychat.evaluate({str(models.folder / 'one')!r}, pathlib.Path({str(models.text)!r}), device='cpu')\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())
