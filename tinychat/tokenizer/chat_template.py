"""Chat templates: which one a checkpoint brings, and messages to text with it.

The template is always the checkpoint's own Jinja; none is ever guessed. It is rendered by `template_worker` in a
process apart, which bounds its time and memory and leaves this one unharmed whatever the template does. That process
starts with the first rendering, stays for the following ones, and ends with its owner. This module knows nothing of
tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinychat.errors import TemplateError
from tinychat.tokenizer.template_worker import read_frame, write_frame

CPU_LIMIT_S = 1.0
"""Processor time one rendering may take; the kernel ends the process that takes more."""
WALL_LIMIT_S = 3.0
"""Wall time after which this side ends the process: for systems without processor-time timers, and for loaded ones."""
START_LIMIT_S = 30.0
"""Wall time in which the process must have imported Jinja, on the slowest of boards."""
MAX_TEMPLATE_CHARS = 1 << 20
"""The longest template met has 17 thousand characters; a template of millions is an attack."""

ALLOWED_VARIABLES = frozenset(
    {
        "add_vision_id",
        "builtin_tools",
        "clear_thinking",
        "custom_instructions",
        "custom_tools",
        "date_string",
        "default_system_prompt",
        "documents",
        "enable_citations",
        "enable_thinking",
        "include_thinking",
        "keep_past_thinking",
        "model_identity",
        "reasoning_effort",
        "reasoning_mode",
        "response_format",
        "thinking",
        "thinking_budget",
        "tools_in_user_message",
        "truncate_history_thinking",
    }
)
"""What a caller may set besides messages and tools: what templates in use read. The rest is ours or the template's."""

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names in use for one thing; the first is standard
_KEPT_ENVIRONMENT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
_ADVICE = "put another chat_template.jinja into the checkpoint's directory, or complete plain text without one"

_EXPLANATIONS = {
    "syntax": "the chat template is damaged: {}",
    "unsafe": "unsafe chat template, refused: {}",
    "refused": "the chat template refuses these messages: {}",
    "memory": "the chat template takes too much memory, refused; " + _ADVICE,
    "recursion": "the chat template nests too deeply, refused; " + _ADVICE,
    "failed": "the chat template failed: {}",
}


def find_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template(s) of a checkpoint, or None where it brings none.

    Sources, the first that exists: `chat_template.jinja` with `additional_chat_templates/*.jinja`; "chat_template" of
    tokenizer_config.json, a string or a list of {"name", "template"}; `chat_template.json` (written for processors).
    Several templates come as a dict by name. Raises TemplateError for a source that is damaged.
    """
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        templates = {name: _read_text(path) for name, path in files.items()}
        return templates["default"] if set(templates) == {"default"} else templates
    found = tokenizer_config.get("chat_template")
    source = "tokenizer_config.json"
    if found is None and (directory / "chat_template.json").is_file():
        source = "chat_template.json"
        try:
            content = json.loads(_read_text(directory / source))
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{directory / source} is not JSON: {error}") from None
        found = content.get("chat_template") if isinstance(content, dict) else content
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, list):
        if all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found):
            found = {t["name"]: t["template"] for t in found}
        else:
            raise TemplateError(f'{source}: each entry of the list "chat_template" needs "name" and "template"')
    if isinstance(found, dict) and all(isinstance(t, str) for pair in found.items() for t in pair):
        return found
    raise TemplateError(f'{source}: "chat_template" is neither text nor a list of named templates')


class ChatTemplate:
    """A checkpoint's Jinja template, or several by name, with the special tokens that they may write."""

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None):
        """`special_tokens`: "bos_token" and the like to their text, handed to the template as variables."""
        self.templates = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        for name, text in self.templates.items():
            if len(text) > MAX_TEMPLATE_CHARS:
                raise TemplateError(
                    f"the chat template {name!r} has {len(text):,} characters, at most {MAX_TEMPLATE_CHARS:,} are "
                    f"accepted; {_ADVICE}"
                )
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    @property
    def source(self) -> str:
        """The text of the template used without tools; raises TemplateError where there are several and no default."""
        return self._choose(with_tools=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, equal to what transformers' apply_chat_template(tokenize=False) gives.

        messages: dicts with "role" and "content" (text, or a list of {"type": "text", "text": ...} for the templates
        that take such lists). variables: names of ALLOWED_VARIABLES, such as enable_thinking. Raises TemplateError
        for messages of another shape, and when the template refuses them, fails, is unsafe, or takes more time or
        memory than it may.
        """
        unknown = sorted(variables.keys() - ALLOWED_VARIABLES)
        if unknown:
            raise TemplateError(
                f"unknown template variable {unknown[0]!r}; known are: {', '.join(sorted(ALLOWED_VARIABLES))}"
            )
        checked = _checked_messages(messages)
        request = {
            "template": self._choose(with_tools=tools is not None),
            "cpu_seconds": CPU_LIMIT_S,
            "variables": {
                **self.special_tokens,
                "documents": None,
                **variables,
                "messages": checked,
                "tools": tools if tools is None else _checked_tools(tools),
                "add_generation_prompt": bool(add_generation_prompt),
            },
        }
        try:
            payload = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"messages, tools and variables must be plain JSON values: {error}") from None
        text = self._ask(payload)
        for index, message in enumerate(checked):
            if isinstance(message.get("content"), list) and str(message["content"]) in text:
                raise TemplateError(
                    f"message {index}: this model's chat template does not take content as a list of parts; "
                    f"give it as one text"
                )
        return text

    def _choose(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        raise TemplateError(
            f"the checkpoint has several chat templates ({', '.join(sorted(self.templates))}) and none is the default; "
            f"write the one to use to chat_template.jinja in its directory"
        )

    def _ask(self, payload: bytes) -> str:
        with self._lock:
            if self._worker is None or not self._worker.alive:
                self._worker = _Worker()
            try:
                answer = self._worker.ask(payload)
            except BaseException:
                self._worker.close()  # an answer cut off, by Ctrl-C too, must not be read as the next one's
                self._worker = None
                raise
        if "text" in answer:
            return answer["text"]
        raise TemplateError(_EXPLANATIONS[answer["error"]].format(answer["message"]))


class _Worker:
    """The rendering process. Not for several threads at once."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("template_worker.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), *_import_folders("jinja2", "markupsafe")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C in the terminal is for the program, not for this process
            )
        except (OSError, ValueError) as error:
            raise TemplateError(f"cannot start the process that renders chat templates: {error}") from None
        self._ready = False
        self.close = weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, payload: bytes) -> dict[str, str]:
        """Send one request and wait for its answer; raises TemplateError when the process ends instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._ready:
            if self._timed(START_LIMIT_S, b"") is None:
                raise TemplateError(
                    f"the process that renders chat templates does not start: check that '{sys.executable}' can "
                    f"import jinja2"
                )
            self._ready = True
        answer = self._timed(WALL_LIMIT_S, payload)
        if answer is None:
            raise TemplateError(
                f"the chat template takes longer than {CPU_LIMIT_S:g} s, or too much memory, refused; {_ADVICE}"
            )
        return json.loads(answer)

    def _timed(self, seconds: float, payload: bytes) -> bytes | None:
        """Write `payload` unless it is empty and read a frame; None when the process ended, by our hand or its own."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            if payload:
                write_frame(self._process.stdin, payload)  # type: ignore[arg-type]
            return read_frame(self._process.stdout)  # type: ignore[arg-type]
        except (BrokenPipeError, ConnectionResetError, OSError):
            return None
        finally:
            timer.cancel()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was never written cannot be flushed any more
                stream.close()


def _import_folders(*modules: str) -> list[str]:
    """The folders that hold these modules, for a process that looks nowhere else. Imports none of them."""
    from importlib.util import find_spec

    folders = []
    for name in modules:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise TemplateError(f"chat templates need the package {name}; install it with: pip install {name}")
        folders.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(folders))


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts, without the keys that hold None and with reasoning under its standard name."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise TemplateError("there are no messages; give at least one, such as {'role': 'user', 'content': 'Hello'}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"message {index} must be a dict with role and content, got {type(message).__name__}")
        plain = {key: value for key, value in message.items() if value is not None}
        role = plain.get("role")
        if not isinstance(role, str) or not role:
            raise TemplateError(f"message {index}: role must be a text such as 'user', got {role!r}")
        _check_content(index, plain)
        reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        checked.append(plain)
    return checked


def _check_content(index: int, message: dict[str, Any]) -> None:
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise TemplateError(f"message {index} has no content")
    elif isinstance(content, list):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise TemplateError(
                    f"message {index}: each part of content must be {{'type': 'text', 'text': ...}}, got {part!r:.80}"
                )
    elif not isinstance(content, str):
        raise TemplateError(
            f"message {index}: content must be text or a list of text parts, got {type(content).__name__}"
        )


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise TemplateError(f"tools must be a list of JSON schemas, got {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TemplateError(f"tool {index} must be a JSON schema (a dict), got {type(tool).__name__}")
    return [dict(tool) for tool in tools]


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{path} has {path.stat().st_size:,} bytes, too many for a chat template")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"cannot read the chat template {path}: {error}") from None
