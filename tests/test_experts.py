"""Mixtures of experts: the lowered decoder against the PyTorch one at every level, checkpoints, and what is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_architectures import TOLERANCE, every_backend, ours, theirs, tokens
from test_lowered_decoder import ISAS, build, f32, ids, joined, nmse, quantized, reference
from tiny_models import memory_weights, tiny
from transformers import AutoModelForCausalLM

from tinychat import checkpoint
from tinychat.architectures import translate
from tinychat.bench import shapes, traffic
from tinychat.bench.random_weights import RandomWeights
from tinychat.bench.write import write
from tinychat.cache import Rows
from tinychat.checkpoint import awq
from tinychat.config import Experts, ModelConfig, Rope
from tinychat.errors import CheckpointError, ConfigError
from tinychat.qtensor import bfloat16
from tinychat.weights import Layer, Linear, MemoryWeights

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def mixture(weight="f32", *, n=7, used=3, shared=50, normalized=True, layers=2, sparse=(0, 1), inter=43):
    """A random model; weight: f32, q4, or mixed: experts in 16 bits among those in 4."""
    hidden, heads, dim, dense, vocab = 60, 6, 10, 77, 97
    experts = Experts(n, used, inter, frozenset(sparse), normalized, shared)
    sizes = vocab, hidden, layers, heads, heads, dim, dense, 512
    config = ModelConfig("test", *sizes, norm_eps=1e-5, rope=Rope(dim=dim), experts=experts)
    seeds = iter(range(10_000))

    def one(rows, k):
        seed = next(seeds)
        if weight == "q4" or (weight == "mixed" and seed % 3):
            return quantized(rows, k, 32, seed)
        return f32(rows, k, seed=seed, scale=0.15).astype(np.float32 if weight == "f32" else bfloat16)

    def linear(*rows, k=hidden):
        return Linear(tuple(one(n, k) for n in rows))

    def norm():
        return 1 + f32(hidden, seed=next(seeds), scale=0.2)

    def layer(index):
        made = {"norm1": norm(), "norm2": norm()}
        made |= {"qkv": linear(*[heads * dim] * 3), "out": linear(hidden, k=heads * dim)}
        if index not in sparse:
            return Layer(**made, up=linear(dense, dense), down=linear(hidden, k=dense))
        rows = (n, 1) if shared else (n,)
        made["router"] = Linear(tuple(f32(r, hidden, seed=next(seeds), scale=0.2) for r in rows))
        if shared:
            made |= {"shared_up": linear(shared, shared), "shared_down": linear(hidden, k=shared)}
        return Layer(**made, up=linear(*[inter] * 2 * n), down=linear(*[hidden] * n, k=inter))

    blocks = [layer(index) for index in range(layers)]
    return MemoryWeights(config, f32(vocab, hidden, seed=next(seeds)), blocks, norm(), linear(vocab))


MODELS = {
    "shared expert, a plain layer": {"layers": 3, "sparse": (0, 2), "normalized": False},
    "two of eight": {"n": 8, "used": 2, "shared": 0},
    "one of many": {"n": 70, "used": 1, "shared": 0, "inter": 16},
    "all": {"n": 3, "used": 3, "shared": 700, "inter": 600},  # more than a piece at a time
}


@pytest.mark.parametrize("weight", ["f32", "q4", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference_at_every_level(name, weight):
    weights = mixture(weight, **MODELS[name])
    text = ids(40, 97)
    expected = reference(weights, dtype="fp64").step(Rows.of(text, 0, wanted="all"))
    for isa in ISAS:
        runner = build(weights, isa=isa)
        pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(text[:31], 0), (text[31:34], 31)]]
        pieces += [runner.step(Rows.of(text[at : at + 1], at)) for at in range(34, 40)]
        y = np.concatenate(pieces)
        if weight == "f32":
            assert np.abs(y - expected).max() < TOLERANCE * max(1, expected.std())
        assert nmse(y, expected) < 1e-6


def test_experts_find_a_way_of_reading_of_their_own():
    of_all, of_experts = ["qkv", "out", "head"], ["experts' up", "experts' down"]
    expected = {
        "shared expert, a plain layer": [*of_all, "up", "down", *of_experts, "shared down"],
        "two of eight": [*of_all, *of_experts],
    }
    for name, linears in expected.items():
        found = build(mixture("q4", **MODELS[name])).fetch
        assert found is None or sorted(found) == sorted(linears)


@pytest.mark.parametrize("weight", ["f32", "q4"])
def test_threads_do_not_change_a_bit(weight):
    weights = mixture(weight)
    text, results = ids(21, 97), []
    for threads in (1, 2, 3, 7):
        runner = build(weights, threads=threads)
        results.append([runner.step(Rows.of(text[:20], 0, wanted="all")), runner.step(Rows.of(text[20:], 20))])
    for result in results[1:]:
        for y, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(y, first)


def test_rows_of_several_slots():
    weights = mixture()
    runner, texts = build(weights, n_slots=2), [ids(9, 97, seed=1), ids(5, 97, seed=2)]
    alone = [build(weights).step(Rows.of(text, 0)) for text in texts]
    y = runner.step(joined(*(Rows.of(text, 0, slot) for slot, text in enumerate(texts))))
    np.testing.assert_allclose(y, np.concatenate(alone), atol=2e-5)


def test_only_the_experts_of_a_row_are_read():
    """The others may hold anything."""
    weights = mixture(layers=1, sparse=(0,), n=12, used=3)
    (layer,), unread = weights.layers, {}
    for backend in (reference, build):
        unread[backend] = []
        for expert in range(12):
            broken = [part.segments[0].copy() for part in layer.down.parts(12)]
            broken[expert][:] = np.nan
            changed = replace(weights, layers=[replace(layer, down=Linear(tuple(broken)))])
            if np.isfinite(backend(changed).step(Rows.of([5], 0))).all():
                unread[backend].append(expert)
    assert len(unread[build]) == 12 - 3
    assert unread[build] == unread[reference]


@every_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_go_where_transformers_sends_them(family, backend):
    """Told by the rows that an expert of NaN spoils."""
    everywhere = {} if family == "mixtral" else {"mlp_only_layers": []}
    model, config = tiny(family, num_hidden_layers=1, **everywhere)
    chosen = []
    (router,) = (module for module in model.modules() if type(module).__name__.endswith("TopKRouter"))
    router.register_forward_hook(lambda _, __, out: chosen.append(out[2].numpy()))
    text = tokens(60, config["vocab_size"])
    theirs(model, text)
    weights = memory_weights(model, config)
    (layer,), n = weights.layers, weights.config.experts.n_experts
    for expert in range(n):
        broken = [part.segments[0].copy() for part in layer.down.parts(n)]
        broken[expert][:] = np.nan
        changed = replace(weights, layers=[replace(layer, down=Linear(tuple(broken)))])
        spoiled = np.isnan(ours(changed, text, [41, 1, 18], backend)).any(1)
        np.testing.assert_array_equal(spoiled, (chosen[0] == expert).any(1))


def test_a_router_that_is_not_a_number_is_no_crash():
    weights = mixture(layers=1, sparse=(0,))
    (layer,) = weights.layers
    broken = Linear(tuple(np.full_like(s, np.nan) for s in layer.router.segments))
    changed = replace(weights, layers=[replace(layer, router=broken)])
    assert np.isnan(build(changed).step(Rows.of(ids(9, 97), 0))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read(family, tmp_path):
    model, config = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = checkpoint.open(tmp_path)
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    text = tokens(12, config["vocab_size"])
    assert np.abs(ours(found, text, [7, 1, 4]) - theirs(model, text)).max() < TOLERANCE


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
OF_QWEN = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
SIZES_OF = {"mixtral": SIZES, "qwen2_moe": SIZES | OF_QWEN, "qwen3_moe": SIZES | {"moe_intermediate_size": 32}}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_awq_checkpoint_is_read(family, tmp_path):
    """As the community publishes them: 4 bits but for routers, the gate of a shared expert, and the head."""
    model, config = tiny(family, **SIZES_OF[family])
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain/model.safetensors")
    plain = dict(tensors)
    for seed, name in enumerate(sorted(plain)):
        module, _, ending = name.rpartition(".")
        if ending == "weight" and plain[name].ndim == 2 and not module.endswith(("gate", "lm_head", "embed_tokens")):
            q = quantized(*tensors.pop(name).shape, 32, seed)
            tensors |= {f"{module}.{part}": array for part, array in awq.pack(q).items()}
            plain[name] = q.dequantize()
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    layout = awq.AwqFormat(group_size=32, modules_to_not_convert=("gate", "shared_expert_gate")).to_config()
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": layout}))
    save_file(tensors, tmp_path / "model.safetensors")

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, experts_implementation="eager"
    )
    found, text = checkpoint.open(tmp_path), tokens(12, config["vocab_size"])
    assert found.n_quantized == sum(plain[name].size for name in plain if name not in tensors)
    want = theirs(model, text)
    assert np.abs(ours(found, text, [7, 1, 4]) - want).max() < TOLERANCE * max(1, want.std())
    cpu = build(found)
    assert nmse(cpu.step(Rows.of(text[:9], 0, wanted="all")), want[:9]) < 1e-6
    assert nmse(cpu.step(Rows.of(text[9:], 9, wanted="all")), want[9:]) < 1e-6


def test_what_is_missing_or_left_over_is_named(tmp_path):
    model, _ = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({name: array for name, array in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        checkpoint.open(tmp_path)
    stacked = {"model.layers.0.mlp.experts.down_proj": np.zeros((9, 60, 19), np.float32)}  # as it is in memory
    save_file(tensors | stacked, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.0\.mlp\.experts\.down_proj"):
        checkpoint.open(tmp_path)


def test_configs():
    def experts(family, **changes):
        return translate({**tiny(family)[1], **changes})[0].experts

    assert experts("mixtral") == Experts(5, 2, 107, frozenset({0, 1}))
    assert experts("qwen2_moe") == Experts(7, 3, 21, frozenset({0, 2}), False, 50)
    assert experts("qwen3_moe", decoder_sparse_step=2, norm_topk_prob=True) == Experts(9, 4, 19, frozenset({1}))
    published = {k: v for k, v in tiny("qwen3_moe")[1].items() if k != "num_local_experts"} | {"num_experts": 128}
    assert translate(published)[0].experts.n_experts == 128
    with pytest.raises(ConfigError, match="num_experts_per_tok is 10; expected an integer from 1 to 9"):
        experts("qwen3_moe", num_experts_per_tok=10)
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        experts("qwen2_moe", mlp_only_layers="all")
    with pytest.raises(ConfigError, match="layer_types"):
        experts("qwen2_moe", use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=None)


def test_bytes_of_a_token(tmp_path):
    """Counted from the files and from the shape: of the experts, those that a token uses."""
    config = {**tiny("qwen2_moe", **SIZES_OF["qwen2_moe"])[1], "torch_dtype": "float16", "dtype": "float16"}
    shape = shapes.Shape(config, 32)
    source = RandomWeights(*shape.translate(), 32)
    need = traffic.of(source)
    bits = 4 + 20 / 32
    assert need.idle == pytest.approx(2 * (7 - 3) * 3 * 64 * 32 * bits / 8)
    plain = traffic.of(RandomWeights(*shape.translate(), None))
    assert plain.idle == pytest.approx(2 * (7 - 3) * 3 * 64 * 32 * 2)
    found = checkpoint.open(write(shape, tmp_path / "written"))
    assert traffic.of(found) == need
    assert found.n_parameters == source.n_parameters and found.n_quantized == source.n_quantized
    assert np.isfinite(build(found).step(Rows.of(ids(9, 97), 0))).all()
