"""grain's real weights through files: what each method leaves of the distance that rounding makes."""

from pathlib import Path

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
