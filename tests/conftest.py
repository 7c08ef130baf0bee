"""What all tests share: where the optional test data lies, and one thread per worker."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background jobs with Ctrl-C ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights, tokenizers, templates and texts; tests that need them skip where they are absent."""
    path = Path(os.environ.get("TINYCHAT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "README.md").exists():
        pytest.skip(f"test data not found at {path} (set TINYCHAT_TEST_DATA)")
    return path
