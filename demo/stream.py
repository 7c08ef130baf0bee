"""A conversation whose answers appear as they are made: python demo/stream.py [MODEL]"""

import sys

import tinychat


def main(model: str = "pebble") -> None:
    messages = []
    with tinychat.load(model) as llm:
        for question in ("Hi! Who are you?", "Tell me a story about a dog."):
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            answer = ""
            for piece in tinychat.stream(llm, messages, max_tokens=64, seed=1):
                print(piece.text, end="", flush=True)
                answer += piece.text
            messages.append({"role": "assistant", "content": answer})
            print(f"\n({piece.usage.cached_tokens} of {piece.usage.prompt_tokens} prompt tokens were cached)\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
