"""Train pebble, or a relative of it, on what prepare.py wrote.

    python models/pebble/train.py build/pebble -o build/pebble-fp32 [--steps 3000] [--hidden-size 384] ...

The defaults make a Llama of 11 M parameters, about 70 minutes of work for two CPU cores. AdamW (0.9, 0.95), weight
decay on matrices, 100 steps of warm-up, constant rate, linear decay over the last --decay of the work (the steps, or
the minutes where those run out earlier). Every window of text comes from one of the files that --mix names, with the
share given there; the last fifth of the work has a mix and a length of its own (pebble: a fifth of the windows are from
persona.jsonl). Progress and held-out loss go to the terminal; the state is saved every --save-every steps, and the same
command continues from it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from tinychat import tokenizer as tokenizers


class Sequences:
    """Random windows of files of token ids. `shares`: name of a file in `folder`, without .bin -> share of windows."""

    def __init__(self, folder: Path, shares: dict[str, float], length: int, seed: int):
        self.files = [np.memmap(folder / f"{name}.bin", np.uint16, "r") for name in shares]
        self.shares = np.array(list(shares.values())) / sum(shares.values())
        self.length = min(length, *(len(ids) - 1 for ids in self.files))
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int) -> torch.Tensor:
        """int64 [size, length]."""
        windows = []
        for source in self.rng.choice(len(self.files), size, p=self.shares):
            ids = self.files[source]
            start = self.rng.integers(0, len(ids) - self.length)
            windows.append(ids[start : start + self.length].astype(np.int64))
        return torch.from_numpy(np.stack(windows))


def share(text: str) -> tuple[str, float]:
    """NAME=SHARE of --mix."""
    name, _, value = text.partition("=")
    return name, float(value or 1)


def learning_rate(step: int, done: float, peak: float, decay: float, warmup: int = 100) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay` of the work, of which `done` is behind."""
    return peak * min(1.0, (step + 1) / warmup, (1 - done) / decay)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder written by prepare.py")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=384, help="tokens of a training sequence")
    parser.add_argument("--context", type=int, default=1024, help="positions configured in the model")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.2, help="share of the steps in which the rate falls to zero")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--mix", type=share, nargs="+", metavar="NAME=SHARE", default=[("train", 1.0)])
    parser.add_argument(
        "--last-mix", type=share, nargs="+", metavar="NAME=SHARE", default=[("train", 0.8), ("persona", 0.2)]
    )
    parser.add_argument("--last-length", type=int, help="tokens of a sequence of the last fifth (default: --length)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, but for the last fifth: faster from some 1000 steps on"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end by then, whatever --steps says")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads or torch.get_num_threads())

    tokenizer = tokenizers.load(args.data)
    assert tokenizer is not None
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=args.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=[2, tokenizer.eos_id],
        # On a CPU the backward pass of PyTorch's own attention takes longer than products that fill the caches.
        attn_implementation="eager" if args.device == "cpu" else None,
    )
    model = LlamaForCausalLM(config).to(args.device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")

    state_file = args.output / "state.pt"
    start, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    args.output.mkdir(parents=True, exist_ok=True)

    first = Sequences(args.data, dict(args.mix), args.length, args.seed + start)
    last = Sequences(args.data, dict(args.last_mix), args.last_length or args.length, args.seed + start + 1)
    held_out = Sequences(args.data, {"val": 1.0}, args.length, 0).batch(32)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16):
            return model(ids.to(args.device), labels=ids.to(args.device), use_cache=False).loss

    compiled = torch.compile(loss, dynamic=False) if args.compile else loss

    def save(step: int) -> None:
        temporary = state_file.with_suffix(".tmp")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds()}
        torch.save(state, temporary)
        temporary.replace(state_file)

    began = time.monotonic() - spent

    def seconds() -> float:
        return time.monotonic() - began

    progress = trange(start, args.steps, initial=start, total=args.steps)
    for step in progress:
        done = max(step / args.steps, seconds() / 60 / args.minutes)
        if done >= 1:
            break
        source = last if done >= 0.8 else first
        # Compiled for one shape only: another takes a minute more, and that of 512 tokens gave no finite gradients.
        value = (compiled if source is first else loss)(source.batch(max(1, args.batch * args.length // source.length)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if not torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            raise SystemExit(f"the gradients of step {step} are not finite; {state_file} holds the last state saved")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, args.rate, args.decay)
        optimizer.step()
        progress.set_postfix(loss=f"{value.item():.3f}")
        if (step + 1) % args.save_every == 0:
            save(step + 1)
            with torch.no_grad():
                held = sum(loss(part).item() for part in held_out.split(8)) / 4
            print(f"\nstep {step + 1}, {seconds():.0f} s: held-out loss {held:.4f}")
    model.float().save_pretrained(args.output)


if __name__ == "__main__":
    main()
