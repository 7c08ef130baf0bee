"""Quantized weights in the layout of the CUDA kernels (csrc/cuda/linear_layout.h), made and unmade by torch.

Packing is a permutation of bytes; torch does it on the device that the weight will live on, tile by tile, from the
codes spread out or from AWQ's words as a file holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tinychat.qtensor import AWQ_ORDER, AwqWords, QTensor, bfloat16

TILE, CHUNK, HALF = 16, 64, 32  # outputs of a tile, inputs of a chunk and of half of one
_MAX_ZERO = {4: 63, 8: 255}  # of what the kernels subtract exactly, by the bits that codes lie in
_WHOLE_ROW = 26  # a shift that leaves nothing of a number of half-chunks
_SLAB = 1 << 26  # codes that are spread out at a time


def tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on `device`; bf16 too, which numpy does not know."""
    values = np.require(values, requirements=["C", "W"])
    if values.dtype == bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(values).to(device)


def array(values: torch.Tensor) -> np.ndarray:
    """`values` in numpy."""
    values = values.cpu()
    return values.view(torch.int16).numpy().view(bfloat16) if values.dtype == torch.bfloat16 else values.numpy()


def device_group(group_size: int, k: int) -> tuple[int, int] | None:
    """(inputs of a group on the device, shift from a half-chunk's number to its group's); None: no kernel has it.

    The device's groups are powers of two from 32 on, or whole rows: a group of 96 becomes three of 32.
    """
    if group_size >= k:
        return k, _WHOLE_ROW
    fine = group_size & -group_size
    return (fine, (fine // HALF).bit_length() - 1) if fine >= HALF else None


@dataclass(frozen=True, eq=False)
class Packed:
    """Quantized rows of one kind, of one segment of a linear or of several that lie on top of each other."""

    codes: torch.Tensor  # uint8 [tiles, bytes of a tile]
    scales: torch.Tensor  # fp16 or fp32 [tiles, groups, 8, 2]
    zeros: torch.Tensor  # uint8 [tiles, groups, 8, 2]
    n: int
    k: int
    kept: int  # bits that a code takes: 4 or 8
    group_size: int  # as it was
    scale_dtype: np.dtype  # as it was
    rows: tuple[int, ...]  # outputs of each segment
    bits: tuple[int, ...]  # of each segment
    permutation: torch.Tensor | None  # int64 [k], see `QTensor`

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        order = 0 if self.permutation is None else self.permutation.nbytes
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + order


def same_kind(a: QTensor | AwqWords, b: QTensor | AwqWords) -> bool:
    """Whether two segments of a linear can be packed as one."""
    p, q = getattr(a, "permutation", None), getattr(b, "permutation", None)
    return (
        (a.bits <= 4) == (b.bits <= 4)
        and a.group_size == b.group_size
        and a.scales.dtype == b.scales.dtype
        and (p is q or (p is not None and q is not None and np.array_equal(p, q)))
    )


def pack(segments: list[QTensor | AwqWords], device: torch.device) -> Packed:
    """Segments of one kind (`same_kind`) in one packed weight. ValueError for codes or zeros beyond their bits."""
    first = segments[0]
    k, kept = first.shape[1], 4 if first.bits <= 4 else 8
    found = device_group(first.group_size, k)
    if found is None or first.bits > 8:
        raise ValueError(f"no kernel for {first.bits} bits in groups of {first.group_size}")
    fine, shift = found
    n, chunks = sum(s.shape[0] for s in segments), -(-k // CHUNK)
    tiles, groups = -(-n // TILE), (2 * chunks - 1 >> shift) + 1
    tile_bytes = TILE * CHUNK * chunks * kept // 8
    codes = torch.empty(tiles, tile_bytes, dtype=torch.uint8, device=device)
    spread = _tiles(segments, device, max(1, _SLAB // (TILE * k)))
    begin = 0
    for slab in spread:
        if kept < 8 and int(slab.max()) >= 1 << kept:
            raise ValueError(f"codes up to {int(slab.max())}; {kept} bits hold {(1 << kept) - 1}")
        padded = torch.nn.functional.pad(slab, (0, chunks * CHUNK - k, 0, -len(slab) % TILE))
        codes[begin : begin + len(padded) // TILE] = _arrange(padded, kept).view(-1, tile_bytes)
        begin += len(padded) // TILE
    scales, zeros = (torch.cat(parts) for parts in zip(*(_grids(s, device) for s in segments), strict=True))
    if int(zeros.max()) > _MAX_ZERO[kept]:
        raise ValueError(f"zeros up to {int(zeros.max())}; with {kept} bits at most {_MAX_ZERO[kept]}")
    wide = torch.float16 if first.scales.dtype == np.float16 else torch.float32
    p = getattr(first, "permutation", None)
    return Packed(
        codes=codes,
        scales=_lay_groups(scales.to(wide), tiles, groups, first.group_size // fine),
        zeros=_lay_groups(zeros, tiles, groups, first.group_size // fine),
        n=n,
        k=k,
        kept=kept,
        group_size=first.group_size,
        scale_dtype=first.scales.dtype,
        rows=tuple(s.shape[0] for s in segments),
        bits=tuple(s.bits for s in segments),
        permutation=None if p is None else tensor(p, device).long(),
    )


def unpack(packed: Packed) -> list[QTensor]:
    """The segments that were packed, bit by bit."""
    tiles, chunks = len(packed.codes), -(-packed.k // CHUNK)
    codes = _rearrange(packed.codes, tiles, chunks, packed.kept)[: packed.n, : packed.k]
    fine = device_group(packed.group_size, packed.k)
    assert fine is not None  # or it had not been packed
    step, groups = packed.group_size // fine[0] or 1, -(-packed.k // packed.group_size)
    scales, zeros = (
        grid.permute(0, 3, 2, 1).reshape(tiles * TILE, -1)[: packed.n, : groups * step : step]
        for grid in (packed.scales, packed.zeros)
    )
    order = None if packed.permutation is None else packed.permutation.cpu().numpy().astype(np.int32)
    found, begin = [], 0
    for n, bits in zip(packed.rows, packed.bits, strict=True):
        rows = slice(begin, begin + n)
        each = (np.ascontiguousarray(array(part[rows])) for part in (codes, scales, zeros))
        code, scale, zero = each
        found.append(QTensor(code, scale.astype(packed.scale_dtype), zero, bits, packed.group_size, order))
        begin += n
    return found


def _arrange(codes: torch.Tensor, kept: int) -> torch.Tensor:
    """uint8 [16 tiles, 64 chunks] -> bytes in the order of the device. The names of the axes are the header's:

    tile, lower (or upper), g, chunk, half, t, step of the half, h, e
    """
    tiles, chunks = codes.shape[0] // TILE, codes.shape[1] // CHUNK
    axes = codes.view(tiles, 2, 8, chunks, 2, 4, 2, 2, 2)
    if kept == 8:  # tile, chunk, half, g, t, step, h, lower, e
        return axes.permute(0, 3, 4, 2, 5, 6, 7, 1, 8).contiguous()
    both = axes[:, 0] | axes[:, 1] << 4  # tile, g, chunk, half, t, step, h, e
    return both.permute(0, 2, 1, 4, 3, 5, 7, 6).contiguous()  # tile, chunk, g, t, half, step, e, h


def _rearrange(packed: torch.Tensor, tiles: int, chunks: int, kept: int) -> torch.Tensor:
    """The codes that `_arrange` was given."""
    if kept == 8:
        axes = packed.view(tiles, chunks, 2, 8, 4, 2, 2, 2, 2).permute(0, 7, 3, 1, 2, 4, 5, 6, 8)
    else:
        both = packed.view(tiles, chunks, 8, 4, 2, 2, 2, 2).permute(0, 2, 1, 4, 3, 5, 7, 6)
        axes = torch.stack([both & 15, both >> 4], dim=1)
    return axes.reshape(tiles * TILE, chunks * CHUNK)


def _lay_groups(grid: torch.Tensor, tiles: int, groups: int, repeats: int) -> torch.Tensor:
    """[N, groups as they were] -> [tiles, groups, 8, 2], each repeated, zeros where there is no output or input."""
    if repeats > 1:
        grid = grid.repeat_interleave(repeats, dim=1)
    grid = grid[:, :groups]
    padded = torch.nn.functional.pad(grid, (0, groups - grid.shape[1], 0, tiles * TILE - len(grid)))
    return padded.view(tiles, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def _grids(segment: QTensor | AwqWords, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, zeros) of a segment, [N, groups]."""
    if isinstance(segment, AwqWords):
        return tensor(segment.scales, device).T, _codes_of_words(tensor(segment.qzeros, device))
    return tensor(segment.scales, device), tensor(segment.zeros, device)


def _codes_of_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8] of the AWQ layout (see `qtensor`) -> uint8 codes [N, K]."""
    halves = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    codes[..., list(AWQ_ORDER[0::2])] = halves & 15
    codes[..., list(AWQ_ORDER[1::2])] = halves >> 4
    return codes.flatten(1).T


def _codes(segment: QTensor | AwqWords, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """uint8 [end - begin, K], outputs begin .. end of a segment."""
    if isinstance(segment, AwqWords):
        words = tensor(np.ascontiguousarray(segment.qweight[:, begin // 8 : -(-end // 8)]), device)
        return _codes_of_words(words)[begin % 8 : begin % 8 + end - begin]
    return tensor(segment.codes[begin:end], device)


def _tiles(segments: list[QTensor | AwqWords], device: torch.device, tiles: int) -> Iterator[torch.Tensor]:
    """The codes of all segments, `tiles` full tiles of outputs at a time, the last perhaps fewer."""
    parts: list[torch.Tensor] = []
    missing = tiles * TILE
    for segment in segments:
        begin, n = 0, segment.shape[0]
        while begin < n:
            end = min(n, begin + missing)
            parts.append(_codes(segment, begin, end, device))
            missing -= end - begin
            begin = end
            if not missing:
                yield torch.cat(parts)
                parts, missing = [], tiles * TILE
    if parts:
        yield torch.cat(parts)
