"""Checkpoints out: other libraries read them, and a failure at any point leaves nothing behind and breaks nothing."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_models import tiny as tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from tinychat import checkpoint
from tinychat.checkpoint import AwqFormat, CheckpointWriter, awq
from tinychat.checkpoint.partial import is_mount
from tinychat.errors import CheckpointError
from tinychat.qtensor import QTensor, bfloat16


def write(directory, tensors, config=tiny.CONFIG, quantization=None, **options):
    with CheckpointWriter(directory, **options) as writer:
        for name, array in tensors.items():
            writer.add(name, array)
        return writer.finish(config, quantization)


def left_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_written_is_read_back(tmp_path, shard_bytes, dtype):
    tensors = tiny.plain(dtype)
    path = write(tmp_path / "out", tensors, shard_bytes=shard_bytes)
    assert left_in(tmp_path) == ["out"]
    found = checkpoint.open(path)
    sharded = shard_bytes < 1 << 30
    assert (path / "model.safetensors.index.json").exists() == sharded
    assert (len(left_in(path)) > 4) == sharded
    assert np.array_equal(found.embed(), tensors["model.embed_tokens.weight"])
    assert np.array_equal(found.layer(1).down.segments[0], tensors["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.parametrize("max_bytes", [1 << 30, 1000])
def test_the_library_reads_it_in_every_framework(tmp_path, max_bytes):
    rng = np.random.default_rng(0)
    tensors = {
        "half": rng.standard_normal(3).astype(np.float16),  # odd sizes first: what follows must still be aligned
        "brain": rng.standard_normal((5, 1)).astype(bfloat16),
        "words": rng.integers(-9, 9, (3, 7), np.int32),
        "turned": rng.standard_normal((4, 6)).astype(np.float32).T,
        "float": rng.standard_normal((300, 2)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float16),
    }
    path = write(tmp_path / "out", tensors, shard_bytes=max_bytes)
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118  (a safe_open is not iterable)
                assert opened.get_tensor(name).float().shape == tensors[name].shape
        found |= load_file(file)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_transformers_opens_it(tmp_path):
    model, config = tiny_model("qwen2")
    path = write(tmp_path / "out", {n: t.numpy() for n, t in model.state_dict().items()}, config, shard_bytes=50_000)
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_awq_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tensors, made = tiny.plain(), {}
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors.pop(f"{name}.weight").shape
        made[name] = QTensor(
            rng.integers(0, 16, (n, k), np.uint8),
            rng.random((n, k // 32)).astype(np.float16),
            rng.integers(0, 16, (n, k // 32), np.uint8),
            4,
            32,
        )
        tensors |= {f"{name}.{part}": array for part, array in awq.pack(made[name]).items()}
    config = {**tiny.CONFIG, "quantization_config": {"quant_method": "old"}}
    path = write(tmp_path / "out", tensors, config, AwqFormat(group_size=32, modules_to_not_convert=("lm_head",)))
    written = json.loads((path / "config.json").read_text())["quantization_config"]
    assert written == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    theirs = AutoConfig.from_pretrained(path).quantization_config
    assert theirs["quant_method"] == "awq"
    found = checkpoint.open(path)
    q, m = found.layer(1).qkv.segments[2].tensor(), made["model.layers.1.self_attn.v_proj"]
    assert np.array_equal(q.codes, m.codes) and np.array_equal(q.zeros, m.zeros) and np.array_equal(q.scales, m.scales)


def test_what_belongs_to_the_model_is_copied(tmp_path):
    source = tiny.write(tmp_path / "source", tiny.plain())
    copied = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"]
    copied += ["generation_config.json", "chat_template.jinja", "LICENSE.txt"]
    left = ["pytorch_model.bin", "tokenizer.py", "modeling.py", "README.md", "quant_config.json", "x.safetensors"]
    for name in copied + left:
        (source / name).write_text(name)
    (source / "vocab.json").symlink_to(source / "tokenizer.json")  # as in the hub's cache
    path = write(tmp_path / "out", tiny.plain(), source=source)
    assert left_in(path) == sorted([*copied, "vocab.json", "config.json", "model.safetensors"])
    assert not (path / "vocab.json").is_symlink() and (path / "vocab.json").read_text() == "tokenizer.json"


def test_targets_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"not part of a checkpoint and would be lost: notes.txt"):
        CheckpointWriter(tmp_path / "full", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        CheckpointWriter(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="is the source itself"):
        CheckpointWriter(tmp_path / "full" / ".." / "full", source=tmp_path / "full", overwrite=True)
    with pytest.raises(CheckpointError, match="below cannot be written: "):
        CheckpointWriter(tmp_path / "file" / "below")
    assert left_in(tmp_path) == ["file", "full"] and left_in(tmp_path / "full") == ["notes.txt"]
    if os.path.ismount("/proc"):
        with pytest.raises(CheckpointError, match="is a mount point"):
            CheckpointWriter("/proc", overwrite=True)
    (tmp_path / "mounts").write_text(f"36 35 98:0 /x {tmp_path}/a\\040\\134b rw - ext4 /dev/vda rw\n")
    assert is_mount(tmp_path / "a \\b", tmp_path / "mounts") and not is_mount(tmp_path / "a", tmp_path / "mounts")
    (tmp_path / "mounts").unlink()


def test_a_target_that_was_filled_meanwhile_is_refused_and_the_work_kept(tmp_path):
    run, told = {"seed": 0}, r"exists and is not empty.*\.out\.partial: clear the target, and the same again goes on"
    with (
        pytest.raises(CheckpointError, match=told),
        CheckpointWriter(tmp_path / "out", run=run) as writer,
    ):
        writer.add("a", np.arange(3, dtype=np.float32))
        writer.commit({})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        writer.finish({})
    (tmp_path / "out" / "notes.txt").unlink()
    with CheckpointWriter(tmp_path / "out", run=run) as writer:
        assert writer.complete
        writer.finish({})
    assert left_in(tmp_path) == ["out"] and left_in(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_overwriting_replaces_the_whole_directory(tmp_path):
    write(tmp_path / "out", tiny.plain(), shard_bytes=20_000)
    tensors = tiny.plain(seed=1)
    write(tmp_path / "out", tensors, overwrite=True)
    assert left_in(tmp_path) == ["out"] and left_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert np.array_equal(checkpoint.open(tmp_path / "out").embed(), tensors["model.embed_tokens.weight"])


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tiny.plain())
    assert left_in(tmp_path) == ["out"] and checkpoint.open(tmp_path / "out")


def test_permissions_follow_the_umask(tmp_path):
    path = write(tmp_path / "out", tiny.plain())
    (tmp_path / "other").mkdir()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_nothing_is_seen_before_finish_nor_after_an_error(tmp_path):
    class Interrupted(BaseException):
        pass

    with pytest.raises(Interrupted), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", np.ones(3, np.float32))
        assert not (tmp_path / "out").exists()
        raise Interrupted
    assert left_in(tmp_path) == []


def full_disk(n_bytes):
    """Files may not grow beyond `n_bytes`, which fails as a full disk does: within write() or at the last flush."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("n_bytes", [0, 100, 5_000, 60_000])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_changes_nothing(tmp_path, n_bytes, exists):
    if exists:
        write(tmp_path / "out", tiny.plain(), shard_bytes=50_000)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out/*")}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full_disk(n_bytes)
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*; nothing was changed there"):
            write(tmp_path / "out", tiny.plain(np.float32, seed=1), overwrite=exists)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert left_in(tmp_path) == (["out"] if exists else [])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out/*")} == before


def test_a_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    write(tmp_path / "out", tiny.plain())
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    rename = type(tmp_path).rename

    def failing(self, target):
        if self.name == "whole":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "out", tiny.plain(seed=1), overwrite=True)
    assert left_in(tmp_path) == ["out"] and (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def recording(handle):
        flushed.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    write(tmp_path / "out", tiny.plain())
    names = [path.rsplit("/", 1)[1] for path in flushed]
    assert names[:2] == ["shard-1", "config.json"]
    assert names[2] == "whole" and flushed[3] == str(tmp_path) and len(flushed) == 4


def test_misuse_is_a_value_error(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", np.ones(3, np.float32))
        with pytest.raises(ValueError, match="a was added before"):
            writer.add("a", np.ones(3, np.float32))
        with pytest.raises(ValueError, match="complex64"):
            writer.add("b", np.ones(3, np.complex64))
        writer.finish(tiny.CONFIG)
        with pytest.raises(ValueError, match="has finished"):
            writer.add("c", np.ones(3, np.float32))
    assert (tmp_path / "out").exists()
