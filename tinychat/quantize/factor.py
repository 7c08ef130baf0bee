"""The Cholesky factor of an inverse, of large matrices in tiles: half of the matrix, in fp64 while it is computed.

U, upper triangular, of (H + damping)^-1 = U^T U. H = M M^T of an upper triangular M is the Cholesky factorization taken
backwards, and U = M^-1. In tiles, with k over all between:

    M_jj M_jj^T = H_jj - sum_(k > j) M_jk M_jk^T            M_ij = (H_ij - sum_(k > j) M_ik M_jk^T) M_jj^-T
    U_jj = M_jj^-1                                          U_ij = -U_ii sum_(i < k <= j) M_ik U_kj

Each takes the place of what it is made of. A channel that never spoke has a column of zeros in H; damping alone keeps
it, and it neither moves others nor is moved.

Each channel is damped by a part of its own second moment, so that a massive one does not drown others; few tokens tell
little of that moment, so that the median of all is added as if some more had it. The part is the larger the fewer
tokens there were for so many channels: what then seems to make up for an error is chance. The measurements behind the
three constants are in benchmarks/results/quality.md.
"""

from __future__ import annotations

import torch

from tinychat.errors import CheckpointError

DAMPING = 0.03  # of H's diagonal, added to it; ten times as much where that is not enough
CHANCE = 1.0  # likewise, for as many channels as tokens
PRIOR = 16  # tokens for which the median of H's diagonal stands, beside those that there were
TRIALS = 6
TILE = 1024

_Tiles = dict[tuple[int, int], torch.Tensor]


class Factor:
    """U of H, the symmetric `gram`, fp32 [K, K], of so many tokens; its channels in `order` where that is given."""

    def __init__(self, gram: torch.Tensor, n_tokens: int, order: torch.Tensor | None = None, name: str = "weight"):
        """CheckpointError, with `name`, where H has no Cholesky factor, damped as it may be."""
        k = len(gram)
        self._tile = TILE
        channels = (torch.arange(k) if order is None else order).split(TILE)
        diagonal = gram.diagonal().double()
        common = diagonal[diagonal > 0].median() if diagonal.any() else torch.tensor(1.0)
        diagonal = (n_tokens * diagonal + PRIOR * common) / (n_tokens + PRIOR)
        step = DAMPING + CHANCE * k / n_tokens
        tiles, damping = None, 0.0
        for _ in range(TRIALS):
            damping += step
            step *= 10
            if tiles := _factorized(gram, channels, damping * diagonal):
                break
        else:
            raise CheckpointError(
                f"{name}: the second moments of its inputs have no Cholesky factor, damped as they may be"
            )
        _invert(tiles, len(channels))
        self._strips = [
            torch.cat([tiles.pop((i, j)) for j in range(i, len(channels))], dim=1) for i in range(len(channels))
        ]  # of rows, each from its diagonal tile on

    def rows(self, first: int, last: int) -> torch.Tensor:
        """U[first : last, first :], fp32."""
        found = torch.zeros(last - first, self._strips[0].shape[1] - first)
        for i in range(first // self._tile, -(-last // self._tile)):
            top = i * self._tile
            part = self._strips[i][max(first - top, 0) : last - top, max(first - top, 0) :]
            below = max(top - first, 0)
            found[below : below + len(part), below:] = part
        return found


def _factorized(gram: torch.Tensor, channels: tuple[torch.Tensor, ...], damping: torch.Tensor) -> _Tiles | None:
    """M, fp64 tiles on and above the diagonal; None where there is none."""
    n = len(channels)
    tiles: _Tiles = {}
    for j in reversed(range(n)):
        for i in reversed(range(j + 1)):
            tile = gram[channels[i][:, None], channels[j]].double()
            for k in range(j + 1, n):
                tile.addmm_(tiles[i, k], tiles[j, k].T, alpha=-1)
            if i == j:
                tile.diagonal().add_(damping[channels[j]])
                lower, failed = torch.linalg.cholesky_ex(tile.flip(0, 1))
                if failed:
                    return None
                tiles[j, j] = lower.flip(0, 1)
            else:
                tiles[i, j] = torch.linalg.solve_triangular(tiles[j, j].T, tile, upper=False, left=False)
    return tiles


def _invert(tiles: _Tiles, n: int) -> None:
    """M becomes U, in fp32."""
    for i in range(n):
        eye = torch.eye(len(tiles[i, i]), dtype=torch.float64)
        tiles[i, i] = torch.linalg.solve_triangular(tiles[i, i], eye, upper=True)
    for j in reversed(range(n)):
        for i in reversed(range(j)):
            found = tiles[i, j] @ tiles[j, j]
            for k in range(i + 1, j):
                found.addmm_(tiles[i, k], tiles[k, j])
            tiles[i, j] = tiles[i, i] @ found.neg_()
        for i in range(j + 1):
            tiles[i, j] = tiles[i, j].float()  # the columns before this one do not need it
