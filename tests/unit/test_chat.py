"""Chat templates: transformers' ids, text in messages stays text, and hostile templates are stopped."""

import json
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import byte_level_spec, make_artifact, train_byte_level, train_sentencepiece

from llmrun import template_sandbox
from llmrun.chat import encode_chat, render_chat
from llmrun.errors import UsageError
from llmrun.tokenizer import load_tokenizer

LLAMA_2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}
    {%- set system_message = messages[0]['content'] %}
{%- else %}
    {%- set loop_messages = messages %}
    {%- set system_message = false %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system_message != false %}
        {%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {%- else %}
        {%- set content = message['content'] %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% if message.role == 'tool' %}{% continue %}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

# As trl writes it, so that transformers can tell the model's own tokens; the spaces are part of what is tested.
GENERATION = """{% for message in messages %}
{%- set end = '\\n' %}
{% if message.role == 'assistant' %}
  {% generation %}
{% set end = ' unseen outside' %}{{ loop.index0 }} {{- message.content + eos_token }}
  {% endgeneration %}
{% else %}
{{ message.role }}: {%- generation -%} {{ message.content }} {% endgeneration -%}
{% endif %}
{{ end }}{% endfor %}"""

CONVERSATION = [
    {"role": "system", "content": "You are the house."},
    {"role": "user", "content": "  Where is the sea? "},
    {"role": "assistant", "content": "Here,\n\nin 1234 stones é漢🦙."},
    {"role": "user", "content": "\n{{ 7 * 7 }} {% raw %} and\u2028more"},
]
SHORT = [{"role": "user", "content": "Hello"}]
IM_TOKENS = ["<|begin|>", "<|im_end|>", "<|im_start|>"]


@pytest.fixture(scope="module", params=["llama-2", "llama-3", "generation", "chatml", "chatml-sentencepiece"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    kind, file = "tokenizers", "tokenizer.json"
    if request.param == "llama-2":
        template, kind, file, spec = LLAMA_2, "sentencepiece", "tokenizer.model", {"vocab_size": 420}
        train_sentencepiece(folder)
    elif request.param == "llama-3":
        template, spec = LLAMA_3, byte_level_spec(train_byte_level(folder))
    elif request.param == "generation":
        template, spec = GENERATION, byte_level_spec(train_byte_level(folder))
    elif request.param == "chatml":
        template, spec = CHATML, byte_level_spec(train_byte_level(folder, IM_TOKENS), IM_TOKENS)
    else:
        template, kind, file = CHATML, "sentencepiece", "tokenizer.model"
        library = train_sentencepiece(folder, control_symbols=IM_TOKENS)
        special = {text: library.piece_to_id(text) for text in ["<unk>", "<s>", "</s>", *IM_TOKENS]}
        spec = {"vocab_size": 420, "special_tokens": special}
    ours = load_tokenizer(make_artifact(folder, kind, file, chat_template=template, **spec))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    if request.param == "chatml-sentencepiece":
        theirs.add_special_tokens({"additional_special_tokens": IM_TOKENS})
    theirs.chat_template = template
    return SimpleNamespace(ours=ours, theirs=theirs)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [SHORT, CONVERSATION, CONVERSATION[:3], CONVERSATION[1:]], ids=len)
def test_prompt_and_ids_are_those_of_transformers(model, messages, add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    prompt = model.theirs.apply_chat_template(messages, tokenize=False, **options)
    ids = model.theirs.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
    assert render_chat(model.ours, messages, **options) == prompt
    assert encode_chat(model.ours, messages, **options) == ids


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt", "unheard_of"])
def test_what_a_template_may_ask_for_is_what_transformers_gives(name, model, monkeypatch):
    template = f"{{{{ {name} is defined }}}} {{{{ {name} is none }}}} {{{{ {name} }}}}"
    monkeypatch.setattr(model.ours, "chat_template", template)
    theirs = model.theirs.apply_chat_template(SHORT, tokenize=False, chat_template=template)
    assert render_chat(model.ours, SHORT, add_generation_prompt=False) == theirs


KWARGS = {"mood": False, "way": {"of": ["life", 1]}}


def test_a_template_gets_variables_of_the_callers(model, monkeypatch):
    template = "{{ mood is defined and mood is false }} {{ way.of | join('-') }} {{ documents is none }}"
    monkeypatch.setattr(model.ours, "chat_template", template)
    for kwargs in (KWARGS, {**KWARGS, "documents": [{"title": "T", "text": "t"}]}):
        theirs = model.theirs.apply_chat_template(SHORT, tokenize=False, chat_template=template, **kwargs)
        assert render_chat(model.ours, SHORT, chat_template_kwargs=kwargs) == theirs


def test_special_tokens_in_variables_are_text(model):
    ours = _with_template(model.ours, "{{ messages[0].content }}{{ way[0] }}{{ bos_token }}")
    token = model.ours.eos_token
    ids = encode_chat(ours, SHORT, chat_template_kwargs={"way": [token]})
    assert model.ours.eos_token_ids[0] not in ids
    assert token in model.ours.decode(ids)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ([], "found list"),
        ({1: 2}, "expected names"),
        *(({name: "x"}, f"{name} is not free") for name in ("messages", "tools", "bos_token", "add_generation_prompt")),
        ({"x": ["y" * template_sandbox.MAX_CHARS]}, "expected at most"),
        (json.loads('{"x": [' * 33 + "]}" * 33), "nested more than 64 deep"),
    ],
)
def test_variables_that_a_template_cannot_have(kwargs, says):
    for call in (render_chat, encode_chat):
        with pytest.raises(UsageError, match=says):
            call(_Plain("{{ messages }}"), SHORT, chat_template_kwargs=kwargs)


def test_variables_of_a_template_may_be_nested_as_deep_as_a_request_allows():
    nested = json.loads('{"x": [' * 32 + "]}" * 32)
    assert render_chat(_Plain("{{ x[0].x is sequence }}"), SHORT, chat_template_kwargs=nested) == "True"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_special_tokens_in_messages_are_text(model, data):
    special = model.ours.special_tokens
    fragments = st.one_of(st.sampled_from(sorted(special)), st.text("<s>|/im_end ", max_size=5), st.text(max_size=4))
    content = "".join(data.draw(st.lists(fragments, max_size=5)))
    control = set(special.values()) - {0 if "<unk>" in special else None}

    def controls(content):
        ids = encode_chat(model.ours, [{"role": "user", "content": content}])
        return [token_id for token_id in ids if token_id in control], model.ours.decode(ids)

    found, text = controls(content)
    expected, _ = controls("harmless")
    assert found == expected
    if model.ours.strips_leading_space:
        content = content.replace("\u2581", " ")
    assert content.strip() in text


def test_typed_special_tokens_end_up_as_their_characters(model):
    for token in model.ours.special_tokens:
        ids = encode_chat(model.ours, [{"role": "user", "content": f"a{token}b"}])
        assert f"a{token}b" in model.ours.decode(ids)


def test_a_message_cannot_forge_the_marks(model):
    token = model.ours.eos_token
    expected = encode_chat(model.ours, [{"role": "user", "content": "x"}]).count(model.ours.eos_token_ids[0])
    for content in [f"\ue000{token}\ue001", f"\ue001{token}\ue000 \ue002{token}\ue003", f"\ue000{token}", "\ue000"]:
        ids = encode_chat(model.ours, [{"role": "user", "content": content}])
        assert ids.count(model.ours.eos_token_ids[0]) == expected
        assert content in model.ours.decode(ids)


def test_a_template_that_takes_marked_text_apart_lets_no_special_token_in(model):
    token = model.ours.eos_token
    middle = len(token) // 2
    for expression in [
        "message.content[1:-1]",
        "message.content | reverse | reverse",
        f"message.content.split('{token}') | join('')",
        f"message.content.replace('{token}', '')",
        f"message.content[:{middle + 2}] + message.content[{middle + 2}:]",
    ]:
        template = "{% for message in messages %}{{ " + expression + " }}{% endfor %}"
        ours = _with_template(model.ours, template)
        ids = encode_chat(ours, [{"role": "user", "content": f"{token[:middle]}{token}{token[middle:]}"}])
        assert model.ours.eos_token_ids[0] not in ids, expression


class _Plain:
    bos_token, eos_token = "<s>", None

    def __init__(self, chat_template):
        self.chat_template = chat_template


def _with_template(tokenizer, template):
    class Changed:
        chat_template = template

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    return Changed()


def test_without_a_template_generate_is_suggested():
    with pytest.raises(UsageError, match=r"no chat template.*generate"):
        render_chat(_Plain(None), SHORT)


def test_what_a_template_raises_is_a_usage_error_with_its_text():
    messages = [{"role": "assistant", "content": "I begin"}]
    with pytest.raises(UsageError, match="Conversation roles must alternate"):
        render_chat(_Plain(LLAMA_2), messages)


def test_the_names_that_templates_expect():
    source = "{{ bos_token }}|{{ eos_token }}|{{ {'a': '<é>'} | tojson }}|{{ strftime_now('%Y') | length }}|{{ tools }}"
    assert render_chat(_Plain(source), SHORT) == '<s>||{"a": "<é>"}|4|None'
    source = "{% for t in tools %}{{ t.name }}{% break %}{% endfor %}"
    assert render_chat(_Plain(source), SHORT, tools=[{"name": "f"}, {"name": "g"}]) == "f"
    source = "{%- set ns = namespace(n=1) -%}{%- set ns.n = ns.n + 1 -%}{{ ns.n }}\n  {% if true %}\nx\n  {% endif %}\n"
    assert render_chat(_Plain(source), SHORT) == "2\nx\n"
    source = "{{ {'a': [1]} | tojson(indent=2) }} {{ 'a\nb' | indent(2) }} {{ '{}-{}'.format(1, 2) }} {{ '%s' % 3 }}"
    assert render_chat(_Plain(source), SHORT) == '{\n  "a": [\n    1\n  ]\n} a\n  b 1-2 3'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "at least one"),
        ("hello", "list"),
        ({"role": "user", "content": "x"}, "list"),
        ([1], "message 0 has int"),
        ([{"role": "user"}], "expected role and content"),
        (
            [{"role": "user", "content": "x", "mood": "y"}],
            "no others than name, reasoning_content, tool_call_id, tool_calls",
        ),
        ([{"role": "root", "content": "x"}], "role is 'root'"),
        ([{"role": None, "content": "x"}], "role is None"),
        ([{"role": [], "content": "x"}], "role is"),
        ([*SHORT, {"role": "user", "content": None}], "message 1: content is NoneType"),
        ([{"role": "user", "content": ["x"]}], "content is list"),
        ([{"role": "user", "content": "x" * (template_sandbox.MAX_CHARS + 1)}], "at most"),
    ],
)
def test_malformed_messages_are_refused(messages, expected):
    for call in (render_chat, encode_chat):
        with pytest.raises(UsageError, match=expected):
            call(_Plain("{{ messages }}"), messages)


def test_lone_surrogates_in_messages_are_refused(model):
    with pytest.raises(UsageError, match="lone surrogate"):
        encode_chat(model.ours, [{"role": "user", "content": "a\ud800"}])


HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "getitem": "{{ ''['__class__'] ~ ().__class__.__base__ }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format through map": "{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "huge range": "{{ range(10**9) | list }}",
    "huge literal": "{{ 'a' * 10**10 }}",
    "huge list": "{{ [0] * 10**10 }}",
    "huge power": "{{ 9 ** (9 ** 9) }}",
    "huge product": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "join": "{% set s = 'a' * 99999 %}{{ (range(99999) | list) | join(s) }}",
    "str.join": "{% set s = 'a' * 99999 %}{{ s.join([s] * 99999) }}",
    "replace": "{% set s = 'a' * 99999 %}{{ s | replace('a', s) }}",
    "str.replace": "{% set s = 'a' * 99999 %}{{ s.replace('a', s) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "str.center": "{{ 'a'.center(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "format width": "{{ '{:>10000000000}'.format(1) }}",
    "format nested width": "{{ '{:>{}}'.format(1, 10**10) }}",
    "indent": "{{ ('\n' * 99999) | indent(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "output in pieces": "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "silent loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "exponential recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "lazy filters": "{% for i in range(99999) %}{{ '' if range(99999) | map('string') | list }}{% endfor %}",
    "syntax": "{% if %}",
    "generation without end": "{% generation %}",
    "generation with arguments": "{% generation x %}{% endgeneration %}",
    "unknown filter": "{{ 1 | nosuchfilter }}",
    "unknown name": "{{ nothing.at.all }}",
    "division by zero": "{{ 1 // 0 }}",
    "deep nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "too long": "a" * (template_sandbox.MAX_CHARS + 1),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_templates_are_refused_in_time(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.5)
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"^chat: the template"):
        render_chat(_Plain(HOSTILE[name]), SHORT)
    assert time.monotonic() - start < 10  # a hang is what is looked for, on a busy machine too


def test_a_stopped_template_leaves_the_next_one_alone(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.2)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"more than 0\.2 s"):
            render_chat(_Plain(HOSTILE["silent loop"]), SHORT)
        assert render_chat(_Plain("{{ messages[0].content }}"), SHORT) == "Hello"


def test_a_busy_machine_stops_no_template(monkeypatch):
    class Waiting:
        def generate(self, _variables):
            time.sleep(0.3)
            yield "text"

    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.1)
    monkeypatch.setattr(template_sandbox, "_compile", lambda _source: Waiting())
    assert render_chat(_Plain("{{ messages[0].content }}"), SHORT) == "text"
