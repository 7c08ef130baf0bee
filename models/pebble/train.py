"""Train pebble on what prepare.py wrote.

    python models/pebble/train.py build/pebble -o build/pebble-fp32 [--steps 3000] [--hidden-size 384] ...

The defaults are the model that ships: a Llama of 11 M parameters, 70 minutes on two CPU cores. AdamW (0.9, 0.95), weight
decay 0.1 on matrices, 100 steps of warm-up, constant rate, linear decay over the last fifth, in which a fifth of
the sequences come from persona.jsonl. Progress and held-out loss go to the terminal; the state is saved every
--save-every steps, and the same command continues from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from tinychat import tokenizer as tokenizers


class Sequences:
    """Random windows of a file of token ids."""

    def __init__(self, path: Path, length: int, seed: int):
        self.ids = np.memmap(path, np.uint16, "r")
        self.length = min(length, len(self.ids) - 1)
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int) -> torch.Tensor:
        """int64 [size, length]."""
        starts = self.rng.integers(0, len(self.ids) - self.length, size)
        return torch.from_numpy(np.stack([self.ids[s : s + self.length].astype(np.int64) for s in starts]))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.2) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps * decay))


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder written by prepare.py")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=384, help="tokens of a training sequence")
    parser.add_argument("--context", type=int, default=1024, help="positions configured in the model")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = tokenizers.load(args.data)
    assert tokenizer is not None
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden_size // args.heads,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=args.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=[2, tokenizer.eos_id],
    )
    model = LlamaForCausalLM(config).to(args.device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")

    state_file = args.output / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    args.output.mkdir(parents=True, exist_ok=True)

    train = Sequences(args.data / "train.bin", args.length, args.seed + start)
    persona = Sequences(args.data / "persona.bin", args.length, args.seed + start + 1)
    held_out = Sequences(args.data / "val.bin", args.length, 0).batch(32)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16):
            return model(ids.to(args.device), labels=ids.to(args.device), use_cache=False).loss

    def save(step: int) -> None:
        temporary = state_file.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
        temporary.replace(state_file)

    progress = trange(start, args.steps, initial=start, total=args.steps)
    for step in progress:
        last_stage = step >= args.steps * 0.8
        source = persona if last_stage and step % 5 == 0 else train
        value = loss(source.batch(args.batch))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.rate)
        optimizer.step()
        progress.set_postfix(loss=f"{value.item():.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)
            with torch.no_grad():
                print(f"\nstep {step + 1}: held-out loss {sum(loss(part).item() for part in held_out.split(8)) / 4:.4f}")
    model.float().save_pretrained(args.output)


if __name__ == "__main__":
    main()
