"""One safetensors file: what the library writes is read, what it should refuse is refused, as is fuzz."""

import json
import random
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import raw

from tinychat.checkpoint.safetensors_file import MAX_TENSORS, SafetensorsFile
from tinychat.errors import CheckpointError, TinychatError
from tinychat.qtensor import bfloat16


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = raw({"a": entry(), "b": entry("F16", (3,), 8, 14)}, bytes(14))


@pytest.fixture
def opened(tmp_path):
    def opened(data: bytes) -> SafetensorsFile:
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)
        return SafetensorsFile(path)

    return opened


def test_every_dtype_of_the_library_is_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        str(np.dtype(dtype)): (rng.standard_normal((3, 5)) * 10).astype(dtype)
        for dtype in ("f8", "f4", "f2", bfloat16, "i8", "i4", "i2", "i1", "u4", "u1", "?")
    }
    tensors["empty"] = np.zeros((0, 4), np.float32)
    tensors["scalar"] = np.array(3.0, np.float32)
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        found = file.read(name)
        assert found.dtype == array.dtype and np.array_equal(found, array) and not found.flags.writeable


def test_read_is_mapped_and_survives_release(opened):
    file = opened(raw(json.dumps({"a": entry()}).ljust(64), bytes(8)))
    array = file.read("a")
    file.release()
    assert array.tolist() == [0, 0] and not array.flags.owndata


def test_tensors_that_lie_askew_are_copied_into_place(opened):
    values = np.arange(2, dtype=np.float32).tobytes()
    file = opened(raw({"b": entry("U8", (1,), 0, 1), "a": entry("F32", (2,), 1, 9)}, b"x" + values))
    array = file.read("a")
    assert array.flags.aligned and array.tolist() == [0, 1] and not array.flags.writeable


BAD = {
    "empty": (b"", "only 0 bytes"),
    "seven bytes": (b"\1" * 7, "only 7 bytes"),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}" * 9, "claims a header"),
    "header of 200 MB": (struct.pack("<Q", 200 << 20) + b"{}" * 9, "claims a header"),
    "header beyond the file": (struct.pack("<Q", 1000) + b"{}", "is truncated"),
    "not JSON": (raw('{"a": oops}'), "not valid JSON"),
    "a list": (raw("[1, 2, 3]"), "does not begin with"),
    "leading space": (raw(' {"__metadata__": {}}'), "does not begin with"),
    "bad UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "nested 100,000 deep": (raw('{"a":' * 100_000), "nested too deeply"),
    "a number of 10,000 digits": (raw('{"a": ' + "9" * 10_000 + "}"), "not valid JSON"),
    "a key twice": (raw(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', bytes(8)), "occurs twice"),
    "NaN": (raw('{"a": NaN}'), "NaN is not a JSON number"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (raw({"__metadata__": []}), "__metadata__"),
    "entry of another kind": (raw({"a": 5}), "not dtype, shape and data_offsets"),
    "entry with more keys": (raw({"a": {**entry(), "b": 1}}, bytes(8)), "not dtype, shape and data_offsets"),
    "unknown dtype": (raw({"a": entry("F9")}, bytes(8)), "stores a as F9; supported are F64, F32"),
    "dtype list": (raw({"a": {**entry(), "dtype": ["F32"]}}, bytes(8)), "supported are"),
    "negative size": (raw({"a": entry(shape=(-2,))}, bytes(8)), "not a list of sizes"),
    "size true": (raw({"a": entry(shape=(True,), end=4)}, bytes(4)), "not a list of sizes"),
    "size 2.0": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "not a list of sizes"),
    "nine dimensions": (raw({"a": entry(shape=(1,) * 9, end=4)}, bytes(4)), "not a list of sizes"),
    "overflowing shape": (raw({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(8)), "needs"),
    "shape lies": (raw({"a": entry(shape=(3,))}, bytes(8)), "8 bytes, where F32 of shape [3] needs 12"),
    "begin after end": (raw({"a": entry(begin=8, end=0)}, bytes(8)), "gives a -8 bytes"),
    "three offsets": (raw({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8)), "not two offsets"),
    "overlap": (raw({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "b overlaps"),
    "the same place": (raw({"a": entry(), "b": entry()}, bytes(8)), "b overlaps"),
    "hole": (raw({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "b leaves a gap"),
    "hole at the start": (raw({"a": entry(begin=4, end=12)}, bytes(12)), "a leaves a gap"),
    "data cut": (raw({"a": entry()}, bytes(7)), "is truncated: the header describes"),
    "data beyond": (raw({"a": entry()}, bytes(9)), "1 bytes after its last tensor"),
    "zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(100), "a pickle"),
    "gguf": (b"GGUF\x03" + bytes(100), "a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(opened, name):
    data, message = BAD[name]
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as fault:
        opened(data)
    assert message in str(fault.value) and "model.safetensors" in str(fault.value)
    assert time.perf_counter() - start < 1


def test_header_lengths_that_look_like_magic_numbers_are_fine(opened):
    for length in (0x3C, 0x280, 0x380, 0x480, 0x580):  # '<', and \x80 followed by 2 .. 5
        file = opened(raw(json.dumps({"a": entry(end=8)}).ljust(length).encode(), bytes(8)))
        assert list(file.tensors) == ["a"]


def test_too_many_tensors(opened):
    nothing = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(CheckpointError, match="tensors; at most"):
        opened(raw("{" + ",".join(f'"{i}":{nothing}' for i in range(MAX_TENSORS + 1)) + "}"))


def test_missing_directory_and_pipe(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        SafetensorsFile(tmp_path / "no.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path / "dir.safetensors")


def test_names_are_escaped_in_messages(opened):
    with pytest.raises(CheckpointError) as fault:
        opened(raw({"\x1b[2J\n\0../../x" + "y" * 5000: entry(shape=(3,))}, bytes(8)))
    assert "\x1b" not in str(fault.value) and "\n" not in str(fault.value) and len(str(fault.value)) < 800


def test_a_file_cut_while_mapped_is_noticed(opened, tmp_path):
    file = opened(GOOD)
    with (tmp_path / "model.safetensors").open("r+b") as cut:
        cut.truncate(20)
    with pytest.raises(CheckpointError, match="changed its size"):
        file.read("a")


def test_dtypes_that_numpy_lacks_may_lie_there_but_not_be_read(opened):
    file = opened(raw({"a": entry("F8_E4M3", (8,))}, bytes(8)))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        file.read("a")


def test_fuzzed_files_end_in_an_error_or_in_arrays(opened):
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), 0x22, 0x7B, 0x7D, 0x30, 0x39, 0x2C))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            file = opened(bytes(data))
            for name in file.tensors:
                file.read(name)
        except TinychatError:
            refused += 1
    assert refused > 300
