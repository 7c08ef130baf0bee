"""The process that renders chat templates, started by `chat_template` as a script of its own.

A template comes with a checkpoint and is a program. Jinja's sandbox keeps it away from Python's internals but bounds
neither time nor memory, and one `'x' * 10**10` cannot be interrupted from inside Python. A process can be: this one
limits its own memory, lets the kernel end it when a rendering takes too much processor time, and holds nothing worth
stealing.

Frames on stdin and stdout: a 4-byte big-endian length, then JSON.
Request: {"template", "variables", "cpu_seconds"}. Answer: {"text"} or {"error", "message"}.
It knows nothing of the rest of the package: it runs with `python -I -S <this file> <import folder>...`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

MEMORY_LIMIT_BYTES = 64 << 20  # on top of what interpreter and jinja2 take
MAX_MESSAGE_CHARS = 2000


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's payload, or None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    payload = stream.read(int.from_bytes(header, "big"))
    return payload if len(payload) == int.from_bytes(header, "big") else None


def write_frame(stream: BinaryIO, payload: bytes) -> None:
    """Write one frame and flush."""
    stream.write(len(payload).to_bytes(4, "big") + payload)
    stream.flush()


def limit_process() -> None:
    """MEMORY_LIMIT_BYTES more memory, no files written, no core dumps; where the system knows such limits."""
    with contextlib.suppress(ImportError):  # Windows has no resource module
        import resource

        limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
        with contextlib.suppress(OSError):  # only Linux tells, and only Linux enforces it
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
        for name, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(name, (limit, limit))


def set_cpu_deadline(seconds: float) -> None:
    """Let the kernel end this process after so many seconds of processor time; 0 lifts the deadline."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


class Refusal(Exception):
    """What a template raises, in its author's words, when the messages do not suit the model."""


def make_environment() -> Any:
    """The Jinja environment that chat templates are written for: what transformers' apply_chat_template offers."""
    from jinja2 import ext, nodes, utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return caller()

    class Namespace(utils.Namespace):
        """A namespace that takes no underscored names: they could shadow what Python itself looks up."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                refuse_underscore(name)
            utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    def refuse_underscore(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace takes no attribute {name!r}")

    class Environment(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, which takes an unsafe attribute for an undefined one, made to say so at once."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__!r} is out of bounds")

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise Refusal(str(message))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda spec: datetime.now().strftime(spec)
    environment.globals["namespace"] = Namespace
    return environment


def render(environment: Any, compiled: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request; whatever the template raises becomes an answer too. Fills `compiled` by source."""
    from jinja2 import exceptions

    try:
        source = request["template"]
        if source not in compiled:
            compiled[source] = environment.from_string(source)
        return {"text": compiled[source].render(request["variables"])}
    except exceptions.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except exceptions.SecurityError as error:
        return {"error": "unsafe", "message": str(error)}
    except Refusal as error:
        return {"error": "refused", "message": str(error)}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except RecursionError:
        return {"error": "recursion", "message": ""}
    except Exception as error:
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Say that all is imported, then answer requests until the other side closes."""
    environment = make_environment()
    compiled: dict[str, Any] = {}
    limit_process()
    write_frame(answers, b"{}")
    while (payload := read_frame(requests)) is not None:
        request = json.loads(payload)
        set_cpu_deadline(request["cpu_seconds"])
        answer = render(environment, compiled, request)
        try:
            if "message" in answer:
                answer["message"] = answer["message"][:MAX_MESSAGE_CHARS]
            encoded = json.dumps(answer).encode()
        except MemoryError:
            encoded = b'{"error": "memory", "message": ""}'
        set_cpu_deadline(0)
        write_frame(answers, encoded)


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])
    serve(sys.stdin.buffer, sys.stdout.buffer)
