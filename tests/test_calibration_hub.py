"""Calibration on a hub's dataset, by a stand-in for the package `datasets`: there is no network in tests."""

import sys
from types import SimpleNamespace

import pytest
from test_quantize_pipeline import make_tokenizer, source  # noqa: F401  a fixture

from tinychat.cli import main
from tinychat.errors import UsageError
from tinychat.quantize import calibration


def hub(monkeypatch, answer):
    """`load_dataset` notes how it was called and gives, or raises, `answer`."""
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        if isinstance(answer, Exception):
            raise answer
        return iter(answer)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def read(name, model, n=2, length=8):
    return calibration.from_hub(name, model, n_sequences=n, length=length)


def test_records_are_joined_and_no_more_are_read_than_needed(source, monkeypatch):  # noqa: F811
    make_tokenizer(source)
    taken = []

    def records():
        for i in range(100):
            taken.append(i)
            yield {"text": f"record {i} says little ", "url": "x"}

    calls = hub(monkeypatch, records())
    found = read("hf:owner/name/en:validation", source)
    assert calls == [(("owner/name", "en"), {"split": "validation", "streaming": True})]
    assert len(found) == 2 and all(len(sequence) <= 8 for sequence in found) and len(taken) < 12


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "hf:owner/name",
            ConnectionError("Couldn't reach the Hub\nmore"),
            "cannot be read: Couldn't reach the Hub; check",
        ),
        ("hf:owner/name", TypeError(), "hf:owner/name cannot be read: TypeError; check its name and the network"),
        ("hf:owner/name", [{"prompt": "x"}], r"has no column 'messages, text or content', but .*prompt"),
        ("hf:owner/name:train:body", [{"text": "x"}], r"has no column 'body', but .*text"),
        ("hf:owner/name", [], "holds no text to calibrate on"),
        ("hf:name", [], r"names no dataset; expected is hf:org/name"),
    ],
)
def test_what_cannot_be_read_is_said(source, monkeypatch, name, answer, message):  # noqa: F811
    make_tokenizer(source)
    hub(monkeypatch, answer)
    with pytest.raises(UsageError, match=message):
        read(name, source)


def test_without_the_package_or_a_network(source, monkeypatch, tmp_path, capsys):  # noqa: F811
    make_tokenizer(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), "--group-size", "32", "--calibration", "hf:a/b"]
    assert main(command) == 2
    assert "needs a package that is not installed: pip install datasets" in capsys.readouterr().err
    assert main([*command, "--offline"]) == 2
    assert "is on the hub; without --offline it can be fetched, or give a file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
