"""Rendered conversations equal transformers'; hostile templates end in an error, soon, and nothing else happens."""

import copy
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Core
from tokenizers.models import WordLevel

from tinychat.errors import TemplateError
from tinychat.tokenizer import chat_template
from tinychat.tokenizer.chat_template import ChatTemplate, find_template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter 天気 ö <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}},
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


HI = (user("hi"),)
CONVERSATIONS = {
    "user": ([user("Hi")], {}),
    "system": ([system("Be brief."), user("Hi")], {}),
    "turns": ([user("a"), assistant("b"), user("  c\n")], {}),
    "unicode": ([system("é"), user("你好 👨‍👩‍👧 <b>&'\""), assistant("ok"), user("x")], {"enable_thinking": False}),
    "tools": ([system("s"), user("Weather?")], {"tools": TOOLS}),
    "reasoning": ([user("q"), assistant("a", reasoning_content="hm"), user("r")], {"add_generation_prompt": False}),
    "None": ([user("q"), assistant("a", tool_calls=None), user("r")], {"reasoning_effort": "low"}),
    "refused by many": ([assistant("x"), assistant("y")], {}),
}


def transformers_render(source, messages, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    options.setdefault("add_generation_prompt", True)
    return render_jinja_template([messages], chat_template=source, **TOKENS, **options)[0][0]


def test_real_templates_render_as_in_transformers(data_dir):
    paths = sorted((data_dir / "chat_templates").glob("*.jinja"))
    assert len(paths) == 55
    compared = 0
    for path in paths:
        ours = ChatTemplate(path.read_text(), TOKENS)
        for name, (messages, options) in CONVERSATIONS.items():
            try:
                expected = transformers_render(ours.source, messages, **options)
            except Exception:  # whatever stops transformers, such as a role that the template refuses, stops us
                with pytest.raises(TemplateError):
                    ours.render(messages, **options)
                continue
            compared += 1
            assert ours.render(messages, **options) == expected, (path.name, name)
    assert compared > 380


@pytest.fixture(scope="module")
def render():
    """Render a source with one process for all tests of this module that do not kill it."""
    shared = ChatTemplate("")

    def render(source, messages=HI, **options):
        shared.templates["default"] = source
        return shared.render(list(messages), **options)

    return render


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ nothing }}|{{ documents is none }}", "||True"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ {'é': '<&>'} | tojson }}{{ [1] | tojson(indent=2) }}", '{"é": "<&>"}[\n  1\n]'),
        ("{% set ns = namespace(self=1, a=0) %}{% set ns.a = 5 %}{{ ns.a }}{{ dict(a=1) }}", "5{'a': 1}"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("<b>{{ messages[0]['content'] }}</b>", "<b>hi</b>"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_what_templates_may_use(render, source, text):
    assert render(source) == text


def test_variables(render):
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    for name in ("messages_", "raise_exception", "bos_token", "tokenize"):
        with pytest.raises(TemplateError, match=f"unknown template variable '{name}'"):
            render("", **{name: 1})


def test_the_templates_own_words_reach_the_user(render):
    with pytest.raises(TemplateError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="damaged: line 2: "):
        render("a\n{% if %}")
    with pytest.raises(TemplateError, match="failed: "):
        render("{{ messages[0].content.no.such }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list of dicts"),
        ({"role": "user"}, "must be a list of dicts"),
        ([], "there are no messages"),
        (["hi"], "message 0 must be a dict"),
        ([user("a"), {"content": "x"}], "message 1: role"),
        ([{"role": 3, "content": "x"}], "message 0: role"),
        ([{"role": "user"}], "message 0 has no content"),
        ([user(5)], "message 0: content must be text"),
        ([user([{"type": "image"}])], "message 0: each part"),
        ([user(["x"])], "message 0: each part"),
        ([{**user("a"), "extra": {1, 2}}], "plain JSON values"),
    ],
)
def test_messages_are_checked(render, messages, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate("x").render(messages)


def test_tools_are_checked(render):
    for tools in ("get", {"a": 1}, [print]):
        with pytest.raises(TemplateError, match="tool"):
            render("", tools=tools)


def test_content_in_parts(render):
    parts = [user([{"type": "text", "text": "Hi"}])]
    assert render("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", parts) == "Hi"
    for source in ("{{ messages[0].content }}", "{{ messages[0].content | trim }}", "{{ 'a' + messages[0].content }}"):
        with pytest.raises(TemplateError):
            render(source, parts)


def test_messages_are_not_changed(render):
    messages = [user("a"), assistant("b", reasoning="r", name=None)]
    before = copy.deepcopy(messages)
    render("{{ messages }}", messages)
    assert messages == before


PROBES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__')|list }}",
    "{{ dict.mro() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
]


@pytest.mark.parametrize("source", PROBES)
def test_attempts_to_break_out_are_refused(render, source):
    with pytest.raises(TemplateError, match="unsafe chat template, refused"):
        render(source)


@pytest.mark.parametrize("word", ["include", "import", "extends"])
def test_templates_read_no_files(render, word):
    with pytest.raises(TemplateError):
        render(f"{{% {word} '/etc/passwd' {'as x' if word == 'import' else ''} %}}")


MEMORY_BOMBS = [
    "{{ 'x' * 10**10 }}",
    "{{ 'x'|center(10**9) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set s = 'x' * 10**5 %}{{ s.replace('x', s)|length }}",
    "{{ (('x' * 10**5)|list)|join('y' * 10**5)|length }}",
    "{{ 'a\nb'|indent(10**9)|length }}",
    "{{ [1]|tojson(indent=10**9)|length }}",
    "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ range(10**9) }}",
]


@pytest.mark.parametrize("source", MEMORY_BOMBS)
def test_memory_bombs_end_at_once(render, source):
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux bounds a process's memory")
    start = time.monotonic()
    with pytest.raises(TemplateError):
        render(source)
    assert time.monotonic() - start < 2
    assert render("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ((3 ** 3000000) ** 30) % 7 }}",  # one call into C,
    ],
)
def test_endless_work_ends_in_time(monkeypatch, source):
    monkeypatch.setattr(chat_template, "CPU_LIMIT_S", 0.2)
    template = ChatTemplate({"default": source, "tool_use": "fine"})
    start = time.monotonic()
    with pytest.raises(TemplateError, match="takes longer than"):
        template.render([user("hi")])
    assert time.monotonic() - start < 3
    assert template.render([user("hi")], tools=TOOLS) == "fine"


def test_this_side_ends_it_where_the_kernel_does_not(monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_LIMIT_S", 60.0)
    monkeypatch.setattr(chat_template, "WALL_LIMIT_S", 0.2)
    with pytest.raises(TemplateError, match="takes longer than"):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}").render(
            [user("hi")]
        )


def test_a_template_of_megabytes_is_refused():
    with pytest.raises(TemplateError, match="at most 1,048,576"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_CHARS + 1))


def test_a_killed_process_is_started_anew():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([user("a")]) == "a"
    os.kill(template._worker._process.pid, signal.SIGKILL)
    template._worker._process.wait()
    assert template.render([user("b")]) == "b"


def test_the_process_ends_with_its_owner():
    template = ChatTemplate("x")
    assert template.render([user("a")]) == "x"
    process = template._worker._process
    del template
    assert process.poll() is not None


def test_rendering_from_several_threads(render):
    template = ChatTemplate("{{ messages[0].content }}")
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: template.render([user(f"{n}")])})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}" for n in range(8)}


def test_where_templates_are_found(tmp_path):
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": None}) is None
    assert find_template(tmp_path, {"chat_template": "a"}) == "a"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert find_template(tmp_path, {"chat_template": named}) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "j"}))
    assert find_template(tmp_path, {}) == "j"
    assert find_template(tmp_path, {"chat_template": "a"}) == "a"
    (tmp_path / "chat_template.jinja").write_text("é\n")
    assert find_template(tmp_path, {"chat_template": "a"}) == "é\n"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("t")
    assert find_template(tmp_path, {}) == {"default": "é\n", "tool_use": "t"}


def test_templates_are_found_as_by_transformers(tmp_path):
    from transformers import AutoTokenizer

    from tinychat import tokenizer

    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}{{ tools is none }}"
    for config, files in (
        ({"chat_template": source}, {}),
        ({"chat_template": [{"name": "default", "template": source}, {"name": "tool_use", "template": "T"}]}, {}),
        ({"chat_template": "overridden"}, {"chat_template.jinja": source + "\n"}),
    ):
        directory = tmp_path
        Core(WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x")).save(str(directory / "tokenizer.json"))
        (directory / "config.json").write_text('{"model_type": "llama"}')
        named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (directory / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
        for name, text in files.items():
            (directory / name).write_text(text)
        theirs, ours = AutoTokenizer.from_pretrained(directory), tokenizer.load(directory)
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template([user("x")], tokenize=False, tools=tools, add_generation_prompt=True)
            assert ours.chat_template.render([user("x")], tools=tools) == expected


@pytest.mark.parametrize("found", [5, ["x"], [{"name": "a"}], [{"name": 1, "template": "x"}], {"default": 3}], ids=str)
def test_damaged_template_entries(tmp_path, found):
    with pytest.raises(TemplateError, match="chat_template"):
        find_template(tmp_path, {"chat_template": found})


def test_several_templates_without_a_default():
    template = ChatTemplate({"rag": "a", "tool_use": "b"})
    assert template.render([user("x")], tools=TOOLS) == "b"
    with pytest.raises(TemplateError, match="rag, tool_use"):
        template.render([user("x")])
