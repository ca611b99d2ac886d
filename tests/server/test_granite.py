"""A model of Granite 3's kind with OpenAI's own client: its tokens, its calls, and what its templates ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Served

from models import GRANITE, make_checkpoint
from unit.tokenizer_makers import CORPUS
from unit.tool_forms import TOOLS

END, CALL = "<|end_of_text|>", "<|tool_call|>"
ADDED = ["<|start_of_role|>", "<|end_of_role|>", CALL]  # behind all others, where the end of a text is the first
# With the variables, filters and turns of those that are published; calls that were made have no place in them.
TEMPLATE = """\
{%- if tools and not available_tools -%}
    {%- set available_tools = tools -%}
{%- endif -%}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "The year is " + strftime_now('%Y') + "." %}
    {%- if available_tools %}
        {%- set system_message = system_message + " To use a tool, write <|tool_call|> and a JSON list." %}
    {%- elif thinking %}
        {%- set system_message = system_message + " Think between <think></think>, answer between <response></response>." %}
    {%- endif %}
    {%- if 'citations' in controls and documents %}
        {%- set system_message = system_message + ' Cite.' %}
    {%- endif %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
{%- if available_tools %}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + available_tools | tojson(indent=4) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for document in documents or [] %}
    {{- '<|start_of_role|>document {"document_id": "' + document['doc_id'] | string + '"}<|end_of_role|>\n' }}
    {{- document['text'] + '<|end_of_text|>\n' }}
{%- endfor %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}
            {{- ' ' + controls | tojson()}}
        {%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}
"""
MESSAGES: list[Any] = [{"role": "user", "content": "Is it raining in Rome, or in Oslo?"}]
LISTED = '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "weather", "arguments": {"city": "Oslo"}}]'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_special_tokens(ADDED)
    folder = tmp_path_factory.mktemp("granite") / "model"
    make_checkpoint(
        folder, **GRANITE, tie_word_embeddings=True, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048
    )
    for name in ("config.json", "generation_config.json"):
        named = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**named, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)
    config = {**names, "tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, packed: Callable[..., Path]) -> Iterator[Served]:
    with Served(packed(checkpoint, 1, "q8")) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def special(checkpoint: Path) -> dict[str, int]:
    added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tools": TOOLS},
        {"thinking": True},
        {"documents": [{"doc_id": 1, "text": "It rains in Oslo."}, {"doc_id": "b", "text": "Rome is dry."}]},
        {"documents": [{"doc_id": 1, "text": "It rains."}], "controls": {"citations": True, "length": "short"}},
    ],
    ids=["plain", "tools", "thinking", "documents", "controls"],
)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]], ids=["asks", "instructed"])
def test_prompts_are_those_of_transformers(given: Any, system: Any, checkpoint: Path, served: Served) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(checkpoint)
    messages = [*system, *MESSAGES, {"role": "assistant", "content": "No, 12 degrees."}, *MESSAGES]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)
    kwargs = {name: value for name, value in given.items() if name != "tools"}
    body = {"messages": messages, "chat_template_kwargs": kwargs, "max_tokens": 1}
    if "tools" not in given:
        assert served.ask("/tokenize", body)[1]["tokens"] == expected
    status, answer = served.ask("/v1/chat/completions", {**body, **({"tools": TOOLS} if "tools" in given else {})})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(expected)


def test_the_model_is_told_what_it_called(checkpoint: Path, served: Served) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(checkpoint)
    asked = [{"id": str(i), "type": "function", "function": call} for i, call in enumerate(json.loads(LISTED))]
    for call in asked:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    results = [{"role": "tool", "content": text, "tool_call_id": str(i)} for i, text in enumerate(("no", "yes"))]
    written = [*MESSAGES, {"role": "assistant", "content": f"{CALL}{LISTED}"}, *results]
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": asked}, *results]
    expected = theirs.apply_chat_template(written, add_generation_prompt=True, return_dict=False)
    assert served.ask("/tokenize", {"messages": messages})[1]["tokens"] == expected


def test_the_end_of_a_text_ends_an_answer(client: openai.OpenAI, served: Served, special: dict[str, int]) -> None:
    body: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 50}
    choice = client.chat.completions.create(**body, logit_bias={str(special[END]): 100}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "stop")


def test_an_answer_behind_thoughts_comes_without_its_tags(client: openai.OpenAI, served: Served) -> None:
    written = "<think>\nTwo towns.\n</think>\n\n<response>\nNo: 12 < 13.\n</response>"
    body: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 200}
    more = {"structured_outputs": {"choice": [written]}, "chat_template_kwargs": {"thinking": True}}
    message = client.chat.completions.create(**body, extra_body=more).choices[0].message
    assert message.content == "No: 12 < 13."
    assert message.model_dump()["reasoning_content"] == "Two towns."
    chunks = client.chat.completions.create(**body, extra_body=more, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_demanded_call_is_made(choice: Any, client: openai.OpenAI, served: Served) -> None:
    body: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 200, "tools": TOOLS, "tool_choice": choice}
    for seed in range(4):
        whole = client.chat.completions.create(**body, seed=seed, temperature=1.0, logprobs=True).choices[0]
        assert whole.message.content is None
        assert whole.logprobs
        assert (whole.logprobs.content or [])[0].token == CALL
        (call,) = whole.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name in ("weather", "now")[: 2 if choice == "required" else 1]
        assert json.loads(call.function.arguments).get("city", "Rome") in ("Rome", "Oslo")


@pytest.mark.parametrize("thought", ["", "<think>\nTwo towns, [{}].\n</think>\n"])
@pytest.mark.parametrize("tag", [CALL, "<tool_call>"])
def test_calls_that_the_model_makes_by_itself_are_found(
    tag: str, thought: str, client: openai.OpenAI, served: Served, special: dict[str, int]
) -> None:
    begins = f"<[{special[tag]}]>" if tag in special else json.dumps(tag)
    written = {"grammar": f"start: {json.dumps(thought) if thought else ''} {begins} {json.dumps(LISTED)}"}
    body: Any = {"model": served.model, "messages": MESSAGES, "max_tokens": 400, "tools": TOOLS}
    body["extra_body"] = {"structured_outputs": written}
    whole = client.chat.completions.create(**body).choices[0]
    assert (whole.message.content, whole.finish_reason) == (None, "tool_calls")
    assert getattr(whole.message, "reasoning_content", "") == ("Two towns, [{}]." if thought else "")
    calls = [call.function for call in whole.message.tool_calls or [] if call.type == "function"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Rome", "Oslo"]

    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**body, stream=True)]
    assert not any(delta.content for delta in deltas)
    streamed = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function and call.function.arguments) for call in streamed] == [
        (i, call.arguments) for i, call in enumerate(calls)
    ]

    (alone,) = client.chat.completions.create(**body, parallel_tool_calls=False).choices[0].message.tool_calls or []
    assert alone.type == "function"
    assert alone.function == calls[0]
