"""benchmarks/peers: workers are asked in turns, timed alike, and compared within rounds."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
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
            self.left = args.options.get("answers", -1)
            self.about = {{"version": "1", "setting": str(args.threads), "bytes_per_token": 8}}

        def generate(self, prompt, seen):
            if not self.left:
                raise SystemExit(7)
            self.left -= 1
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


@pytest.mark.parametrize("said", ["", "print('{', end='', flush=True); "])
def test_worker_that_dies_says_how(module, tmp_path, said):
    process = module("process")
    program = [sys.executable, "-c", f"{said}raise SystemExit(7)"]
    with pytest.raises(process.WorkerError, match=r"exit status 7.*log"):
        process.Worker(program, threads=1, context=1, log=tmp_path / "log", variables={})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_that_is_killed_between_requests_says_so(module, tmp_path):
    failure = module("process").WorkerError
    with worker(module, tmp_path) as asked:
        os.kill(asked.about["pid"], signal.SIGKILL)
        with pytest.raises(failure, match=r"ended with SIGKILL.*log"):
            asked.ask({"do": "memory"})
        with pytest.raises(failure, match=r"ended with SIGKILL.*log"):
            asked.cpu_seconds()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_first_token(module, tmp_path):
    answer = module("process").first_token(command(tmp_path), threads=1, context=9, log=tmp_path / "log", variables={})
    assert 0 < answer["first_token_s"] < answer["seconds"]


def test_ratios_are_taken_within_rounds_and_against_the_best_setting(module):
    measure, report, contenders = module("measure"), module("report"), module("contenders")
    ours, *peers = (
        contenders.tinychats("tinyllama-1.1b", [], None)
        + [p for p in contenders.PEERS if p.environment == "llama.cpp"][:2]
    )
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


def engine(module, folder: Path, name: str, environment: str | None, **options):
    command(folder)
    return module("contenders").Contender(name, "fake", str(folder / "fake.py"), environment, "model", options)


class Models:
    """Made at once, but for the environment "unbuilt"."""

    def __init__(self, module, folder: Path):
        self.failure, self.folder, self.tries = module("process").WorkerError, folder, 0

    def python(self, environment):
        if environment == "unbuilt":
            self.tries += 1
            raise self.failure("pip failed: see pip.log")
        return Path(sys.executable)

    def find(self, _kind):
        return self.folder, {}

    def bytes_per_token(self, _kind, _head_bits):
        return 8


def plan(module, folder: Path, *engines):
    return module("measure").Plan([*engines], Models(module, folder), [1], rounds=3, tokens=2, seconds=5, logs=folder)


class Probe:
    """Of a memory that reads 10 GB/s."""

    def __init__(self, _threads):
        pass

    def read(self):
        return 10.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_engines_that_fail_leave_the_others_and_what_they_did_before(module, tmp_path, monkeypatch):
    measure, report = module("measure"), module("report")
    monkeypatch.setattr(measure, "Probe", Probe)
    monkeypatch.setattr(measure, "PREFILL", 8)
    asked = plan(
        module,
        tmp_path,
        engine(module, tmp_path, "ours", None),
        engine(module, tmp_path, "unbuilt", "unbuilt"),
        engine(module, tmp_path, "unbuilt too", "unbuilt"),
        engine(module, tmp_path, "dies at once", "a", answers=1),  # the one to warm up
        engine(module, tmp_path, "dies in a prefill", "b", answers=4),  # that of round 2, after its decoding
        engine(module, tmp_path, "steady", "c"),
    )
    runs, missing = measure.speeds(asked)
    rounds = {run.contender.name: len(run.decode) for run in runs}
    assert rounds == {"ours": 3, "dies in a prefill": 1, "steady": 3}
    for run in runs:
        lists = run.decode, run.fraction, run.probe_gb_s, run.prefill, run.others
        assert {len(values) for values in lists} == {rounds[run.contender.name]}
        assert run.peak_rss_bytes > 1 << 20
    assert missing.keys() == {"unbuilt", "unbuilt too", "dies at once", "dies in a prefill"}
    assert missing["unbuilt"] == missing["unbuilt too"] == "pip failed: see pip.log"
    assert asked.models.tries == 1
    assert missing["dies at once"].startswith("--threads 1, round 1: ")
    assert missing["dies in a prefill"].startswith("--threads 1, round 2: ")
    assert missing["dies in a prefill"].endswith(str(tmp_path / "dies in a prefill.log"))
    assert [row["peer"] for row in report.ratios(runs)] == ["dies in a prefill", "steady"]
    assert "| dies in a prefill | fake | 1 |" in report.speeds(runs)
    assert "- unbuilt failed: pip failed: see pip.log" in report.engines([], missing)


@pytest.mark.parametrize("failing", ["ours", "peer"])
def test_starts_before_a_failure_are_kept_and_compared(module, tmp_path, monkeypatch, failing):
    measure, report = module("measure"), module("report")
    times = {"ours": [2.0, 1.0, 1.0], "peer": [4.0, 4.0, 4.0]}
    del times[failing][2]

    def first_token(_command, *, log, **_):
        if not times[log.stem]:
            raise module("process").WorkerError("out of memory")
        return {"seconds": times[log.stem].pop(0), "interpreter_s": 0.1, "peak_rss_bytes": 1}

    monkeypatch.setattr(measure, "first_token", first_token)
    engines = [engine(module, tmp_path, name, environment) for name, environment in (("ours", None), ("peer", "a"))]
    found, missing = measure.starts(plan(module, tmp_path, *engines, engine(module, tmp_path, "none", "unbuilt")))
    assert {start.contender.name: len(start.seconds) for start in found} == {"ours": 3, "peer": 3} | {failing: 2}
    assert report.starts(found).endswith("| 3.00 |")  # of 4 / 2 and 4 / 1
    assert missing == {"none": "pip failed: see pip.log", failing: "in round 3: out of memory"}


def test_environment_or_model_that_cannot_be_made_says_where_the_log_is(module, tmp_path, monkeypatch):
    environments, contenders, failure = module("environments"), module("contenders"), module("process").WorkerError
    with pytest.raises(failure, match=r"^making \S*no-such-shape-awq failed: see \S*no-such-shape-awq.log$"):
        contenders.Models(tmp_path, "no-such-shape").find("awq")
    assert "no-such-shape" in (tmp_path / "models" / "no-such-shape-awq.log").read_text()
    assert not (tmp_path / "models" / "no-such-shape-awq.json").exists()
    for works, step in ((0, "venv"), (1, "pip")):
        codes = iter([0] * works + [1])
        monkeypatch.setattr(
            subprocess, "run", lambda *_, codes=codes, **__: subprocess.CompletedProcess([], next(codes))
        )
        with pytest.raises(failure, match=rf"^{step} failed for llama.cpp: see \S*pip.log$"):
            environments.python("llama.cpp", tmp_path)
    assert not (tmp_path / "llama.cpp" / environments.MARK).exists()


@pytest.mark.parametrize(("hidden", "kind", "row"), [(256, "Q6_K", 210), (960, "Q8_0", 30 * 34)])
def test_gguf_head_falls_back_where_its_blocks_do_not_fit(module, tmp_path, hidden, kind, row):
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'tinychat[test]')")
    sizes = {"vocab_size": 64, "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    read = module("gguf_model").write(sizes | heads | {"rope_theta": 1e4, "rms_norm_eps": 1e-5}, tmp_path / "m.gguf")
    head = next(tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "output.weight")
    assert head.tensor_type.name == kind
    weights = gguf.quants.dequantize(head.data, head.tensor_type)
    assert weights.shape == (64, hidden)
    assert weights.std() == pytest.approx(hidden**-0.5, rel=0.05)
    assert read == 64 * row + (3 * hidden + 3 * 64) * hidden // 32 * 18  # q and o, k and v half as many rows; inner


def test_tinychat_is_labelled_with_the_groups_of_its_shape(module):
    labels = {shape: module("contenders").tinychats(shape, [], 8)[0].what for shape in ("llama-2-7b", "smollm2-360m")}
    assert labels == {
        "llama-2-7b": "AWQ 4-bit g128, 8-bit head",
        "smollm2-360m": "AWQ 4-bit g64, 8-bit head",
    }
