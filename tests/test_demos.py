"""Every program in demo/ runs and prints something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_quantize_and_compare(data_dir, tmp_path):
    text = data_dir / "text" / "tinystories_val.txt"
    shown = run_demo(ROOT / "demo" / "quantize_and_compare.py", tmp_path, data_dir / "stories260K", text, 32)
    perplexity = {line.split()[0]: float(line.split()[2]) for line in shown.splitlines() if " perplexity " in line}
    assert perplexity["original"] < perplexity["awq"] < perplexity["rtn"] < 1.1 * perplexity["original"]
