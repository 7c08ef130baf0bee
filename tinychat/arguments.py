"""The parts of tinychat's command line that its commands share: the parser, and groups of options. Knows no command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tinychat import settings
from tinychat.errors import UsageError

DEFAULT_MODEL = "pebble"


class Parser(argparse.ArgumentParser):
    """argparse that suggests the nearest option or command, and reports errors as the rest of tinychat does."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.update(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        """One line and the way to the help, exit code 2."""
        print(f"tinychat: error: {message}\n('{self.prog} --help' shows how it is used)", file=sys.stderr)
        raise SystemExit(UsageError.exit_code)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, where every one of them is known."""
        word = next((word for word in argv if not word.startswith("-")), None)
        if word is not None and argv[0] == word and word not in self.commands:
            known = ", ".join(self.commands)
            self.error(f"no command {word!r}{settings.suggest(word, self.commands)}; there are: {known}")
        args, unknown = self.parse_known_args(argv)
        parser = self.commands.get(getattr(args, "command", None) or "", self)
        # argparse takes all positional arguments from the first run of them: in `MODEL -n 5 PROMPT` it sees no prompt.
        for action in parser._actions:
            missing = not action.option_strings and getattr(args, action.dest, "") is None
            if missing and unknown and not _is_option(unknown[0]):
                setattr(args, action.dest, unknown.pop(0))
        if unknown:
            parser._refuse(unknown)
        return args

    def _refuse(self, unknown: list[str]) -> NoReturn:
        options = [word for word in unknown if _is_option(word)]
        if options:
            option = options[0].partition("=")[0]
            self.error(f"no option {option}{settings.suggest(option, self._option_string_actions)}")
        self.error(f"unexpected argument {unknown[0]!r}; a text of several words needs quotes")


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def whole(text: str) -> int:
    """A positive whole number, for argparse."""
    try:
        if int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more; found {text!r}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, as an argument or an option; `one_model` reads it."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a directory, GGUF file or hub id, or 'pebble' (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as an option")


def one_model(args: argparse.Namespace) -> str:
    """The model that `add_model`'s arguments name."""
    if args.model and args.model_flag:
        raise UsageError(f"two models: {args.model!r} and -m {args.model_flag!r}; give one")
    return args.model_flag or args.model or DEFAULT_MODEL


def add_source(parser: argparse.ArgumentParser) -> None:
    """Options of finding and reading a checkpoint."""
    group = parser.add_argument_group("where the model comes from")
    group.add_argument("--revision", metavar="REV", help="commit, tag or branch on the hub (default: its main branch)")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine")
    group.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="pass over a key of config.json that tinychat does not know; may be given several times",
    )


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_source`'s options give, as the functions that open a checkpoint take it."""
    return {"revision": args.revision, "offline": args.offline, "ignore_config": tuple(args.ignore_config)}


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_device`'s options give, but for threads, as the functions that run a model take it."""
    return {
        "device": args.device,
        "ctx_size": args.ctx_size,
        "kv_dtype": args.kv_type,
        "activations": args.activations,
        "head": args.head,
    }


def add_device(
    parser: argparse.ArgumentParser,
    *,
    context: str = "the model's maximum, at most 4096",
    several_threads: bool = False,
    kv_type: str = "fp16",
    head: int | None = None,
) -> None:
    """Options of running a model.

    context          the default of --ctx-size, in words
    several_threads  --threads takes more than one number, and gives a list
    kv_type, head    the defaults of --kv-type and --head
    """
    group = parser.add_argument_group("how it runs")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, cpu or reference (default: auto)")
    group.add_argument(
        *("-c", "--ctx-size", "--max-seq-len", "--num-ctx"),
        dest="ctx_size",
        type=whole,
        metavar="N",
        help=f"tokens of context (default: {context})",
    )
    group.add_argument(
        "--kv-type",
        choices=("fp16", "fp32", "int8"),
        default=kv_type,
        help=f"precision of the KV cache; int8 takes half the memory of fp16 (default: {kv_type})",
    )
    group.add_argument(
        "--activations",
        type=int,
        choices=(16, 8),
        default=16,
        help="bits that activations keep where they meet quantized weights (default: 16; 8 is faster with long prompts "
        "and several chats, and less exact)",
    )
    group.add_argument(
        "--head",
        type=int,
        choices=(8, 16),
        default=head,
        help="bits of the output head; 16: as it is stored "
        f"(default: {head or '8 where the checkpoint is quantized, else as it is stored'})",
    )
    group.add_argument(
        *("-t", "--threads"),
        type=whole,
        nargs="+" if several_threads else None,
        metavar="N",
        help=("a run for each N threads" if several_threads else "threads") + " (default: one for each core available)",
    )


def add_sampling(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """One option for each setting; `defaults` replaces what the help says of some."""
    group = parser.add_argument_group(
        "how tokens are chosen", "Where nothing is given the model's generation_config.json counts, then the default."
    )
    for setting in settings.SETTINGS:
        default = defaults.get(setting.name, setting.default)
        group.add_argument(
            *setting.flags,
            dest=setting.name,
            type=_argument(setting),
            action="append" if setting.kind is list else "store",
            metavar={int: "N", float: "X", list: "TEXT"}[setting.kind],
            help=setting.help
            + ("; may be given several times" if setting.kind is list else "")
            + ("" if default is None else f" (default: {default})"),
        )


def given_settings(args: argparse.Namespace) -> dict[str, settings.Value]:
    """The settings that `add_sampling`'s options give, checked. Imports numpy."""
    given = {setting.name: getattr(args, setting.name) for setting in settings.SETTINGS}
    return settings.check({name: value for name, value in given.items() if value is not None})


def _argument(setting: settings.Setting) -> Callable[[str], settings.Value | str]:
    def parse(text: str) -> settings.Value | str:
        try:
            return text if setting.kind is list else setting.parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
