"""Every program in demo/ runs on the shipped model and prints something."""

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


@pytest.mark.parametrize("program", sorted((ROOT / "demo").glob("*.py")), ids=lambda path: path.name)
def test_demo_runs(program, pebble, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
