"""Every family's logits on every backend against transformers', on tiny random models with awkward numbers.

Parameters are random with logits of standard deviation near 1; the largest difference allowed is 1e-4 (found: a few
1e-6). A family is a file in `tinychat/architectures/`; one without models here fails.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_families
import torch
from tiny_models import BASES, MIXTURES, memory_weights, tiny

import tinychat
from tinychat import architectures, checkpoint, decoder, quantize, rope
from tinychat.backends import cpu, reference
from tinychat.cache import Rows
from tinychat.config import RopeScaling
from tinychat.quantize.dense import dense_layer
from tinychat.quantize.dense import part as part_of
from tinychat.quantize.groups import scaling_groups
from tinychat.weights import LINEARS, OF_EXPERTS, Layer, Linear, MemoryWeights

TOLERANCE = 1e-4
BACKENDS = [module for module in (reference, cpu) if module.available() is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.rpartition(".")[2])
# name: what it changes; families whose keys are Llama's get those of COMMON and their own
COMMON = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "GQA 1, heads of 64": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 128},
    "GQA 7, heads of 80": {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 80, "hidden_size": 70},
    "GQA 3, heads of 128": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 51},
    "one of everything": {
        "vocab_size": 3,
        "hidden_size": 1,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
    },
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
EIGHT_HEADS = {"num_attention_heads": 8, "hidden_size": 64}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
OWN = {
    "mpt": {
        "heads of no power of two": {},
        "heads of a power of two": {"n_heads": 4, "d_model": 64},
        "one head": {"n_heads": 1},
        "a head of its own": {"tie_word_embeddings": False},
        "heads of 64": {"d_model": 192, "n_heads": 3},
        "clipped, scaled": {"attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.2}},
    },
    "falcon": {
        "7B": {},
        "7B with biases, a head of its own": {"bias": True, "tie_word_embeddings": False},
        "40B": NEW_FALCON,
        "40B with biases": {**NEW_FALCON, "bias": True},
        "40B, one key-value head for each": {**NEW_FALCON, "num_kv_heads": 6},
        "11B, one norm": {**NEW_FALCON, "num_ln_in_parallel_attn": 1},
        "1B": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True} | EIGHT_HEADS,
        "1B, parallel": {"alibi": True, "multi_query": False} | EIGHT_HEADS,
        "sequential, rotary": {"parallel_attn": False},
    },
    "llama": {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "attention bias only": {"attention_bias": True},
        "head_dim from hidden_size": {"head_dim": None, "hidden_size": 96, "num_key_value_heads": None},
    },
    "mistral": {
        "window": {"sliding_window": 5},
        "window of one": {"sliding_window": 1},
        "no window": {"sliding_window": None},
        "head_dim from hidden_size": {"head_dim": None, "hidden_size": 96},
    },
    "qwen2": {
        "window": {**WINDOWED, "max_window_layers": 1},
        "window in layer_types": {**WINDOWED, "layer_types": MIXED_LAYERS},
        "window switched off": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    },
    "qwen3": {
        "attention bias": {"attention_bias": True},
        "window": {**WINDOWED, "max_window_layers": 2},
        "window in layer_types": {**WINDOWED, "layer_types": MIXED_LAYERS},
    },
    "mixtral": {
        "window": {"sliding_window": 5},
        "one expert of one": {"num_local_experts": 1, "num_experts_per_tok": 1},
        "all used": {"num_local_experts": 3, "num_experts_per_tok": 3},
        "many, most without a row": {"num_local_experts": 60, "num_experts_per_tok": 1},
    },
    "qwen2_moe": {
        "every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 4},
        "probabilities that sum to 1": {"norm_topk_prob": True},
        "no bias": {"qkv_bias": False},
        "window": {**WINDOWED, "layer_types": MIXED_LAYERS},
        "no experts at all": {"mlp_only_layers": [0, 1, 2]},
    },
    "qwen3_moe": {
        "probabilities that sum to 1": {"norm_topk_prob": True},
        "attention bias": {"attention_bias": True},
        "window": WINDOWED,
        "every third layer": {"decoder_sparse_step": 3, "num_hidden_layers": 4},
    },
}
LEVELS = cpu._cpu.supported_isas().split() if cpu in BACKENDS else []
LIKE_LLAMA = [family for family in OWN if family not in BASES]  # in the keys of config.json
CASES = [(family, name, change) for family in LIKE_LLAMA for name, change in COMMON.items()]
VARIANTS = {**OWN, **tiny_families.CASES}
EACH = [(family, name) for family, variants in VARIANTS.items() for name in variants]
each_variant = pytest.mark.parametrize(("family", "name"), EACH, ids=[f"{f}: {n}" for f, n in EACH])


def tokens(count: int, vocab_size: int = 97) -> np.ndarray:
    return np.random.default_rng(7).integers(0, vocab_size, count)


def theirs(model, ids: np.ndarray, chunks: list[int] | None = None) -> np.ndarray:
    """transformers' logits [tokens, vocab_size], in chunks through its cache."""
    cache, logits = None, []
    with torch.no_grad():
        for part in np.split(ids, np.cumsum(chunks or [len(ids)])[:-1]):
            out = model(torch.from_numpy(part)[None], past_key_values=cache, use_cache=chunks is not None)
            cache = out.past_key_values
            logits.append(out.logits[0].numpy())
    return np.concatenate(logits)


def ours(weights, ids: np.ndarray, chunks: list[int], backend=reference, **options) -> np.ndarray:
    """Our logits [tokens, vocab_size]."""
    runner = backend.build(weights, ctx_size=len(ids), threads=1, kv_dtype="fp32", **options)
    logits, start = [], 0
    for part in np.split(ids.astype(np.int32), np.cumsum(chunks)[:-1]):
        logits.append(runner.step(Rows.of(part, start, wanted="all")))
        start += len(part)
    return np.concatenate(logits)


def test_every_family_has_models_here():
    families = set(VARIANTS)
    assert set(architectures.supported()) == families
    files = {path.stem for path in Path(architectures.__file__).parent.glob("*.py")}
    assert files - families == {"__init__", "config_reader", "names"}, (
        "a file of a family needs NAMES and translate, and models in this test"
    )


@every_backend
@pytest.mark.parametrize(("family", "name", "change"), CASES, ids=[f"{f}: {n}" for f, n, _ in CASES])
def test_logits_equal_transformers(family, name, change, backend):
    model, config = tiny(family, **change)
    weights = memory_weights(model, config)
    ids = tokens(23, config["vocab_size"])
    want = theirs(model, ids)
    for chunks in ([23], [1, 9, 2, 11], [4, 1, 5, 6, 7], [1] * 23):  # also to, at and past a window of 5
        assert np.abs(ours(weights, ids, chunks, backend) - want).max() < TOLERANCE, chunks
    if name != "one of everything":
        assert 0.3 < want.std() < 3


def variant(family: str, name: str):
    """transformers' model."""
    change = VARIANTS[family][name]
    # transformers adds Falcon's ALiBi twice where attention is "eager": once by its mask
    return tiny(family, attention="sdpa" if change.get("alibi") else "eager", **change)[0]


@each_variant
def test_logits_of_variants_equal_transformers(family, name, tmp_path, record_property):
    """From files as transformers writes them: prefill, chunks and single tokens, past every window, on the reference
    and at every level of instructions."""
    model = variant(family, name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    weights = checkpoint.open(tmp_path)
    ids = tokens(23)
    want = theirs(model, ids)
    assert 0.3 < want.std() < 3
    every = [[23], [1, 9, 2, 11], [4, 1, 5, 6, 7], [1] * 23]
    runs = [(backend, chunks, {}) for backend in BACKENDS for chunks in every]
    if cpu in BACKENDS:
        runs += [(cpu, [1, 19, 3], {"isa": isa}) for isa in LEVELS]
    by_length = weights.config.rope.scaling is RopeScaling.LONGROPE  # keys stay as they were stored: chunks matter
    for backend, chunks, options in runs:
        if by_length:
            want = theirs(model, ids, chunks)
        difference = np.abs(ours(weights, ids, chunks, backend, **options) - want).max()
        record_property(backend.__name__.rpartition(".")[2], float(difference))
        assert difference < TOLERANCE, (backend.__name__, chunks, options)


@each_variant
def test_folding_scales_keeps_the_logits(family, name, tmp_path):
    """Every scaling group of every family, with scales from a quarter to four, before anything is rounded."""
    model = variant(family, name)
    model.save_pretrained(tmp_path)
    source = checkpoint.open(tmp_path)
    generator, folded = torch.Generator().manual_seed(0), []
    for index in range(source.config.n_layers):
        layer = dense_layer(source.layer(index), lambda *_: ("", "kept"))
        groups = scaling_groups(source.config, source.config.experts_of(index))
        for group in (group for group in groups if group.producer):  # others are clipped alone
            channels = group.pooled(torch.ones(part_of(layer, group.consumers[0]).weight.shape[1]))
            layer = group.fold(layer, 4 ** (2 * torch.rand(len(channels), generator=generator) - 1))
        changed = vars(layer) | {name: whole(getattr(layer, name)) for name in (*LINEARS, *OF_EXPERTS)}
        folded.append(Layer(**{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in changed.items()}))
    ends = source.norm(), source.head(), source.norm_bias(), source.ends()
    after = MemoryWeights(source.config, source.embed(), folded, *ends)
    ids = tokens(23)
    difference = np.abs(ours(after, ids, [20, 3]) - ours(source, ids, [20, 3])).max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("family", architectures.supported())
def test_what_is_quantized_is_loaded_and_generates(family, tmp_path):
    """AWQ on a little text: what is written is what runs, on both backends, and not far from what it was."""
    model, _ = tiny(family, **tiny_families.whole_words(family))
    model.save_pretrained(tmp_path / "float")
    ids = tokens(48)
    sequences = [part.tolist() for part in np.split(ids, 3)]
    source = checkpoint.open(tmp_path / "float")
    in_memory, _ = quantize.quantize_in_memory(source, method="awq", group_size=32, sequences=sequences)
    assert all(segment.bits == 4 for layer in in_memory.layers for segment in layer.qkv.segments)
    quantize.quantize(tmp_path / "float", tmp_path / "awq", method="rtn", group_size=32, progress=False)
    written = checkpoint.open(tmp_path / "awq")
    want, rounded = (ours(weights, ids, [40, 8]) for weights in (source, written))
    for made in (rounded, ours(in_memory, ids, [40, 8])):
        assert 1e-5 < ((made - want) ** 2).sum() / ((want - want.mean(0)) ** 2).sum() < 0.3
    if cpu in BACKENDS:
        lowered = ours(written, ids, [40, 8], cpu)
        assert ((lowered - rounded) ** 2).sum() / (rounded**2).sum() < 1e-6
        with tinychat.load(tmp_path / "awq", device="cpu", kv_dtype="fp32") as llm:
            first, second = (llm.generate(ids[:5].tolist(), max_tokens=6, temperature=0) for _ in range(2))
        assert first.tokens == second.tokens and len(first.tokens) == 6


def whole(dense) -> Linear | None:
    """A linear, or those of experts, as weights."""
    if dense is None:
        return None
    stack = dense if isinstance(dense, tuple) else (dense,)
    bias = None if dense is stack or dense.bias is None else dense.bias.numpy()
    return Linear(tuple(one.weight.numpy() for one in stack), bias)


# A context of 64 stretched to 256 and run to 700: beyond both.
STRETCHED = {"max_position_embeddings": 256, "num_hidden_layers": 2, "head_dim": 16, "rope_theta": 10000.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.1, 1.3, 2.0, 3.0, 5.0, 8.0, 9.0],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    },
}


@every_backend
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", [family for family in LIKE_LLAMA if family not in MIXTURES])
def test_long_positions_under_every_scaling(family, scaling, backend):
    model, config = tiny(family, **STRETCHED, rope_parameters=SCALINGS[scaling])
    weights = memory_weights(model, config)
    assert weights.config.rope.scaling is RopeScaling(scaling)
    ids = tokens(700)
    want = theirs(model, ids)
    assert np.abs(ours(weights, ids, [700], backend) - want).max() < TOLERANCE
    chunks = [200, 57, 1, 1, 300, 141]
    if scaling == "dynamic":  # frequencies follow the length, and keys stay as they were stored: chunks matter
        model, _ = tiny(
            family, **STRETCHED, rope_parameters=SCALINGS[scaling]
        )  # transformers' keeps the longest length
        in_chunks = theirs(model, ids, chunks)
        assert np.abs(in_chunks - want).max() > 100 * TOLERANCE
        want = in_chunks
    assert np.abs(ours(weights, ids, chunks, backend) - want).max() < TOLERANCE


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_sequence_that_starts_at_position_100000(scaling):
    model, config = tiny("llama", **STRETCHED, rope_parameters=SCALINGS[scaling])
    weights = memory_weights(model, config)
    ids, positions = tokens(40), np.arange(100_000, 100_040, dtype=np.int32)
    with torch.no_grad():
        want = (
            model(torch.from_numpy(ids)[None], position_ids=torch.from_numpy(positions)[None].long()).logits[0].numpy()
        )
    ops = reference.TorchOps()
    turned = tuple(map(torch.from_numpy, rope.angles(weights.config.rope, positions, np.full(40, 100_040))))
    context = dataclasses.replace(decoder.Context.of_sequences(weights.config, [40]), angles=(turned,))
    x = torch.from_numpy(weights.embedding[ids])
    for index, layer in enumerate(weights.layers):
        x = decoder.block(weights.config, ops, decoder.pack_layer(ops, layer), index, x, context)
    x = ops.norm(x, ops.vector(weights.final_norm), weights.config.norm_eps)
    assert np.abs(ops.linear(x, ops.pack(weights.output_head)).numpy() - want).max() < TOLERANCE


def test_scalings_change_the_logits():
    results = []
    for scaling in SCALINGS:
        model, config = tiny("llama", **STRETCHED, rope_parameters=SCALINGS[scaling])
        results.append(ours(memory_weights(model, config), tokens(300), [300]))
    for index, one in enumerate(results):
        assert all(np.abs(one - other).max() > 100 * TOLERANCE for other in results[:index])


def test_every_scaling_is_covered():
    assert set(SCALINGS) == {scaling.value for scaling in RopeScaling}
