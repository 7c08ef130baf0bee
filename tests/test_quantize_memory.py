"""What the quantizer keeps in memory: two layers in fp32, the calibration activations and the embedding, at most.

In a process of its own, which has quantized before, so that libraries and their buffers are there already. The layer is
small beside those of real models but large beside whatever else comes and goes.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tinychat import checkpoint
from tinychat.bench import shapes, write
from tinychat.checkpoint.inventory import segments
from tinychat.weights import LINEARS

PEAK = Path("/proc/self/clear_refs")  # Linux: to write a 5 there begins the peak anew
N, LENGTH = 8, 128
PROGRAM = """
import json, sys
from pathlib import Path
from tinychat.memory import _fields
from tinychat.quantize import calibration, quantize

def kilobytes(name):
    return _fields(Path("/proc/self/status"))[name]

small, source, output, options = json.loads(sys.argv[1])
sequences = [[(7 * i + j) % 1000 for j in range(options["length"])] for i in range(options["n_sequences"])]
calibration.load = lambda *given, **more: (sequences, "tokens of this test")
quantize(small, output + "-small", **options)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
quantize(source, output, **options)
print(1024 * (kilobytes("VmHWM") - before))
"""


def shape(hidden, intermediate):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "vocab_size": 1000}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    return replace(shapes.SHAPES["llama-2-7b"], hf_config={**shapes.SHAPES["llama-2-7b"].hf_config, **sizes, **heads})


@pytest.mark.skipif(not PEAK.exists(), reason="the peak of a process is told and begun anew by Linux")
@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_two_layers_and_the_activations(method, tmp_path):
    small = write.write(shape(128, 256), tmp_path / "small", plain=True)
    source = write.write(shape(1024, 2816), tmp_path / "source", plain=True)
    options = {"method": method, "symmetric": True, "n_sequences": N, "length": LENGTH, "threads": 1, "progress": False}
    job = json.dumps([str(small), str(source), str(tmp_path / "out"), options])
    run = subprocess.run([sys.executable, "-c", PROGRAM, job], stdout=subprocess.PIPE, text=True, check=True)
    opened = checkpoint.open(source)
    config = opened.config
    parts = [part.shape for name in LINEARS for part in segments(config, opened.names, name, 0)]
    layer = 4 * sum(n * k for n, k in parts)
    assert layer > 50e6
    bound = 2 * layer + 4 * N * LENGTH * config.hidden_size + 2 * config.vocab_size * config.hidden_size
    assert int(run.stdout.splitlines()[-1]) <= bound
