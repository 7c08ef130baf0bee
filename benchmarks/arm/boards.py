"""What boards publish of themselves, and the speed that this and the kernels' cycles allow: predicted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from tinychat.bench import shapes, traffic
from tinychat.bench.random_weights import RandomWeights

MODELS = ("tinyllama-1.1b", "llama-3.2-3b", "llama-2-7b")
CONTEXT = 256  # tokens that decoding looks back on, as `tinychat doctor` takes them
# Of the peak that memory reaches where nobody's measurement is at hand: an assumption. A Pi 4 reaches 0.43, 16-bit
# LPDDR4 and DDR4 under A53 cores 0.67 to 0.79 (STREAM in Texas Instruments' SPRACV1B and SPRAD45A).
SHARE = 0.6


@dataclass(frozen=True)
class Board:
    """`peak` and `measured` in GB/s; `level` is the kernels' that run there, `core` llvm-mca's nearest model."""

    name: str
    level: str
    core: str
    cores: int
    ghz: float
    peak: float
    measured: float | None = None

    @property
    def gb_s(self) -> float:
        """What memory is taken to give."""
        return self.measured or SHARE * self.peak


# Clocks and peaks as the makers publish them (32 bits of LPDDR4-3200 are 12.8 GB/s). The Pi 4's measurement is STREAM's
# on a board without a display, 5.56 GB/s at best: https://www.sci-pi.org.uk/bench/stream.html.
BOARDS = (
    Board("Raspberry Pi 4B", "neon", "cortex-a72", 4, 1.8, 12.8, 5.5),
    Board("Raspberry Pi 5", "dotprod", "neoverse-n1", 4, 2.4, 17.1),
    Board("Jetson Orin Nano 8 GB", "dotprod", "neoverse-n1", 6, 1.5, 68.3),
    Board("Jetson AGX Orin 64 GB", "dotprod", "neoverse-n1", 12, 2.2, 204.8),
    Board("Graviton2, 64 x Neoverse N1", "dotprod", "neoverse-n1", 64, 2.5, 204.8),
    Board("Graviton3, 64 x Neoverse V1", "i8mm", "neoverse-v1", 64, 2.6, 307.2),
)


@dataclass(frozen=True)
class Need:
    """Of one token: bytes read, weights of 4 bits multiplied, weights of the head in 8 bits."""

    bytes: float
    weights: float
    head: float


def need(model: str) -> Need:
    """Of a published shape in 4 bits, its head in 8."""
    shape = shapes.find(model)
    source = RandomWeights(*shape.translate(), shape.group_size)
    config = source.config
    read = traffic.of(source, head_bits=8)
    return Need(read.token(CONTEXT), source.n_quantized, config.vocab_size * config.table_width)


@dataclass(frozen=True)
class Limits:
    """Tokens a second that memory and arithmetic allow."""

    memory: float
    arithmetic: float

    @property
    def at_most(self) -> float:
        """The lower of the two."""
        return min(self.memory, self.arithmetic)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        return "memory" if self.memory <= self.arithmetic else "arithmetic"


def predicted(board: Board, token: Need, cycles: float, head_cycles: float) -> Limits:
    """With all cores, from cycles a weight of 4 and of 8 bits."""
    work = token.weights * cycles + token.head * head_cycles
    return Limits(board.gb_s * 1e9 / token.bytes, board.cores * board.ghz * 1e9 / work)
