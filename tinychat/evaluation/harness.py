"""Our engine as a model of lm-evaluation-harness, so that its tasks (GSM8K, MBPP, ...) run on it: `tinychat[eval]`.

    python -m tinychat.evaluation.harness run --model tinychat --model_args pretrained=DIRECTORY --tasks gsm8k

takes every option of `lm_eval`; in Python, `lm_eval.simple_evaluate(model=TinychatLM("DIRECTORY"), tasks=[...])`. As in
`tinychat eval`, the output head stays as it is stored and the KV cache rounds nothing unless told otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tinychat import engine
from tinychat.backends import PREFERENCE
from tinychat.engine import Engine
from tinychat.errors import TokenizerError, UsageError
from tinychat.evaluation.likelihood import continuation
from tinychat.sampling import MAX_STOPS

# What the harness means where it says nothing: the model's plain distribution, whatever its files prefer.
PLAIN = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0,
}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("tinychat")
class TinychatLM(LM):
    """Log-likelihoods and generation on one engine, one request after the other.

    pretrained    a directory, a hub id or "pebble"; or an Engine
    max_gen_toks  new tokens, where a task does not say
    options       of `tinychat.load`; the harness's batch sizes and PyTorch's devices mean nothing here
    """

    def __init__(
        self,
        pretrained: str | Engine = "pebble",
        *,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(pretrained, Engine):
            self.engine, self.tokenizer_name = pretrained, pretrained.description
        else:
            ours = device if device in PREFERENCE else "auto"  # the harness names PyTorch's, "cuda:0" unasked
            given = {"head": 16, "kv_dtype": "fp32", "device": ours, **options}
            self.engine, self.tokenizer_name = engine.load(pretrained, **given), str(pretrained)
        if self.engine.tokenizer is None:
            raise TokenizerError(f"{self.tokenizer_name} has no tokenizer, which the tasks' texts need")
        self._words = self.engine.tokenizer
        self.max_gen_toks = max_gen_toks
        self.max_length = self.engine.ctx_size

    tokenizer_name: str = ""  # what the harness keys its caches by

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before: the beginning token, or else the end token."""
        for found in (self._words.bos_id, self._words.eos_id):
            if found is not None:
                return int(found)
        raise TokenizerError(
            f"{self.tokenizer_name} has neither a beginning nor an end token, one of which must stand before a text"
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether greedy decoding says it."""
        return self._likelihoods([self._pair(*request.args) for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-likelihood, every token predicted once, from as much before it as there is room."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            ids = self._encode(request.args[0], add_bos=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (found, _) in zip(owners, self._likelihoods(pairs, disable_tqdm), strict=True):
            totals[owner] += found
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options): what the model writes, up to the first of the strings in "until"."""
        answers, cut = [], 0
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            context, given = request.args
            options = self._options(dict(given))
            # A prompt loses its beginning before its answer gets less room, but not more than half of the context.
            room = max(self.max_length - options["max_tokens"], self.max_length // 2, 1)
            prompt = self._encode(context) or [self.prefix_token_id]
            cut += len(prompt) > room
            answer = self.engine.generate(prompt[-room:], **options).text
            self.cache_hook.add_partial("generate_until", request.args, answer)
            answers.append(answer)
        if cut:
            warnings.warn(
                f"{cut} of {len(requests)} prompts lost their beginning: with room for an answer they do not fit into "
                f"the context of {self.max_length} tokens",
                stacklevel=2,
            )
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it."""
        if self._words.chat_template is None:
            raise TokenizerError(f"{self.tokenizer_name} has no chat template; leave --apply_chat_template out")
        return str(self._words.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which the harness keeps with its results."""
        found = self._words.chat_template
        return found.source if chat_template and found is not None else None

    def _encode(self, text: str, add_bos: bool = True) -> list[int]:
        bos = self._words.bos_id
        if bos is not None and text.startswith(self._words.token(bos) or "\0"):  # a template wrote it
            add_bos = False
        return list(self._words.encode(text, add_bos=add_bos))

    def _pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows it, divided where the tokens of both together divide."""
        if not context:
            ids, prefix = self._encode(text, add_bos=False), self.prefix_token_id
            return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
        stripped = context.rstrip()
        before, whole = self._encode(stripped or context), self._encode(context + text)
        before = before or [self.prefix_token_id]
        return before, whole[len(before) :]

    def _likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """In the order of `pairs`; run in the order of their tokens, so that common contexts are run once."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: [*pairs[i][0], *pairs[i][1]])
        held: list[int] = []
        with self.engine.exclusive() as runner:
            for i in tqdm(order, desc="scoring", disable=disable_tqdm):
                before, text = pairs[i]
                ids = [*before, *text][-(self.max_length + 1) :]  # the last is predicted, not run
                n_scored = min(len(text), len(ids) - 1)
                if n_scored:
                    found[i] = continuation(runner, held, ids, n_scored)
        return found

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """A task's generation options as our engine's."""
        until = given.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        if len(stops) > MAX_STOPS:
            raise UsageError(f"a task has {len(stops)} strings to stop at; the engine takes at most {MAX_STOPS}")
        lengths = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
        sampled = given.pop("do_sample", None)
        known = {name: value for name, value in given.items() if name in PLAIN and value is not None}
        options = {**PLAIN, **known, "stop": stops}
        if sampled is False:
            options["temperature"] = 0.0
        elif sampled and "temperature" not in known:
            options["temperature"] = 1.0
        wanted = int(lengths[0]) if lengths else self.max_gen_toks
        return {**options, "max_tokens": min(wanted, self.max_length - 1)}


def main() -> None:
    """The harness's own command line, which knows our engine as "tinychat"."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
