"""The server as OpenAI's own Python client sees it; tokens and log-probabilities as transformers computes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Served

from models import DEMO

PROMPT = "In the evening the king"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of a king."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Anna", "Bernd"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA, "strict": True}}


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def oracle() -> Callable[[list[int], int], tuple[list[float], list[int]]]:
    """Log-probabilities of a text's tokens after the first, and the likeliest continuation, by transformers."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32)

    def run(ids: list[int], num_tokens: int) -> tuple[list[float], list[int]]:
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            logprobs = [float(scores[i, token]) for i, token in enumerate(ids[1:])]
            inputs = torch.tensor([ids])
            out = model.generate(inputs, attention_mask=inputs * 0 + 1, max_new_tokens=num_tokens, do_sample=False)
        return logprobs, out[0, len(ids) :].tolist()

    return run


def test_the_model_is_listed(client: openai.OpenAI, served: Served) -> None:
    (listed,) = client.models.list()
    assert (listed.id, client.models.retrieve(served.model)) == (served.model, listed)
    with pytest.raises(openai.NotFoundError, match="'other/one' does not exist"):
        client.models.retrieve("other/one")


def test_prompt_logprobs_are_those_of_transformers(client: openai.OpenAI, served: Served, oracle: Any) -> None:
    _, tokens = served.ask("/tokenize", {"prompt": PROMPT})
    ids = tokens["tokens"]
    expected, _ = oracle(ids, 1)
    for max_tokens in (0, 1):
        result = client.completions.create(model=served.model, prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens)
        found = result.choices[0].logprobs
        assert found is not None
        assert found.token_logprobs is not None
        assert len(found.token_logprobs) == len(ids) + max_tokens
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=2e-4)
        assert found.token_logprobs[0] is None
        assert result.usage is not None
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(ids), max_tokens)


def test_the_greedy_answer_is_that_of_transformers(client: openai.OpenAI, served: Served, oracle: Any) -> None:
    ids = served.ask("/tokenize", {"prompt": PROMPT})[1]["tokens"]
    _, expected = oracle(ids, 12)
    text = served.ask("/detokenize", {"tokens": ids + expected})[1]["prompt"]
    result = client.completions.create(model=served.model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert PROMPT + result.choices[0].text == text


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, served: Served) -> None:
    options: Any = {
        "model": served.model,
        "messages": MESSAGES,
        "max_tokens": 20,
        "seed": 5,
        "n": 2,
        "temperature": 0.9,
    }
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    chunks = list(
        client.chat.completions.create(
            **options, logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    # But for the details: the second request may find the first one's prompt in the cache.
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert whole.choices[0].message.content != whole.choices[1].message.content
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [own[-1].finish_reason] == [choice.finish_reason]
        entries = [entry for c in own if c.logprobs for entry in c.logprobs.content or []]
        assert choice.logprobs is not None
        assert entries == choice.logprobs.content
        assert len(entries) == 20
        for entry in entries:
            assert len(entry.top_logprobs) == 3
            assert bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token
        assert "".join(entry.token for entry in entries).strip() == (choice.message.content or "").strip()


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI, served: Served) -> None:
    def ask(seed: int) -> str:
        options: Any = {"model": served.model, "prompt": PROMPT, "max_tokens": 10, "temperature": 1, "seed": seed}
        return client.completions.create(**options).choices[0].text

    assert ask(3) == ask(3) != ask(4)


def test_several_prompts_and_choices(client: openai.OpenAI, served: Served) -> None:
    prompts = [PROMPT, "The queen"]
    options: Any = {"model": served.model, "max_tokens": 6, "temperature": 0}
    result = client.completions.create(prompt=prompts, n=2, **options)
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert [choice.text for choice in result.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]


def test_ids_of_a_prompt_are_answered_as_its_text(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"model": served.model, "max_tokens": 12, "temperature": 0, "echo": True}
    begin_with_space = 0
    for prompt in (PROMPT, "In the evening the prince was", "The king said"):
        ids = served.ask("/tokenize", {"prompt": prompt})[1]["tokens"]
        text, same = (client.completions.create(prompt=given, **options).choices[0].text for given in (prompt, ids))
        assert text == same
        begin_with_space += text.startswith(prompt + " ")
    assert begin_with_space


@pytest.mark.parametrize("stop", [[], [", never"]])
def test_offsets_are_those_of_the_text(client: openai.OpenAI, served: Served, stop: list[str]) -> None:
    prompt = "日本 the king, said"
    options: Any = {"model": served.model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stop": stop}
    for echo in (True, False):
        choice = client.completions.create(**options, echo=echo, logprobs=0).choices[0]
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.text_offset is not None
        whole = [
            (token, offset)
            for token, offset in zip(found.tokens, found.text_offset, strict=True)
            if not token.startswith(("bytes:", "<"))
        ]
        assert len(whole) > 8
        for i, (token, offset) in enumerate(whole):
            # The space that the encoding puts before a text is no part of it.
            shown = token.removeprefix(" ") if echo and i == 0 else token
            assert choice.text[offset : offset + len(shown)] == shown


def test_a_stop_string_ends_an_answer(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"model": served.model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[10:14]
    choice = client.completions.create(**options, stop=[stop, "never"]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_bias_and_penalties_change_what_comes(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"model": served.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    (token,) = served.ask("/tokenize", {"prompt": ",", "add_special_tokens": False})[1]["tokens"][-1:]
    assert client.completions.create(**options, logit_bias={str(token): 100}).choices[0].text.count(",") == 8
    repeated = client.completions.create(
        **options, logit_bias={str(token): 15}, frequency_penalty=2, presence_penalty=2
    )
    assert repeated.choices[0].text.count(",") < 8


def test_an_answer_by_schema(client: openai.OpenAI, served: Served) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        result = client.chat.completions.create(
            model=served.model, messages=MESSAGES, response_format=form, max_tokens=200, seed=seed, temperature=1
        )
        value = json.loads(result.choices[0].message.content or "")
        assert value["name"] in ("Anna", "Bernd")
        assert 1 <= value["age"] <= 99
        assert result.choices[0].finish_reason == "stop"


def test_an_answer_by_regular_expression_and_by_choice(client: openai.OpenAI, served: Served) -> None:
    def ask(form: dict[str, Any]) -> str:
        extra = {"structured_outputs": form}
        options: Any = {"model": served.model, "prompt": PROMPT, "max_tokens": 60, "extra_body": extra}
        return client.completions.create(**options).choices[0].text

    assert len(ask({"regex": "[0-9]{3}"})) == 3
    assert ask({"choice": ["yes", "no"]}) in ("yes", "no")
    assert set(ask({"grammar": 'root ::= "ab" root | "c"'})) <= set("abc")


def test_a_space_that_a_choice_begins_with_is_in_the_answer(client: openai.OpenAI, served: Served) -> None:
    result = client.chat.completions.create(
        model=served.model, messages=MESSAGES, extra_body={"structured_outputs": {"choice": [" yes", " no"]}}
    )
    assert result.choices[0].message.content in (" yes", " no")


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=served.model, messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=served.model, prompt="a " * 4000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=served.model, messages=[{"role": "user", "content": "a " * 4000}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    assert "This model's maximum context length is 512 tokens" in long.value.message  # LiteLLM looks for these words
    for create in (
        lambda: client.completions.create(model=served.model, prompt="a", max_tokens=4000),
        lambda: client.chat.completions.create(model=served.model, messages=MESSAGES, max_tokens=4000),
    ):
        with pytest.raises(openai.BadRequestError) as long:
            create()
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="does not know tools"):
        client.chat.completions.create(model=served.model, messages=MESSAGES, tools=[TOOL])


def test_ids_and_texts_go_both_ways(served: Served) -> None:
    for text in ("The king", "ü", "", "</s> is text", "a\nb"):
        status, found = served.ask(
            "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        )
        assert (status, len(found["token_strs"])) == (200, found["count"])
        assert served.ask("/detokenize", {"tokens": found["tokens"]})[1]["prompt"] == text
    assert served.ask("/tokenize", {"messages": MESSAGES})[0] == 200
    assert served.ask("/detokenize", {"tokens": [10**6]})[0] == 400


# Tools: the demo model with a template that knows them

TEMPLATE = (
    '{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }} Answer with {"name": ..., "parameters": ...}\n\n{% endif %}'
    "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}"
    "{{ m.content }}{% endif %}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Any:
    folder = tmp_path_factory.mktemp("tools") / "model"
    folder.mkdir()
    for file in DEMO.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    with Served(packed(folder, 1, "q8"), "--served-model-name", "tools") as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_required_tool_is_called_with_arguments_of_its_schema(tool_client: openai.OpenAI) -> None:
    options: Any = {"model": "tools", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 200}
    for choice, reason in (("required", "tool_calls"), ({"type": "function", "function": {"name": "look_up"}}, "stop")):
        result = tool_client.chat.completions.create(**options, tool_choice=choice).choices[0]
        assert result.message.tool_calls is not None
        (call,) = result.message.tool_calls
        assert (call.function.name, result.finish_reason, result.message.content) == ("look_up", reason, None)
        assert json.loads(call.function.arguments)["name"] in ("Anna", "Bernd")
    answer: Any = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "He is 40."},
    ]
    said = tool_client.chat.completions.create(**{**options, "messages": answer}, tool_choice="none").choices[0]
    assert said.message.tool_calls is None
    assert said.message.content


def test_an_agent_names_a_form_of_its_answers_in_each_turn(tool_client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    options: Any = {"model": "tools", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 200, "response_format": form}
    (call,) = tool_client.chat.completions.create(**options, tool_choice="required").choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["name"] in ("Anna", "Bernd")
    seen = set()
    for seed in range(0, 40, 8):  # so hot that all that the grammar allows is as likely
        for choice in tool_client.chat.completions.create(**options, n=8, temperature=100, seed=seed).choices:
            if choice.finish_reason != "length":
                calls = choice.message.tool_calls or []
                assert (choice.finish_reason, len(calls)) == (("tool_calls", 1) if calls else ("stop", 0))
                value = json.loads(calls[0].function.arguments if calls else choice.message.content or "")
                assert value["name"] in ("Anna", "Bernd")
                seen.add(choice.finish_reason)
    assert seen == {"stop", "tool_calls"}


def test_a_streamed_call_is_whole(tool_client: openai.OpenAI) -> None:
    options: Any = {
        "model": "tools",
        "messages": MESSAGES,
        "tools": [TOOL],
        "max_tokens": 200,
        "tool_choice": "required",
    }
    choices = [chunk.choices[0] for chunk in tool_client.chat.completions.create(**options, stream=True)]
    (call,) = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert (call.index, call.type, call.function.name) == (0, "function", "look_up")
    assert 1 <= json.loads(call.function.arguments)["age"] <= 99
    assert choices[-1].finish_reason == "tool_calls"
    assert [choice.delta.role for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]
    assert all(
        choice.delta.content is None for choice in choices
    )  # a text, though empty, would be shown before the call


def test_a_stream_that_says_nothing_may_go_back(tool_client: openai.OpenAI) -> None:
    options: Any = {"model": "tools", "tools": [TOOL], "max_tokens": 4}
    end = {"2": 100}  # </s>
    with tool_client.chat.completions.stream(**options, messages=MESSAGES, logit_bias=end) as stream:
        silent = stream.get_final_completion().choices[0].message
    assert not silent.content
    again: Any = [*MESSAGES, silent, *MESSAGES]
    assert tool_client.chat.completions.create(**options, messages=again).choices[0].message.content


def test_tools_that_are_not_called_leave_text(tool_client: openai.OpenAI) -> None:
    options: Any = {"model": "tools", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    result = tool_client.chat.completions.create(**options, tools=[TOOL])
    assert result.choices[0].message.tool_calls is None
    chunks = tool_client.chat.completions.create(**options, tools=[TOOL], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == result.choices[0].message.content
