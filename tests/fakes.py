"""A runner and a tokenizer small enough to predict, for tests of what stands on them."""

import codecs
import hashlib

import numpy as np

from tinychat.cache import KVCache
from tinychat.config import ModelConfig, Rope

BOS, EOS, VOCAB = 256, 257, 260


def tiny_config(**changes) -> ModelConfig:
    values = {
        "model_type": "fake",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "n_layers": 1,
        "n_heads": 1,
        "n_kv_heads": 1,
        "head_dim": 1,
        "intermediate_size": 8,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "rope": Rope(dim=1),
    }
    return ModelConfig(**(values | changes))


def hashed(history: list[int]) -> np.ndarray:
    """Logits that depend on every token before: a mistake in the cache changes them."""
    seed = hashlib.sha256(np.asarray(history, np.int64).tobytes()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).normal(0, 2, VOCAB).astype(np.float32)


def saying(answer: bytes | list[int], prompt_length: int):
    """A rule under which greedy decoding of a prompt of `prompt_length` tokens gives `answer`, then EOS."""
    script = [*answer, EOS]

    def rule(history):
        logits = np.zeros(VOCAB, np.float32)
        logits[script[min(max(len(history) - prompt_length, 0), len(script) - 1)]] = 10.0
        return logits

    return rule


class FakeRunner:
    """A `Runner` whose keys are the tokens themselves and whose logits are `rule(tokens so far)`."""

    weight_bytes = 0

    def __init__(self, rule=hashed, ctx_size=64, n_slots=1):
        self.config = tiny_config()
        self.cache = KVCache(1, n_slots, 1, ctx_size, 1, "fp32")
        self.rule = rule
        self.steps = []  # rows of each step
        self.fail_at = None  # index of a step that raises when half done

    def step(self, rows):
        lengths = self.cache.check(rows)
        self.steps.append(len(rows))
        out = []
        for i, (token, slot, position) in enumerate(zip(rows.tokens, rows.slots, rows.positions, strict=True)):
            self.cache.keys[0, slot, 0, position, 0] = token
            if self.fail_at == len(self.steps) - 1 and i >= len(rows) // 2:
                self.cache.lengths[slot] += i
                raise RuntimeError("step failed")
            if i in rows.wanted:
                out.append(self.rule(self.cache.keys[0, slot, 0, : position + 1, 0].astype(int).tolist()))
        self.cache.lengths[:] = lengths
        return np.array(out, np.float32).reshape(len(rows.wanted), VOCAB)


class ByteDecoder:
    def __init__(self):
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token):
        return self.bytes.decode(bytes([token])) if token < 256 else ""

    def flush(self):
        return self.bytes.decode(b"", final=True)


class Template:
    def render(self, messages, add_generation_prompt=True):
        return "".join(f"{m['role']}:{m['content']}\n" for m in messages) + "assistant:" * add_generation_prompt


class ByteTokenizer:
    bos_id, eos_id, special_ids = BOS, EOS, frozenset({BOS, EOS})

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text, add_bos=True):
        return [BOS] * add_bos + list(text.encode())

    def decode(self, ids, skip_special=True):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def decoder(self):
        return ByteDecoder()
