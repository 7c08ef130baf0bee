"""The engine over a fake runner whose logits depend on every token before: mistakes of the cache change the answer."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import BOS, EOS, VOCAB, ByteTokenizer, FakeRunner, Template, hashed, saying, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import tinychat
from tinychat import engine as engine_module
from tinychat import memory
from tinychat.config import Rope, RopeScaling
from tinychat.engine import Engine, context_size
from tinychat.errors import (
    BackendError,
    ConfigError,
    ContextOverflowError,
    TemplateError,
    TokenizerError,
    UsageError,
)

GREEDY = {"temperature": 0, "max_tokens": 12}


def make(rule=hashed, *, ctx_size=64, n_slots=1, chunk=8, template=None, tokenizer=True, **options) -> Engine:
    runner = FakeRunner(rule, ctx_size, n_slots)
    words = ByteTokenizer(template) if tokenizer else None
    options.setdefault("eos_ids", frozenset({EOS}))
    return Engine(runner, words, prefill_chunk=chunk, **options)


def saying_after(text: str, answer: bytes, **options) -> Engine:
    """An engine that answers the completion prompt `text` with `answer`."""
    return make(saying(answer, len(text.encode()) + 1), **options)


# -- results and pieces


def test_pieces_add_up_to_the_result():
    llm = saying_after("Hi", "né!".encode())
    pieces = list(llm.stream("Hi", **GREEDY))
    result = llm.generate("Hi", **GREEDY)
    assert "".join(p.text for p in pieces) == result.text == "né!"
    assert [t for p in pieces for t in p.tokens] == result.tokens == list("né!".encode())
    assert [p.finish_reason for p in pieces] == [None] * 4 + ["stop"]
    assert all(p.usage is None and p.timings is None for p in pieces[:-1])
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 4)


def test_results_are_json():
    llm = make()
    result = json.loads(json.dumps(llm.generate("Hi", logprobs=2, seed=1, max_tokens=3).to_dict()))
    assert result.keys() == {"text", "tokens", "finish_reason", "usage", "timings", "logprobs"}
    assert result["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0}
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2, 2, 2]
    assert [entry["token"] for entry in result["logprobs"]] == result["tokens"]
    last = list(llm.stream("Hi", seed=1, max_tokens=2))[-1]
    assert json.loads(json.dumps(last.to_dict()))["finish_reason"] == "length"


def test_timings():
    llm = make()
    timings = llm.generate("Hello", ignore_eos=True, **GREEDY).timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (6, 11)
    assert 0 < timings.prefill_s <= timings.first_token_s <= timings.total_s
    assert timings.prefill_tokens_per_s == pytest.approx(6 / timings.prefill_s)
    assert timings.decode_tokens_per_s == pytest.approx(11 / timings.decode_s)
    assert llm.generate("Hello", max_tokens=1).timings.decode_tokens_per_s is None


def test_a_slow_reader_is_not_the_engines_time():
    llm = make()
    pieces = []
    for piece in llm.stream("Hi", temperature=0, max_tokens=4, ignore_eos=True):
        pieces.append(piece)
        time.sleep(0.02)
    assert pieces[-1].timings.decode_s < 0.02 * 3 <= pieces[-1].timings.total_s


# -- prompts


def test_prompts_in_three_forms():
    llm = make(template=Template())
    assert llm.prompt_tokens("Hi") == [BOS, *b"Hi"]
    assert llm.prompt_tokens([1, 2]) == llm.prompt_tokens(np.array([1, 2])) == [1, 2]
    assert llm.prompt_tokens([{"role": "user", "content": "Hi"}]) == list(b"user:Hi\nassistant:")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([1, VOCAB], f"token 1 is {VOCAB}"),
        ([-1], "token 0 is -1"),
        ([1, True], "item 1"),
        ([1.5], "item 0"),
        (["a"], "item 0"),
        (7, "must be a text"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "message 1"),
        ([{"role": "user", "content": "x"}, "y"], "message 1"),
        ([{"role": "assistant", "content": "x"}], "last message"),
    ],
)
def test_wrong_prompts_are_refused_at_once(prompt, words):
    with pytest.raises(UsageError, match=words):
        make(template=Template()).stream(prompt)


def test_a_tokenizer_larger_than_the_model_is_an_error_before_any_step():
    llm = make()
    llm.tokenizer.encode = lambda text, add_bos=True: [1, VOCAB + 5]
    with pytest.raises(TokenizerError, match=f"token id {VOCAB + 5}.*0 to {VOCAB - 1}"):
        llm.stream("Hi")


def test_messages_need_a_template_and_completion_does_not():
    llm = make()
    with pytest.raises(TemplateError, match=r"no chat template.*plain completion works"):
        llm.stream([{"role": "user", "content": "Hi"}])
    assert llm.generate("Hi", **GREEDY).tokens


def test_without_a_tokenizer_token_ids_work():
    llm = make(tokenizer=False)
    result = llm.generate([1, 2, 3], **GREEDY)
    assert result.text == "" and result.tokens == make().generate([1, 2, 3], **GREEDY).tokens
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        with pytest.raises(TokenizerError, match="token ids"):
            llm.stream(prompt)
    with pytest.raises(TokenizerError, match="stop"):
        llm.stream([1], stop="x")


def test_decoder_continues_a_text_and_starts_anew_for_an_answer():
    class Spaced(ByteTokenizer):
        """Like SentencePiece: the first space of a text is not shown."""

        def decoder(self):
            inner = super().decoder()
            state = {"first": True}

            def step(token):
                text = inner.step(token)
                if text and state.pop("first", False):
                    text = text.removeprefix(" ")
                return text

            return SimpleNamespace(step=step, flush=inner.flush)

    chat = [{"role": "user", "content": "Hi"}]
    runner = FakeRunner()
    llm = Engine(runner, Spaced(Template()))
    runner.rule = saying(b" you", len(llm.prompt_tokens("Hi")))
    assert llm.generate("Hi", **GREEDY).text[:4] == " you"
    runner.rule = saying(b" you", len(llm.prompt_tokens(chat)))
    assert llm.generate(chat, **GREEDY).text[:3] == "you"


# -- where an answer ends


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer"),
    [({"eos_token_id": [7, EOS]}, {}, None), ({}, {"eos_token_id": EOS}, None), ({"eos_token_id": 7}, {}, EOS)],
)
def test_every_end_of_sequence_id_counts(generation, config, tokenizer):
    ids = engine_module._eos_ids(generation, config, SimpleNamespace(eos_id=tokenizer))
    assert EOS in ids and None not in ids
    result = saying_after("Hi", b"yes", eos_ids=ids).generate("Hi", **GREEDY)
    assert (result.text, result.finish_reason) == ("yes", "stop")


def test_end_of_sequence_first_and_ignored():
    llm = saying_after("Hi", b"")
    result = llm.generate("Hi", **GREEDY)
    assert (result.text, result.tokens, result.finish_reason) == ("", [], "stop")
    assert llm.generate("Hi", ignore_eos=True, **GREEDY).tokens == [EOS] * 12


@pytest.mark.parametrize(
    ("stop", "text", "n_tokens"),
    [("wor", "Hello ", 9), (["d!", "ld"], "Hello wor", 11), (["xyz", "Hello w?"], "Hello world!", 12), ("H", "", 1)],
)
def test_stop_strings_cut_across_tokens(stop, text, n_tokens):
    llm = saying_after("Hi", b"Hello world!")
    pieces = list(llm.stream("Hi", temperature=0, stop=stop))
    assert "".join(p.text for p in pieces) == llm.generate("Hi", temperature=0, stop=stop).text == text
    assert sum(len(p.tokens) for p in pieces) == n_tokens
    assert pieces[-1].finish_reason == "stop"


def test_held_text_is_released_when_the_answer_ends():
    llm = saying_after("Hi", b"a </s")
    for options in ({"max_tokens": 5}, {"max_tokens": 50}):
        assert llm.generate("Hi", temperature=0, stop="</s>", **options).text == "a </s"


def test_max_tokens_and_the_context_end_an_answer():
    llm = make(ctx_size=16)
    result = llm.generate("Hi", temperature=0, max_tokens=4, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason) == (4, "length")
    result = llm.generate("Hi", temperature=0, max_tokens=2**63, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason) == (13, "length")


def test_context_overflow_says_the_numbers_before_any_work():
    llm = make(ctx_size=16)
    assert len(llm.generate([1] * 15, max_tokens=5).tokens) <= 1
    steps = len(llm._runner.steps)
    for n in (16, 17, 160):
        with pytest.raises(ContextOverflowError, match=f"{n} tokens.*16") as caught:
            llm.stream([1] * n)
        assert (caught.value.n_tokens, caught.value.ctx_size) == (n, 16)
    assert len(llm._runner.steps) == steps


def test_characters_cut_by_max_tokens_do_not_break_the_text():
    text = saying_after("Hi", "aé".encode()).generate("Hi", temperature=0, max_tokens=2).text
    assert text.encode().decode() in ("a", "a\ufffd")


# -- sampling through the engine


def test_seed_and_precedence():
    llm = make(generation_config={"temperature": 1.5, "top_k": 0, "top_p": 1.0})
    options = {"max_tokens": 20, "ignore_eos": True}
    assert llm.generate("Hi", seed=3, **options).tokens == llm.generate("Hi", seed=3, **options).tokens
    assert llm.generate("Hi", seed=3, **options).tokens != llm.generate("Hi", seed=4, **options).tokens
    assert llm.generate("Hi", **options).tokens != llm.generate("Hi", **options).tokens
    assert llm.sampling(top_k=5).top_k == 5 and llm.sampling().temperature == 1.5 and llm.sampling().min_p == 0.05


def test_greedy_is_the_likeliest_of_the_whole_history():
    llm, history, expected = make(), [BOS, *b"Hello there"], []
    for _ in range(12):
        expected.append(int(hashed(history).argmax()))
        history.append(expected[-1])
    assert llm.generate("Hello there", ignore_eos=True, **GREEDY).tokens == expected


def test_penalties_see_prompt_and_answer():
    def rule(history):
        logits = np.zeros(VOCAB, np.float32)
        logits[[72, 65, 66]] = 3.0, 2.9, 2.8
        return logits

    assert make(rule).generate("H", temperature=0, max_tokens=3).text == "HHH"
    assert make(rule).generate("H", temperature=0, max_tokens=3, repetition_penalty=1.5).text == "ABH"
    assert make(rule).generate("H", temperature=0, max_tokens=3, presence_penalty=0.15).text == "HAH"
    assert make(rule).generate("H", temperature=0, max_tokens=5, frequency_penalty=0.15).text == "HAHBA"


def test_wrong_options_are_refused_at_once():
    llm = make()
    with pytest.raises(UsageError, match="temperature"):
        llm.stream("Hi", temperature=-1)
    with pytest.raises(UsageError, match=r"max_token'.*max_tokens"):
        llm.stream("Hi", max_token=5)
    with pytest.raises(UsageError, match="cancel"):
        llm.stream("Hi", cancel=5)
    with pytest.raises(ConfigError, match=r"generation_config.json, top_p"):
        make(generation_config={"top_p": 7}).stream("Hi")
    assert make(generation_config={"top_p": 7}).stream("Hi", top_p=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite_is_an_error_not_garbage(bad):
    def rule(history):
        return hashed(history) if len(history) < 5 else np.full(VOCAB, bad, np.float32)

    llm = make(rule)
    with pytest.raises(BackendError, match="not finite after 5 tokens"):
        llm.generate("Hi", ignore_eos=True, **GREEDY)
    assert llm.generate("Hi", max_tokens=2).usage.cached_tokens == 0  # nothing computed with it is kept


# -- the KV cache


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 3))
def test_kept_prefixes_change_nothing(prompts, n_slots):
    warm = make(n_slots=n_slots, chunk=3)
    for prompt in prompts:
        cold = make().generate(prompt, ignore_eos=True, **GREEDY)
        result = warm.generate(prompt, ignore_eos=True, **GREEDY)
        assert result.tokens == cold.tokens
        assert result.usage.cached_tokens + result.timings.prefill_tokens == len(prompt)


def test_cached_tokens_are_the_common_prefix_and_one_row_is_run():
    llm = make(chunk=4)
    prompt = list(range(1, 11))
    first = llm.generate(prompt, ignore_eos=True, temperature=0, max_tokens=4)
    assert llm._runner.steps[:3] == [4, 4, 2]
    # the last token was sampled and never run
    for following, cached in [
        ([*prompt, *first.tokens, 5], 13),
        (prompt, 9),
        ([*prompt[:6], 99], 6),
        (prompt[:3], 2),
        ([99], 0),
    ]:
        assert llm.generate(following, max_tokens=1).usage.cached_tokens == cached
    assert llm._runner.cache.lengths[0] == len(llm._slots[0])


def test_conversations_take_turns_in_slots():
    llm = make(n_slots=2)
    a, b = [1] * 10, [2] * 10
    for prompt, cached in [(a, 0), (b, 0), (a, 9), (b, 9)]:
        assert llm.generate(prompt, max_tokens=1).usage.cached_tokens == cached
    assert llm.generate([3] * 10, max_tokens=1).usage.cached_tokens == 0  # takes the place of a, idle for longest
    assert llm.generate(b, max_tokens=1).usage.cached_tokens == 9


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_after_an_exception_the_engine_answers_as_before(fail_at):
    llm = make(chunk=8)
    expected = make().generate("Hello there", **GREEDY).tokens
    llm._runner.fail_at = fail_at
    with pytest.raises(RuntimeError, match="step failed"):
        llm.generate("Hello there", ignore_eos=True, **GREEDY)
    assert llm._runner.cache.lengths[0] == len(llm._slots[0])
    assert llm.generate("Hello there", **GREEDY).tokens == expected


def test_logits():
    llm = make(chunk=4)
    llm.generate("before", **GREEDY)
    tokens = [5, 6, 7, 8, 9, 10]
    expected = np.array([hashed(tokens[: i + 1]) for i in range(6)])
    logits = llm.logits(np.array(tokens))
    assert logits.dtype == np.float32 and np.array_equal(logits, expected)
    assert llm.generate(tokens, max_tokens=1).usage.cached_tokens == 5
    assert llm.logits([]).shape == (0, VOCAB)
    with pytest.raises(UsageError):
        llm.logits([VOCAB])
    with pytest.raises(ContextOverflowError):
        llm.logits([1] * 65)


# -- cancelling, closing, sharing


def test_cancel_between_tokens_keeps_what_was_said():
    llm = saying_after("Hi", b"Hello")
    event, pieces = threading.Event(), []
    for piece in llm.stream("Hi", temperature=0, cancel=event, stop="ello!"):
        pieces.append(piece)
        if len(pieces) == 3:
            event.set()
    assert "".join(p.text for p in pieces) == "Hel"  # what a stop string might have cut is released
    assert pieces[-1].finish_reason == "cancelled" and pieces[-1].usage.completion_tokens == 3
    assert llm.generate("Hi", temperature=0).text == "Hello"


def test_cancel_between_chunks_of_the_prompt():
    llm = make(chunk=8)
    answers = iter([False, True])
    result = llm.generate([1] * 40, cancel=lambda: next(answers))
    assert (result.finish_reason, result.tokens, result.timings.first_token_s) == ("cancelled", [], None)
    assert llm._runner.steps == [8]
    assert llm.generate([1] * 40, max_tokens=1).usage.cached_tokens == 8


def test_closing_a_stream_frees_the_engine_at_once():
    llm = make()
    stream = llm.stream("Hi", ignore_eos=True)
    next(stream)
    with pytest.raises(UsageError, match="another stream"):
        llm.generate("Hi", **GREEDY)
    stream.close()
    assert llm.generate("Hi", **GREEDY).tokens == make().generate("Hi", **GREEDY).tokens
    next(llm.stream("Hi", ignore_eos=True))  # dropped, not closed
    assert llm.generate("Hi", **GREEDY).tokens


def test_threads_take_turns():
    llm = make()
    texts = [f"Text {i}" for i in range(8)]
    found: dict[str, list[int]] = {}
    threads = [
        threading.Thread(target=lambda t=t: found.update({t: llm.generate(t, ignore_eos=True, **GREEDY).tokens}))
        for t in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {t: make().generate(t, ignore_eos=True, **GREEDY).tokens for t in texts}


def test_a_waiting_stream_can_be_cancelled():
    llm = make()
    stream = llm.stream("Hi", ignore_eos=True)
    next(stream)
    reasons = []
    event = threading.Event()
    waiting = threading.Thread(target=lambda: reasons.append(llm.generate("Ho", cancel=event).finish_reason))
    waiting.start()
    event.set()
    waiting.join(20)
    assert reasons == ["cancelled"]
    assert len(list(stream)) > 0


def test_a_closed_engine_says_so():
    with make() as llm:
        assert llm.generate("Hi", **GREEDY)
    for use in (lambda: llm.generate("Hi"), lambda: llm.stream("Hi"), lambda: llm.logits([1])):
        with pytest.raises(UsageError, match="closed"):
            use()


# -- loading


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Fake checkpoint, tokenizer and backend behind `load`; what they were asked is recorded."""
    asked = SimpleNamespace(why="the fastest available", backend="cpu", builds=[], config=tiny_config(), n_quantized=0)
    source = SimpleNamespace(
        generation_config={"eos_token_id": 7},
        hf_config={},
        quantization=None,
        n_parameters=260_000,
        bits=4,
        file_bytes=1001,
        table_bytes=None,
        tokenizer=ByteTokenizer,
    )

    def open_(path, ignore_config=()):
        source.config, source.n_quantized = asked.config, asked.n_quantized
        return source

    def build(source, *, ctx_size, n_slots, **options):
        asked.builds.append({"ctx_size": ctx_size, "n_slots": n_slots, **options})
        return FakeRunner(hashed, ctx_size, n_slots)

    def choose(device):
        module = SimpleNamespace(
            __name__=f"tinychat.backends.{asked.backend}",
            FOOTPRINT=memory.Footprint(program=20_000_000),
            build=build,
            describe=lambda threads: f"{asked.backend} ({threads or 2} threads)",
        )
        return module, asked.why

    modules = {
        "checkpoint": SimpleNamespace(locate=lambda model, revision=None, offline=False: tmp_path, open=open_),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"tinychat.{name}", module)
        monkeypatch.setattr(tinychat, name, module, raising=False)
    monkeypatch.setattr("tinychat.backends.choose", choose)
    monkeypatch.setattr(engine_module, "_loaded", {})
    return asked


def test_load_puts_the_parts_together(parts):
    llm = tinychat.load("pebble", threads=1, kv_dtype="fp32", n_slots=2)
    options = {"threads": 1, "kv_dtype": "fp32", "activations": 16, "head": 16, "progress": None}
    assert parts.builds == [{"ctx_size": 64, "n_slots": 2, **options}]
    assert llm.eos_ids == {7, EOS}
    assert llm.description == "pebble: fake, 0.3M parameters, float16 · cpu (1 threads) · context 64"
    assert llm.max_ctx_size == 64
    assert tinychat.load(".", ctx_size=32).ctx_size == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ctx_size": 65}, "65.*64"),
        ({"ctx_size": 0}, "ctx_size"),
        ({"ctx_size": True}, "ctx_size"),
        ({"threads": "2"}, "threads"),
        ({"n_slots": -1}, "n_slots"),
        ({"kv_dtype": "q8"}, "q8.*fp16"),
        ({"activations": 4}, "activations.*8 or 16"),
        ({"head": 4}, "head.*8 or 16"),
    ],
)
def test_load_refuses_wrong_arguments(parts, options, words):
    with pytest.raises(UsageError, match=words):
        tinychat.load("pebble", **options)
    assert not parts.builds


def test_a_slow_backend_is_never_silent_and_says_so_once(parts, monkeypatch, recwarn):
    monkeypatch.setattr(engine_module, "_warned", set())
    parts.backend, parts.why = "reference", "cpu not used: the extension is not built; install it"
    for _ in range(2):
        llm = tinychat.load("pebble")
    tinychat.load("pebble")
    assert [str(w.message) for w in recwarn] == [
        "the slow reference backend runs the model: cpu not used: the extension is not built; install it"
    ]
    assert "not built" not in llm.description


def test_activations_that_change_nothing_are_not_claimed(parts, monkeypatch, recwarn):
    monkeypatch.setattr(engine_module, "_warned", set())
    for _ in range(2):
        plain = tinychat.load("pebble", activations=8)
    assert [str(w.message) for w in recwarn] == [
        "8-bit activations meet quantized weights only and this model has none: they change nothing here"
    ]
    assert "activations" not in plain.description
    parts.n_quantized = 1000
    quantized = tinychat.load("pebble", activations=8, head=16)
    parts.n_quantized = 0
    rounded = tinychat.load("pebble", activations=8, head=8)
    assert len(recwarn) == 1
    assert all(", 8-bit activations ·" in llm.description for llm in (quantized, rounded))


def test_a_larger_context_is_suggested_only_where_the_model_has_one(parts):
    with pytest.raises(ContextOverflowError, match=r"100 tokens.*--ctx-size, at most 64"):
        tinychat.load("pebble", ctx_size=32).generate([5] * 100)
    with pytest.raises(ContextOverflowError, match=r"holds 64.*all this model can hold") as caught:
        tinychat.load("pebble").generate([5] * 100)
    assert "ctx-size" not in str(caught.value)


def test_bytes_are_no_token_ids():
    with pytest.raises(UsageError, match=r"the prompt is b'Hi'; it must be a text"):
        make().generate(b"Hi")


def test_models_given_by_name_are_loaded_once(parts):
    options = {"temperature": 0, "max_tokens": 3}
    result = tinychat.generate("pebble", "Hi", **options)
    assert "".join(p.text for p in tinychat.stream("pebble", "Hi", **options)) == result.text
    assert len(parts.builds) == 1
    tinychat.generate("other", "Hi", **options)
    assert len(parts.builds) == 2 and len(engine_module._loaded) == 1
    assert tinychat.generate(make(), "Hi", **options).tokens == make().generate("Hi", **options).tokens
    with pytest.raises(UsageError, match="model"):
        tinychat.generate(None, "Hi")


def test_context_size():
    assert context_size(tiny_config(max_positions=131072)) == 4096
    assert context_size(tiny_config(max_positions=131072), 100_000) == 100_000
    yarn = Rope(dim=1, scaling=RopeScaling.YARN, factor=4.0, original_max_positions=1000)
    assert context_size(tiny_config(max_positions=1000, rope=yarn)) == 4000
    with pytest.raises(UsageError, match=r"4001.*4000"):
        context_size(tiny_config(max_positions=1000, rope=yarn), 4001)


def test_what_does_not_fit_in_memory_is_refused_before_loading(parts, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 20_001_000)
    with pytest.raises(BackendError, match=r"needs about 20 MB.*20 MB are available.*--ctx-size"):
        tinychat.load("pebble")
    assert not parts.builds
    monkeypatch.setenv("TINYCHAT_NO_MEMORY_CHECK", "1")
    assert tinychat.load("pebble")


def test_memory_estimate_counts_each_part():
    config = tiny_config(tied_head=True)  # the cpu backend packs the table once, for both of its uses
    packed = memory.Footprint(program=50)
    parts = memory.estimate(config, 800, 600, packed, 10, n_slots=3)
    assert (parts["weights"], parts["kv_cache"], parts["overhead"]) == (800, 3 * 10 * 2 * 2, 50)
    assert parts.pop("total") == sum(parts.values())
    table = VOCAB * config.hidden_size
    assert parts["working"] == 2 * table - parts["kv_cache"]  # the source of the largest part
    wide = memory.estimate(replace(config, intermediate_size=1000), 800, 600, packed, 10)
    assert wide["working"] > 2 * 3 * 1000 * config.hidden_size - wide["kv_cache"] > parts["working"]
    assert memory.estimate(config, 800, 600, packed, 100_000)["working"] == 0
    unpacked = memory.Footprint(program=50, widths=(8,), step_bytes=4)  # a byte a code, fp32 in a step
    parts = memory.estimate(config, 800, 600, unpacked, 100_000)
    assert (parts["weights"], parts["working"]) == (800 + 300, 4 * table)
    widths = [memory.estimate(config, 800, 600, packed, 10, bits=bits)["weights"] for bits in (2, 3, 5)]
    assert widths == [800, 800, 800 + 225]  # 5 bits ride in 8
    rounded = int(table * (1 + 3 / 128)) - 2 * table  # a byte, and a group's scale and zero, for 16 bits
    assert memory.estimate(config, 80_000, 600, packed, 10, head=8)["weights"] == 80_000 + rounded
    mapped = memory.Footprint(program=50, maps=True)
    assert memory.estimate(config, 80_000, 600, mapped, 10)["weights"] == 80_000
    untied = memory.estimate(replace(config, tied_head=False), 80_000, 600, mapped, 10, head=8)
    assert untied["weights"] == 80_000 + rounded - 2 * table  # the embedding is read in its file


@pytest.mark.parametrize(
    ("n", "words"), [(240_000, "0.2 MB"), (9_949_999, "9.9 MB"), (9_950_000, "10 MB"), (2_340_000_000, "2.3 GB")]
)
def test_bytes_in_words(n, words):
    assert memory.megabytes(n) == words


def test_memory_limits_of_control_groups(tmp_path):
    groups = tmp_path / "sys/fs/cgroup"

    def write(group, **files):
        (groups / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (groups / group / f"memory.{name}").write_text(f"{text}\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/\n9:cpu,memory:/slurm/job\n0::/a/b\n")
    write("a/b", max="max", current="5", stat="inactive_file 1")
    assert memory.group_room(tmp_path) is None
    write("a", max="1000", current="700", stat="inactive_file 50")
    assert memory.group_room(tmp_path) == 350
    write("memory/slurm/job", limit_in_bytes=1 << 62, usage_in_bytes=5, stat="")
    write("memory/slurm", limit_in_bytes=800, usage_in_bytes=600, stat="total_active_file 70")
    assert memory.group_room(tmp_path) == 270
    write("memory", limit_in_bytes=100, usage_in_bytes=90, stat="")  # as a container sees its own
    assert memory.group_room(tmp_path) == 10


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, tinychat; light = 'numpy' not in sys.modules; tinychat.generate;"
        "print(light, sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tinychat.nonsense
