"""The product, from the outside, in a few seconds: what must never be broken. `pytest -n 0 tests/test_smoke.py`"""

import json
import subprocess
import sys

import numpy as np
import pytest

import tinychat


def run(*arguments, given=""):
    command = [sys.executable, "-m", "tinychat", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands():
    assert "chat" in run("--help")
    assert json.loads(run("info", "pebble", "--json"))["architecture"] == "llama"
    printed = run("generate", "pebble", "Once upon a time", "-n", "12", "--temp", "0", "--json")
    result = json.loads(printed.splitlines()[-1])
    assert result["text"].startswith(", there was") and len(result["tokens"]) == 12
    assert (result["finish_reason"], result["usage"]["completion_tokens"]) == ("length", 12)
    assert result["timings"]["decode_tokens_per_s"] > 0
    assert "pebble" in run("chat", "--temp", "0", given="What is your name?\n").lower()


def test_the_python_interface():
    with tinychat.load("pebble") as llm:
        result = tinychat.generate(llm, "Once upon a time", max_tokens=12, temperature=0)
        pieces = list(tinychat.stream(llm, "Once upon a time", max_tokens=12, temperature=0))
        assert "".join(piece.text for piece in pieces) == result.text
        assert pieces[-1].finish_reason == result.finish_reason == "length"
        ids = llm.tokenizer.encode("Once upon a time")
        logits = llm.logits(ids)
        assert logits.dtype == np.float32 and logits.shape == (len(ids), llm.config.vocab_size)
        assert int(logits[-1].argmax()) == result.tokens[0]
        assert tinychat.generate(llm, [{"role": "user", "content": "Hi"}], max_tokens=8, seed=1).text
        with pytest.raises(tinychat.TinychatError, match="1024"):
            tinychat.generate(llm, ids * 300)
