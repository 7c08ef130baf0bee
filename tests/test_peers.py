"""benchmarks/peers: workers are asked in turns, timed alike, and compared within rounds."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
FAKE = f"""
    import os, signal, sys, time
    sys.path.insert(0, {str(PEERS)!r})
    from worker import run

    class Fake:
        def __init__(self, args):
            self.about = {{"version": "1", "setting": str(args.threads), "bytes_per_token": 8}}

        def generate(self, prompt, seen):
            if DIES and os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX512_CORE_FP16":
                os.kill(os.getpid(), signal.SIGILL)
            print("noise")
            time.sleep(0.001 * len(prompt))
            while seen():
                time.sleep(0.01)

    run(Fake)
"""


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(PEERS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def command(folder: Path, dies: bool = False) -> list[str]:
    script = folder / "fake.py"
    script.write_text(textwrap.dedent(FAKE).replace("DIES", str(dies)))
    return [sys.executable, str(script), str(folder)]


def worker(module, folder: Path, dies: bool = False):
    process = module("process")
    variables = {"ONEDNN_MAX_CPU_ISA": ""}
    return process.Worker(command(folder, dies), threads=3, context=600, log=folder / "log", variables=variables)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_times_its_peer_and_rests_stopped(module, tmp_path):
    with worker(module, tmp_path) as asked:
        assert asked.about["setting"] == "3"
        assert not asked.limited
        pid = asked.about["pid"]
        latencies = asked.ask({"do": "decode", "prompt": [1], "tokens": 5, "seconds": 60})["latencies"]
        assert len(latencies) == 5
        assert all(0.01 <= latency < 1 for latency in latencies)
        short = asked.ask({"do": "decode", "prompt": [1], "tokens": 1000, "seconds": 0.05})["latencies"]
        assert 1 <= len(short) <= 5
        assert asked.ask({"do": "prefill", "prompt": [1] * 100})["seconds"] >= 0.1
        assert asked.ask({"do": "memory"})["peak_rss_bytes"] > 1 << 20
        assert state(pid) == "T"
    assert "noise" in (tmp_path / "log").read_text()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_that_dies_of_amx_runs_without(module, tmp_path):
    with worker(module, tmp_path, dies=True) as asked:
        assert asked.limited


def test_worker_that_dies_says_how(module, tmp_path):
    process = module("process")
    with pytest.raises(process.WorkerError, match=r"exit status 7.*log"):
        process.Worker(
            [sys.executable, "-c", "raise SystemExit(7)"], threads=1, context=1, log=tmp_path / "log", variables={}
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_first_token(module, tmp_path):
    answer = module("process").first_token(command(tmp_path), threads=1, context=9, log=tmp_path / "log", variables={})
    assert 0 < answer["first_token_s"] < answer["seconds"]


def test_ratios_are_taken_within_rounds_and_against_the_best_setting(module):
    measure, report, contenders = module("measure"), module("report"), module("contenders")
    ours, *peers = contenders.tinychats([], None) + [p for p in contenders.PEERS if p.environment == "llama.cpp"][:2]
    about = {"bytes_per_token": 1}
    runs = [
        measure.Run(ours, 1, about, decode=[10.0, 40.0, 20.0], prefill=[100.0, 100.0, 100.0]),
        measure.Run(peers[0], 1, about, decode=[5.0, 20.0, 11.0], prefill=[10.0, 10.0, 10.0]),
        measure.Run(peers[1], 1, about, decode=[4.0, 10.0, 5.0], prefill=[50.0, 20.0, 25.0]),
    ]
    best, first, second = report.ratios(runs)
    assert best["peer"] == "llama.cpp, best of each"
    assert (
        best["decode"]
        == first["decode"]
        == {"median": 2.0, "min": pytest.approx(20 / 11), "max": 2.0, "against": "llama.cpp"}
    )
    assert (
        best["prefill"] == second["prefill"] == {"median": 4.0, "min": 2.0, "max": 5.0, "against": "llama.cpp-repack"}
    )
