"""An engine without a model, for the front ends' tests: a token is a word, and answers come from a list or echo."""

import time
from types import SimpleNamespace

from tinychat.errors import ContextOverflowError
from tinychat.results import Piece, Result, Timings, Usage
from tinychat.sampling import SamplingParams


class FakeTokenizer:
    """A token is a character, but the model may choose `WORDS`, which encoding never gives; '<' is special."""

    WORDS = {0x110000: "Hello", 0x110001: " there."}  # noqa: RUF012
    special_ids = frozenset({ord("<")})

    def __init__(self, template: bool = True):
        self.chat_template = SimpleNamespace(render=self.render) if template else None

    @staticmethod
    def render(messages, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def encode(self, text, *, add_bos=True):
        return [ord(char) for char in text]

    def decode(self, ids):
        return "".join(self.WORDS[i] if i in self.WORDS else chr(i) for i in ids)


class FakeEngine:
    """Answers with `answers` in turn, then with echoes; each word takes `delay` seconds."""

    description = "fake: 1 parameter, on paper"

    def __init__(self, *answers: str, ctx_size: int = 100, delay: float = 0.0, template: bool = True):
        self.answers = list(answers)
        self.ctx_size = self.max_ctx_size = ctx_size
        self.delay = delay
        self.tokenizer = FakeTokenizer(template)
        self.calls: list[tuple] = []  # (prompt, options)
        self._cached: list[str] = []

    def sampling(self, **options):
        return SamplingParams.resolve(options)

    def stream(self, prompt, *, cancel=None, **options):
        self.calls.append((prompt, options))
        words = prompt.split() if isinstance(prompt, str) else [w for m in prompt for w in m["content"].split()]
        if len(words) >= self.ctx_size:
            raise ContextOverflowError(len(words), self.ctx_size, self.max_ctx_size)
        cached = next((i for i, (a, b) in enumerate(zip(words, self._cached, strict=False)) if a != b), len(words))
        cached = min(cached, len(self._cached))
        answer = self.answers.pop(0) if self.answers else f"You said: {words[-1] if words else ''}"
        room = min(self.ctx_size - len(words), options.get("max_tokens") or 512)
        said, reason = [], "stop"
        for word in answer.split(" "):
            if len(said) == room:
                reason = "length"
                break
            if cancel is not None and cancel.is_set():
                reason = "cancelled"
                break
            time.sleep(self.delay)
            said.append(word)
            yield Piece((" " if len(said) > 1 else "") + word, [len(said)])
        self._cached = words + said
        usage = Usage(prompt_tokens=len(words), completion_tokens=len(said), cached_tokens=cached)
        timings = Timings(0.5, 0.25, 0.5, 0.75, prefill_tokens=len(words) - cached, decode_tokens=max(0, len(said) - 1))
        yield Piece("", [], finish_reason=reason, usage=usage, timings=timings)

    def generate(self, prompt, **options):
        pieces = list(self.stream(prompt, **options))
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        last = pieces[-1]
        return Result(text, tokens, last.finish_reason, last.usage, last.timings)
