"""AWQ's search a second time, written from the paper: one row, one group, one range at a time, in float64."""

import copy

import numpy as np
import pytest
import torch
from test_quantize_awq import PLAIN, dense, random_weights, sequences, tiny_config
from torch.nn.functional import linear

from tinychat.config import Block
from tinychat.decoder import block, mlp, self_attention
from tinychat.quantize import awq
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import Dense, DenseOps, changed
from tinychat.quantize.grid import Grid
from tinychat.quantize.report import BLOCK

WIDTH = 8
SIZES = {"hidden_size": 16, "n_heads": 2, "n_kv_heads": 1, "intermediate_size": 24, "n_layers": 1}
CASES = {
    "llama": (tiny_config(**SIZES), 3),
    "falcon": (tiny_config(**SIZES, block=Block.PARALLEL_ONE_NORM, norm_bias=True, **PLAIN), 4),
}


def rounded(w, low, high, bits):
    """One group of one row: fp16 scale, integer zero, codes."""
    top = 2**bits - 1
    scale = float(np.float16((max(high, 0) - min(low, 0)) / top))
    zero = min(max(round(-min(low, 0) / scale), 0), top)
    return np.array([(min(max(round(v / scale) + zero, 0), top) - zero) * scale for v in w])


def plain(weight, bits):
    rows = [[rounded(g, g.min(), g.max(), bits) for g in np.split(row, len(row) // WIDTH)] for row in weight]
    return np.array([np.concatenate(row) for row in rows])


def clipped_row(row, wanted, x, bits, visits, shrinks):
    """(rounded row, limits of its groups): each in turn, by the error of the row's output, which is to be `wanted`."""
    groups = np.split(row, len(row) // WIDTH)
    own = [(g.min(), g.max()) for g in groups]
    limits = list(own)

    def made(limits):
        return np.concatenate([rounded(g, *limit, bits) for g, limit in zip(groups, limits, strict=True)])

    def loss(limits):
        return ((made(limits) @ x.T - wanted) ** 2).sum()

    for moves in visits:
        for j in range(len(groups)):
            for low_moves, high_moves in moves:
                before = limits[j]
                for shrink in shrinks:
                    low = own[j][0] * shrink if low_moves else before[0]
                    high = own[j][1] * shrink if high_moves else before[1]
                    tried = [*limits[:j], (low, high), *limits[j + 1 :]]
                    if loss(tried) < loss(limits) * (1 - 1e-9):
                        limits = tried
    return made(limits), limits


def clipped(weight, wanted, *how):
    made = [clipped_row(row, wanted[:, i], *how) for i, row in enumerate(weight)]
    return np.array([row for row, _ in made]), np.array([limits for _, limits in made])


@pytest.mark.parametrize("name", CASES)
def test_the_search_is_that_of_a_second_implementation(name, monkeypatch):
    config, bits = CASES[name]
    layer = dense(random_weights(config, salient=(3,)))
    source = random_weights(config, salient=(3,))
    activations = Activations(config, source.embed(), sequences(config, (16, 16)), 10**6, follow=True)
    observed = activations.advance(layer, 0)
    twin = copy.deepcopy(observed)
    (sample,), (held_out,) = observed.samples, observed.held_out

    readings = {}

    def reading(config, folded, index, group, at, grid, reading=awq._reading):
        found = reading(config, folded, index, group, at, grid)
        readings[group.consumers[0], at is twin.samples[0]] = found
        return found

    monkeypatch.setattr(awq, "_reading", reading)
    folded, results = awq.transform(config, layer, 0, twin, Grid(bits, WIDTH))
    for at in (sample, held_out):  # behind the linears before, rounded, in channels of the layer as it was
        ops = DenseOps(grid=Grid(bits, WIDTH))

        def watch(one, x, at=at, ops=ops):
            if (one.name, at is sample) in readings:
                found = readings[one.name, at is sample]
                assert torch.equal(found.exact[one.name], at.inputs[one.name])
                error = (x if one.columns is None else x * one.columns) - found.given[one.name]
                # Scales of rows that were divided are rounded anew.
                assert error.norm() < 0.002 * found.given[one.name].norm()
                assert one.name == "qkv" or not torch.equal(found.given[one.name], at.inputs[one.name])
                if one.name in ("up", "down") and config.block is Block.SEQUENTIAL:
                    stream = at.x + self_attention(config, DenseOps(), layer, 0, at.inputs["qkv"], at.context)
                    assert (ops.stream - stream - found.off).norm() < 0.02 * found.off.norm()

        ops._watch = watch
        block(config, ops, folded, 0, at.x, at.context)
    limits_checked = 0
    for result in (r for r in results if r.group != BLOCK):
        producer, consumers = result.group.split(" -> ")
        exact = {n: getattr(layer, n).weight.double().numpy() for n in consumers.split(", ")}

        def output(weights, at, inputs):
            linears = {}
            for n, w in weights.items():
                linears[n] = Dense(n, torch.from_numpy(w).float(), getattr(layer, n).bias, (len(w),), (n,), (None,))
            replaced, parts = changed(layer, **linears), []
            if weights.keys() == {"out"}:
                parts.append(linear(inputs["out"], linears["out"].weight, layer.out.bias))
            if weights.keys() == {"down"}:
                parts.append(linear(inputs["down"], linears["down"].weight, layer.down.bias))
            if "qkv" in weights:
                parts.append(self_attention(config, DenseOps(), replaced, 0, inputs["qkv"], at.context))
            if "up" in weights:
                parts.append(mlp(config, DenseOps(), replaced, inputs["up"]))
            return sum(parts).double().numpy()

        def loss(weights, at=sample, exact=exact, output=output):
            read, want = readings[next(iter(exact)), at is sample], output(exact, at, at.inputs)
            error = output(weights, at, read.given) - want + (0 if read.off is None else read.off.double().numpy())
            return (error**2).sum() / (want**2).sum()

        def scales(alpha, producer=producer, exact=exact):
            """[K] of the consumers: mean |x| ** alpha, tied over repeated heads, as the file's fp16 can hold it."""
            x = np.concatenate([at.inputs[next(iter(exact))].double().numpy() for at in (sample, held_out)])
            s = np.abs(x).mean(0)
            if producer == "v":  # both query heads read one
                s = np.tile((s[:8] + s[8:]) / 2, 2)
            s = s**alpha / np.sqrt((s**alpha).max() * (s**alpha).min())
            if producer.startswith("norm"):
                norm = getattr(layer, producer).double().numpy()
                s = norm / (norm / s).astype(np.float16)
            return s.astype(np.float16).astype(np.float64) if producer == "act_scale" else s

        def searched(s, visits, shrinks, exact=exact):
            weights, limits = {}, {}
            for n, w in exact.items():
                read = readings[next(iter(exact)), True]
                wanted = sample.inputs[n].double().numpy() @ w.T
                if n in ("out", "down") and read.off is not None:
                    wanted -= read.off.double().numpy()
                found, limits[n] = clipped(w * s, wanted, read.given[n].double().numpy() / s, bits, visits, shrinks)
                weights[n] = found / s
            return weights, limits

        def glanced(i, loss=loss, searched=searched, scales=scales):
            return loss(searched(scales(i / 20), [[(1, 1)]], [0.9, 0.75, 0.6])[0])

        found = {i: glanced(i) for i in range(0, 21, 4)}
        for distance in (2, 1):
            best = min(found, key=found.get)
            found |= {i: glanced(i) for i in (best - distance, best + distance) if 0 <= i <= 20}
        best = min(found, key=found.get)
        visits = [[(1, 1), (1, 0), (0, 1)], [(1, 0), (0, 1)]]
        weights, limits = searched(scales(best / 20), visits, [1.1 - 0.05 * k for k in range(14)])
        rtn = {n: plain(w, bits) for n, w in exact.items()}
        assert result.loss_rtn == pytest.approx(loss(rtn), rel=1e-3)

        def better(one, other, loss=loss):
            return loss(one) < loss(other) and loss(one, held_out) < loss(other, held_out)

        if better(weights, rtn):
            assert result.alpha == best / 20 and result.clipped
            assert result.loss == pytest.approx(loss(weights), rel=0.02)
            for n in exact:
                made = getattr(folded, n)
                assert best == 0 or np.allclose(made.columns.numpy(), scales(best / 20), rtol=1e-4)
                if n in ("out", "down") or not config.gated:  # else the next group divides rows
                    rows = slice(config.q_size + config.kv_size if n == "qkv" else None)
                    same = np.isclose(made.limits.numpy(), limits[n], rtol=1e-4).all(-1)[rows]
                    assert same.mean() > 0.97  # fp32 decides a tie differently now and then; the row follows
                    limits_checked += 1
    assert limits_checked
