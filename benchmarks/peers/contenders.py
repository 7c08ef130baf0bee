"""Who is measured: tinychat and its peers, each as the command of a worker; and the models they run, made once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environments
from process import WorkerError

from tinychat import checkpoint
from tinychat.bench import shapes, traffic

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contender:
    """An engine in one setting.

    name         as the table and `--only` call it
    what         precision and setting, in words
    script       its worker
    environment  of `environments.RECIPES`; None: this process's own
    model        of `Models`
    options      for the worker
    """

    name: str
    what: str
    script: str
    environment: str | None
    model: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this is tinychat."""
        return self.environment is None

    def command(self, models: Models) -> list[str]:
        """The worker's command; makes environment and model where they are missing. WorkerError where that fails."""
        path, facts = models.find(self.model)
        interpreter = str(models.python(self.environment)) if self.environment else sys.executable
        return [interpreter, str(HERE / self.script), str(path), "--options", json.dumps(self.options | facts)]

    def variables(self) -> dict[str, str]:
        """Of the worker's environment: a peer finds its own packages only."""
        return {} if self.ours else {"PYTHONPATH": ""}


PEERS = (
    Contender("llama.cpp", "Q4_0, its own layout", "llama_worker.py", "llama.cpp", "gguf", {"layout": "default"}),
    Contender("llama.cpp-repack", "Q4_0, rows repacked", "llama_worker.py", "llama.cpp", "gguf", {"layout": "repack"}),
    Contender("llama.cpp-plain", "Q4_0, as in the file", "llama_worker.py", "llama.cpp", "gguf", {"layout": "plain"}),
    Contender("transformers", "bf16, eager", "torch_worker.py", "transformers", "config"),
    Contender("transformers-fp32", "fp32, eager", "torch_worker.py", "transformers", "float", {"dtype": "float32"}),
    Contender("gptqmodel", "the same AWQ checkpoint", "torch_worker.py", "gptqmodel", "awq"),
    # Its defaults round activations to int8 in groups of 32, where the CPU has VNNI or AMX.
    Contender("openvino", "int4 g128, default hints", "openvino_worker.py", "openvino", "openvino"),
    Contender(
        "openvino-float",
        "int4 g128, activations not rounded to int8",
        "openvino_worker.py",
        "openvino",
        "openvino",
        {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    ),
    Contender(
        "openvino-int8",
        "int4 g128, int8 activations in groups of 128",
        "openvino_worker.py",
        "openvino",
        "openvino",
        {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"},
    ),
)


def tinychats(shape: str, activations: list[int], head: int | None, unquantized: bool = False) -> list[Contender]:
    """tinychat in its default setting, or once for each width of activations asked for; perhaps unquantized, too."""
    if unquantized:
        plain = Contender("tinychat-fp16", "fp16, unquantized", "tinychat_worker.py", None, "float", {"head": 16})
        return [*tinychats(shape, activations, head), plain]
    common = {} if head is None else {"head": head}
    words = f"AWQ 4-bit g{shapes.find(shape).group_size}" + ("" if head is None else f", {head}-bit head")
    if not activations:
        return [Contender("tinychat", words, "tinychat_worker.py", None, "awq", common)]
    return [
        Contender(
            f"tinychat-a{bits}",
            f"{words}, {bits}-bit activations",
            "tinychat_worker.py",
            None,
            "awq",
            common | {"activations": bits},
        )
        for bits in activations
    ]


class Models:
    """The models of one shape below `folder`, random weights, made when first asked for; beside them, environments."""

    def __init__(self, folder: Path, shape: str):
        self._folder, self._shape = folder, shape

    def python(self, environment: str) -> Path:
        """The interpreter of an environment."""
        return environments.python(environment, self._folder)

    def find(self, kind: str) -> tuple[Path, dict[str, Any]]:
        """Where a model is, and facts of it that its worker needs: bytes_per_token where the file alone tells it."""
        path = self._folder / "models" / f"{self._shape}-{kind}"
        facts = path.with_name(f"{path.name}.json")
        if not facts.is_file():
            print(f"making {path} ...", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(getattr(self, f"_make_{kind}")(path)))
        return path, json.loads(facts.read_text())

    def _make_awq(self, path: Path, *options: str) -> dict[str, Any]:
        if not path.exists():
            write = [sys.executable, "-m", "tinychat", "bench", "--shape", self._shape, "--write", str(path), *options]
            _output(write, path)
        return {}

    def _make_float(self, path: Path) -> dict[str, Any]:
        return self._make_awq(path, "--float")

    def bytes_per_token(self, kind: str, head_bits: int) -> float:
        """What tinychat reads for one token of a model: its weights, the head at `head_bits`."""
        return traffic.of(checkpoint.open(self.find(kind)[0]), head_bits=head_bits).weights

    def _make_config(self, path: Path) -> dict[str, Any]:
        config = json.loads((self.find("awq")[0] / "config.json").read_text())
        del config["quantization_config"]
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        return {}

    def _make_gguf(self, path: Path) -> dict[str, Any]:
        return self._run("llama.cpp", "gguf_model.py", path)

    def _make_openvino(self, path: Path) -> dict[str, Any]:
        return self._run("openvino", "openvino_model.py", path)

    def _run(self, environment: str, script: str, path: Path) -> dict[str, Any]:
        config = self.find("config")[0] / "config.json"
        output = _output([str(self.python(environment)), str(HERE / script), str(config), str(path)], path)
        return json.loads(output.splitlines()[-1])


def _output(command: list[str], path: Path) -> str:
    """What the command that makes the model at `path` prints. WorkerError where it fails, with its log's place."""
    log = path.with_name(f"{path.name}.log")
    with log.open("wb") as out:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=out, text=True)
    if done.returncode:
        raise WorkerError(f"making {path} failed: see {log}")
    return done.stdout
