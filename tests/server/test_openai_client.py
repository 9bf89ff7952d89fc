"""OpenAI's API under a mask, through OpenAI's own client: what each option promises, it does."""

import json
import math
import time

import httpx
import openai
import pytest
from openai.types.chat.chat_completion_chunk import Choice
from running import Server, bearer
from test_api import metric

LEGAL = {"model": "legal", "prompt": "The Secretary shall", "max_tokens": 12, "temperature": 0}
MESSAGES = [{"role": "user", "content": "What causes Glaucoma ?"}]
MEDICAL = {"model": "medical", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"old": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["old", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="boss", max_retries=0) as client:
        yield client


def streamed(client: openai.OpenAI, **ask) -> list[list[Choice]]:
    """The parts of each answer to a chat, in the order in which they come."""
    answers: list[list[Choice]] = [[] for _ in range(ask.get("n", 1))]
    for chunk in client.chat.completions.create(**ask, stream=True):
        for part in chunk.choices:
            answers[part.index].append(part)
    return answers


def text_and_ends(parts: list[Choice]) -> tuple[str, list[str]]:
    """What the parts of one answer say together, and each finish_reason among them."""
    text = "".join(part.delta.content or "" for part in parts)
    return text, [part.finish_reason for part in parts if part.finish_reason]


def test_n_gives_n_choices_and_a_seed_gives_the_same_ones_again(client):
    ask = {**LEGAL, "n": 3, "temperature": 1.0, "seed": 7}
    first, again, other = (client.completions.create(**{**ask, "seed": seed}) for seed in (7, 7, 8))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [choice.text for choice in again.choices] == texts
    assert [choice.text for choice in other.choices] != texts


def test_stop_ends_the_text_before_the_stop_string(client):
    whole = client.completions.create(**LEGAL).choices[0].text
    word = whole.split()[2]
    choice = client.completions.create(**LEGAL, stop=[word]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(word)]


def test_echo_gives_the_prompt_and_its_logprobs_before_the_answer(client):
    plain = client.completions.create(**LEGAL).choices[0].text
    choice = client.completions.create(**LEGAL, echo=True, logprobs=2).choices[0]
    assert choice.text == LEGAL["prompt"] + plain
    assert choice.logprobs.token_logprobs[0] is None  # nothing comes before the first token
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    logprobs = choice.logprobs
    for logprob, top in zip(logprobs.token_logprobs[-12:], logprobs.top_logprobs[-12:], strict=True):
        assert math.isclose(logprob, max(top.values()), abs_tol=1e-5)  # greedy takes the likeliest


def test_top_logprobs_of_a_chat_are_sorted_and_hold_the_token_taken(client):
    content = (
        client.chat.completions.create(**MEDICAL, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    )
    assert len(content) == 12
    for token in content:
        logprobs = [top.logprob for top in token.top_logprobs]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert token.token == token.top_logprobs[0].token


def test_penalties_and_biases_change_the_answer_as_they_say(client):
    plain = client.completions.create(**{**LEGAL, "max_tokens": 60}).choices[0].text
    for penalty in ("presence_penalty", "frequency_penalty"):
        other = client.completions.create(**{**LEGAL, "max_tokens": 60}, **{penalty: 2.0}).choices[0].text
        assert len(set(other.split())) > len(set(plain.split()))
    forced = client.completions.create(**LEGAL, logit_bias={"42": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [42] * 12


def test_a_stream_ends_with_the_usage_of_the_whole(client):
    whole = client.completions.create(**LEGAL)
    *chunks, last = client.completions.create(**LEGAL, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_a_json_schema_gives_json_that_fits(client):
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    # JSON may have any space between its parts; the penalty keeps the model from nothing but that.
    ask = {**MEDICAL, "max_tokens": 200, "frequency_penalty": 2.0}
    reply = client.chat.completions.create(**ask, response_format=form)
    pet = json.loads(reply.choices[0].message.content)
    assert pet.keys() == {"old", "kind"}
    assert isinstance(pet["old"], bool)
    assert pet["kind"] in ("cat", "dog")


def test_a_chat_takes_the_options_that_completions_take(client):
    def ask(**options):
        return client.chat.completions.create(**{**MEDICAL, **options})

    plain = ask()
    text = plain.choices[0].message.content
    drawn = [ask(n=3, temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    first, again, other = ([choice.message.content for choice in reply.choices] for reply in drawn)
    assert len(set(first)) > 1
    assert first == again != other
    word = text.split()[2]
    stopped = ask(stop=[word]).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", text[: text.index(word)])
    forced = ask(logit_bias={"42": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [42] * 12
    *chunks, last = ask(stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert (last.choices, last.usage) == ([], plain.usage)


def test_penalties_keep_a_chat_from_saying_again_what_it_said(client):
    """And let it say the same all the more where they are negative."""
    ask = {**MEDICAL, "messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 60}

    def told(**penalty: float) -> tuple[list[int], list[int]]:
        """Tokens of the answer, and of what was asked."""
        reply = client.chat.completions.create(**ask, extra_body={"return_token_ids": True, **penalty})
        return reply.choices[0].token_ids, reply.prompt_token_ids

    for name in ("presence_penalty", "frequency_penalty"):
        few, some, many = (len(set(told(**{name: penalty})[0])) for penalty in (-2.0, 0.0, 2.0))
        assert few < some < many
    once, asked = told(repetition_penalty=1000.0)  # any token that is new is likelier
    assert len(set(once)) == len(once) == 60
    assert not set(once) & set(asked)


def test_a_streamed_chat_has_the_logprobs_of_the_whole(client):
    ask = {**MEDICAL, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    (parts,) = streamed(client, **ask)
    content = [each for part in parts if part.logprobs for each in part.logprobs.content]
    for each, other in zip(content, whole, strict=True):
        assert [top.token for top in each.top_logprobs] == [top.token for top in other.top_logprobs]
        assert (each.token, each.bytes) == (other.token, other.bytes)
        assert math.isclose(each.logprob, other.logprob, abs_tol=1e-4)
    assert "".join(each.token for each in content) == text_and_ends(parts)[0]


def test_of_a_streamed_chat_each_of_n_answers_comes_to_its_end(client):
    ask = {**MEDICAL, "n": 2, "temperature": 1.0, "seed": 7}  # at temperature 0 there is but one answer
    whole = client.chat.completions.create(**ask).choices
    answers = [text_and_ends(parts) for parts in streamed(client, **ask)]
    assert answers == [(choice.message.content, [choice.finish_reason]) for choice in whole]
    assert answers[0] != answers[1]


def test_a_streamed_chat_ends_before_the_stop_string(client):
    text = client.chat.completions.create(**MEDICAL).choices[0].message.content
    word = text.split()[2]
    (parts,) = streamed(client, **MEDICAL, stop=[word])
    assert text_and_ends(parts) == (text[: text.index(word)], ["stop"])


def test_a_completion_takes_a_json_schema_too_and_streams_what_fits(client):
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    ask = {**LEGAL, "max_tokens": 200, "frequency_penalty": 2.0, "extra_body": {"response_format": form}}
    whole = client.completions.create(**ask).choices[0].text
    assert json.loads(whole).keys() == {"old", "kind"}
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)) == whole


def test_json_object_gives_an_object_even_of_a_model_that_would_only_close_it(client, server: Server):
    *_, brace = httpx.post(f"{server.url}/tokenize", json={"prompt": "}"}, headers=bearer()).json()["tokens"]
    ask = {
        **LEGAL,
        "logit_bias": {str(brace): 100},
        "extra_body": {"response_format": {"type": "json_object"}},
    }
    chat = {**MEDICAL, "logit_bias": {str(brace): 100}, "response_format": {"type": "json_object"}}
    assert json.loads(client.completions.create(**ask).choices[0].text) == {}
    assert json.loads(client.chat.completions.create(**chat).choices[0].message.content) == {}


def test_echo_gives_the_prompt_once_in_a_stream_too(client):
    ask = {**LEGAL, "prompt": ["The Secretary shall", "No person shall be"], "echo": True}
    texts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in client.completions.create(**ask).choices]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, ask["prompt"], strict=True))


def test_tools_without_a_parser_are_refused_with_the_option_that_is_missing(client):
    tool = {"type": "function", "function": {"name": "pet", "parameters": SCHEMA}}
    named = {"type": "function", "function": {"name": "pet"}}
    for choice in ("auto", "required", named):
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            client.chat.completions.create(**MEDICAL, tools=[tool], tool_choice=choice)
    assert client.chat.completions.create(**MEDICAL, tools=[tool], tool_choice="none").choices


def test_prompts_come_in_batches_and_as_token_ids(client, server: Server):
    prompts = ["The Secretary shall", "No person shall be"]
    alone = [client.completions.create(**{**LEGAL, "prompt": p}).choices[0].text for p in prompts]
    ids = [
        httpx.post(f"{server.url}/tokenize", json={"prompt": p}, headers=bearer()).json()["tokens"]
        for p in prompts
    ]
    for batch in (prompts, ids):
        choices = client.completions.create(**{**LEGAL, "prompt": batch}).choices
        assert [(choice.index, choice.text) for choice in choices] == list(enumerate(alone))
    assert client.completions.create(**{**LEGAL, "prompt": ids[0]}).choices[0].text == alone[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_request_in_the_engine(server: Server, stream):
    # 57,600 tokens: ten seconds and more
    many = {"prompt": [LEGAL["prompt"]] * 8, "n": 16, "max_tokens": 450}
    body = {**LEGAL, **many, "ignore_eos": True, "temperature": 1.0, "stream": stream}
    with server.client() as http:
        before = metric(http, "maskllm_requests_total", mask="legal", reason="abort")
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.3)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and (
            metric(http, "maskllm_requests_total", mask="legal", reason="abort") < before + 8
            or metric(http, "vllm:num_requests_running") > 0
        ):
            time.sleep(0.1)
        assert metric(http, "maskllm_requests_total", mask="legal", reason="abort") == before + 8
        assert metric(http, "vllm:num_requests_running") == 0
