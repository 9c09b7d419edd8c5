"""Chat templates: rendering against transformers', and templates that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tp_runtime.errors import RequestError, TokenizerError
from tp_runtime.text.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  <b>Hi</b> & 'bye'  "},
    {
        "role": "assistant",
        "content": "<think>hm</think>Hello",
        "tool_calls": [{"name": "f", "args": {"x": 1}}],
    },
    {"role": "user", "content": "日本語 😀"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"ä": ["<", 1, None, True]}}}]
LOOPS = """
        {%- for message in messages %}
            {%- if message.role == 'system' %}{% continue %}{% endif %}
        [{{ loop.index0 }}] {{ message['role'] | upper }}: {{ message.content | trim }}
            {% if loop.index > 2 %}{% break %}{% endif %}
        {%- endfor %}
        tail {{ add_generation_prompt }}
"""
NAMESPACE = """
    {%- set ns = namespace(found=false, n=0) %}{% macro show(m) %}<{{ m.role }}>{% endmacro %}
    {%- for m in messages[::-1] if m.role != 'system' %}
        {%- set ns.n = ns.n + 1 %}{{ show(m) }}
    {% endfor %}{{ ns.n }}
"""
TEMPLATES = {
    "loops and white space": LOOPS,
    "namespace and macro": NAMESPACE,
    "json": "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages[2].tool_calls[0] | tojson }}",
    "generation mark": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "undefined and none": "{{ nothing }}|{{ messages[0].absent }}|{{ documents is none }}",
    "string methods": "{{ messages[2].content.split('</think>')[-1].lstrip() }}{{ 'a-b'.replace('-', '+') }}",
    "tests and filters": "{{ messages | map(attribute='role') | join(',') }}{{ messages[0].role is string }}",
    "date": "{{ strftime_now('%Y')[:2] }}",
}


@pytest.fixture
def template():
    made = []

    def make(source: str, **limits) -> ChatTemplate:
        made.append(ChatTemplate(source, **limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name, template):
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, documents=None, chat_template=TEMPLATES[name], add_generation_prompt=True
    )
    variables = {"messages": MESSAGES, "tools": TOOLS, "documents": None, "add_generation_prompt": True}
    assert template(TEMPLATES[name]).render(variables) == theirs[0]


DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (ENDLESS, r"took longer than 0\.3 s and was stopped"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 3 ** (2 ** 40) }}", r"took longer than 0\.3 s|too much memory"),
        ("{% set x = 'a' * (2**33) %}", "needs too much memory"),
        (DOUBLING, r"took longer than 0\.3 s|too much memory"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "wrote more than 100000 characters"),
        ("{{ 'a' * 200000 }}", "wrote more than 100000 characters"),
        ("{% for %}", "has a syntax error in line 1"),
        ("{{ raise_exception('roles must\\n alternate') }}", "says: roles must alternate$"),
        ("{{ messages.append(1) }}", "says: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "says: .*unsafe"),
        ("{{ messages + 1 }}", "failed with TypeError"),
        ("{{ 1 // 0 }}", "failed with ZeroDivisionError"),
        ("{% include '/etc/passwd' %}", "failed with TypeError|says: "),
        ("{{ strftime_now(1) }}", "failed with TypeError"),
    ],
)
def test_misbehaving_templates_are_one_sentence(source, sentence, template):
    bad = template(source, time_limit_s=0.3, max_chars=100_000)
    with pytest.raises(TokenizerError, match=sentence) as caught:
        bad.render({"messages": []})
    assert str(caught.value).startswith("the chat template ") and "\n" not in str(caught.value)


def test_limits_hold_outside_the_main_thread_and_work_goes_on(template):
    shared = template("{% if slow %}" + ENDLESS + "{% endif %}{{ text }}", time_limit_s=0.3)
    results: dict[int, str] = {}

    def run(index: int) -> None:
        try:
            results[index] = shared.render({"slow": index % 2 == 0, "text": str(index)})
        except TokenizerError as error:
            results[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [results[i] for i in (1, 3, 5)] == ["1", "3", "5"]
    assert all("took longer" in results[i] for i in (0, 2, 4))


def test_messages_that_are_no_json(template):
    with pytest.raises(RequestError, match="no plain JSON data"):
        template("x").render({"messages": [{1, 2}]})


def test_a_dead_child_is_replaced(template):
    before = set(psutil.Process().children())  # earlier tests' fork servers live as long as pytest
    greeting = template("hi {{ name }}")
    assert greeting.render({"name": "a"}) == "hi a"
    (child,) = set(psutil.Process().children()) - before
    child.kill()
    child.wait(timeout=10)
    assert greeting.render({"name": "b"}) == "hi b"
    greeting.close()
    assert set(psutil.Process().children()) <= before


def test_a_forked_process_starts_its_own_child(template):
    greeting = template("{{ pid }}")
    greeting.render({"pid": 0})
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, greeting.render({"pid": os.getpid()}).encode())
        greeting.close()
        os._exit(0)
    assert os.read(read, 100) == str(pid).encode()
    assert os.waitpid(pid, 0)[1] == 0
    assert greeting.render({"pid": 1}) == "1", "the parent's child is still there"
    os.close(read)
    os.close(write)


def test_no_process_outlives_a_killed_one():
    program = textwrap.dedent(
        """
        import psutil
        from tp_runtime.text.chat_template import ChatTemplate
        template = ChatTemplate("x")
        template.render({})
        print(psutil.Process().children()[0].pid, flush=True)
        input()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
        owner.wait(timeout=10)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_worker_imports_nothing_of_ours():
    source = Path(__file__).parents[3] / "tp_runtime/text/template_worker.py"
    assert "tp_runtime" not in source.read_text(encoding="utf-8").split('"""', 2)[2]
