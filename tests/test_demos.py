"""Every program in demo/ runs and prints something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pebble():
    from tinychat import checkpoint
    from tinychat.errors import CheckpointError

    try:
        return checkpoint.locate("pebble")
    except CheckpointError as error:
        pytest.skip(f"the shipped model is not in this tree: {error}")


def run_demo(program, folder, *arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    return run.stdout


@pytest.mark.parametrize("program", ["generate.py", "stream.py"])
def test_demo_runs(program, pebble, tmp_path):
    run_demo(ROOT / "demo" / program, tmp_path)


def compared(model, text, folder):
    """Perplexity by checkpoint, as the demo prints it."""
    shown = run_demo(ROOT / "demo" / "quantize_and_compare.py", folder, model, text, 32)
    return {line.split()[0]: float(line.split()[2]) for line in shown.splitlines() if " perplexity " in line}


def test_quantize_and_compare(pebble, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model, _ = tiny("llama", vocab_size=4096, max_position_embeddings=512, intermediate_size=96, **sizes)
    model.half().save_pretrained(tmp_path / "tiny")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(pebble / name, tmp_path / "tiny")
    perplexity = compared(tmp_path / "tiny", ROOT / "README.md", tmp_path)
    assert perplexity["rtn"] == pytest.approx(perplexity["original"], rel=0.1)
    assert perplexity["awq"] == pytest.approx(perplexity["original"], rel=0.1)


def test_quantize_and_compare_on_real_weights(data_dir, tmp_path):
    perplexity = compared(data_dir / "stories260K", data_dir / "text" / "tinystories_val.txt", tmp_path)
    assert perplexity["original"] < perplexity["awq"] < perplexity["rtn"] < 1.1 * perplexity["original"]
