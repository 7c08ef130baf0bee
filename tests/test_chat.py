"""The terminal chat: the conversation, its commands, and the terminal, with an engine that needs no model."""

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
from fake_engine import FakeEngine, FakeTokenizer
from fakes import EOS, ByteTokenizer, FakeRunner, saying
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from tinychat import chat, tokenizer
from tinychat.chat import commands, terminal
from tinychat.chat.escapes import EscapeFilter
from tinychat.chat.session import Session
from tinychat.chat.terminal import PromptReader, Screen, message_of
from tinychat.chat.transcript import Transcript
from tinychat.engine import Engine
from tinychat.errors import ContextOverflowError, TemplateError, UsageError

ROOT = Path(__file__).resolve().parent.parent


def ask(session: Session, text: str, cancel=None) -> str:
    return "".join(piece.text for piece in session.ask(text, cancel))


# ---- the conversation ------------------------------------------------------------------------------------------------


def test_the_whole_conversation_goes_to_the_engine_each_turn():
    engine = FakeEngine("Hello there.", "Fine.")
    session = Session(engine, system="Be kind.")
    assert ask(session, "Hi") == "Hello there."
    assert ask(session, "How are you?") == "Fine."
    assert engine.calls[1][0] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "How are you?"},
    ]
    assert session.used == 2 + 1 + 2 + 3 + 1


def test_only_given_settings_are_passed_on_and_the_context_is_the_only_limit():
    engine = FakeEngine(ctx_size=77)
    session = Session(engine, settings={"temperature": 0.0})
    ask(session, "Hi")
    assert engine.calls[0][1] == {"temperature": 0.0, "max_tokens": 77}
    session.settings["max_tokens"] = 5
    ask(session, "Hi")
    assert engine.calls[1][1] == {"temperature": 0.0, "max_tokens": 5}


def test_a_cancelled_answer_is_kept_and_marked():
    session, cancel = Session(FakeEngine("one two three four", "fine")), threading.Event()
    for number, _ in enumerate(session.ask("count", cancel)):
        if number == 1:
            cancel.set()
    assert session.messages[-1] == {"role": "assistant", "content": "one two", "interrupted": True}
    ask(session, "go on")
    assert all(set(message) == {"role", "content"} for message in session.engine.calls[-1][0])


def test_a_closed_stream_counts_as_interrupted():
    session = Session(FakeEngine("one two three"))
    stream = session.ask("count")
    next(stream)
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": "one", "interrupted": True}


def test_what_got_no_answer_leaves_no_trace():
    session, cancel = Session(FakeEngine("fine", "never shown", ctx_size=8)), threading.Event()
    ask(session, "Hi")
    before = list(session.messages)
    cancel.set()
    ask(session, "Stop at once", cancel)
    assert session.messages == before
    with pytest.raises(ContextOverflowError):
        ask(session, "word " * 20)
    assert session.messages == before
    assert ask(session, "Still there?").startswith("You said")


def test_an_empty_answer_is_an_answer():
    session = Session(FakeEngine(""))
    ask(session, "Hi")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


# ---- the tokens of the conversation ----------------------------------------------------------------------------------

HELLO = [*FakeTokenizer.WORDS]  # "Hello there.", as a model would choose it and encoding would not


def exchange(question: str, answer: str | None = None) -> list[dict[str, str]]:
    said = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [{"role": "user", "content": question}, *said]


def test_the_next_prompt_holds_the_tokens_that_the_model_chose():
    transcript = Transcript(FakeTokenizer())
    first = transcript.prompt(exchange("Hi"))
    assert first == exchange("Hi") and FakeTokenizer().decode(first.tokens) == "<user>Hi<assistant>"
    transcript.answered("Hello there.", HELLO)
    second = transcript.prompt([*exchange("Hi", "Hello there."), *exchange("And?")])
    assert second.tokens[: len(first.tokens) + 2] == first.tokens + HELLO
    assert FakeTokenizer().decode(second.tokens) == "<user>Hi<assistant>Hello there.<user>And?<assistant>"
    # A question that is dropped (it did not fit, say) changes nothing.
    third = transcript.prompt([*exchange("Hi", "Hello there."), *exchange("Then?")])
    assert third.tokens[: len(first.tokens) + 2] == first.tokens + HELLO


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello", HELLO),  # a stop string cut the text
        ("Hello there.", [*HELLO, ord("<")]),  # a control token, which no text shows
    ],
)
def test_an_answer_that_its_tokens_do_not_spell_is_encoded_anew(text, tokens):
    transcript = Transcript(FakeTokenizer())
    transcript.prompt(exchange("Hi"))
    transcript.answered(text, tokens)
    again = transcript.prompt([*exchange("Hi", text), *exchange("And?")])
    assert again.tokens == FakeTokenizer().encode(f"<user>Hi<assistant>{text}<user>And?<assistant>")


def test_a_conversation_that_was_changed_is_encoded_anew():
    transcript = Transcript(FakeTokenizer())
    transcript.prompt(exchange("Hi"))
    transcript.answered("Hello there.", HELLO)
    for messages in (exchange("Hi"), [*exchange("Hi", "Hello here."), *exchange("And?")], exchange("Ho")):
        tokens = Transcript(FakeTokenizer()).prompt(messages).tokens
        assert transcript.prompt(messages).tokens == tokens == list(filter(lambda i: i < 0x110000, tokens))


def test_only_new_tokens_are_prefilled_on_a_real_tokenizer(data_dir):
    """Pebble's own answers start with "▁Hello"; encoded anew, the same text starts with "Hello"."""
    words = tokenizer.load(data_dir / "pebble-11m")
    chosen = [words.token_id(token) for token in ("▁Hello", "!", "▁What", "▁would", "▁you", "▁like", "?")]
    transcript = Transcript(words)
    first = transcript.prompt(exchange("Hi")).tokens
    transcript.answered(words.decode(chosen), chosen)
    messages = [*exchange("Hi", words.decode(chosen)), *exchange("A story.")]
    second = transcript.prompt(messages).tokens
    anew = Transcript(words).prompt(messages).tokens
    assert second[: len(first) + len(chosen)] == first + chosen != anew[: len(first) + len(chosen)]
    assert words.decode(second) == words.decode(anew).replace("Hello", " Hello")


class Spelled(ByteTokenizer):
    """The model writes 'é' as one token that encoding never gives; EOS ends a message and is written '|'."""

    OWN = 258

    def encode(self, text, add_bos=True):
        return [EOS if char == "|" else byte for char in text for byte in char.encode()]

    def decode(self, ids, skip_special=True):
        return "".join("é" if i == self.OWN else chr(i) for i in ids if i < 256 or i == self.OWN)

    def decoder(self):
        return SimpleNamespace(step=lambda token: self.decode([token]), flush=lambda: "")


class Barred:
    def render(self, messages, add_generation_prompt):
        return "".join(f"|{m['role']}:{m['content']}" for m in messages) + "|assistant:"


def test_with_the_engine_a_turn_prefills_only_what_is_new():
    runner = FakeRunner(saying([ord("h"), Spelled.OWN], len("|user:Hi|assistant:")), ctx_size=200)
    session = Session(Engine(runner, Spelled(Barred()), eos_ids=frozenset({EOS})))
    assert ask(session, "Hi") == "hé"
    before = int(runner.cache.lengths[0])
    last = list(session.ask("And?"))[-1]
    # Prompt and answer of the first turn; the EOS that ended it was drawn and never run.
    assert last.usage.cached_tokens == before == len("|user:Hi|assistant:") + 2
    assert last.usage.prompt_tokens == before + len("|user:And?|assistant:")


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path):
    session = Session(FakeEngine("Grüß dich 🙂"), model="m", system="Kurz.", settings={"seed": 3, "stop": ["\n"]})
    ask(session, "Hallo")
    session.messages[-1]["interrupted"] = True
    session.save(tmp_path / "talk.json")
    other = Session(FakeEngine(), model="n")
    assert other.load(tmp_path / "talk.json") == "m"
    assert (other.system, other.messages, other.settings) == (session.system, session.messages, session.settings)
    other.clear()
    other.save(tmp_path / "talk.json")  # a saved conversation may be replaced
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == []
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_save_leaves_other_files_alone(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match="not a saved conversation"):
        Session(FakeEngine()).save(tmp_path / "diary.txt")
    assert (tmp_path / "diary.txt").read_text() == "dear diary"
    with pytest.raises(UsageError, match="cannot write"):
        Session(FakeEngine()).save(tmp_path / "nowhere" / "talk.json")


TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "messages"),
        ('{"messages": "hi"}', "messages"),
        (json.dumps({"messages": [{"role": "robot", "content": "a"}]}), r"messages\[0\]"),
        (json.dumps({"messages": TURN[::-1]}), r"messages\[0\]"),
        (json.dumps({"messages": [TURN[0], {"role": "assistant", "content": 3}]}), r"messages\[1\]"),
        (json.dumps({"messages": TURN[:1]}), "no answer"),
        (json.dumps({"messages": TURN, "system": 3}), "system"),
        (json.dumps({"messages": TURN, "settings": [1]}), "settings"),
        (json.dumps({"messages": TURN, "settings": {"temprature": 1}}), "did you mean 'temperature'"),
        (json.dumps({"messages": TURN, "settings": {"temperature": "hot"}}), "temperature"),
        (json.dumps({"messages": TURN, "settings": {"top_p": 2}}), "top_p"),
    ],
)
def test_load_checks_the_file_and_changes_nothing_where_it_is_wrong(tmp_path, text, complaint):
    (tmp_path / "talk.json").write_text(text)
    session = Session(FakeEngine(), system="kept")
    ask(session, "Hi")
    before = list(session.messages)
    with pytest.raises(UsageError, match=complaint):
        session.load(tmp_path / "talk.json")
    assert (session.messages, session.system) == (before, "kept")


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        Session(FakeEngine()).load(tmp_path / "none.json")


# ---- commands --------------------------------------------------------------------------------------------------------


def test_commands_are_told_from_messages():
    assert commands.is_command("/help") and commands.is_command("/?") and commands.is_command("/set temp 0")
    for text in ("hello", "/usr/bin/env is a path", "/help\nme", "/", "// a comment", ""):
        assert not commands.is_command(text)


def test_every_command_is_in_the_help():
    shown = commands.execute(Session(FakeEngine()), "/help")
    assert shown == commands.execute(Session(FakeEngine()), "/?")
    for command in commands.COMMANDS:
        for name in (command.name, *command.aliases):
            assert f"/{name}" in shown


def test_set_takes_any_spelling_and_checks_at_once():
    session = Session(FakeEngine())
    for line in ("/set temp 0", "/set  repeat-penalty   1.1", "/set n 9", r'/set stop "\n\n"', "/set SEED 7"):
        commands.execute(session, line)
    assert session.settings == {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
        "max_tokens": 9,
        "stop": ["\n\n"],
        "seed": 7,
    }
    commands.execute(session, "/set temperature default")
    assert "temperature" not in session.settings
    before = dict(session.settings)
    for line, complaint in (
        ("/set top_p 2", "top_p"),
        ("/set top_k many", "top_k is 'many'; it must be a whole number"),
        ("/set tmp 1", "did you mean 'temp'"),
        ("/set seed", "needs a value"),
        ("/set temperature nan", "temperature"),
    ):
        with pytest.raises(UsageError, match=complaint):
            commands.execute(session, line)
    assert session.settings == before


def test_set_alone_shows_what_the_next_answer_will_use():
    session = Session(FakeEngine(ctx_size=77), settings={"top_k": 7})
    rows = {line[1:].split()[0]: line for line in commands.execute(session, "/set").splitlines()}
    assert rows["temperature"].startswith(" temperature") and " 0.7 " in rows["temperature"]
    assert rows["top_k"].startswith("*top_k") and " 7 " in rows["top_k"]
    assert " 77 " in rows["max_tokens"] and "none" in rows["seed"]


def test_clear_system_and_show():
    session = Session(FakeEngine("fine"), model="paper")
    commands.execute(session, "/system Answer in verse.")
    ask(session, "Hi")
    shown = commands.execute(session, "/show")
    for fact in ("on paper", "5 of 100", "Answer in verse.", "default"):
        assert fact in shown
    commands.execute(session, "/clear")
    assert (session.messages, session.used, session.system) == ([], 0, "Answer in verse.")
    assert commands.execute(session, "/system") == "system prompt: Answer in verse."
    commands.execute(session, "/system none")
    assert session.system == ""


def test_unknown_commands_suggest_and_exits_exit():
    with pytest.raises(UsageError, match=r"no command /hlep \(did you mean '/help'\?\)"):
        commands.execute(Session(FakeEngine()), "/hlep")
    for line in ("/exit", "/quit", "/bye", "/EXIT"):
        assert commands.execute(Session(FakeEngine()), line) is None


def test_save_and_load_commands(tmp_path):
    session = Session(FakeEngine("fine"), model="m")
    ask(session, "Hi")
    name = tmp_path / "a talk.json"
    assert commands.execute(session, f"/save {name}") == f"saved 2 messages to {name}"
    other = Session(FakeEngine(), model="n")
    assert "held with m" in commands.execute(other, f"/load {name}")
    assert other.messages == session.messages
    with pytest.raises(UsageError, match="needs a file name"):
        commands.execute(session, "/save")


# ---- escape sequences ------------------------------------------------------------------------------------------------

SEQUENCES = [
    "\x1b[31m",
    "\x1b[2J",
    "\x1b]52;c;aGk=\x07",
    "\x1b]0;title\x1b\\",
    "\x1bP1$r\x1b\\",
    "\x1bc",
    "\x1b(B",
    "\x9b31m",
    "\x9d0;t\x9c",
    "\x07",
    "\x08",
    "\r",
    "\x7f",
    "\x85",
]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=ascii)
def test_escape_sequences_vanish_whole(sequence):
    assert EscapeFilter()(f"a{sequence}b\n\tc 🙂") == "ab\n\tc 🙂"


def test_an_unfinished_sequence_swallows_its_line_at_most():
    assert EscapeFilter()("a\x1b]0;never closed\nb") == "a\nb"
    assert EscapeFilter()("a\x1b[31\nb") == "a\nb"


@given(
    st.lists(st.one_of(st.sampled_from([*SEQUENCES, "\x1b", "[", "]", "\\", "m", "é", "\n"]), st.text()), max_size=20)
)
def test_no_control_character_gets_through_however_the_text_is_cut(parts):
    keep = EscapeFilter()
    pieces = "".join(keep(part) for part in parts)
    assert pieces == EscapeFilter()("".join(parts))
    assert not [c for c in pieces if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]


# ---- the terminal ----------------------------------------------------------------------------------------------------


class Typed(io.StringIO):
    """A standard input that is no terminal."""


def piped(monkeypatch, text: str, engine: FakeEngine, **options) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdin", Typed(text))
    code = chat.run(engine, screen=Screen(out, err), **options)
    return code, out.getvalue(), err.getvalue()


def test_piped_lines_are_turns(monkeypatch):
    engine = FakeEngine("Hello.", "Bye \x1b[31mred.")
    code, out, err = piped(monkeypatch, "Hi\n\nSee you\n", engine)
    assert (code, out) == (0, "Hello.\nBye \x1b[31mred.\n")  # a pipe gets the text as it is
    assert len(engine.calls) == 2
    assert "tokens" in err and ">>>" not in out + err


def test_piped_commands_and_blocks(monkeypatch):
    engine = FakeEngine()
    code, out, err = piped(monkeypatch, '/system Be brief.\n"""two\nlines"""\n/exit\nnever sent\n', engine)
    assert code == 0
    assert [call[0][-1]["content"] for call in engine.calls] == ["two\nlines"]
    assert engine.calls[0][0][0] == {"role": "system", "content": "Be brief."}
    assert "system prompt: Be brief." in err and "system prompt" not in out


def test_piped_errors_are_told_and_remembered_in_the_exit_code(monkeypatch):
    engine = FakeEngine("fine", ctx_size=10)
    code, out, err = piped(monkeypatch, f"Hi\n{'word ' * 20}\n/hlep\nStill there?\n", engine)
    assert (code, out) == (1, "fine\nYou said: there?\n")
    assert "22 tokens" in err and "holds 10" in err and "/clear" in err and "did you mean '/help'" in err


def test_one_turn_with_prompt(monkeypatch):
    assert piped(monkeypatch, "not read", FakeEngine("Hello."), prompt="Hi")[:2] == (0, "Hello.\n")


def test_notices_of_one_turn_offer_no_command(monkeypatch):
    err = piped(monkeypatch, "", FakeEngine("a b c"), prompt="Hi", settings={"max_tokens": 2})[2]
    assert "cut at max_tokens; a larger -n gives more" in err and "/" not in err.splitlines()[-1]
    engine = FakeEngine("a b c d e f g h i j", ctx_size=9)
    engine.max_ctx_size = 64
    err = piped(monkeypatch, "", engine, prompt="Hi")[2]
    assert "context of 9 tokens is full; -c 64" in err and "/" not in err.splitlines()[-1]
    assert piped(monkeypatch, "", FakeEngine("fine", ctx_size=3), prompt="Hi")[2].count("\n") == 1


def test_notices_on_length_and_on_a_context_that_fills(monkeypatch):
    err = piped(monkeypatch, "Hi\n", FakeEngine("a b c"), settings={"max_tokens": 2})[2]
    assert "cut at max_tokens" in err
    err = piped(monkeypatch, "Hi\n", FakeEngine("a b c d e f g", ctx_size=9))[2]
    assert "context 88 % full: 8 of 9" in err
    err = piped(monkeypatch, "Hi\n", FakeEngine("a b c d e f g h i j", ctx_size=9))[2]
    assert "context is full: 9 of 9" in err and "cut at" not in err and "-c" not in err
    engine = FakeEngine("a b c d e f g h i j", ctx_size=9)
    engine.max_ctx_size = 64
    assert "-c 64 at the start gives more" in piped(monkeypatch, "Hi\n", engine)[2]


def test_notes_break_between_words_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "20")
    for kind, shown in ((Terminal, "a sentence that is\nlonger than a line\n\n  and\n"), (io.StringIO, None)):
        out = kind()
        Screen(out, interactive=True).note(text := "a sentence that is longer than a line\n\n  and")
        assert out.getvalue() == (shown or f"{text}\n")


def test_the_closing_line_says_what_the_cache_saved(monkeypatch):
    err = piped(monkeypatch, "Hi there\nAgain\n", FakeEngine("one two three", "four five"))[2]
    assert "[3 tokens at 8/s; prefill 2 tokens at 4/s; context 5/100]" in err
    assert "[2 tokens at 4/s; prefill 1 token at 2/s, 5 cached; context 8/100]" in err


def test_a_model_without_template_says_what_is_missing_and_what_works(monkeypatch):
    engine = FakeEngine(template=False)
    with pytest.raises(TemplateError, match=r'paper has no chat template.*tinychat generate paper "TEXT"'):
        piped(monkeypatch, "Hi\n", engine, model="paper")
    engine.tokenizer = None
    with pytest.raises(TemplateError, match="has no tokenizer"):
        piped(monkeypatch, "Hi\n", engine)


def test_message_of():
    assert message_of('"""one\ntwo"""') == "one\ntwo"
    assert message_of('"""\none\n"""') == "one"
    assert message_of("  kept  ") == "  kept  "
    assert message_of("\ud83d alone") == "? alone"


@pytest.fixture
def no_history(monkeypatch):
    monkeypatch.setenv("TINYCHAT_NO_HISTORY", "1")


def typed(text: str, engine: FakeEngine) -> tuple[int, str]:
    """A chat in which `text` is typed at prompt_toolkit's prompt."""
    out = io.StringIO()
    with create_pipe_input() as keys:
        keys.send_text(text)
        screen = Screen(out, interactive=True)
        code = chat.run(engine, screen=screen, reader=lambda s: PromptReader(s, keys, DummyOutput()))
    return code, out.getvalue()


def test_typed_turns_and_ctrl_d(no_history):
    engine = FakeEngine("Hello.")
    code, out = typed("Hi\r\x04", engine)
    assert code == 0
    assert out.startswith("fake: 1 parameter, on paper\n/help")
    assert "Hello.\n[1 token;" in out


def test_several_lines_by_alt_enter_block_and_paste(no_history):
    engine = FakeEngine()
    typed('one\x1b\rtwo\r"""three\rfour"""\r\x1b[200~/five\nsix\x1b[201~\r\x04', engine)
    asked = [[m["content"] for m in call[0] if m["role"] == "user"][-1] for call in engine.calls]
    assert asked == ["one\ntwo", "three\nfour", "/five\nsix"]


def test_ctrl_c_at_the_prompt_gives_a_hint_and_errors_do_not_end_the_chat(no_history):
    code, out = typed("\x03/hlep\rHi\r\x04", FakeEngine("Hello."))
    assert code == 0
    assert "Ctrl-D or /exit" in out and "did you mean" in out and "Hello." in out


def test_history_lasts_and_is_private(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("TINYCHAT_NO_HISTORY", raising=False)
    typed("first\r\x04", FakeEngine())
    file = tmp_path / "tinychat" / "history"
    assert "first" in file.read_text() and file.stat().st_mode & 0o077 == 0
    engine = FakeEngine()
    typed("\x10\r\x04", engine)  # Ctrl-P: what was typed before
    assert engine.calls[0][0][-1]["content"] == "first"


def test_a_history_that_cannot_be_kept_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TINYCHAT_NO_HISTORY", raising=False)
    assert typed("Hi\r\x04", FakeEngine("Hello."))[0] == 0
    monkeypatch.setenv("TINYCHAT_NO_HISTORY", "1")
    assert terminal.history_path() is None


def test_ctrl_c_during_an_answer_stops_the_answer(monkeypatch):
    engine = FakeEngine(" ".join(["word"] * 1000), "fine", delay=0.01)
    threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    code, out, err = piped(monkeypatch, "Talk\nAnd now?\n", engine)
    assert code == 0
    assert out.endswith("word\nfine\n") and "stopped; the part above stays" in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_an_engine_that_does_not_stop(monkeypatch):
    class Deaf(FakeEngine):
        def stream(self, prompt, *, cancel=None, **options):
            yield from super().stream(prompt, **options)

    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)

    threading.Timer(0.1, twice).start()
    with pytest.raises(KeyboardInterrupt):
        piped(monkeypatch, "Talk\n", Deaf(" ".join(["word"] * 1000), delay=0.01))


PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from fakes import EOS, ByteTokenizer, FakeRunner, saying
from fake_engine import FakeEngine, FakeTokenizer
from tinychat import chat, tokenizer
long = " ".join(f"w{{i}}" for i in range(2000)) + "\\x1b]52;c;aGk=\\x07"
raise SystemExit(chat.run(FakeEngine("Hello \\x1b]0;owned\\x07there.", long, ctx_size=4000, delay=0.01)))
"""


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_the_real_program_on_a_terminal(tmp_path, term):
    env = {**os.environ, "TERM": term, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM], env=env, encoding="utf-8", timeout=10, dimensions=(40, 150))
    child.expect("on paper.*Ctrl-D leaves.*>>>")
    child.send("Hi\r")
    child.expect("Hello there.\r\n.*2 tokens at .*context 3/4000")
    assert "owned" not in child.before
    child.expect(">>>")
    child.send("Talk\r")
    child.expect("w5 w6")
    child.sendintr()
    child.expect("stopped; the part above stays")
    child.expect(">>>")
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    child.expect(">>>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
