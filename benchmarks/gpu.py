"""One GPU, one command: tinychat beside Hugging Face and the strongest of plain PyTorch, on random weights made there.

    python benchmarks/gpu.py --out DIR [--shapes llama-2-7b ...] [--contenders "tinychat int4" ...] [--minutes 9]

Decoding: batch 1, a prompt of 4 tokens and 200 generated, greedily; the median of the token latencies (the AWQ paper's
protocol), and of Hugging Face and plain PyTorch the time of all 200 over 200, the host never waiting in between, which
favours them. First token: after 4096 tokens of Llama-3-8B. Kernels: see gpu_kernels.py.

    huggingface     transformers, fp16, as a user calls it
    plain           gpu_plain.py in fp16 without a compiler: eager; "graph": a captured step
    compiled        the same under torch.compile (reduce-overhead), as gpt-fast does; "int4": torch's own matmul
    tinychat        this project; fp16 without and with graphs; int4; without graphs, and without overlap: kernels
                    begin only when the one before has ended

Each result is on disk (gpu.json, gpu.md) before the next contender starts, and one that fails says why and loses
nothing else. What would start after --minutes is left out and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_plain import Int4, Plain, decode_step

from tinychat.bench import shapes, traffic
from tinychat.bench.random_weights import RandomWeights
from tinychat.engine import Engine

SHAPES = ("llama-2-7b", "llama-3-8b", "qwen3-0.6b", "mpt-7b", "falcon-7b")
PROMPT, TOKENS, LONG = 4, 200, 4096
CAPACITY = 256  # of plain models: prompt and answer
REPEATS = 3
LEFT_OUT = "left out: no time left (--minutes)"
BASELINE = "huggingface fp16"  # what others are divided by
DEVICE = "cuda"  # of all but tinychat's, which chooses for itself

Found = dict[str, Any]
Contender = Callable[[str], Found]


class Results:
    """What has been found so far, on disk at every moment."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.facts: Found = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        self.found: list[Found] = []

    def add(self, **found: Any) -> None:
        """One more."""
        self.found.append(found)
        print(json.dumps(found), flush=True)
        speeds = [one for one in self.found if "tokens_per_second" in one]
        theirs = {one["shape"]: one["tokens_per_second"] for one in speeds if one["contender"] == BASELINE}
        for one in speeds:
            if one["shape"] in theirs:
                one["over_hugging_face"] = one["tokens_per_second"] / theirs[one["shape"]]
        everything = {**self.facts, "results": self.found}
        (self.folder / "gpu.json").write_text(json.dumps(everything, indent=1))
        (self.folder / "gpu.md").write_text(self.table())

    def has(self, **asked: Any) -> bool:
        """Whether something with all of these values was found."""
        return any(all(found.get(name) == value for name, value in asked.items()) for found in self.found)

    def table(self) -> str:
        """In Markdown, a part for each measurement."""
        lines = [", ".join(f"{name} {value}" for name, value in self.facts.items()), ""]
        for what in dict.fromkeys(found["what"] for found in self.found):
            rows = [found for found in self.found if found["what"] == what]
            columns = list(dict.fromkeys(name for row in rows for name in row if name != "what"))
            lines += ["", f"| {what}: " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def attempt(
    results: Results, shape: str, name: str, contender: Contender, deadline: float | None, what="decode"
) -> None:
    """Run a contender, unless an earlier process has; whatever it does, go on."""
    if results.has(what=what, shape=shape, contender=name):
        return
    if deadline is not None and time.monotonic() > deadline:
        results.add(what=what, shape=shape, contender=name, error=LEFT_OUT)
        return
    began = time.monotonic()
    try:
        found = contender(shape)
        results.add(what=what, shape=shape, contender=name, **found, took_s=time.monotonic() - began)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        results.add(what=what, shape=shape, contender=name, error=f"{type(error).__name__}: {words[0][:200]}")
        go_on_anew_if_broken(deadline)
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def go_on_anew_if_broken(deadline: float | None) -> None:
    """After an illegal access nothing works in a process any more: another one does what is left."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        left = [] if deadline is None else ["--minutes", str(max(0.0, deadline - time.monotonic()) / 60)]
        os.execv(sys.executable, [sys.executable, *sys.argv, "--go-on", *left])


# ---- tinychat


def tinychat_source(shape: str, bits: int) -> RandomWeights:
    """Random weights of `bits`, 16 or 4."""
    found = shapes.find(shape)
    return RandomWeights(*found.translate(), None if bits == 16 else found.group_size)


def tinychat_engine(
    shape: str, bits: int, graphs: bool, ctx_size: int, overlap: bool = True
) -> tuple[Engine, RandomWeights]:
    """On the GPU, the head in 16 bits or 8."""
    from tinychat.backends import cuda

    os.environ["TINYCHAT_CUDA_OVERLAP"] = "1" if overlap else "0"
    source = tinychat_source(shape, bits)
    runner = cuda.build(source, ctx_size=ctx_size, head=16 if bits == 16 else 8, graphs=graphs)
    return Engine(runner), source


def tinychat(bits: int, graphs: bool, copy_gb_s: float, overlap: bool = True) -> Contender:
    """Tokens as a user gets them: each has reached the host and passed through `Engine.stream`.

    overlap: kernels may begin while the one before them ends
    """

    def run(shape: str) -> Found:
        engine, source = tinychat_engine(shape, bits, graphs, CAPACITY, overlap)
        options: Found = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
        latencies: list[float] = []
        for repeat in range(REPEATS + 1):
            stream = engine.stream([repeat + 1, 2, 3, 4][:PROMPT], **options)
            next(stream)
            last = time.perf_counter()
            for _ in stream:
                now = time.perf_counter()
                if repeat:  # the first round captures
                    latencies.append(now - last)
                last = now
        token_s = statistics.median(latencies)
        need = traffic.of(source, head_bits=16 if bits == 16 else 8).token(PROMPT + TOKENS // 2)
        return {
            "tokens_per_second": 1 / token_s,
            "gb_s": need / token_s / 1e9,
            "of_copy_rate": need / token_s / 1e9 / copy_gb_s,
            "weights_gb": engine.runner.weight_bytes / 1e9,
        }

    return run


def tinychat_first_token(bits: int) -> Contender:
    """Seconds from a prompt of 4096 tokens to the first of the answer."""

    def run(shape: str) -> Found:
        engine, _ = tinychat_engine(shape, bits, True, LONG + 8)
        seconds = []
        for repeat in range(REPEATS + 1):
            prompt = np.random.default_rng(repeat).integers(0, 1000, LONG).tolist()
            found = engine.generate(prompt, max_tokens=1, temperature=0.0, ignore_eos=True)
            seconds.append(found.timings.first_token_s or 0.0)
        return {"seconds": statistics.median(seconds[1:])}

    return run


# ---- Hugging Face


def hf_config(shape: shapes.Shape) -> Any:
    """The shape's own config."""
    from transformers import AutoConfig

    values = {k: v for k, v in shape.hf_config.items() if k not in ("architectures", "torch_dtype")}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def hf_model(shape: str) -> Any:
    """fp16, random, on the GPU."""
    from transformers import AutoModelForCausalLM

    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(hf_config(shapes.find(shape)), dtype=torch.float16)
    return model.half().eval()


@torch.inference_mode()
def huggingface(shape: str) -> Found:
    """The forward pass of transformers with its own cache, in the plainest loop."""
    model = hf_model(shape)

    def answer() -> float:
        tokens = torch.randint(0, 1000, (1, PROMPT), device=DEVICE)
        out = model(tokens, use_cache=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(TOKENS):
            tokens = out.logits[:, -1:].argmax(-1)
            out = model(tokens, past_key_values=out.past_key_values, use_cache=True)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / TOKENS

    answer()
    return {"tokens_per_second": 1 / statistics.median(answer() for _ in range(REPEATS))}


@torch.inference_mode()
def huggingface_first_token(shape: str) -> Found:
    """The same prompt, logits of its last token alone."""
    model = hf_model(shape)
    seconds = []
    for _ in range(REPEATS + 1):
        tokens = torch.randint(0, 1000, (1, LONG), device=DEVICE)
        torch.cuda.synchronize()
        began = time.perf_counter()
        int(model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:])}


# ---- plain PyTorch


def plain_model(shape: str, int4: bool = False) -> Plain:
    """fp16, or bf16 with torch's 4-bit linears; small enough numbers to stay finite."""
    found = shapes.find(shape)
    config, _ = found.translate()
    dtype, before = torch.bfloat16 if int4 else torch.float16, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            linear = (lambda inputs, outputs: Int4(inputs, outputs, found.group_size)) if int4 else None
            return Plain(config, CAPACITY, linear).eval()
    finally:
        torch.set_default_dtype(before)


def plain(kind: str, int4: bool = False) -> Contender:
    """`kind`: eager, graph or compiled."""

    @torch.no_grad()  # not inference_mode: the compiler looks at the version of the cache that it changes
    def run(shape: str) -> Found:
        model = plain_model(shape, int4)
        step = decode_step(model)
        if kind == "compiled":
            torch._inductor.config.coordinate_descent_tuning = True  # as gpt-fast has it
            step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        elif kind == "graph":
            step = captured(step)

        def answer() -> float:
            tokens = torch.randint(0, 1000, (PROMPT,), device=DEVICE)
            token = model(tokens, torch.arange(PROMPT, device=DEVICE)).argmax(-1)
            position = torch.tensor([PROMPT], device=DEVICE)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(TOKENS):
                token = step(token, position).clone()
                position = position + 1
            torch.cuda.synchronize()
            return (time.perf_counter() - began) / TOKENS

        answer()
        return {"tokens_per_second": 1 / statistics.median(answer() for _ in range(REPEATS))}

    return run


def captured(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The step as a CUDA graph."""
    token, position = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(token, position)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(token, position)

    def run(*given: torch.Tensor) -> torch.Tensor:
        token.copy_(given[0])
        position.copy_(given[1])
        graph.replay()
        return out

    return run


def driver() -> str:
    """Its version, as nvidia-smi tells it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv: list[str] | None = None) -> None:
    """Measure everything that is asked for, the most telling first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", help="of these names, or whose first word is one (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing new is started (default: 9)")
    parser.add_argument("--no-kernels", action="store_true", help="whole models alone")
    parser.add_argument("--go-on", action="store_true", help="keep what gpu.json in --out has, and do the rest")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    import gpu_kernels

    from tinychat.backends import backend

    results = Results(args.out)
    copy_gb_s = gpu_kernels.copy_rate()
    facts = {"gpu": backend("cuda").describe(), "driver": driver(), "cuda": torch.version.cuda}
    results.facts |= {**facts, "copy_gb_s": round(copy_gb_s, 1), "command": " ".join(sys.argv)}
    if args.go_on and (args.out / "gpu.json").exists():
        earlier = json.loads((args.out / "gpu.json").read_text())["results"]
        results.found = [found for found in earlier if not found.get("error", "").startswith(LEFT_OUT)]
    everything: dict[str, Contender] = {
        "tinychat int4": tinychat(4, True, copy_gb_s),
        "tinychat fp16": tinychat(16, True, copy_gb_s),
        BASELINE: huggingface,
        "tinychat fp16 without graphs": tinychat(16, False, copy_gb_s),
        "tinychat int4 without graphs": tinychat(4, False, copy_gb_s),
        "tinychat int4 without overlap": tinychat(4, True, copy_gb_s, overlap=False),
        "plain fp16 graph": plain("graph"),
        "compiled fp16": plain("compiled"),
        "compiled int4 (torch)": plain("compiled", int4=True),
    }
    first = {
        "tinychat int4": tinychat_first_token(4),
        "tinychat fp16": tinychat_first_token(16),
        BASELINE: huggingface_first_token,
    }

    def wanted(name: str) -> bool:
        return args.contenders is None or any(part in (name, name.split()[0]) for part in args.contenders)

    def decode(names: Iterable[str]) -> None:
        for name in filter(wanted, names):
            for shape in args.shapes:
                attempt(results, shape, name, everything[name], deadline)

    compiled = [name for name in everything if name.startswith("compiled")]  # minutes of compiling each: they come last
    decode(["tinychat int4", BASELINE])
    if "llama-3-8b" in args.shapes:
        for name in filter(wanted, first):
            attempt(results, "llama-3-8b", name, first[name], deadline, f"first token after {LONG}")
    decode(name for name in everything if name not in compiled)
    kernels = {} if args.no_kernels else gpu_kernels.measurements(copy_gb_s)
    for name, measured in kernels.items():
        if time.monotonic() > deadline:
            results.add(what=name, error=LEFT_OUT)
        elif not results.has(what=name):
            for found in gpu_kernels.safely(measured):
                results.add(what=name, **found)
            go_on_anew_if_broken(deadline)
    decode(compiled)
    print(results.table())


if __name__ == "__main__":
    main()
