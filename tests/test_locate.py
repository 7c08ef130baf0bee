"""From a model argument to a directory: the shipped model, folders, hub ids; each failure has its own message."""

import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tinychat.checkpoint import locate as package_locate
from tinychat.checkpoint.locate import locate
from tinychat.errors import CheckpointError

locate_module = sys.modules["tinychat.checkpoint.locate"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with `hub.answer` (a path, or an exception) and records how it was asked."""
    state = SimpleNamespace(answer=tmp_path, asked=[])

    def snapshot_download(hub_id, **options):
        state.asked.append((hub_id, options))
        if isinstance(state.answer, BaseException):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return state


def http(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None, url="", text="", json=dict, content=b"")
    fault = kind.__new__(kind)
    Exception.__init__(fault, f"HTTP {status}")
    fault.response = response
    return fault


def caused(fault, cause):
    fault.__cause__ = cause
    return fault


def test_directories(tmp_path, monkeypatch, hub):
    assert package_locate is locate
    (tmp_path / "owner" / "näme with space").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("owner") == type(tmp_path)("owner")
    assert locate(tmp_path) == tmp_path
    assert locate("owner/näme with space").is_dir()
    assert locate("~/owner") == tmp_path / "owner"
    assert hub.asked == []


def test_the_shipped_model_in_a_wheel_or_beside_a_clone(tmp_path, monkeypatch):
    wheel, clone = tmp_path / "wheel", tmp_path / "clone"
    monkeypatch.setattr(locate_module, "_SHIPPED_AT", (wheel, clone))
    with pytest.raises(CheckpointError, match="lacks the model 'pebble'"):
        locate("pebble")
    for path in (clone, wheel):
        path.mkdir()
        (path / "config.json").write_text("{}")
        assert locate("pebble") == path


@pytest.mark.parametrize(
    "model, message",
    [
        ("", "neither a directory nor a hub id"),
        ("./no", "there is no directory './no'"),
        ("/no/where", "there is no directory"),
        ("../x", "there is no directory '../x'"),
        ("../../etc", "there is no directory"),
        ("~nobody-here/x", "there is no directory"),
        ("a/b/c", "there is no directory 'a/b/c'"),
        ("owner/", "there is no directory"),
        ("C:\\x", "there is no directory"),
        ("owner\\name", "there is no directory"),
        ("typo", "there is no directory 'typo'; a model is 'pebble', a directory, or a hub id"),
        ("-rf", "there is no directory '-rf'"),
        ("-owner/name", "neither an existing directory nor a hub id"),
        ("owner/na me", "neither an existing directory nor a hub id"),
        ("owner/name.git", "neither an existing directory nor a hub id"),
        ("owner/a..b", "neither an existing directory nor a hub id"),
        ("owner/a--b", "neither an existing directory nor a hub id"),
        ("owner/\x1b[31m", r"neither an existing directory.*"),
        ("owner/name\n", "neither an existing directory"),
        ("owner/name\0", "neither a directory nor a hub id"),
        ("x" * 10_000, "10000 characters"),
        ("owner/" + "x" * 1000, "neither an existing directory"),
    ],
)
def test_what_is_neither(hub, tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as fault:
        locate(model)
    text = str(fault.value)
    assert message.removesuffix(".*") in text and len(text) < 600 and text.isprintable()
    assert hub.asked == []


def test_a_file_is_not_a_directory(tmp_path, hub):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        locate(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="local directory, which has no revision 'main'"):
        locate(str(tmp_path), revision="main")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert locate(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="local file, which has no revision 'main'"):
        locate(str(tmp_path / "a.gguf"), revision="main")
    with pytest.raises(CheckpointError, match="'pebble' ships with tinychat and has no revision 'main'"):
        locate("pebble", revision="main")


def test_how_the_hub_is_asked(hub, tmp_path):
    assert locate("owner/Name-1.5B_x", revision="refs/pr/1") == tmp_path
    ((hub_id, options),) = hub.asked
    assert hub_id == "owner/Name-1.5B_x" and options["revision"] == "refs/pr/1" and not options["local_files_only"]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    wanted += ["chat_template.jinja", "merges.txt", "LICENSE"]
    unwanted = ["consolidated.safetensors", "onnx/config.json", "original/params.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*wanted, "pytorch_model.bin", "model.pt", "x.py", "x.gguf", "tf_model.h5", "a.pkl", *unwanted],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == wanted


def test_offline_by_argument_or_environment(hub, monkeypatch):
    locate("owner/name", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    locate("owner/name")
    assert [options["local_files_only"] for _, options in hub.asked] == [True, True]


@pytest.mark.parametrize("revision", ["", "../x", "-x", "a b", "x" * 300, "\x1b"])
def test_revisions_are_checked(hub, revision):
    with pytest.raises(CheckpointError, match="is not a revision"):
        locate("owner/name", revision=revision)
    assert hub.asked == []


@pytest.mark.parametrize(
    "answer, message",
    [
        (http(errors.GatedRepoError, 403), "owner/name is gated: accept its licence at .*owner/name.*HF_TOKEN"),
        (http(errors.RepositoryNotFoundError, 404), "no model owner/name, or it is private"),
        (http(errors.RevisionNotFoundError, 404), "owner/name has no revision 'v1'"),
        (http(errors.HfHubHTTPError, 401), "refuses access to owner/name .HTTP 401.*HF_TOKEN"),
        (http(errors.HfHubHTTPError, 429), "limits the rate"),
        (http(errors.HfHubHTTPError, 503), "the hub failed on owner/name .HTTP 503"),
        (caused(errors.LocalEntryNotFoundError("x"), http(errors.HfHubHTTPError, 403)), "refuses access"),
        (
            caused(errors.LocalEntryNotFoundError("x"), ConnectionError("no route")),
            "no route.*network",
        ),
        (errors.LocalEntryNotFoundError("An error happened"), "cannot download owner/name at revision v1.*network"),
        (ConnectionError("name resolution"), "cannot download.*name resolution"),
        (ValueError("<html>captive portal"), "cannot download.*captive portal"),
        (OSError(28, "No space left on device", "/cache"), r"No space left on device \(/cache\)"),
    ],
)
def test_failures_of_the_hub(hub, answer, message):
    hub.answer = answer
    with pytest.raises(CheckpointError, match=message):
        locate("owner/name", revision="v1")


def test_interrupting_a_download_is_not_an_error_of_the_hub(hub):
    hub.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        locate("owner/name")


def cached(tmp_path, model):
    """Run `locate(model, offline=True)` in an interpreter of its own, its cache in `tmp_path`."""
    code = (
        "from tinychat.checkpoint import locate\nfrom tinychat.errors import CheckpointError\n"
        f"try: print(locate({model!r}, offline=True))\nexcept CheckpointError as fault: print('refused:', fault)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_real_cache_offline(tmp_path):
    assert "refused: owner/name is not complete in the local cache" in cached(tmp_path, "owner/name")
    repo, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert cached(tmp_path, "owner/name") == str(snapshot)
