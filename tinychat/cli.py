"""The `tinychat` command: parses, loads what the command needs, prints errors as one line. Knows no model.

Nothing heavy is imported before a command runs, so that `tinychat --help` is instant on a small board.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat import __version__
from tinychat.arguments import (
    DEFAULT_MODEL,
    Parser,
    add_device,
    add_model,
    add_sampling,
    add_source,
    device_options,
    given_settings,
    one_model,
    source_options,
    whole,
)
from tinychat.bench import command as bench
from tinychat.doctor import command as doctor
from tinychat.errors import TinychatError, UsageError
from tinychat.evaluation import command as evaluation

if TYPE_CHECKING:
    from tinychat.engine import Engine

METHODS = "awq", "awq+gptq", "gptq", "rtn"  # tinychat.quantize.methods(), which would import PyTorch
INTERNAL_ERROR = 70  # sysexits: EX_SOFTWARE
INTERRUPTED, CLOSED_PIPE, TERMINATED = 130, 141, 143  # 128 + SIGINT, SIGPIPE, SIGTERM


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="tinychat",
        description="Run 4-bit language models on the device in front of you.",
        epilog="""examples:
  tinychat chat                                     talk to pebble, the model that comes with tinychat
  tinychat generate "Once upon a time" -n 64        continue a text
  tinychat info Qwen/Qwen2.5-0.5B-Instruct-AWQ      what a model is and the memory it needs
  tinychat quantize DIR -o DIR-awq                  make a 4-bit checkpoint of a 16-bit one
  tinychat eval DIR-awq --text FILE --against DIR   perplexity, and the distance from the original
  tinychat bench --shape llama-2-7b                 how fast such a model would run here
  tinychat doctor                                   what this machine is good for, and what holds it back

A MODEL is a directory, a GGUF file, an id on the Hugging Face hub, or 'pebble'. TINYCHAT_DEBUG=1 shows tracebacks.
'tinychat COMMAND --help' tells more.""",
    )
    parser.add_argument(
        "--version", action="version", version=f"tinychat {__version__}", help="show the version and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, summary, fill, run in (
        ("chat", "talk to a model in the terminal", _chat_options, _chat),
        ("generate", "continue a text, for scripts", _generate_options, _generate),
        ("quantize", "make a checkpoint of 4 bits, or 2, 3, 8", _quantize_options, _quantize),
        ("eval", "how well a model predicts a text, and what its quantization cost", evaluation.fill, evaluation.run),
        ("bench", "how fast a model runs here, and how near the machine's limit", bench.fill, bench.run),
        ("info", "what a model is, the memory it needs, its backend", _info_options, _info),
        ("doctor", "what this machine is, which models fit, what would make it faster", doctor.fill, doctor.run),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        parser.commands[name] = command
        fill(command)
        command.set_defaults(run=run, parser=command)
    return parser


def _chat_options(parser: Parser) -> None:
    parser.epilog = """examples:
  tinychat chat                                     pebble
  tinychat chat ./my-model-awq --system "Answer in one sentence."
  tinychat chat Qwen/Qwen2.5-0.5B-Instruct-AWQ -c 4096 --temp 0
  tinychat chat -p "How do I boil an egg?"          one answer, then exit
  printf 'Hi\\nAnd you?\\n' | tinychat chat          a line of input is a turn

In the chat: /help, Ctrl-C stops an answer, Ctrl-D leaves. What you type is kept in
$XDG_STATE_HOME/tinychat/history (~/.local/state); TINYCHAT_NO_HISTORY=1 keeps nothing. NO_COLOR is honoured."""
    add_model(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer TEXT and exit")
    parser.add_argument("--system", "-sys", default="", metavar="TEXT", help="the system prompt (default: none)")
    add_sampling(parser, max_tokens="as many as the context holds")
    add_device(parser)
    add_source(parser)


def _generate_options(parser: Parser) -> None:
    parser.usage = '%(prog)s [options] [MODEL] "PROMPT"'
    parser.epilog = """examples:
  tinychat generate pebble "Once upon a time" -n 64 --temp 0
  tinychat generate "Once upon a time"              one argument is the prompt, for pebble, ...
  cat story.txt | tinychat generate ./my-model      ... unless it names a model (a path, org/name, 'pebble')
  tinychat generate --chat "Where is Paris?" --json | tail -n 1 | python -m json.tool

The prompt is taken as it is, without a chat template, unless --chat asks for it; '-' or none reads it from stdin.
The text is written as the model makes it; a terminal is shielded from escape sequences in it, a pipe is not."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a directory, GGUF file or hub id, or 'pebble' (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue (default: stdin)")
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the model, as an option")
    parser.add_argument("-p", "--prompt", dest="prompt_flag", metavar="TEXT", help="the prompt, as an option")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message through the template")
    parser.add_argument("--system", "-sys", default="", metavar="TEXT", help="a system prompt, with --chat")
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--json",
        action="store_true",
        help="no text but one JSON object, on the last line: text, tokens, finish_reason, usage, timings",
    )
    out.add_argument("--logprobs", type=int, metavar="N", help="with --json: the N likeliest tokens at each place")
    out.add_argument("-v", "--verbose", action="store_true", help="the model, the backend and figures on stderr")
    add_sampling(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end of the text, for measurements")
    add_device(parser)
    add_source(parser)


def _quantize_options(parser: Parser) -> None:
    parser.usage = "%(prog)s SRC -o DST [options]"
    parser.epilog = """examples:
  tinychat quantize ./my-model -o ./my-model-awq
      AWQ, 4 bits, groups of 128, calibrated on text that the model itself writes: no download, any language
  tinychat quantize ./my-model -o ./my-model-awq --calibration texts.txt
      calibrated on text like that of its later use: plain text, or *.jsonl with {"text": "..."} or
      {"messages": [...]} in each line, which goes through the model's chat template
  tinychat quantize ./my-model -o ./my-model-awq --calibration hf:allenai/c4/en:train:text
      on the first records of a dataset on the hub: hf:org/name[/configuration][:split[:column]]
  tinychat quantize ./my-model -o ./my-model-rtn --method rtn --group-size 64
      plain rounding: no calibration, done in a minute

DST is a checkpoint that other engines read too; a report of what it cost ends the run. In memory is one layer at a
time (and the model in 4 bits while it writes text to be calibrated on). Stopped by Ctrl-C, a full disk or a power
failure, the same command goes on after the last finished layer and writes the same bytes; what it needs for that lies
in .DST.partial beside DST until it is done."""
    parser.add_argument("source", metavar="SRC", help="the checkpoint to quantize: a directory or a hub id")
    parser.add_argument("-o", "--output", required=True, metavar="DST", help="the directory to write (required)")
    form = parser.add_argument_group("what comes out")
    form.add_argument(
        "--method",
        choices=METHODS,
        default="awq",
        metavar="NAME",
        help="how weights are rounded: %(choices)s (default: %(default)s)",
    )
    form.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4, help="of a weight (default: 4)")
    form.add_argument(
        "--group-size",
        type=lambda text: -1 if text == "-1" else whole(text),
        default=128,
        metavar="N",
        help="inputs that share a scale: 32, 64, 128, or -1 for a whole row; smaller: less loss, more bits. "
        "Where it does not divide a layer's inputs, smaller groups or 16 bits are taken, and named (default: 128)",
    )
    form.add_argument("--symmetric", action="store_true", help="one zero for all groups, in the middle of the codes")
    form.add_argument(
        "--act-order",
        choices=("static", "free"),
        help="gptq rounds the most active inputs first; static: in the groups of the file; free: inputs of like "
        "activity share a group, written as GPTQ with g_idx",
    )
    text = parser.add_argument_group("what it is calibrated on", "Nothing of it matters to a method that only rounds.")
    text.add_argument(
        "--calibration",
        metavar="TEXT",
        help="a text file, a .jsonl file, or hf:DATASET (default: sampled from the model itself)",
    )
    text.add_argument(
        "--n-sequences", type=whole, default=128, metavar="N", help="of calibration text, at most (default: 128)"
    )
    text.add_argument(
        "--length", type=whole, metavar="N", help="tokens of each, at most (default: 512, or 128 of sampled text)"
    )
    text.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed, the same bytes; of hf:DATASET the first records are taken (default: 0)",
    )
    run = parser.add_argument_group("how it runs")
    run.add_argument("--restart", action="store_true", help="begin anew, not where an interrupted run stopped")
    run.add_argument("--overwrite", action="store_true", help="replace DST where it exists, once the new one is whole")
    run.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda or cpu (default: auto)")
    run.add_argument(*("-t", "--threads"), type=whole, metavar="N", help="threads (default: one for each core)")
    add_source(parser)


def _info_options(parser: Parser) -> None:
    parser.epilog = """examples:
  tinychat info pebble
  tinychat info Qwen/Qwen2.5-7B-Instruct-AWQ -c 32768       memory at a context of 32768 tokens
  tinychat info ./my-model --json
  tinychat info --supported                                 which model families there are

Reads the config and the headers of the weight files, never the weights; a hub id that is not in the cache is downloaded
first, whole, as to run it."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--supported", action="store_true", help="the model families, and how each is tested")
    add_device(parser)
    add_source(parser)


def _load(args: argparse.Namespace, model: str) -> Engine:
    from tinychat import engine
    from tinychat.progress import Loading

    with Loading(model) as loading:
        return engine.load(
            model,
            threads=args.threads,
            **device_options(args),
            **source_options(args),
            progress=loading,
        )


def _chat(args: argparse.Namespace) -> int:
    from tinychat import chat

    model, settings = one_model(args), given_settings(args)  # mistakes are found before the model is loaded
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("the prompt (-p) is empty; give it some text, or leave -p out to chat")
    return chat.run(_load(args, model), model=model, system=args.system, settings=settings, prompt=args.prompt)


def names_model(word: str) -> bool:
    """Whether a lone argument of `generate` is a model and not a prompt: 'pebble', org/name, a path, a GGUF file."""
    if word == DEFAULT_MODEL or re.fullmatch(r"[\w.-]+/[\w.-]+|[.~]*/\S+|\S+\.gguf", word):
        return True
    try:
        return Path(word).is_dir()
    except OSError:  # too long for a path
        return False


def _model_and_prompt(args: argparse.Namespace) -> tuple[str, str]:
    words = [word for word in (args.model, args.prompt) if word is not None]
    model, prompt = args.model_flag, args.prompt_flag
    if len(words) == 2 and model is None and prompt is None:
        model, prompt = words
    elif len(words) == 1 and prompt is None and (model is not None or not names_model(words[0])):
        prompt = words[0]
    elif len(words) == 1 and model is None:
        model = words[0]
    elif words:
        raise UsageError(f"{words[-1]!r} is one argument too many: a model and a prompt are given already")
    if prompt is None and sys.stdin.isatty():
        raise UsageError('no prompt: tinychat generate MODEL "PROMPT", or pipe the text in')
    if prompt is None or prompt == "-":
        prompt = _standard_input()
    if not prompt:
        raise UsageError("the prompt is empty; give some text to continue")
    return model or DEFAULT_MODEL, prompt


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on stdin is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def _generate(args: argparse.Namespace) -> int:
    from tinychat.chat.terminal import Screen, closing_line

    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs shows nothing without --json")
    if args.system and not args.chat:
        raise UsageError("--system needs --chat: a plain completion has no system prompt")
    model, text = _model_and_prompt(args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    prompt = [*system, {"role": "user", "content": text}] if args.chat else text
    options: dict[str, Any] = {**given_settings(args), "ignore_eos": args.ignore_eos}
    engine = _load(args, model)
    if args.verbose:
        print(engine.description, file=sys.stderr)
    if args.json:
        result = engine.generate(prompt, logprobs=args.logprobs, **options)
        print(json.dumps(result.to_dict()))
        last: Any = result
    else:
        screen, end = Screen(), "\n"
        for last in engine.stream(prompt, **options):
            screen.write(last.text)
            end = last.text[-1:] or end
        if screen.on_terminal and end != "\n":
            screen.write("\n")
    if args.verbose:
        print(closing_line(last, engine.ctx_size), file=sys.stderr)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from tinychat.quantize import quantize

    # Being told to end is as good a reason as Ctrl-C to tidy up and to say how to go on.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        report = quantize(
            args.source,
            args.output,
            method=args.method,
            bits=args.bits,
            group_size=args.group_size,
            symmetric=args.symmetric,
            act_order=args.act_order,
            calibration=args.calibration,
            n_sequences=args.n_sequences,
            length=args.length,
            seed=args.seed,
            overwrite=args.overwrite,
            restart=args.restart,
            device=args.device,
            threads=args.threads,
            **source_options(args),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(report)
    return 0


def _info(args: argparse.Namespace) -> int:
    from tinychat import architectures, info

    if args.supported:
        if args.model or args.model_flag:
            raise UsageError("--supported is about all models; it takes no MODEL")
        rows = [dataclasses.asdict(family) for family in architectures.described()]
        print(json.dumps(rows) if args.json else info.families())
        return 0
    facts = info.gather(
        one_model(args),
        device=args.device,
        ctx_size=args.ctx_size,
        kv_dtype=args.kv_type,
        head=args.head,
        threads=args.threads,
        **source_options(args),
    )
    print(json.dumps(facts) if args.json else info.table(facts))
    return 0


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    print(f"tinychat: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the program's own); returns the exit code."""
    _prepare_streams()
    warnings.showwarning = _warn
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv:
            parser.print_help()
            return 0
        return _run(parser, argv)
    except BrokenPipeError:  # `| head` has seen enough
        _abandon_stdout()
        return CLOSED_PIPE


def _prepare_streams() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started us closed it: `<&-`, a service manager
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for the whole run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows '?', not a traceback


def _abandon_stdout() -> None:
    """Let what is buffered vanish: nothing more can be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(parser: Parser, argv: list[str]) -> int:
    debug = bool(os.environ.get("TINYCHAT_DEBUG"))
    try:
        args = parser.parse(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit):
        raise
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except TinychatError as error:
        if debug:
            raise
        print(f"tinychat: error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("tinychat"):
            raise
        print(f"tinychat: error: this needs the Python package {error.name!r}: pip install it", file=sys.stderr)
        return 1
    except MemoryError:
        if debug:
            raise
        print("tinychat: error: out of memory; 'tinychat info MODEL' shows what a model needs", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a directory that may not be read: the machine's, not ours
        if debug:
            raise
        _abandon_stdout()
        where = f" ({error.filename})" if error.filename else ""
        print(f"tinychat: error: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        print(f"tinychat: internal error: {name}: {error}\n(TINYCHAT_DEBUG=1 shows where)", file=sys.stderr)
        return INTERNAL_ERROR
