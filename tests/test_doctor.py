"""`tinychat doctor` on machines made of files, on nonsense, and on this one."""

import json
import subprocess
import sys
import types
from pathlib import Path

import machines
import pytest

from tinychat import cli, memory
from tinychat.backends import cpu
from tinychat.bench import probe
from tinychat.doctor import models, speed, throttling
from tinychat.doctor.advice import _gpu
from tinychat.doctor.command import gather
from tinychat.doctor.report import report

needs_kernels = pytest.mark.skipif(cpu.available() is not None, reason="the compiled kernels are not built")


def ours(supported, **changed):
    """What tinychat would say of itself where these levels run."""
    used = supported.split()[0]
    found = {"backend": "cpu", "description": f"cpu ({used}, 4 threads)", "reason": "the fastest available"}
    found |= {
        "used": used,
        "supported": supported.split(),
        "threads": None,
        "forced": {},
        "device_memory": None,
        "asked": "auto",
    }
    return {**found, **changed}


def facts_of(files, root, supported="neon scalar", **changed):
    return gather(machines.plant(files, root), probe=False, kernels=ours(supported, **changed))


def advice(facts):
    return "\n".join(facts["advice"])


def test_a_raspberry_pi_4_on_a_weak_supply(tmp_path):
    facts = facts_of(machines.PI_4, tmp_path)
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    found = facts["processor"]
    assert (found["name"], found["architecture"], found["cpus"], found["threads"]) == ("Cortex-A72", "aarch64", 4, 4)
    assert facts["kernels"]["lacking"] == {"i8mm": ["i8mm", "asimddp"], "dotprod": ["asimddp"]}
    assert not facts["kernels"]["unused"]
    assert facts["memory"]["total"] == 3885396 * 1024 and facts["memory"]["swap_on"] == ["/var/swap"]
    assert facts["throttling"]["raspberry_pi"] == {
        "word": "0x50005",
        "now": ["under-voltage", "throttled"],
        "since_start": ["under-voltage", "throttled"],
    }
    assert "Under-voltage at this moment" in advice(facts) and "82 °C" in advice(facts)
    fits = {row["name"]: row["longest_context"] for row in facts["models"]}
    assert fits["tinyllama-1.1b"] == 2048 and fits["llama-3-8b"] is None
    text = report(facts)
    for words in (
        "Cortex-A72, aarch64",
        "neon: the best of those that run here (neon, scalar)",
        "not dotprod: the processor lacks asimddp",
        "now: under-voltage, throttled; since the start: under-voltage, throttled (0x50005)",
        "600 of 1800 MHz, governor ondemand",
        "swap 105 MB on /var/swap, 0.0 MB used",
        "do not fit: llama-2-7b",
    ):
        assert words in text, words


def test_a_raspberry_pi_5_in_good_order(tmp_path):
    facts = facts_of(machines.PI_5, tmp_path, "dotprod neon scalar")
    assert facts["processor"]["name"] == "Cortex-A76" and facts["kernels"]["lacking"] == {"i8mm": ["i8mm"]}
    assert facts["throttling"]["raspberry_pi"]["now"] == [] and facts["advice"] == []
    assert "nothing was found that holds it back" in report(facts)
    assert next(row for row in facts["models"] if row["name"] == "llama-2-7b")["longest_context"] == 4096


def test_kernels_that_the_build_lacks_are_named(tmp_path):
    facts = facts_of(machines.PI_5, tmp_path, "scalar")
    assert facts["kernels"]["unused"] == ["dotprod", "neon"]
    assert "kernels of level dotprod and they are not used" in advice(facts)
    assert "not dotprod: the processor has it" in report(facts)
    forced = gather(
        tmp_path, probe=False, kernels=ours("dotprod neon scalar", used="neon", forced={"TINYCHAT_ISA": "neon"})
    )
    assert "TINYCHAT_ISA asks for neon: unset it, and the kernels take dotprod" in advice(forced)


def test_a_jetson_held_back_by_its_power_mode(tmp_path):
    facts = facts_of(machines.ORIN_NANO, tmp_path, "dotprod neon scalar")
    assert facts["processor"]["name"] == "Cortex-A78AE"
    assert facts["gpus"] == [{"name": "the Jetson's own", "driver": "Jetson Linux 36.4.3", "shared_memory": True}]
    mode = facts["throttling"]["power_mode"]
    assert mode == {"id": 1, "name": "7W", "fastest_id": 2, "fastest": "MAXN_SUPER"}
    assert facts["throttling"]["temperatures"][0] == {"zone": "gpu-thermal", "celsius": 52.5, "limit": 99.0}
    for words in (
        "2 of 6 CPUs are offline",
        "held at 960 of 1510 MHz",
        "'sudo nvpmodel -m 2' (MAXN_SUPER)",
        "819 MB of swap are in use",
    ):
        assert words in advice(facts), words
    assert "memory shared with the CPU" in report(facts)


def test_a_server_and_a_container_on_it(tmp_path):
    facts = facts_of(machines.SERVER, tmp_path / "server", "amx avx512vnni scalar")
    assert facts["board"] == "ThinkSystem SR650" and facts["processor"]["threads"] == 2  # cores, of four CPUs
    assert facts["gpus"] == [{"name": "NVIDIA H100 PCIe", "driver": "550.54.15", "shared_memory": False}]
    assert facts["processor"]["cache_bytes"] == 60 << 20
    assert "governor" not in advice(facts), "intel_pstate's powersave is no cap"
    facts["kernels"] = ours("amx scalar", reason="cuda not used: its kernels are not built")
    assert any("GPU (NVIDIA H100 PCIe) and it is not used" in line for line in _gpu(facts))
    assert all(row["longest_context"] == row["limit"] for row in facts["models"])
    inside = facts_of(machines.CONTAINER, tmp_path / "container", "avx512vnni scalar")
    assert inside["processor"]["quota"] == 1.5 and inside["processor"]["threads"] == 1
    assert inside["memory"]["available"] == inside["memory"]["group_room"] == 3 << 29
    assert "grants 1.5 of 4 CPUs" in advice(inside) and "leaves 1.6 GB of memory" in advice(inside)
    assert inside["kernels"]["unused"] == ["amx"], "the tiles of AMX are often kept from containers"


@pytest.mark.parametrize(
    "word, now, since", [(0, [], []), (1 << 3, ["soft temperature limit"], []), (1 << 17, [], ["clock capped"])]
)
def test_the_bits_of_get_throttled(word, now, since):
    assert throttling.decode(word) == {"word": f"{word:#x}", "now": now, "since_start": since}


@pytest.mark.parametrize(
    "governor, driver, said", [("powersave", "cpufreq-dt", True), ("powersave", "intel_pstate", False)]
)
def test_the_governor(tmp_path, governor, driver, said):
    files = {**machines.PI_5, **machines.clock(0, "0", 600000, 2400000, 2400000, governor, driver)}
    assert ("governor 'powersave'" in advice(facts_of(files, tmp_path))) == said


NONSENSE = [
    "",
    "\n",
    "-1",
    "99999999999999999999999",
    "a:b:c\n::\n",
    "0-\n,",
    "\ufffd\0\x1b[31m",
    "max max\n",
    "0-99999999",
]


@pytest.mark.parametrize("machine", machines.ALL)
def test_no_file_can_break_it(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(models, "published", lambda *args: [])
    assert report(gather(tmp_path / "nothing", probe=False, kernels=ours("scalar")))
    files, root = machines.ALL[machine], tmp_path / "tree"
    for text in NONSENSE:  # everywhere
        report(facts_of(dict.fromkeys(files, text), root))
    machines.plant(files, root)
    for index, name in enumerate(files):  # in one place, the rest as it is
        (root / name).write_bytes(b"\xff\xfe\0" if index % 2 else NONSENSE[index % len(NONSENSE)].encode())
        report(gather(root, probe=False, kernels=ours("scalar")))
        (root / name).unlink()
        (root / name).mkdir()
        report(gather(root, probe=False, kernels=ours("scalar")))
        (root / name).rmdir()
        (root / name).write_text(files[name])


def test_the_longest_context_is_what_memory_holds(tmp_path):
    rows = models.published(cpu.FOOTPRINT, 4 << 30)
    assert rows == sorted(rows, key=lambda row: row["needs"])
    by_name = dict(models._shapes(cpu.FOOTPRINT, "fp16"))
    for row in rows:
        sized, context = by_name[row["name"]], row["longest_context"]
        if context is None:
            assert sized.needs(512)["total"] > 4 << 30
        else:
            assert sized.needs(context)["total"] <= 4 << 30
            assert context == sized.limit or sized.needs(context + models.STEP)["total"] > 4 << 30
    assert {row["longest_context"] == row["limit"] for row in models.published(cpu.FOOTPRINT, None)} == {True}


def test_speed_is_the_lower_of_two_limits():
    measured = {"gb_s": 4.0, "weights_per_s": 4e9}
    row = next(r for r in models.published(cpu.FOOTPRINT, None, measured) if r["name"] == "llama-2-7b")
    found = row["tokens_per_s"]
    assert found["memory"] == pytest.approx(4e9 / row["bytes_per_token"])
    assert found["arithmetic"] == pytest.approx(4e9 / (6_476_005_376 + 32000 * 4096))
    assert (found["at_most"], found["limit"]) == (found["arithmetic"], "arithmetic")
    cached = models.published(cpu.FOOTPRINT, None, measured, cache_bytes=1 << 40)
    assert {r["tokens_per_s"]["memory"] for r in cached} == {None}


@needs_kernels
def test_the_command_measures(monkeypatch, capsys):
    for name, size in (("BUFFER_BYTES", 4 << 20), ("SLICE_BYTES", 1 << 20), ("READ_BYTES", 8 << 20)):
        monkeypatch.setattr(probe, name, size)
    monkeypatch.setattr(speed, "TURN_S", 0.001)
    assert cli.main(["doctor", "pebble", "--json", "-t", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["speed"]["threads"] == 1 and facts["speed"]["gb_s"] > 0.1 and facts["speed"]["weights_per_s"] > 1e6
    assert facts["model"]["fits"] and facts["model"]["tokens_per_s"]["at_most"] > 1
    assert facts["kernels"]["used"] == facts["kernels"]["supported"][0] or facts["kernels"]["forced"]
    assert cli.main(["doctor", "--no-probe"]) == 0
    text = capsys.readouterr().out
    assert "not measured" in text and cpu.describe() in text


def test_a_model_that_does_not_fit(monkeypatch, capsys):
    room = {"free": 60 << 20}
    monkeypatch.setattr(memory, "available", lambda root: room["free"])
    assert cli.main(["doctor", "pebble", "--no-probe"]) == 1
    text = capsys.readouterr().out
    assert "does NOT fit at a context of 1024" in text and "pebble does not fit at any useful context" in text
    needs = gather(model="pebble", probe=False, kv_dtype="fp32")["model"]["needs"]
    room["free"] = needs["total"] - needs["kv_cache"] // 4
    wide = ["doctor", "pebble", "--no-probe", "--kv-type", "fp32"]
    assert cli.main(wide) == 1
    assert "pebble fits with a context of 7" in capsys.readouterr().out
    assert cli.main([*wide, "-c", "512"]) == 0
    assert cli.main(["doctor", "no/such-model-here", "--no-probe", "--offline"]) == 1
    assert capsys.readouterr().err.startswith("tinychat: error:")


def test_a_level_that_does_not_run_is_a_finding_and_no_error(monkeypatch, capsys):
    if cpu.available() is not None:
        pytest.skip("the compiled kernels are not built")
    monkeypatch.setenv("TINYCHAT_ISA", "mmx")
    assert cli.main(["doctor", "--no-probe"]) == 1
    text = capsys.readouterr().out
    assert "none: TINYCHAT_ISA=mmx does not run here" in text and "tinychat cannot run a model here" in text


def test_a_gpu_is_measured_and_its_memory_counts(tmp_path, monkeypatch):
    copied = types.SimpleNamespace(complete=lambda: None, samples=[2000.0, 2010.0, 1990.0], bytes_read=4 << 30)
    monkeypatch.setitem(sys.modules, "tinychat.bench.copy_probe", types.SimpleNamespace(CopyProbe=lambda: copied))
    gpu = {"backend": "cuda", "description": "cuda (NVIDIA H100, sm_90)", "used": None}
    found = {**ours("scalar", **gpu, device_memory=80 * 10**9), "supported": []}
    facts = gather(machines.plant(machines.SERVER, tmp_path), kernels=found)
    assert facts["free"] == 80 * 10**9 and facts["speed"]["gb_s"] == 2000
    speeds = {row["name"]: row["tokens_per_s"] for row in facts["models"]}
    assert speeds["llama-2-7b"]["limit"] == "memory" and 500 < speeds["llama-2-7b"]["at_most"] < 600
    text = report(facts)
    assert "the GPU copies its memory at 2000 GB/s" in text and "80.0 GB of its memory are free" in text


@needs_kernels
def test_it_is_light():
    code = (
        "import sys; from tinychat import cli; cli.main(['doctor', 'pebble', '--no-probe']);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
