"""grain's real weights through files: what each method leaves of the distance that rounding makes."""

from pathlib import Path

import pytest

from tinychat import backends, checkpoint
from tinychat.evaluation import likelihood
from tinychat.quantize import calibration, quantize

GRAIN = Path(__file__).parents[1] / "models" / "grain" / "checkpoint"
TEXTS = {"n_sequences": 32, "length": 128}  # that the model writes itself


def test_methods_from_files(tmp_path):
    windows, _ = calibration.load(None, checkpoint.open(GRAIN), seed=1, **TEXTS)

    def runner(path):
        return backends.choose()[0].build(checkpoint.open(path), ctx_size=128, kv_dtype="fp32", head=16)

    distances = {}
    for method in ("rtn", "awq", "gptq", "awq+gptq"):
        path = tmp_path / method
        quantize(GRAIN, path, method=method, bits=3, group_size=64, progress=False, **TEXTS)
        distances[method] = likelihood.compare_runs(runner(path), runner(GRAIN), windows).kl.mean
    assert distances["awq"] < 0.6 * distances["rtn"], distances
    assert distances["gptq"] < 0.7 * distances["rtn"], distances
    assert distances["awq+gptq"] < 0.9 * distances["gptq"], distances
    assert distances["awq+gptq"] < distances["awq"], distances  # which alone makes up for layers before it


@pytest.mark.parametrize(("bits", "goal"), [(3, 0.40), (4, 0.80)])
def test_what_awq_leaves_of_the_perplexity_that_rounding_adds(bits, goal, tmp_path, data_dir):
    """On text that neither the model nor the search has seen."""
    text = (data_dir / "text" / "tinystories_val.txt").read_text()
    windows = likelihood.windows(checkpoint.open(GRAIN).tokenizer().encode(text)[:20_000], 512)

    def perplexity(path):
        runner = backends.choose()[0].build(checkpoint.open(path), ctx_size=512, kv_dtype="fp32", head=16)
        return likelihood.score(runner, windows).perplexity

    given = {"calibration": data_dir / "text" / "tinystories_train.txt", "n_sequences": 128, "length": 256}
    for method in ("rtn", "awq"):
        quantize(GRAIN, tmp_path / method, method=method, bits=bits, group_size=64, progress=False, **given)
    original, rounded, found = (perplexity(path) for path in (GRAIN, tmp_path / "rtn", tmp_path / "awq"))
    assert found - original < goal * (rounded - original), (original, rounded, found)
