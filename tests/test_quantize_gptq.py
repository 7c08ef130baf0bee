"""GPTQ against the columns one by one in float64, and what it promises: never worse than rounding to nearest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_quantize_awq import ALL, random_weights, sequences, tiny_config

from tinychat.backends.reference import TorchOps
from tinychat.config import Experts
from tinychat.decoder import Context, block, pack_layer
from tinychat.errors import CheckpointError, UsageError
from tinychat.quantize import factor, gptq, gram, pipeline, quantize_in_memory
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import Dense
from tinychat.quantize.grid import Grid

TOKENS = 300


def problem(n=24, k=96, tokens=TOKENS, seed=0, dead=()):
    """(a linear, the Gram matrix of inputs that are correlated)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    x[:, list(dead)] = 0
    weight = torch.randn(n, k, generator=generator) * 0.1
    return Dense("out", weight, None, (n,), ("out",), (None,)), x.T @ x


def damping(gram, tokens):
    """Of each channel: see `factor`."""
    diagonal = gram.diagonal().double()
    known = tokens / (tokens + factor.PRIOR)
    parts = known * diagonal + (1 - known) * diagonal[diagonal > 0].median()
    return (factor.DAMPING + factor.CHANCE * len(gram) / tokens) * parts


def naive(weight, gram, tokens, grid, act_order=None):
    """Column by column: round, move all columns to come, strike the column out of the inverse (equations 2 and 3).

    Codes lie as columns do, or, where the order is free, one after the other as they were made.
    """
    w, h = weight.double().numpy().copy(), gram.double().numpy().copy()
    k = len(h)
    h[np.diag_indices(k)] += damping(gram, tokens).numpy()
    inverse = np.linalg.inv(h)
    width = grid.width(k)
    order = np.argsort(-gram.diagonal().numpy(), kind="stable") if act_order else np.arange(k)
    _, static_scales, static_zeros = (t.double().numpy() for t in grid.fitted(weight))
    scales, zeros, codes = static_scales.copy(), static_zeros.copy(), np.zeros_like(w)
    for i, j in enumerate(order):
        g = (i if act_order == "free" else j) // width
        if act_order != "static" and i % width == 0:
            part = torch.from_numpy(w[:, order[i : i + width]]).float()
            scales[:, g], zeros[:, g] = (t.numpy() for t in grid.parameters(part.amin(1), part.amax(1)))
        codes[:, j] = np.clip(np.round(w[:, j] / scales[:, g]) + zeros[:, g], 0, grid.top)
        error = (w[:, j] - (codes[:, j] - zeros[:, g]) * scales[:, g]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        w[:, j] = 0
    return codes[:, order] if act_order == "free" else codes, scales, zeros


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [None, "static", "free"])
@pytest.mark.parametrize(("k", "group"), [(96, 32), (96, -1), (200, 200), (320, 64), (150, 40), (300, 150)])
def test_it_is_the_columns_one_by_one(k, group, act_order, symmetric):
    grid = Grid(3, group, symmetric)
    part, gram = problem(k=k, tokens=2 * k)
    codes, scales, zeros = naive(part.weight, gram, 2 * k, grid, act_order)
    _, at_first, zeros_at_first = grid.fitted(part.weight)
    found = gptq.Solver(gram, 2 * k, act_order)._solve(part, grid, at_first, zeros_at_first, free=act_order == "free")
    same = [float((a.numpy() == b).mean()) for a, b in zip(found, (codes, scales, zeros), strict=True)]
    assert same[0] > 0.99 and same[1] > 0.97 and same[2] > 0.97  # fp32 decides a tie differently now and then


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("act_order", [None, "static", "free"])
def test_the_loss_reported_is_that_of_the_tensor(bits, act_order):
    part, gram = problem()
    grid = Grid(bits, 32)
    made, (nearest, found, power) = gptq.Solver(gram, TOKENS, act_order).quantize(part, grid)

    def loss(q):
        error = q.dequantize(np.float64) - part.weight.double().numpy()
        return float(np.trace(error @ gram.double().numpy() @ error.T))

    assert found == pytest.approx(loss(made), rel=1e-3)
    assert nearest == pytest.approx(loss(grid.quantize(part.weight)), rel=1e-3)
    assert found < 0.7 * nearest < nearest < power


@pytest.mark.parametrize(("n", "seeds"), [(40, 5), (1, 100)])
def test_no_row_is_worse_than_rounding(n, seeds):
    """Groups of one weight or two are exact but for the ends of ranges, which updates then move beyond."""
    for seed in range(seeds):
        part, gram = problem(n=n, k=12, tokens=3, seed=seed)
        grid = Grid(4, 2)
        made, _ = gptq.Solver(gram, 3).quantize(part, grid)
        errors = [torch.from_numpy(q.dequantize()) - part.weight for q in (made, grid.quantize(part.weight))]
        found, nearest = (((e @ gram) * e).sum(1) for e in errors)
        assert (found <= nearest + 1e-6).all()


def test_dead_channels_and_too_few_tokens():
    part, gram = problem(tokens=5, dead=(0, 7, 95))
    grid = Grid(4, 32)
    made, _ = gptq.Solver(gram, 5, act_order="static").quantize(part, grid)
    rtn = grid.quantize(part.weight)
    assert np.isfinite(made.dequantize()).all()
    assert np.array_equal(made.dequantize()[:, [0, 7, 95]], rtn.dequantize()[:, [0, 7, 95]])
    silent, (nearest, found, power) = gptq.Solver(torch.zeros(96, 96), 5).quantize(part, grid)
    assert np.array_equal(silent.codes, rtn.codes) and nearest == found == power == 0


@pytest.mark.parametrize("k", [40, 64, 200])
def test_a_factor_in_tiles_is_the_factor(k, monkeypatch):
    """Of several tiles, the last of which is smaller; H in another order; rows on both sides of a tile's end."""
    _, gram = problem(k=k, tokens=2 * k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(factor, "TILE", 64)
    made = factor.Factor(gram, 2 * k, order)
    whole = made.rows(0, k).double()
    damped = gram[order][:, order].double()
    damped.diagonal().add_(damping(gram, 2 * k)[order])
    inverse = torch.linalg.inv(damped)
    assert (whole.T @ whole - inverse).abs().max() < 1e-6 * inverse.abs().max()
    assert (whole.tril(-1) == 0).all()
    for first, last in ((0, 7), (30, min(k, 70)), (k - 1, k)):
        assert torch.equal(made.rows(first, last), whole[first:last, first:].float())


def test_massive_channels_do_not_drown_the_others():
    """With two of them in other units the factor is as before, but for what the median adds to their damping."""
    _, gram = problem()
    units = torch.ones(96)
    units[[3, 50]] = 1e4
    found = factor.Factor(gram * torch.outer(units, units), TOKENS).rows(0, 96) * units
    expected = factor.Factor(gram, TOKENS).rows(0, 96)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("act_order", [None, "static"])
def test_one_token_tells_little(act_order):
    """What it seems to say of channels that were silent in it, above all."""
    part, _ = problem(n=64, k=96)
    grid = Grid(4, 32)
    nearest = float(((torch.from_numpy(grid.quantize(part.weight).dequantize()) - part.weight) ** 2).sum())
    for seed in range(10):
        x = torch.randn(1, 96, generator=torch.Generator().manual_seed(seed))
        made, _ = gptq.Solver(x.T @ x, 1, act_order).quantize(part, grid)
        assert float(((torch.from_numpy(made.dequantize()) - part.weight) ** 2).sum()) < 1.1 * nearest


def test_few_tokens_do_not_mislead(monkeypatch):
    """On other tokens than those that were solved for."""
    generator = torch.Generator().manual_seed(0)
    part, _ = problem(n=64, k=128)
    mixed = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q * torch.arange(1, 129) ** -0.5
    x = torch.randn(64, 128, generator=generator) @ mixed.T

    def loss(q):
        error = torch.from_numpy(q.dequantize()) - part.weight
        return float(((error @ mixed) ** 2).sum())

    found = loss(gptq.Solver(x.T @ x, 64).quantize(part, Grid(4, 32))[0])
    monkeypatch.setattr(factor, "CHANCE", 0.0)
    assert found < 0.8 * loss(gptq.Solver(x.T @ x, 64).quantize(part, Grid(4, 32))[0])
    assert found < 0.8 * loss(Grid(4, 32).quantize(part.weight))


def test_rows_are_solved_for_a_few_at_a_time(monkeypatch):
    part, gram = problem()
    whole = gptq.Solver(gram, TOKENS).quantize(part, Grid(3, 32))
    monkeypatch.setattr(gptq, "NUMBERS", 7 * 96)
    pieces = gptq.Solver(gram, TOKENS).quantize(part, Grid(3, 32))
    assert all(np.array_equal(getattr(whole[0], n), getattr(pieces[0], n)) for n in ("codes", "scales", "zeros"))
    assert pieces[1] == pytest.approx(whole[1], rel=1e-6)


def test_inputs_beyond_range_are_named():
    with pytest.raises(CheckpointError, match=r"layers\.3\.out: its inputs"):
        gptq.Solver(torch.full((4, 4), float("inf")), 9, name="layers.3.out")


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("act_order", [None, "static", "free"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_whole_models(method, act_order, symmetric):
    config = tiny_config(biases=ALL)
    source = random_weights(config, salient=(3, 17))
    arguments = {"bits": 3, "group_size": 16, "sequences": sequences(config), "symmetric": symmetric}
    made, report = quantize_in_memory(source, method=method, act_order=act_order, **arguments)
    rounding = [r for r in report.groups if r.group.endswith(", rounding")]
    assert len(rounding) == 4 * config.n_layers and all(0 < r.loss < r.loss_rtn for r in rounding)
    again, _ = quantize_in_memory(source, method=method, act_order=act_order, **arguments)
    for one, other in zip(made.layers, again.layers, strict=True):
        assert np.array_equal(one.up.segments[0].codes, other.up.segments[0].codes)
    if symmetric:
        assert (made.layer(0).qkv.segments[0].zeros == 4).all()


@pytest.mark.parametrize(("bits", "followed"), [(2, True), (3, False)])
def test_the_search_follows_what_is_written(bits, followed, monkeypatch):
    """With awq+gptq, where much is lost: the sampled tokens went through the layers as GPTQ rounded them."""
    found = []

    class Kept(Activations):
        def __init__(self, *given):
            super().__init__(*given)
            found.append(self)

    monkeypatch.setattr(pipeline, "Activations", Kept)
    config, tokens = tiny_config(biases=ALL), [5, 1, 4, 30, 2, 2, 7, 9]
    source = random_weights(config, salient=(3, 17))
    made, _ = quantize_in_memory(source, method="awq+gptq", bits=bits, group_size=16, sequences=[tokens])
    state = found[0].state
    assert ("drifted" in state) == followed
    if followed:
        ops, x = TorchOps(), torch.from_numpy(source.embed()[tokens]).float()
        for index, layer in enumerate(made.layers):
            x = block(config, ops, pack_layer(ops, layer), index, x, Context.of_sequences(config, [len(tokens)]))
        torch.testing.assert_close(torch.from_numpy(state["drifted"]), x)
        assert (x - torch.from_numpy(state["activations"])).abs().max() > 0.01


def test_groups_of_like_activity_lose_less():
    """Inputs some of which are a thousand times as loud as others, anywhere, met by weights as much smaller."""
    part, gram = problem(k=256, tokens=600)
    loud = 2.0 ** torch.randint(-5, 6, (256,), generator=torch.Generator().manual_seed(3))
    part, gram = replace(part, stored=part.stored / loud), gram * torch.outer(loud, loud)
    made, losses = {}, {}
    for order in (None, "static", "free"):
        made[order], (_, losses[order], _) = gptq.Solver(gram, 600, order).quantize(part, Grid(3, 32))
    assert losses["free"] < 0.5 * losses["static"] and made["static"].permutation is made[None].permutation is None
    assert (np.diff(gram.diagonal().numpy()[made["free"].permutation]) <= 0).all()


def test_free_groups_that_lose_more_are_not_written():
    """Groups of which every other holds large weights: mixed by activity, they share their scales with small ones."""
    part, gram = problem(k=256, tokens=600)
    offset = (torch.arange(256) // 32 % 2 * 2 - 1) * 3.0
    solver = gptq.Solver(gram, 600, "free")
    made, (nearest, found, _) = solver.quantize(replace(part, stored=part.stored + offset), Grid(3, 32))
    assert made.permutation is None and found < nearest
    assert solver.quantize(part, Grid(3, 32))[0].permutation is not None


def test_act_order_belongs_to_gptq():
    for method in ("rtn", "awq"):
        with pytest.raises(UsageError, match="act-order is the order in which gptq rounds"):
            quantize_in_memory(random_weights(tiny_config()), method=method, act_order="static", sequences=[[1, 2]])
    with pytest.raises(UsageError, match="act-order 'fast'; there are: static, free"):
        quantize_in_memory(random_weights(tiny_config()), method="gptq", act_order="fast", sequences=[[1, 2]])
    mixture = tiny_config(experts=Experts(4, 2, 32, frozenset([0])))
    with pytest.raises(UsageError, match="permutes the inputs of experts"):
        quantize_in_memory(random_weights(mixture), method="gptq", act_order="free", sequences=[[1, 2]])


def test_a_gram_matrix_is_kept_by_half(monkeypatch):
    monkeypatch.setattr(gram, "ROWS", 8)
    x = torch.randn(50, 21, generator=torch.Generator().manual_seed(0))
    kept = gram.Gram()
    for some in x.split(20):
        kept.add(some)
    assert kept.n_tokens == 50
    assert sum(strip.numel() for strip in kept._strips) == 8 * 8 + 8 * 16 + 5 * 21
    torch.testing.assert_close(kept.taken(), x.T @ x, rtol=1e-5, atol=1e-5)
