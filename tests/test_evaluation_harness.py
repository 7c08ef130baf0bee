"""lm-evaluation-harness on our engine: likelihoods by the definition, generation, and whole tasks from local files."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import memory_weights, tiny
from tokenizer_files import LLAMA, PIECES, load, make_directory, sentencepiece_model

from tinychat.backends import reference
from tinychat.engine import Engine
from tinychat.errors import TokenizerError
from tinychat.evaluation import likelihood

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    words = load(make_directory(tmp_path_factory.mktemp("words"), LLAMA, sentencepiece_model(PIECES)))
    return Engine(reference.build(memory_weights(*tiny("llama", **SIZES)), ctx_size=48), words, description="tiny")


def by_definition(llm, before, text):
    """The log-likelihood of `text` after `before`, both token ids, and whether it is what greedy decoding says."""
    logits = llm.logits([*before, *text])[len(before) - 1 : -1].astype(np.float64)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return table[range(len(text)), text].sum(), bool((logits.argmax(-1) == text).all())


def test_continuations_run_common_contexts_once(llm):
    held, rows = [], []
    with llm.exclusive() as runner:
        step = runner.step
        runner.step = lambda asked: rows.append(len(asked)) or step(asked)
        cases = [([1, 5, 6, 7, 8], [9, 10]), ([1, 5, 6, 7, 8], [11]), ([1, 5], [6, 7, 8]), ([1], [2])]
        found = [likelihood.continuation(runner, held, [*before, *text], len(text)) for before, text in cases]
        del runner.step
    # Of the second only the row that predicts is run; the third has to go back behind what it predicts.
    assert rows == [4, 2, 1, 3, 1]
    for (before, text), (value, greedy) in zip(cases, found, strict=True):
        expected = by_definition(llm, before, text)
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy is expected[1]


# ---- with the harness ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(llm):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'tinychat[eval]')")
    from tinychat.evaluation.harness import TinychatLM

    return TinychatLM(llm, max_gen_toks=6)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_likelihoods(model, llm):
    asked = [("Hello there", " in the ring"), ("Hello ", "there"), ("", "the end"), ("Hello there", " and"), ("a", "")]
    found = model.loglikelihood(requests(*asked), disable_tqdm=True)
    for (context, text), (value, greedy) in zip(asked, found, strict=True):
        before = llm.tokenizer.encode(context.rstrip())
        rest = llm.tokenizer.encode(context + text)[len(before) :]
        before = before or [1]
        expected = by_definition(llm, before, rest) if rest else (0.0, True)
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy is expected[1]
    said = llm.generate("Hello", max_tokens=3, temperature=0).tokens
    (_, greedy), *_ = model._likelihoods([(llm.tokenizer.encode("Hello"), said)], True)
    assert greedy


def test_rolling_likelihoods_predict_every_token_once(model, llm):
    text = "the end is near and he is in it " * 6
    ids = llm.tokenizer.encode(text, add_bos=False)
    assert len(ids) > 2 * model.max_length
    expected, whole = 0.0, [1, *ids]
    for start in range(0, len(ids), model.max_length):
        if start + model.max_length <= len(ids):
            part, n = whole[start : start + model.max_length + 1], model.max_length
        else:  # the last takes as much context as there is room
            part, n = whole[-model.max_length - 1 :], len(ids) - start
        logits = np.concatenate([llm.logits(part[:-1])]).astype(np.float64)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += table[range(model.max_length), part[1:]][-n:].sum()
    (found,) = model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation_stops_where_the_task_says(model, llm):
    plain = llm.generate("Hello", max_tokens=6, temperature=0).text
    stop = plain[2:4]
    long = "Hello there " * 40  # more than the context: its end counts
    found = model.generate_until(
        requests(("Hello", {}), ("Hello", {"until": [stop, ""]}), (long, {"max_gen_toks": 4, "until": None})), True
    )
    assert found[0] == plain and found[1] == plain[: plain.index(stop)] and found[2]
    with pytest.warns(UserWarning, match="1 of 2 prompts lost their beginning"):
        found = model.generate_until(requests((long, {"max_gen_toks": 99}), ("Hello", {"max_gen_toks": 6})), True)
    ids = llm.prompt_tokens(long)[-(llm.ctx_size // 2) :]
    assert found == [llm.generate(ids, max_tokens=99, temperature=0, ignore_eos=False).text, plain]
    options = model._options({"do_sample": True, "temperature": 0.5, "max_new_tokens": 99, "until": "x"})
    assert options["temperature"] == 0.5 and options["max_tokens"] == 47 and options["stop"] == ["x"]
    assert model._options({"do_sample": False, "temperature": 0.5})["temperature"] == 0


def test_a_model_without_a_tokenizer_or_template_is_refused(model, llm):
    with pytest.raises(TokenizerError, match="no tokenizer"):
        type(model)(Engine(llm.runner))
    with pytest.raises(TokenizerError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.chat_template(True) is None


def test_tasks_from_local_files(model, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    records = [{"question": "He is in the", "choices": ["ring", "end"], "answer": 0} for _ in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    choice = "task: local_choice\noutput_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
    (tmp_path / "choice.yaml").write_text(choice + common + "metric_list: [{metric: acc}]\n")
    free = "task: local_free\noutput_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    options = "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    (tmp_path / "free.yaml").write_text(free + common + options)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice", "local_free"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert set(found["results"]) == {"local_choice", "local_free"}
    assert found["results"]["local_choice"]["acc,none"] in (0.0, 1.0)
