"""The weight files of a checkpoint directory as one table of tensors: a single file, or shards with their index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.checkpoint.json_file import read_object
from tinychat.checkpoint.quoting import listing, quote
from tinychat.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from tinychat.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARDS = 1000
# A name from an index becomes part of a path, so it may be nothing but a name.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Shards:
    """Every tensor of a directory by name. `model.safetensors` is taken first, else what the index lists."""

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / SINGLE).exists():
            self.files = [SafetensorsFile(directory / SINGLE)]
        elif (directory / INDEX).exists():
            self.files = self._open_indexed(directory / INDEX)
        else:
            raise CheckpointError(_why_no_weights(directory))
        # An index gives every name one file and each file must hold just that, so no name is there twice.
        self._owner = {name: file for file in self.files for name in file.tensors}

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._owner)

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(file.nbytes for file in self.files)

    def info(self, name: str) -> TensorInfo:
        """What the header says of tensor `name`."""
        return self._owner[name].tensors[name]

    def where(self, name: str) -> str:
        """Tensor and file, for a message that names the directory."""
        return f"{quote(name)} in {self._owner[name].path.name}"

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, read-only, mapped from its file."""
        return self._owner[name].read(name)

    def release(self) -> None:
        """See `SafetensorsFile.release`."""
        for file in self.files:
            file.release()

    def _open_indexed(self, index: Path) -> list[SafetensorsFile]:
        weight_map: Any = read_object(index).get("weight_map")
        where = quote(str(index))
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{where} has no weight_map from tensor names to files; download it again")
        listed: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise CheckpointError(
                    f"{where} places {quote(name)} in {quote(shard)}: expected is the name of a .safetensors file "
                    f"beside the index, without a folder"
                )
            listed.setdefault(shard, set()).add(name)
        if len(listed) > MAX_SHARDS:
            raise CheckpointError(f"{where} lists {len(listed):,} files; at most {MAX_SHARDS:,} are read")
        absent = sorted(shard for shard in listed if not (self.directory / shard).exists())
        if absent:
            raise CheckpointError(
                f"{where} lists {len(absent)} of {len(listed)} files that are not there: {listing(absent)}; "
                f"the download is incomplete"
            )
        files = []
        for shard in sorted(listed):
            file = SafetensorsFile(self.directory / shard)
            for names, fault in (
                (sorted(listed[shard] - file.tensors.keys()), "the index lists but the file lacks"),
                (sorted(file.tensors.keys() - listed[shard]), "the file holds but the index does not list there"),
            ):
                if names:
                    raise CheckpointError(
                        f"{quote(str(file.path))} and {index.name} disagree: tensors that {fault}: {listing(names)}"
                    )
            files.append(file)
        return files


def _why_no_weights(directory: Path) -> str:
    where = quote(str(directory))
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    others = sorted(path.name for pattern in ("*.safetensors", "*.gguf") for path in directory.glob(pattern))
    if others:
        return (
            f"{where} has neither {SINGLE} nor {INDEX}, only {listing(others)}; "
            f"shards need their index, and other formats are not read"
        )
    if pickles:
        return (
            f"{where} holds its weights only as pickle files ({listing(pickles)}), which can run code when they are "
            f"opened and are never read. If you trust them, convert them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)"
        )
    return f"{where} has no weights: expected is {SINGLE}, or {INDEX} with the files it lists"
