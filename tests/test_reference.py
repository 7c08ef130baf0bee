"""Linears of the reference backend: packed in as many bits as they claim, dequantized to the very numbers."""

import numpy as np
import pytest
import torch
from test_gptq_layout import random_qtensor

from tinychat.backends.reference import TorchOps
from tinychat.weights import Linear


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("k", "permuted"), [(64, False), (100, False), (128, True)])
def test_codes_come_back(bits, k, permuted):
    weight = random_qtensor(12, k, 32, bits, permuted=permuted)
    (segment,) = TorchOps("fp64").pack(Linear((weight,))).segments
    assert np.array_equal(segment.codes().numpy(), weight.codes)
    assert np.array_equal(segment.dequantize(torch.float64).numpy(), weight.dequantize(np.float64))


@pytest.mark.parametrize(
    ("bits", "group", "resident"), [(8, 128, 8.1875), (4, 128, 4.1875), (3, 128, 3.1875), (2, 64, 2.375)]
)
def test_codes_take_the_bytes_they_claim(bits, group, resident):
    ops = TorchOps()
    packed = ops.pack(Linear((random_qtensor(64, 4096, group, bits),)))
    assert ops.packed_bytes(packed) * 8 / (64 * 4096) == resident
