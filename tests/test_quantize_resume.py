"""A quantization that is killed, told to stop, out of disk or not alone: nothing is half there, nothing is lost."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import tiny_checkpoints as tiny
from quantizer_process import Quantizers

from tinychat import checkpoint
from tinychat.checkpoint import CheckpointWriter, partial
from tinychat.errors import CheckpointError
from tinychat.quantize import quantize

OPTIONS = ["--group-size", "32", "--n-sequences", "4", "--length", "16"]


@pytest.fixture(scope="module")
def quantizers(tmp_path_factory):
    with Quantizers(tmp_path_factory.mktemp("quantizers")) as found:
        yield found


@pytest.fixture
def work(quantizers):
    """A directory with the source; what the quantizers do below it is watched."""
    path = quantizers._root / "work"
    shutil.rmtree(path, ignore_errors=True)
    tensors = {name: array * np.float16(0.3) for name, array in tiny.plain().items()}
    tiny.write(path / "source", tensors, bos_token_id=1)
    return path


def command(work, *more):
    return ["quantize", work / "source", "-o", work / "out", *OPTIONS, *more]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("method", "overwritten", "step"), [("awq", False, 23), ("rtn", True, 5)])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(quantizers, work, method, overwritten, step):
    arguments = command(work, "--method", method, "--overwrite")
    assert quantizers.run(*arguments) == 0, quantizers.log
    expected, n_events = contents(work / "out"), quantizers.events
    assert sum(name.endswith(".safetensors") for name in expected) > 1 and names(work) == ["out", "source"]
    # Of the times at which it touches the disk, a few; all of them (step 1) take a minute.
    old = {"config.json": b"old", "model.safetensors": b"old"}
    went_on = 0
    for at in [*range(1 + 2 * overwritten, n_events, step), n_events]:
        shutil.rmtree(work / "out")
        if overwritten:
            (work / "out").mkdir()
            for name, content in old.items():
                (work / "out" / name).write_bytes(content)
        assert quantizers.run(*arguments, at=at) == -signal.SIGKILL
        if (work / "out").exists():
            assert contents(work / "out") in (old, expected), at
        assert quantizers.run(*arguments) == 0, (at, quantizers.log)
        went_on += "going on after layer" in quantizers.log
        assert contents(work / "out") == expected, at
        assert names(work) == ["out", "source"], at
    assert went_on


def test_killed_again_and_again(quantizers, work):
    assert quantizers.run(*command(work)) == 0
    expected, n_events = contents(work / "out"), quantizers.events
    shutil.rmtree(work / "out")
    runs = 1
    while quantizers.run(*command(work), at=n_events // 3 + 8) == -signal.SIGKILL:
        runs += 1
        assert runs < 9
    assert runs > 2
    assert contents(work / "out") == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_says_how_to_go_on(quantizers, work, number, code):
    assert quantizers.run(*command(work)) == 0
    expected, n_events = contents(work / "out"), quantizers.events
    shutil.rmtree(work / "out")
    assert quantizers.run(*command(work), at=n_events // 3, signal=number) == code
    assert "1 of 2 layers are finished and kept: the same command goes on from there" in quantizers.log
    assert names(work) == [".out.partial", "source"]
    assert quantizers.run(*command(work)) == 0 and "going on after layer 1 of 2" in quantizers.log
    assert contents(work / "out") == expected and names(work) == ["out", "source"]


def test_stopped_before_anything_was_finished_it_leaves_nothing(quantizers, work):
    assert quantizers.run(*command(work, "--method", "rtn"), at=4, signal=signal.SIGTERM) == 143
    assert names(work) == ["source"]


def test_a_full_disk_keeps_what_was_finished(quantizers, work):
    assert quantizers.run(*command(work), shard_bytes=1 << 30) == 0
    expected = contents(work / "out")
    for share in (0.1, 0.7, 0.99):
        limits = {"largest_file": int(share * len(expected["model.safetensors"])), "shard_bytes": 1 << 30}
        assert quantizers.run(*command(work, "--overwrite"), **limits) == 1, quantizers.log
        assert "File too large; nothing was changed there" in quantizers.log
        assert contents(work / "out") == expected
    assert "is kept in" in quantizers.log and names(work) == [".out.partial", "out", "source"]
    assert quantizers.run(*command(work, "--overwrite"), shard_bytes=1 << 30) == 0
    assert "going on after layer" in quantizers.log
    assert contents(work / "out") == expected and names(work) == ["out", "source"]


def test_another_run_does_not_go_on_with_it(quantizers, work):
    text = work / "text.jsonl"
    text.write_text("x")
    assert quantizers.run(*command(work), at=18) == -signal.SIGKILL
    before = contents(work / ".out.partial")
    for more, expected in (
        (["--seed", "1"], "seed was 0, now 1"),
        (["--method", "rtn"], "method was awq, now rtn"),
        (["--length", "17", "--n-sequences", "5"], "length was 16, now 17; sequences was 4, now 5"),
        (["--calibration", text], "calibration was sampled from the model itself, now text.jsonl, sha256 2d711642b726"),
    ):
        assert quantizers.run(*command(work, *more)) == 1
        assert expected in quantizers.log and "(--restart)" in quantizers.log
        assert "an unfinished run that differs from this one" in quantizers.log
    for name in ("model.safetensors", "config.json"):
        changed = work / "source" / name
        stat = changed.stat()
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert quantizers.run(*command(work)) == 1 and f"{name} was" in quantizers.log
    assert {**contents(work / ".out.partial"), "lock": before["lock"]} == before
    assert quantizers.run(*command(work, "--restart", "--seed", "1")) == 0 and "going on" not in quantizers.log
    assert names(work) == ["out", "source", "text.jsonl"]


def test_killed_between_two_renames(work):
    """What was there before lies in the hidden directory, and perhaps someone has made a new one since."""
    out, hidden = work / "out", work / ".out.partial"
    for there in ({}, {"notes.txt": b"mine"}):
        shutil.rmtree(out, ignore_errors=True)
        (hidden / "replaced").mkdir(parents=True)
        (hidden / "replaced" / "config.json").write_bytes(b"old")
        out.mkdir()
        for name, content in there.items():
            (out / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            CheckpointWriter(out)
        assert contents(out) == (there or {"config.json": b"old"})
    assert contents(hidden / "replaced") == {"config.json": b"old"}
    shutil.rmtree(out)
    quantize(work / "source", out, method="rtn", group_size=32, progress=False, overwrite=True)
    assert names(work) == ["out", "source"]


def test_a_full_disk_at_the_first_commit_promises_nothing(work, monkeypatch):
    def full(file):
        if file.name.endswith("state.json.new"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(partial, "flush", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; nothing was changed there$"):
        quantize(work / "source", work / "out", group_size=32, n_sequences=2, length=8, progress=False)
    assert names(work) == ["source"]


def test_two_at_once(work):
    """The lock is the system's: a file left by a killed process, as above, locks nothing."""
    arguments = {"method": "rtn", "group_size": 32, "progress": False}
    with (
        CheckpointWriter(work / "out"),
        pytest.raises(CheckpointError, match=rf"is being written by another process \(pid {os.getpid()}, since 20"),
    ):
        quantize(work / "source", work / "out", **arguments)
    (work / ".out.partial").mkdir()
    (work / ".out.partial" / "lock").write_text(json.dumps({"pid": 1, "since": "2001-01-01 00:00:00"}))
    quantize(work / "source", work / "out", **arguments)
    assert names(work) == ["out", "source"]


def test_what_was_kept_and_is_damaged(quantizers, work):
    assert quantizers.run(*command(work), at=18) == -signal.SIGKILL
    partial = work / ".out.partial"
    state = json.loads((partial / "state.json").read_text())
    data, kept = partial / f"data-{state['closed'] + 1}", partial / f"kept-{state['serial']}.activations"
    for change, message in (
        (lambda: os.truncate(kept, 10), ".activations is missing or damaged; begin anew (--restart)"),
        (lambda: os.truncate(data, 10), "lacks the end of data-"),
        (data.unlink, "lacks data-"),
        (lambda: (partial / "state.json").write_text("{"), "state.json is damaged"),
    ):
        change()
        assert quantizers.run(*command(work)) == 1 and message in quantizers.log


def test_a_disk_without_room_is_found_at_once(work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(CheckpointError, match=r"has 0.1 MB free; writing this checkpoint takes up to 0.\d MB"):
        quantize(work / "source", work / "out", method="rtn", group_size=32, progress=False)
    assert names(work) == ["source"]


def test_what_was_predicted_is_what_is_written(work):
    from tinychat.quantize.output import Output

    predicted = Output(checkpoint.open(work / "source"), 4, 32).predicted_bytes()
    report = quantize(work / "source", work / "out", method="rtn", group_size=32, progress=False)
    assert predicted < report.bytes_after < predicted + 6000  # the header
