"""What all tests share: where the optional test data lies, and one thread per worker."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background jobs with Ctrl-C ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal access to a GPU's memory nothing works in a process any more: xdist makes another one."""
    report = yield
    if report.failed and item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ and _gpu_is_broken():
        print(report.longreprtext, file=sys.__stderr__, flush=True)
        os._exit(3)
    return report


def _gpu_is_broken() -> bool:
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real weights, tokenizers, templates and texts; tests that need them skip where they are absent."""
    path = Path(os.environ.get("TINYCHAT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "README.md").exists():
        pytest.skip(f"test data not found at {path} (set TINYCHAT_TEST_DATA)")
    return path
