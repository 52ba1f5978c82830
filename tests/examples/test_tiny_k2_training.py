"""Data and training at a size for tests: variations stay true to their calls, two steps lower the loss."""

import json
import lzma
import random
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.paths import TINY_K2
from helpers.tiny_k2 import micro_config

TOOL = {
    "type": "function",
    "function": {
        "name": "FindRestaurants",
        "description": "Find a restaurant in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City"},
                "date": {"type": "string", "description": "Day"},
                "price_range": {"type": "string", "description": "Price", "enum": ["moderate", "pricey"]},
            },
            "required": ["city"],
        },
    },
}


def call(arguments):
    function = {"name": "FindRestaurants", "arguments": json.dumps(arguments)}
    return {"id": "functions.FindRestaurants:0", "type": "function", "function": function}


def dialogue(city, day):
    arguments = {"city": city, "date": f"2019-03-{day:02}", "price_range": "moderate"}
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": f"A moderate place in {city.lower()} on March {day}th."},
            {"role": "assistant", "content": "", "tool_calls": [call(arguments)]},
            {
                "role": "tool",
                "tool_call_id": "functions.FindRestaurants:0",
                "name": "FindRestaurants",
                "content": json.dumps([{"city": city, "restaurant_name": "Bird Dog"}]),
            },
            {"role": "assistant", "content": f"There is Bird Dog in {city}."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "Goodbye."},
        ],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.jsonl.xz"
    with lzma.open(path, "wt") as file:
        for city, day in (("San Jose", 4), ("Palo Alto", 13), ("Fresno Heights", 27)):
            print(json.dumps(dialogue(city, day)), file=file)
    return path


def test_variations_keep_calls_and_text_together(data):
    from augment import Augmenter
    from dialogues import read_dialogues

    dialogues = read_dialogues(data)
    augmenter, rng = Augmenter(dialogues), random.Random(0)
    cities, days, names = set(), set(), set()
    for _ in range(200):
        varied = augmenter.vary(rng.choice(dialogues), rng)
        function = varied["messages"][1]["tool_calls"][0]["function"]
        by_value = {value: key for key, value in json.loads(function["arguments"]).items()}
        date = next(value for value in by_value if value.startswith("2019-"))
        city = next(value for value in by_value if value not in (date, "moderate"))
        said = varied["messages"][0]["content"]
        assert city.lower() in said.lower() and city in varied["messages"][3]["content"]
        assert str(int(date[-2:])) in said and "moderate" in said
        tool = next(t for t in varied["tools"] if t["function"]["name"] == function["name"])
        assert set(by_value.values()) <= set(tool["function"]["parameters"]["properties"])
        assert list(json.loads(function["arguments"])) == sorted(json.loads(function["arguments"]))
        cities.add(city), days.add(date), names.add(function["name"])
    assert len(cities) > 50 and len(days) > 20 and len(names) > 5
    assert read_dialogues(data) == dialogues


def test_loss_falls_on_what_the_model_writes():
    from dialogues import ANSWER, CALL, NOTHING, Renderer, load_template
    from tokenizer import load

    renderer = Renderer(load_template(TINY_K2), load(TINY_K2))
    ids, kinds = renderer.encode(dialogue("San Jose", 4))

    def text(kind):
        return renderer.encoding.decode(ids[kinds == kind].tolist())

    assert text(CALL).startswith("<|tool_calls_section_begin|><|tool_call_begin|>functions.FindRestaurants:0")
    assert text(CALL).endswith("<|tool_call_end|><|tool_calls_section_end|>")
    assert text(ANSWER) == "<|im_end|>There is Bird Dog in San Jose.<|im_end|>Goodbye.<|im_end|>"
    assert "<think></think>" in text(NOTHING)


def test_thoughts_name_the_call_and_what_is_missing(data):
    from dialogues import Renderer, load_template, read_dialogues
    from thoughts import thinking_cut, thought
    from tokenizer import load

    messages = read_dialogues(data)[0]["messages"]
    assert thought(messages, 1) == "I call FindRestaurants with city, date, price_range."
    assert thought(messages, 3) == "FindRestaurants returned 1 result. I tell the user."
    assert thought(messages, 5) == "No tool is needed. I answer."
    renderer = Renderer(load_template(TINY_K2), load(TINY_K2))
    cut = thinking_cut(read_dialogues(data)[0], random.Random(1))
    text = renderer.encoding.decode(renderer.encode(cut, think=True)[0].tolist())
    assert f"<think>{cut['messages'][-1]['reasoning_content']}</think>" in text


def test_exercises_say_every_argument(data):
    from augment import Augmenter
    from dialogues import read_dialogues
    from exercise import exercise

    augmenter, rng = Augmenter(read_dialogues(data)), random.Random(0)
    for _ in range(50):
        messages = exercise(augmenter, rng)["messages"]
        said = " ".join(message["content"] for message in messages[::2]).lower()
        arguments = json.loads(messages[-1]["tool_calls"][0]["function"]["arguments"])
        for value in arguments.values():
            assert value.lower() in said or value.startswith("2019-"), (value, said)


@pytest.fixture
def one_thread():
    """One thread: for small products on busy cores, threads would wait longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_some_steps_of_training(data, tmp_path, capsys, one_thread):
    from export import load_parts
    from model import Model
    from stream import Sequences, dev_batches, pack
    from train import loss_of, train

    torch.manual_seed(0)
    model = Model(SimpleNamespace(**micro_config()))
    batches = pack(iter(Sequences(data, TINY_K2, 0)), 256, 4)
    held = next(batches)
    before = loss_of(model, held, "cpu").item()
    rates = {"muon_lr": 0.02, "adam_lr": 0.005}
    options = Namespace(**rates, minutes=1e6, steps=6, every=1, compile=False, assets=TINY_K2, out=tmp_path)
    train(model, batches, dev_batches(data, TINY_K2, 4096), options)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(np.isfinite(row["loss"]) for row in rows)
    assert loss_of(model, held, "cpu").item() < before - 0.2
    assert any(layer.gate.e_score_correction_bias.abs().sum() > 0 for layer in model.moe_layers())
    assert not load_parts(tmp_path)


def test_scores_count_calls(data):
    from model import Model
    from score import control_marks, score
    from stream import dev_batches

    model = Model(SimpleNamespace(**micro_config()))
    rates = score(model, dev_batches(data, TINY_K2, 4096), control_marks(TINY_K2), "cpu")
    assert rates["calls"] == 3 and rates["turns"] == 6
    assert 0 <= rates["exact_arguments"] <= rates["right_name"] <= rates["called"] <= 1


def test_evaluation_compares_arguments_not_text():
    from evaluate import compare

    right = compare([("F", '{"b": "2", "a": "1"}')], "F", {"a": "1", "b": "2"})
    assert right["right_name"] and right["valid_json"] and right["exact_arguments"]
    broken = compare([("F", '{"a": ')], "F", {"a": "1"})
    assert broken["right_name"] and not broken["valid_json"] and not broken["exact_arguments"]
    assert not compare([], "F", {})["called"]
