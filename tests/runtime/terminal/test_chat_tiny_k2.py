"""The chat on the bundled trained model, quantized: tools, cache, and the command itself on a terminal."""

import json
import os
import re
import sys

import pexpect
import pytest

from helpers.paths import TINY_K2
from moebox.quantize.convert import quantize
from moebox.runtime.api import load

QUESTION = "I want to find an Italian restaurant in San Jose."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "FindRestaurants",
            "description": "Find restaurants by location and by category",
            "parameters": {
                "type": "object",
                "properties": {
                    "category": {"type": "string", "description": "The category of food"},
                    "location": {"type": "string", "description": "City where the restaurant is located"},
                },
                "required": ["category", "location"],
            },
        },
    }
]
GREEDY = {"temperature": 0.0, "max_tokens": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-k2") / "int4"
    quantize(TINY_K2, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, context=2048)


@pytest.mark.slow
def test_the_tokenizer_and_template_are_those_of_the_checkpoint(model):
    ids = model.template.render([{"role": "user", "content": QUESTION}], TOOLS, thinking=False)
    text = model.tokenizer.decode(ids)
    assert text.startswith('<|im_system|>tool_declare<|im_middle|>[{"function": {"description"')
    assert text.endswith("<|im_assistant|>assistant<|im_middle|><think></think>")
    assert QUESTION in text
    assert model.template.has_thinking
    assert model.tokenizer.n_vocab == model.engine.config.vocab_size == 4096
    assert model.tokenizer.special("<|im_end|>") in model.stop_ids


def test_a_dialogue_with_tools_computes_only_new_tokens(model):
    messages = [{"role": "user", "content": QUESTION}]
    first = model.generate(messages, tools=TOOLS, thinking=False, **GREEDY)
    assert first.stats.finish_reason in ("stop", "tool_calls")
    assert "<|" not in first.text
    answer = {"role": "assistant", "content": first.text}
    if first.tool_calls:
        assert first.tool_calls[0].name == "FindRestaurants"
        answer["tool_calls"] = [call.to_message() for call in first.tool_calls]
        follow_up = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '[{"name": "Roma"}]'}
    else:
        follow_up = {"role": "user", "content": "Moderate, please."}
    second = model.generate([*messages, answer, follow_up], tools=TOOLS, thinking=False, **GREEDY)
    assert second.stats.usage.cached_tokens == first.stats.prompt_tokens + first.stats.usage.completion_tokens
    assert second.text or second.tool_calls


def test_the_same_seed_gives_the_same_text(model):
    messages = [{"role": "user", "content": QUESTION}]
    options = {"thinking": False, "temperature": 1.0, "seed": 5, "max_tokens": 8}
    assert model.generate(messages, **options).tokens == model.generate(messages, **options).tokens


@pytest.mark.slow
def test_the_command_holds_a_dialogue_on_a_terminal(folder, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    program = ["-c", "from moebox.cli import main; main()", "chat", str(folder)]
    options = ["--tools", str(tools), "--no-think", "--temperature", "0", "--max-tokens", "48"]
    environment = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    child = pexpect.spawn(
        sys.executable, program + options, env=os.environ | environment, encoding="utf-8", timeout=60
    )
    child.setwinsize(50, 200)
    child.expect("context 8,192 tokens")
    child.expect_exact(">>>")
    for text in (QUESTION, "Thank you, that is all."):
        child.send(text + "\r")
        while child.expect(
            [r"context [\d,]+/8,192\D.*>>>", r"type what FindRestaurants returns.*Restaurants>"]
        ):
            child.send('[{"restaurant_name": "Roma", "city": "San Jose"}]\r')
    assert re.search(r"answer [\d,]+ tok at [\d,.]+ tok/s", child.before + child.after)
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
