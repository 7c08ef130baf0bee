"""The command line: what it accepts, how it fails, what it prints; with an engine that needs no model."""

import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from fake_engine import FakeEngine

from tinychat import cli, engine, settings
from tinychat.arguments import Parser
from tinychat.errors import BackendError, CheckpointError
from tinychat.progress import Loading
from tinychat.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("chat", "generate", "quantize", "eval", "bench", "info")


@pytest.fixture
def fake(monkeypatch):
    """`engine.load` gives this engine; `fake.loaded` is how it was called."""
    made = FakeEngine("Hello there.")
    made.loaded = []

    def load(model, **options):
        made.loaded.append((model, options))
        return made

    monkeypatch.setattr(engine, "load", load)
    return made


@pytest.fixture
def stdin(monkeypatch):
    """Call it with the bytes that stdin shall hold; a terminal until then."""

    def hold(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    return hold


def run(*argv: str) -> int:
    """The exit code of a command line."""
    try:
        return cli.main(argv)
    except SystemExit as leaving:
        return leaving.code or 0


# ---- light, and helpful ----------------------------------------------------------------------------------------------


def test_help_is_light():
    code = (
        "import sys\nfrom tinychat.cli import main\n"
        "try: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert time.perf_counter() - start < 3  # 0.06 s on an idle machine; the modules below are what counts
    heavy = {"numpy", "torch", "transformers", "tokenizers", "prompt_toolkit", "huggingface_hub", "jinja2", "asyncio"}
    assert done.returncode == 0 and not heavy & set(done.stderr.split())


def test_no_front_end_needs_torch():
    code = "import sys, tinychat.cli, tinychat.chat, tinychat.info, tinychat.engine; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/", check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())


def test_help_lists_the_commands_and_each_teaches_by_example(capsys):
    assert run() == 0
    listing = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in listing
        assert run(command, "--help") == 0
        text = capsys.readouterr().out
        assert f"examples:\n  tinychat {command}" in text and "(default: " in text


def test_every_setting_is_an_option_with_its_true_default(capsys):
    run("generate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings.SETTINGS:
        for flag in setting.flags:
            assert flag in text
        if setting.default is not None:
            assert f"(default: {setting.default})" in text


def test_the_settings_are_those_of_the_sampler():
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    del fields["logprobs"], fields["ignore_eos"]  # of a request, not of a conversation
    assert {s.name: s.default for s in settings.SETTINGS if s.name != "stop"} | {"stop": ()} == fields


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("tinychat ")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("caht", "no command 'caht' (did you mean 'chat'?)"),
        ("serve", "no command 'serve'; there are: chat, generate, quantize, eval, bench, info"),
        ("--verison", "no option --verison (did you mean '--version'?)"),
        ("chat --tmep 1", "no option --tmep (did you mean '--temp'?)"),
        ("chat --ctx_size=5", "no option --ctx_size (did you mean '--ctx-size'?)"),
        ("chat --temp hot", "temperature is 'hot'; it must be a number"),
        ("chat --temp -1", "temperature is -1"),
        ("chat -n 0", "max_tokens is 0"),
        ("chat -n 1.5", "max_tokens is '1.5'; it must be a whole number"),
        ("chat -c 0", "expected a whole number, 1 or more; found '0'"),
        ("chat -t many", "expected a whole number, 1 or more; found 'many'"),
        ("chat --kv-type int4", "invalid choice: 'int4'"),
        ("chat a -m b", "two models: 'a' and -m 'b'"),
        ("chat a b", "unexpected argument 'b'"),
        ("generate a b c", "unexpected argument 'c'; a text of several words needs quotes"),
        ("generate a --tmep 5 b", "no option --tmep"),
        ("generate a b -m c", "'b' is one argument too many"),
        ("generate pebble", "no prompt"),
        ("generate", "no prompt"),
        ("generate a.gguf", "no prompt"),
        ("doctor -c 512", "a context (-c) and the bits of a head (--head) are a model's; name a MODEL"),
        ("doctor --device fpga", "there is no device 'fpga'; choose one of auto, "),
        ("generate hi --logprobs 2", "--logprobs shows nothing without --json"),
        ("generate hi --system x", "--system needs --chat"),
        ("quantize a", "the following arguments are required: -o/--output"),
        ("quantize a -o b --method gguf", "invalid choice: 'gguf'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(line, message, fake, stdin, capsys):
    assert run(*line.split()) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("tinychat: error: ") and "Traceback" not in err
    assert out == "" and not fake.loaded  # nothing was loaded before the mistake was found


@pytest.mark.parametrize("error", [CheckpointError("no such model"), BackendError("no such device")])
def test_errors_of_the_library_become_one_line(error, monkeypatch, capsys):
    def load(model, **options):
        raise error

    monkeypatch.setattr(engine, "load", load)
    assert run("generate", "hi") == 1
    assert capsys.readouterr().err == f"tinychat: error: {error}\n"


def test_other_exceptions(monkeypatch, capsys):
    def failing(error):
        def load(model, **options):
            raise error

        monkeypatch.setattr(engine, "load", load)
        return run("generate", "hi"), capsys.readouterr().err

    code, err = failing(ZeroDivisionError("oops"))
    assert code == 70 and "internal error: ZeroDivisionError: oops" in err and "TINYCHAT_DEBUG=1" in err
    code, err = failing(MemoryError())
    assert code == 1 and "out of memory" in err and "tinychat info" in err
    code, err = failing(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert code == 1 and "needs the Python package 'torch'" in err
    assert failing(KeyboardInterrupt())[0] == 130
    monkeypatch.setenv("TINYCHAT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError("oops"))


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("generate hi <&-", 0, ""),
        ("chat <&-", 0, ""),
        ("generate hi >&-", 0, ""),
        ("generate hi -v 2>&-", 0, ""),
        ("generate hi >/dev/full", 1, "tinychat: error: No space left on device\n"),
        ("generate hi --json >/dev/full", 1, "tinychat: error: No space left on device\n"),
    ],
)
def test_closed_streams_and_full_disks_are_no_accidents(command, code, said):
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from fake_engine import FakeEngine
from tinychat import cli, engine
engine.load = lambda model, **options: FakeEngine("fine")
raise SystemExit(cli.main())
"""
    shell = f"exec {sys.executable} -c {shlex.quote(program)} {command}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (code, said)


def test_the_version_is_the_package_s(capsys):
    import tinychat

    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{tinychat.__version__}"' in project
    assert run("--version") == 0
    assert capsys.readouterr().out == f"tinychat {tinychat.__version__}\n"


def test_warnings_look_like_the_rest(fake, monkeypatch, capsys):
    import warnings

    def load(model, **options):
        warnings.warn("the slow backend runs", RuntimeWarning, stacklevel=2)
        return fake

    monkeypatch.setattr(engine, "load", load)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("generate", "hi") == 0
    assert capsys.readouterr().err == "tinychat: warning: the slow backend runs\n"


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "model", "prompt"),
    [
        (["m", "a text"], "m", "a text"),
        (["m", "-n", "5", "a text"], "m", "a text"),
        (["--temp", "0", "m", "--json", "-"], "m", "from stdin\n"),
        (["a text"], "pebble", "a text"),
        (["word"], "pebble", "word"),
        (["-m", "m", "a/b"], "m", "a/b"),
        (["-m", "m", "-p", "a text"], "m", "a text"),
        (["m", "-p", "a text"], "m", "a text"),
        (["org/name", "-p", "a text"], "org/name", "a text"),
        (["-p", "a text"], "pebble", "a text"),
        (["m", "-"], "m", "from stdin\n"),
        (["org/name"], "org/name", "from stdin\n"),
        (["./here"], "./here", "from stdin\n"),
        (["pebble"], "pebble", "from stdin\n"),
        ([], "pebble", "from stdin\n"),
        (["-m", "m"], "m", "from stdin\n"),
        (["x" * 5000], "pebble", "x" * 5000),
    ],
)
def test_which_argument_is_what(argv, model, prompt, fake, stdin):
    stdin(b"from stdin\n")
    assert run("generate", *argv) == 0
    assert (fake.loaded[0][0], fake.calls[0][0]) == (model, prompt)


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(fake, stdin, capsys):
    for argv in (["generate", "m", ""], ["generate", "-p", ""], ["generate", "org/m"], ["chat", "-p", " "]):
        stdin(b"")
        assert run(*argv) == 2 and "prompt" in capsys.readouterr().err
    assert not fake.loaded


def test_a_directory_is_a_model(fake, stdin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("a file")
    assert run("generate", "notes") == 0 and fake.loaded[-1][0] == "pebble"  # a prompt
    (tmp_path / "mine").mkdir()  # what it lacks is said by who opens it; another model would answer as if it were right
    for name in ("mine", "absent.gguf"):
        stdin(b"text")
        assert run("generate", name) == 0 and fake.loaded[-1][0] == name


def test_options_reach_the_engine(fake, stdin):
    line = "-n 5 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --presence-penalty -0.5"
    line += " --frequency-penalty 0.25 -s 7 --stop a --stop b --ignore-eos -c 64 -t 2 --kv-type fp32 --device reference"
    line += " --activations 8 --head 16 --revision r --offline --ignore-config k --ignore-config l"
    assert run("generate", "m", "hi", *line.split()) == 0
    model, options = fake.loaded[0]
    progress = options.pop("progress")
    assert callable(progress)
    assert (model, options) == (
        "m",
        {
            "device": "reference",
            "ctx_size": 64,
            "threads": 2,
            "kv_dtype": "fp32",
            "activations": 8,
            "head": 16,
            "revision": "r",
            "offline": True,
            "ignore_config": ("k", "l"),
        },
    )
    assert fake.calls[0][1] == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 7,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }


@pytest.mark.parametrize("spelling", ["-n5", "--max-tokens=5", "--n-predict 5", "--max-new-tokens 5"])
def test_spellings_people_know(spelling, fake):
    assert run("generate", "hi", *spelling.split()) == 0
    assert fake.calls[0][1] == {"max_tokens": 5, "ignore_eos": False}


def test_the_text_goes_to_a_pipe_as_it_is(fake, capsys):
    fake.answers = ["Grüße \x1b[31m🙂"]
    assert run("generate", "hi") == 0
    assert capsys.readouterr() == ("Grüße \x1b[31m🙂", "")


def test_json_is_one_object_on_the_last_line(fake, capsys):
    assert run("generate", "hi", "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert (found["text"], found["tokens"], found["finish_reason"]) == ("Hello there.", [1, 2], "stop")
    assert found["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0}
    assert found["timings"]["decode_tokens_per_s"] == 4.0


def test_chat_and_system_make_messages(fake):
    assert run("generate", "--chat", "--system", "Be brief.", "hi") == 0
    assert fake.calls[0][0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_verbose_says_more_on_stderr(fake, capsys):
    assert run("generate", "hi", "-v") == 0
    out, err = capsys.readouterr()
    assert out == "Hello there." and err.startswith("fake: 1 parameter") and "2 tokens at 4/s" in err


def test_a_prompt_that_is_not_utf8(fake, stdin, capsys):
    stdin(b"caf\xe9")
    assert run("generate") == 2
    assert "not UTF-8: byte 3 is 0xe9" in capsys.readouterr().err


SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from fake_engine import FakeEngine
from tinychat import cli, engine
engine.load = lambda model, **options: FakeEngine("\\x1b]0;owned\\x07" + "word " * 20000, ctx_size=10**6)
raise SystemExit(cli.main(["generate", "hi", "-n", "99999"]))
"""


def test_a_closed_pipe_is_quiet():
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(20)
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(timeout=20) == 141


def test_a_terminal_is_shielded_and_ctrl_c_ends_with_130():
    child = pexpect.spawn(sys.executable, ["-c", SCRIPT], encoding="utf-8", timeout=10)
    child.expect("word word")
    assert "owned" not in child.before
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_chat_answers_a_prompt(fake, capsys):
    assert run("chat", "-p", "hi", "--system", "Be brief.", "--temp", "0") == 0
    assert capsys.readouterr().out == "Hello there.\n"
    assert fake.loaded[0][0] == "pebble"
    assert fake.calls[0][0][0] == {"role": "system", "content": "Be brief."}
    assert fake.calls[0][1]["temperature"] == 0.0


def test_chat_reads_a_pipe(fake, stdin, capsys):
    stdin(b"hi\ncaf\xe9\n")
    assert run("chat", "-m", "m") == 0
    assert capsys.readouterr().out == "Hello there.\nYou said: caf�\n"


def test_quantize_is_thin(monkeypatch, capsys):
    from types import ModuleType

    made = ModuleType("tinychat.quantize")
    calls = []

    def quantize(*paths, **options):
        calls.append((paths, options))
        return "the closing table"

    made.quantize, made.methods = quantize, lambda: ["awq", "rtn"]
    monkeypatch.setitem(sys.modules, "tinychat.quantize", made)
    assert run("quantize", "src", "-o", "dst") == 0
    options = "--method rtn --bits 3 --group-size 64 --act-order free --calibration t --overwrite"
    options += " --revision v1 --offline --ignore-config a --ignore-config b"
    options += " --n-sequences 3 --length 9 --seed 7 --restart --device cpu --threads 2"
    assert run("quantize", "src", "-o", "dst", *options.split()) == 0
    default = {
        "method": "awq",
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "act_order": None,
        "calibration": None,
        "overwrite": False,
    }
    default |= {"revision": None, "offline": False, "ignore_config": (), "restart": False, "threads": None}
    default |= {"n_sequences": 128, "length": None, "seed": 0, "device": "auto"}
    given = {
        "method": "rtn",
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "act_order": "free",
        "calibration": "t",
        "overwrite": True,
    }
    given |= {"revision": "v1", "offline": True, "ignore_config": ("a", "b"), "restart": True, "threads": 2}
    given |= {"n_sequences": 3, "length": 9, "seed": 7, "device": "cpu"}
    assert calls == [(("src", "dst"), default), (("src", "dst"), given)]
    assert run("quantize", "src", "-o", "dst", "--group-size", "-1") == 0
    assert calls[2][1]["group_size"] == -1
    assert capsys.readouterr().out == "the closing table\n" * 3


def test_loading_shows_itself_only_where_it_takes_a_while(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Loading("m") as loading:
        loading(1, 2)
        assert screen.getvalue() == ""
        monkeypatch.setattr("tinychat.progress.PATIENCE_S", 0)
        loading(1, 2)
        assert screen.getvalue() == "\rloading m: 50 %"
    assert screen.getvalue().endswith("\r")


def test_main_is_what_python_dash_m_runs():
    done = subprocess.run(
        [sys.executable, "-m", "tinychat", "caht"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "did you mean 'chat'" in done.stderr
    assert isinstance(cli.build_parser(), Parser)
