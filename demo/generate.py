"""Continue a text: python demo/generate.py [MODEL] ["text"]"""

import sys

import tinychat


def main(model: str = "pebble", prompt: str = "Once upon a time") -> None:
    with tinychat.load(model) as llm:
        print(llm.description)
        result = tinychat.generate(llm, prompt, max_tokens=64, temperature=0)
        print(prompt + result.text)
        print(f"{result.usage.completion_tokens} tokens, ended by {result.finish_reason}", end="; ")
        print(f"{result.timings.decode_tokens_per_s or 0:.0f} tokens/s")


if __name__ == "__main__":
    main(*sys.argv[1:])
