"""What the quantizer keeps in memory: two layers in fp32, the calibration activations and the embedding, at most.

In a process of its own, which has quantized before, so that libraries and their buffers are there already. The layer is
small beside those of real models, for which alone there is time here; so are the vocabulary, the tokens, the parts that
are worked on at once, and the blocks that the allocator gives back as soon as they are free: of a large layer it does
that by itself.
"""

import json
import os
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
N, LENGTH = 2, 96
PROGRAM = """
import json, sys
from pathlib import Path
from tinychat.quantize import awq, calibration, clip, dense, factor, gptq, quantize

def kilobytes(name):
    (found,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(found.split()[1])

clip.SHRINK = clip.SHRINK[:2]  # more of the same takes time, not memory
factor.TILE, clip.PIECE, dense.MULTIPLIED = 192, 2**17, 2**17
dense.SLICE, awq.SLICE, gptq.NUMBERS = 2**18, 2**18, 2**18
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
    llama, heads = shapes.SHAPES["llama-2-7b"], {"num_attention_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "vocab_size": 6000}
    return replace(llama, hf_config={**llama.hf_config, **sizes, **heads, "num_key_value_heads": hidden // 64})


@pytest.mark.skipif(not PEAK.exists(), reason="Linux tells the peak of a process, and begins it anew")
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_two_layers_and_the_activations(method, tmp_path):
    small = write.write(shape(256, 512), tmp_path / "small", plain=True)
    source = write.write(shape(768, 2048), tmp_path / "source", plain=True)
    options = {"method": method, "symmetric": True, "n_sequences": N, "length": LENGTH, "threads": 1, "progress": False}
    job = json.dumps([str(small), str(source), str(tmp_path / "out"), options])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, job], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    opened = checkpoint.open(source)
    config = opened.config
    parts = [part.shape for name in LINEARS for part in segments(config, opened.names, name, 0)]
    layer = 4 * sum(n * k for n, k in parts)
    bound = 2 * layer + 4 * N * LENGTH * config.hidden_size + 2 * config.vocab_size * config.hidden_size
    taken = int(run.stdout.splitlines()[-1])
    assert taken <= bound, f"{taken / layer:.2f} layers"
