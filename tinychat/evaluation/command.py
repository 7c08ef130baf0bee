"""The command line of `tinychat eval`. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tinychat.arguments import add_device, add_model, add_source, device_options, one_model, source_options, whole


def fill(parser: argparse.ArgumentParser) -> None:
    """The options of `tinychat eval`."""
    parser.usage = "%(prog)s [MODEL] --text FILE [options]"
    parser.epilog = """examples:
  tinychat eval ./my-model-awq --text wiki.test.raw                         perplexity
  tinychat eval ./my-model-awq --text wiki.test.raw --against ./my-model    ... and what quantizing it cost
  tinychat eval pebble --text story.txt --json | tail -n 1                  the last line is one JSON object

The protocol is the AWQ paper's: the file is tokenized whole, with a beginning token before it where the tokenizer puts
one and none anywhere else, and cut into windows that do not overlap; a rest shorter than a window is left out. In a
window each token but the first is predicted, from those before it in the window. Perplexity is exp of the mean negative
log-likelihood; KL divergence is that of the model from the other, at the same places. Intervals take windows for
independent (blocks of up to 128 tokens where there are fewer than 20).

So that the figures are those of the weights, the output head stays as it is stored (--head 16) and the KV cache rounds
nothing, unless told otherwise; what was used is said, and holds for both models."""
    add_model(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text to predict (required)")
    parser.add_argument("--against", metavar="MODEL", help="another checkpoint, as the 16-bit one this was made from")
    parser.add_argument("--window", type=whole, metavar="N", help="tokens (default: 2048, or the context if shorter)")
    parser.add_argument("--max-tokens", type=whole, metavar="N", help="of the text, from its beginning (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object more, on the last line")
    add_device(parser, context="that of a window", kv_type="fp32", head=16)
    add_source(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from tinychat.evaluation.evaluate import evaluate

    found = evaluate(
        one_model(args),
        args.text,
        against=args.against,
        window=args.window,
        max_tokens=args.max_tokens,
        threads=args.threads,
        **device_options(args),
        **source_options(args),
        progress=True,
    )
    print(found)
    if args.json:
        print(json.dumps(found.to_dict()))
    return 0
