"""Quantize a model with round-to-nearest and with AWQ; compare sizes, perplexity on a text, and what they write.

python demo/quantize_and_compare.py MODEL TEXT_FILE [GROUP_SIZE]
"""

import sys
import tempfile
from pathlib import Path

import tinychat


def main(model: str, text_file: str, group_size: int = 128) -> None:
    text = Path(text_file).read_text(encoding="utf-8")[:8000]
    with tempfile.TemporaryDirectory() as folder:
        paths = {"original": model}
        for method in ("rtn", "awq"):
            paths[method] = str(Path(folder) / method)
            options = {"method": method, "group_size": group_size, "n_sequences": 8, "length": 64, "progress": False}
            print(tinychat.quantize(model, paths[method], **options))
        for name, path in paths.items():
            with tinychat.load(path) as llm:
                found = tinychat.evaluate(llm, text, window=256)
                written = tinychat.generate(llm, text[:60], max_tokens=24, temperature=0).text
            print(f"{name:<9} perplexity {found.perplexity:.3f}  {text[:60]!r} -> {written!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
