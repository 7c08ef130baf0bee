"""The AWQ paper's own figures (arXiv 2306.00978): what each script prints beside ours, marked "paper".

WikiText-2 perplexity in windows of 2048 tokens where nothing else is said. Keys are models as the paper names them. Two
small ones are not the paper's: INT3-g128 by the authors' code, as Brevitas measured it (its pull request 1213).
"""

from __future__ import annotations

import re

ORIGINAL = {
    "OPT-1.3B": 14.62,
    "OPT-2.7B": 12.47,
    "OPT-6.7B": 10.86,
    "OPT-13B": 10.13,
    "OPT-30B": 9.56,
    "Llama-2-7B": 5.47,
    "Llama-2-13B": 4.88,
    "Llama-2-70B": 3.32,
    "LLaMA-7B": 5.68,
    "LLaMA-13B": 5.09,
    "LLaMA-30B": 4.10,
    "LLaMA-65B": 3.53,
    "Mistral-7B": 5.94,
    "Mixtral-8x7B": 4.14,
    "OPT-125M": 23.77,
    "Llama-3.2-1B": 8.77,
}
NOT_OF_THE_PAPER = {"OPT-125M", "Llama-3.2-1B"}

# INT3-g128: round to nearest; 0.1, 1 and 3 % of the channels in fp16, chosen by activation, by weight, at random.
TABLE1 = {
    "OPT-1.3B": (119.00, (25.03, 16.91, 16.68), (108.71, 98.55, 98.08), (119.76, 109.38, 61.49)),
    "OPT-6.7B": (23.54, (11.58, 11.39, 11.36), (23.41, 22.37, 22.45), (23.54, 24.23, 24.22)),
    "OPT-13B": (46.04, (10.51, 10.43, 10.42), (46.07, 48.96, 54.49), (44.87, 42.00, 39.71)),
}

# INT3-g128, s = 1, 1.25, 1.5, 2, 4: share of changed scales, mean ratio of scales, that over s, perplexity.
TABLE2 = {
    "OPT-6.7B": (
        (0.0, 0.028, 0.044, 0.082, 0.212),
        (1.0, 1.005, 1.013, 1.038, 1.213),
        (1.0, 0.804, 0.676, 0.519, 0.303),
        (23.54, 12.87, 12.48, 11.92, 12.36),
    )
}

# INT3-g128: RTN, 1 % of the channels in fp16, s = 2, AWQ.
TABLE3 = {
    "OPT-1.3B": (119.47, 16.91, 18.63, 16.32),
    "OPT-2.7B": (298.00, 13.69, 14.94, 13.58),
    "OPT-6.7B": (23.54, 11.39, 11.92, 11.39),
    "OPT-13B": (46.04, 10.43, 10.80, 10.56),
    "OPT-30B": (18.80, 9.85, 10.32, 9.77),
}

# By bits, g128: RTN, GPTQ, GPTQ-R, AWQ. The last two rows are Table 5's, which has AWQ alone; the heads of its columns
# look swapped there: here the smaller model has the higher perplexity.
TABLE4 = {
    3: {
        "Llama-2-7B": (6.66, 6.43, 6.42, 6.24),
        "Llama-2-13B": (5.52, 5.48, 5.41, 5.32),
        "Llama-2-70B": (3.98, 3.88, 3.86, 3.74),
        "LLaMA-7B": (7.01, 8.81, 6.53, 6.35),
        "LLaMA-13B": (5.88, 5.66, 5.64, 5.52),
        "LLaMA-30B": (4.88, 4.88, 4.74, 4.61),
        "LLaMA-65B": (4.24, 4.17, 4.21, 3.95),
        "Mistral-7B": (None, None, None, 6.52),
        "Mixtral-8x7B": (None, None, None, 4.83),
        "OPT-125M": (45.72, None, None, 31.53),
        "Llama-3.2-1B": (34.38, None, None, 15.16),
    },
    4: {
        "Llama-2-7B": (5.73, 5.69, 5.63, 5.60),
        "Llama-2-13B": (4.98, 4.98, 4.99, 4.97),
        "Llama-2-70B": (3.46, 3.42, 3.43, 3.41),
        "LLaMA-7B": (5.96, 6.22, 5.83, 5.78),
        "LLaMA-13B": (5.25, 5.23, 5.20, 5.19),
        "LLaMA-30B": (4.23, 4.24, 4.22, 4.21),
        "LLaMA-65B": (3.67, 3.66, 3.66, 3.62),
        "Mistral-7B": (None, None, None, 6.05),
        "Mixtral-8x7B": (None, None, None, 4.30),
    },
}

# INT4-g128: original, RTN, GPTQ, AWQ; per cent solved, or passed by the first program.
TABLE8 = {
    "gsm8k": {
        "Llama-2-7B": (13.87, 11.07, 12.13, 13.57),
        "Llama-2-13B": (26.16, 21.23, 24.26, 25.25),
        "Llama-2-70B": (56.41, 53.98, 56.03, 56.40),
    },
    "mbpp": {"CodeLlama-7b-Instruct": (38.53, 37.51, 31.97, 40.64)},
}

# INT2-g64: RTN, GPTQ, AWQ and then GPTQ.
TABLE9 = {
    "OPT-1.3B": (10476, 46.67, 35.71),
    "OPT-2.7B": (193210, 28.15, 25.70),
    "OPT-6.7B": (7622, 16.65, 15.71),
    "OPT-13B": (17564, 16.74, 13.25),
    "OPT-30B": (8170, 11.75, 11.38),
}

# INT3-g128, OPT-6.7B; (calibrated on, evaluated on) -> perplexity.
FIGURE8 = {
    "gptq": {
        ("PubMed", "PubMed"): 32.48,
        ("PubMed", "Enron"): 50.41,
        ("Enron", "PubMed"): 34.81,
        ("Enron", "Enron"): 45.52,
    },
    "awq": {
        ("PubMed", "PubMed"): 32.56,
        ("PubMed", "Enron"): 45.07,
        ("Enron", "PubMed"): 33.16,
        ("Enron", "Enron"): 44.57,
    },
}


def closest(table: dict[str, tuple], model: str, default: str) -> tuple[str, tuple]:
    """(name, figures) of the model that the path or hub id `model` names, else of `default`."""
    plain = _plain(model)
    named = [name for name in table if re.search(rf"{re.escape(_plain(name))}(?![0-9.])", plain)]
    name = max(named, key=len) if named else default
    return name, table[name]


def whose(name: str) -> str:
    """Whose figures of the model `name` those of a table are."""
    return "Brevitas" if name in NOT_OF_THE_PAPER else "paper"


def _plain(name: str) -> str:
    return re.sub(r"[-_/ ]", "", name.lower())
