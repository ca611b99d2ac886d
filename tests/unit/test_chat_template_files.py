"""Which chat template the packager finds: what it renders to is what transformers' does."""

import json

import pytest
from tokenizer_makers import edit_json, load_files, train_byte_level

from llmpack.tokenizer_files import read_tokenizer
from llmrun.artifact import IncompatibleError
from llmrun.chat import render_chat
from llmrun.errors import UsageError
from llmrun.server.tools import tool_form

MESSAGES = [{"role": "user", "content": "Where is the house?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
PLAIN = "\n  {% if true %}\n{{ bos_token }}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}  \n"
WITH_TOOLS = "  {% for t in tools %}\n {{ t | tojson }}{% endfor %}<tool_call>\n{{ messages[0].content }}\n\n"


@pytest.fixture
def model(tmp_path):
    train_byte_level(tmp_path)
    return tmp_path


def _in_config(model, **templates):
    several = [{"name": name, "template": template} for name, template in templates.items()]
    (model / "chat_template.jinja").unlink(missing_ok=True)  # `load_files` leaves one
    edit_json(model, "tokenizer_config.json", chat_template=several)


def _in_files(model, **templates):
    folder = model / "additional_chat_templates"
    folder.mkdir()
    edit_json(model, "tokenizer_config.json", chat_template="not this one")
    for name, template in templates.items():
        path = model / "chat_template.jinja" if name == "default" else folder / f"{name}.jinja"
        path.write_text(template, "utf-8")


def test_chat_template_from_each_place(model):
    edit_json(model, "tokenizer_config.json", chat_template="{{ 'config' }}")
    assert read_tokenizer(model, 500).chat_template == "{{ 'config' }}"
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (model / "chat_template.jinja").unlink(missing_ok=True)  # `load_files` leaves one
    edit_json(model, "tokenizer_config.json", chat_template=several)
    assert read_tokenizer(model, 500).chat_template == "d"
    (model / "chat_template.jinja").write_text("{{ 'é' }}{% for m in messages %}{% break %}{% endfor %}", "utf-8")
    files = read_tokenizer(model, 500)
    assert files.chat_template.startswith("{{ 'é' }}")
    assert "chat_template.jinja" in files.sources
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    )
    assert "{% generation %}" in read_tokenizer(model, 500).chat_template


def test_the_template_that_models_that_see_images_had_first(model):
    """The processor's own file, before there was chat_template.jinja."""
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'seeing' }}"}))
    files = read_tokenizer(model, 500)
    assert files.chat_template == "{{ 'seeing' }}"
    assert "chat_template.json" in files.sources
    edit_json(model, "tokenizer_config.json", chat_template="{{ 'config' }}")
    assert read_tokenizer(model, 500).chat_template == "{{ 'config' }}"
    edit_json(model, "tokenizer_config.json", chat_template=None)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": ["a"]}))
    with pytest.raises(IncompatibleError, match=r"chat_template.json: chat_template: found list"):
        read_tokenizer(model, 500)


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% nosuchtag %}", "{{ " + "(" * 5000 + "}}"])
def test_a_template_that_does_not_parse_is_refused(model, template):
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(IncompatibleError, match=r"chat_template.jinja: chat template"):
        read_tokenizer(model, 500)


def test_a_template_of_another_type_is_refused(model):
    edit_json(model, "tokenizer_config.json", chat_template=5)
    with pytest.raises(IncompatibleError, match=r"chat_template: found int"):
        read_tokenizer(model, 500)


@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["none", "empty", "one"])
@pytest.mark.parametrize("write", [_in_config, _in_files])
def test_a_template_for_tools_is_used_where_transformers_uses_it(write, tools, model):
    write(model, default=PLAIN, tool_use=WITH_TOOLS)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model)
    files = read_tokenizer(model, 500)
    ours = load_files(files)
    assert render_chat(ours, MESSAGES, tools=tools) == theirs.apply_chat_template(
        MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert files.notes == ()
    assert ("additional_chat_templates/tool_use.jinja" in files.sources) == (write is _in_files)
    assert tool_form(ours).opening == "<tool_call>\n"  # the server knows that the model calls tools


@pytest.mark.parametrize(
    "ours", ["{# c #}", "\n", "a\r\n", "  ", " {% if 1 %}\n {% endif %}\n\n", "x\n  {#- c #}\n", "{{ 1 }}\n \n"]
)
@pytest.mark.parametrize("other", ["\n  y", " {% set z = 1 %}\n{{ z }}"])
def test_white_space_at_the_seams_stays_what_it_was(ours, other, model):
    for templates in ({"default": ours, "tool_use": other}, {"default": other, "tool_use": ours}):
        _in_config(model, **templates)
        joined = load_files(read_tokenizer(model, 500))
        for name, tools in (("default", None), ("tool_use", TOOLS)):
            _in_config(model, default=templates[name])
            alone = load_files(read_tokenizer(model, 500))
            assert render_chat(joined, MESSAGES, tools=tools) == render_chat(alone, MESSAGES, tools=tools)


@pytest.mark.parametrize("write", [_in_config, _in_files])
def test_templates_that_are_left_out_are_noted(write, model):
    write(model, default="d", rag="r", summary="s")
    files = read_tokenizer(model, 500)
    assert files.chat_template == "d"
    assert files.notes == ("chat templates 'rag', 'summary': left out: default and tool_use are used",)


@pytest.mark.parametrize("write", [_in_config, _in_files])
def test_templates_of_which_none_is_the_default_are_noted(write, model):
    write(model, rag="r", tool_use="t")
    files = read_tokenizer(model, 500)
    assert files.chat_template is None
    assert files.notes == ("chat templates 'rag', 'tool_use': left out, as none is named default: chats need one",)


def test_a_template_for_tools_that_does_not_parse_is_refused(model):
    _in_files(model, default="d", tool_use="{% if %}")
    with pytest.raises(IncompatibleError, match=r"additional_chat_templates/tool_use\.jinja: chat template"):
        read_tokenizer(model, 500)


def test_tokens_with_names_are_those_of_transformers(model):
    asked = "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ boi_token }}{{ eoi_token }}{{ im }}{{ nosuch_token }}"
    tokens = {
        "pad_token": "<|eot_id|>",
        "unk_token": {"__type": "AddedToken", "content": "<tool>"},
        "boi_token": "<tool>",
    }
    extra = {"eoi_token": "<|eot_id|>", "im": "<|end_header_id|>"}
    edit_json(model, "tokenizer_config.json", **tokens, extra_special_tokens=extra, chat_template=f"  {asked}\n ")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model)
    files = read_tokenizer(model, 500)
    assert render_chat(load_files(files), MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert files.chat_template.count("{% set ") == 5


def test_what_a_template_sets_itself_is_not_set(model):
    template = "{{ bos_token }}{% set pad_token = 1 %}{{ pad_token }}{{ sep_token }}"
    edit_json(model, "tokenizer_config.json", pad_token="<tool>", chat_template=template)
    assert read_tokenizer(model, 500).chat_template == template


@pytest.mark.parametrize("text", ['a"b', "%}{{ 1 }}", "\\n'", "\n\t\x01", "é\u2028🦙"], ids=ascii)
def test_the_text_of_a_token_is_text_to_the_template(text, model):
    edit_json(model, "tokenizer_config.json", pad_token=text, chat_template="{{ pad_token }}")
    assert render_chat(load_files(read_tokenizer(model, 500)), MESSAGES) == text


def test_filters_that_the_runtime_does_not_have_are_noted(model):
    template = "{% if tools %}{{ [1] | sum }}{{ 'x' | nosuch(5) }}{% endif %}{{ 'ok' | trim | replace('o', 'O') }}"
    edit_json(model, "tokenizer_config.json", chat_template=template)
    files = read_tokenizer(model, 500)
    assert files.notes == ("chat template: filters 'nosuch', 'sum': not supported: chats that come to them fail",)
    assert render_chat(load_files(files), MESSAGES) == "Ok"
    with pytest.raises(UsageError, match="No filter named 'sum'"):
        render_chat(load_files(files), MESSAGES, tools=TOOLS)


def test_a_filter_that_nobody_has_hides_no_token(model):
    edit_json(model, "tokenizer_config.json", chat_template="{{ 'x' | nosuch }}{{ pad_token }}", pad_token="<tool>")
    assert read_tokenizer(model, 500).chat_template.startswith('{% set pad_token = "<tool>" %}')
