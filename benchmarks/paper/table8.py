"""Table 8: problems solved: GSM8K and MBPP under round to nearest, GPTQ and AWQ, from local JSON lines.

    python benchmarks/paper/table8.py MODEL --calibration FILE --gsm8k FILE --mbpp FILE [--run-programs] [--limit 50]

GSM8K: {question, answer} a line; the first --shots problems are worked examples in the prompt, the others are asked;
the answer is the number after "####", else the last one. MBPP: {text, code, test_list, task_id} a line; tasks 2 to 4
are examples, the test tasks 11 to 510 are asked. Greedy decoding, one program a task (pass@1).

Programs that a model wrote are run only with --run-programs, in a limited process each (see `programs.py`); without it
the table says how many are Python at all. With --text perplexity is measured as well. The last line is JSON of
method -> scores in per cent (and perplexity).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import programs
import published
from experiment import Experiment, finite, parser, show

from tinychat.engine import Engine
from tinychat.weights import WeightSource

METHODS = ("original", "rtn", "gptq", "awq")
EXAMPLES, FIRST, LAST = (2, 3, 4), 11, 510  # MBPP's task ids
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def number(text: str) -> float | None:
    """The answer that a solution gives: the number after "####", else the last one."""
    found = _NUMBER.findall(text.rpartition("####")[2]) or _NUMBER.findall(text)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def gsm8k(problems: list[dict[str, Any]], shots: int) -> list[tuple[str, float]]:
    """(prompt, answer) of every problem but the first `shots`, which stand in each prompt."""
    solved = "".join(f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in problems[:shots])
    asked = [(f"{solved}Question: {p['question']}\nAnswer:", number(p["answer"])) for p in problems[shots:]]
    return [(prompt, answer) for prompt, answer in asked if answer is not None]


def mbpp(tasks: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(prompt, assertions) of the test tasks."""
    by_id = {task["task_id"]: task for task in tasks}

    def asked(task: dict[str, Any]) -> str:
        tests = "\n".join(task["test_list"])
        return f"Task: {task['text']}\nThe code should pass these tests:\n{tests}\nCode:\n"

    solved = "".join(f"{asked(by_id[i])}{by_id[i]['code'].strip()}\n[DONE]\n\n" for i in EXAMPLES if i in by_id)
    chosen = [task for i, task in sorted(by_id.items()) if FIRST <= i <= LAST]
    return [(solved + asked(t), [t.get("test_setup_code", ""), *t["test_list"]]) for t in chosen]


def is_python(program: str) -> bool:
    """Whether it is a program; nothing is run."""
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(program.strip())


class Trial:
    """One method's model answering."""

    def __init__(self, run: Experiment, name: str, source: WeightSource):
        assert run.words is not None
        self._name = name
        self.cut = 0
        self._engine = Engine(
            run.runner(source, min(run.context, run.args.context)),
            run.words,
            eos_ids=frozenset({run.words.eos_id} - {None}),
        )

    def answers(self, prompts: list[str], stop: list[str], max_tokens: int) -> list[str]:
        """Greedy answers; a prompt longer than the context leaves room for loses its beginning: `cut` of them."""
        found, self.cut = [], 0
        room = max(self._engine.ctx_size - max_tokens, self._engine.ctx_size // 2)
        for i, prompt in enumerate(prompts, 1):
            ids = self._engine.prompt_tokens(prompt)
            self.cut += len(ids) > room
            ids = ids[-room:]
            options = {"max_tokens": max_tokens, "temperature": 0.0, "repetition_penalty": 1.0, "stop": stop}
            found.append(self._engine.generate(ids, **options).text)
            print(f"\r{self._name}: {i} of {len(prompts)}", end="\n" * (i == len(prompts)), file=sys.stderr)
        return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__, bits=4, group_size=128, text=False)
    made.add_argument("--gsm8k", type=Path, help="JSON lines of {question, answer}")
    made.add_argument("--mbpp", type=Path, help="JSON lines of {text, code, test_list, task_id}")
    made.add_argument("--limit", type=int, help="ask only so many problems of each (default: all)")
    made.add_argument("--shots", type=int, default=8, help="worked examples of GSM8K")
    made.add_argument("--answer-tokens", type=int, default=256)
    made.add_argument("--context", type=int, default=4096, help="tokens, or the model's own context where shorter")
    made.add_argument("--run-programs", action="store_true", help="run what the model wrote; see above")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = made.parse_args(argv)
    if not (args.gsm8k or args.mbpp):
        made.error("give --gsm8k FILE, --mbpp FILE or both")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(argv)
    run = Experiment(args)
    problems = gsm8k(records(args.gsm8k), args.shots)[: args.limit] if args.gsm8k else []
    tasks = mbpp(records(args.mbpp))[: args.limit] if args.mbpp else []
    scores: dict[str, dict[str, float]] = {}
    cut: dict[str, str] = {}  # a word on the prompts that did not fit
    for method in args.methods:
        source = run.source if method == "original" else run.quantized(method)
        trial, found = Trial(run, method, source), scores.setdefault(method, {})
        if args.text:
            found["perplexity"] = run.perplexity(method, source)
        if problems:
            said = trial.answers([prompt for prompt, _ in problems], ["Question:"], args.answer_tokens)
            cut["gsm8k"] = f", {trial.cut} of which lost their beginning to fit" * bool(trial.cut)
            right = [number(text) == answer for text, (_, answer) in zip(said, problems, strict=True)]
            found["gsm8k"] = 100 * sum(right) / len(right)
        if tasks:
            written = trial.answers([prompt for prompt, _ in tasks], ["[DONE]", "\nTask:"], args.answer_tokens)
            cut["mbpp"] = f", {trial.cut} of which lost their beginning to fit" * bool(trial.cut)
            found["mbpp_python"] = 100 * sum(map(is_python, written)) / len(tasks)
            if args.run_programs:
                passed = [
                    is_python(code) and programs.passes("\n".join([code, *tests]))
                    for code, (_, tests) in zip(written, tasks, strict=True)
                ]
                found["mbpp"] = 100 * sum(passed) / len(tasks)

    run.introduce(f"Table 8: INT{args.bits}-g{args.group_size}; per cent of problems solved, greedy")
    columns = {"gsm8k": "GSM8K", "mbpp": "MBPP pass@1", "mbpp_python": "MBPP: is Python", "perplexity": "perplexity"}
    rows: dict[str, list[Any]] = {}
    for table, default in (("gsm8k", "Llama-2-7B"), ("mbpp", "CodeLlama-7b-Instruct")):
        name, theirs = published.closest(published.TABLE8[table], args.model, default)
        for method, figure in zip(METHODS, theirs, strict=True):
            if method in args.methods:
                rows[f"{method}: paper, {name} (INT4-g128)"] = [figure if key == table else None for key in columns]
    rows |= {f"{m}: ours, {run.name}": [found.get(key) for key in columns] for m, found in scores.items()}
    show(list(columns.values()), rows)
    asked = []
    if problems:
        asked.append(f"{len(problems)} of GSM8K after {args.shots} examples{cut['gsm8k']}")
    if tasks:
        not_run = "" if args.run_programs else ", whose programs were not run (--run-programs)"
        asked.append(f"{len(tasks)} of MBPP{cut['mbpp']}{not_run}")
    print(f"problems: {'; '.join(asked)}\n")
    print(json.dumps({method: {key: finite(x) for key, x in found.items()} for method, found in scores.items()}))


if __name__ == "__main__":
    main()
