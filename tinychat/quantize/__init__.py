"""The offline half of tinychat: an unquantized checkpoint in, one of 4 bits (AWQ), or 2, 3 or 8 (GPTQ), out.

A `method` is made of stages, each one file (`awq`, `rtn`); all end on a `grid`. `groups` says where scales fold;
`activations` carries `calibration` tokens through the model layer by layer; `pipeline` joins them to a checkpoint;
`report` tells what was done; what it cost, `tinychat.evaluation` measures. It knows no device layout and no
architecture's name.

The package is called as its function is: `tinychat.quantize(SRC, DST)` is `tinychat.quantize.quantize(SRC, DST)`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from tinychat.quantize.calibration import from_file, self_generated
from tinychat.quantize.method import names as methods
from tinychat.quantize.pipeline import quantize, quantize_in_memory
from tinychat.quantize.report import Report

__all__ = ["Report", "from_file", "methods", "quantize", "quantize_in_memory", "self_generated"]


class _Package(ModuleType):
    __call__ = staticmethod(quantize)


sys.modules[__name__].__class__ = _Package
