"""FORMATS.md: its examples are what the layouts write, its table is what they say they hold."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from tinychat import checkpoint
from tinychat.checkpoint import layouts
from tinychat.qtensor import QTensor

PAGE = (Path(checkpoint.__file__).parent / "FORMATS.md").read_text()
EXAMPLES = re.findall(r"^    (\w+) (\d): ([\d ]+) = ([\da-f ]+)$", PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| `([\w-]+)`.*?\| `(\w+)\.py` \| ([\d, ]+) \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)


def test_the_page_has_examples_and_rows():
    assert {(name, int(bits)) for name, bits, _, _ in EXAMPLES} == {("awq", 4), ("gptq", 2), ("gptq", 3), ("gptq", 8)}
    assert {file for _, file, _, _ in ROWS} == set(layouts._layouts())


@pytest.mark.parametrize(("method", "bits", "codes", "words"), EXAMPLES)
def test_a_layout_writes_what_the_page_shows(method, bits, codes, words):
    values = np.array(codes.split(), np.uint8)
    # The page's codes are those of eight outputs of one input (AWQ), or of the inputs of one output (GPTQ).
    table = np.zeros((len(values), 32), np.uint8) if method == "awq" else np.zeros((32, len(values)), np.uint8)
    (table.T if method == "awq" else table)[0] = values
    n, k = table.shape
    q = QTensor(table, np.ones((n, 1), np.float16), np.zeros((n, 1), np.uint8), int(bits), k)
    layout = layouts.for_writing(int(bits), k)
    packed = layout.pack(q)["qweight"]
    assert layout.method == method
    found = packed[0] if method == "awq" else packed[:, 0]
    assert " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in found) == words


@pytest.mark.parametrize(("method", "file", "bits", "written"), ROWS)
def test_the_table_is_what_the_layouts_say(method, file, bits, written):
    layout = importlib.import_module(f"tinychat.checkpoint.{file}")
    assert layout.recognises({"quant_method": method})
    widths = {int(each) for each in bits.split(",")}
    assert widths == set(np.atleast_1d(layout.BITS).tolist())
    default = {b for b in widths if (offered := layout.for_writing(b, 128, False, False)) and offered.method == method}
    assert default == {int(each) for each in re.findall(r"\b\d\b", written.split("bits")[0])}
