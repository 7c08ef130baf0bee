"""On real weights, greedy text is transformers' own: 200 tokens, whatever the backend."""

import pytest

import tinychat

PROMPTS = ["Once upon a time", "One day, a little cat", "The old man looked at the sea and"]


@pytest.fixture(scope="module", params=["pebble-11m", "stories260K"])
def theirs(request, data_dir):
    """(directory, for each prompt its ids and the 200 that transformers adds in fp32)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = data_dir / request.param
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, do_sample=False, min_new_tokens=200, max_new_tokens=200, eos_token_id=None)
        answers.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
    return path, answers


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_greedy_text_equals_transformers(theirs, device):
    path, answers = theirs
    with tinychat.load(path, device=device) as llm:
        for prompt, (ids, expected) in zip(PROMPTS, answers, strict=True):
            assert llm.tokenizer.encode(prompt) == ids
            result = tinychat.generate(llm, prompt, max_tokens=200, temperature=0, ignore_eos=True)
            assert result.tokens == expected
