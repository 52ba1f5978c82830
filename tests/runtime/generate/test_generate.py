import json
import threading
import time

import pytest
import torch

from helpers.chat import FakeSession, encode_answer, fake_model, write_tokenizer
from moebox.errors import BusyError, CheckpointError, MoeboxError, RequestError, TokenizerError
from moebox.quantize.synth.write import synth
from moebox.runtime import api
from moebox.runtime.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi"}]
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
)
GREEDY = {"temperature": 0}


def text_of(pieces, kind="text"):
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def test_a_chat_streams_text_then_stats(tmp_path):
    model = fake_model(tmp_path, answers=["sunny in Größe 😀"])
    pieces = list(model.chat(USER))
    assert text_of(pieces) == "sunny in Größe 😀"
    assert [piece.kind for piece in pieces].count("stats") == 1
    stats = pieces[-1].stats
    assert stats.finish_reason == "stop"
    assert stats.prompt_tokens == model.count_tokens(USER)
    assert stats.usage.completion_tokens == len(model.tokenizer.encode("sunny in Größe 😀"))
    assert stats.context_used == stats.prompt_tokens + stats.usage.completion_tokens
    assert stats.ttft_s >= stats.usage.prefill_s > 0
    assert json.dumps(stats.to_dict())


def test_no_piece_ends_inside_a_character(tmp_path):
    model = fake_model(tmp_path, answers=[list("天😀".encode())])  # one byte a token
    pieces = [piece.text for piece in model.chat(USER) if piece.kind == "text"]
    assert pieces == ["天", "😀"]


def test_reasoning_text_and_calls(tmp_path):
    model = fake_model(tmp_path, "k25_style", answers=["hm</think>Looking." + CALL])
    done = model.generate(USER)
    assert (done.reasoning, done.text) == ("hm", "Looking.")
    assert done.tool_calls == (api.ToolCall("functions.get_weather:0", "get_weather", '{"city": "Paris"}'),)
    assert done.stats.finish_reason == "tool_calls"
    assert done.tokens == encode_answer(model.tokenizer, "hm</think>Looking." + CALL)


def test_thinking_off_closes_the_block_in_the_prompt(tmp_path):
    model = fake_model(tmp_path, "k25_style", answers=["plain"])
    assert model.generate(USER, thinking=False).text == "plain"
    assert model.generate(USER, thinking=True).reasoning == "plain"


def test_only_new_tokens_are_prefilled_on_the_next_turn(tmp_path):
    model = fake_model(tmp_path, answers=["sunny", "fine"])
    messages = list(USER)
    first = list(model.chat(messages))[-1].stats
    messages += [{"role": "assistant", "content": "sunny"}, {"role": "user", "content": "ok"}]
    second = list(model.chat(messages))[-1].stats
    assert second.usage.cached_tokens == first.prompt_tokens + first.usage.completion_tokens
    new = [model.tokenizer.encode(text) for text in ("user", "ok", "assistant")]
    marks = 6  # <|im_end|>, <|im_user|>..<|im_middle|>..<|im_end|>, <|im_assistant|>..<|im_middle|>
    assert second.prompt_tokens - second.usage.cached_tokens == marks + sum(map(len, new))
    assert model.engine.prefills[1] == (second.usage.cached_tokens, marks + sum(map(len, new)))


def test_a_model_that_does_not_write_canonical_tokens_keeps_its_prefix(tmp_path):
    spelled = list(b"sunny")  # the tokenizer would take fewer tokens
    model = fake_model(tmp_path, answers=[spelled, "fine"])
    assert model.tokenizer.encode("sunny") != spelled
    first = list(model.chat(USER))[-1].stats
    messages = [*USER, {"role": "assistant", "content": "sunny"}, {"role": "user", "content": "ok"}]
    assert list(model.chat(messages))[-1].stats.usage.cached_tokens == first.prompt_tokens + len(spelled)


def test_tool_turns_keep_the_prefix_too(tmp_path):
    model = fake_model(tmp_path, answers=["Looking." + CALL, "It is sunny."])
    first = model.generate(USER)
    answer = {"role": "assistant", "content": first.text}
    answer["tool_calls"] = [call.to_message() for call in first.tool_calls]
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
    second = model.generate([*USER, answer, result])
    assert second.text == "It is sunny."
    assert second.stats.usage.cached_tokens == first.stats.prompt_tokens + first.stats.usage.completion_tokens


@pytest.mark.parametrize("ending", ["[EOS]", "<|im_end|>", "[EOT]"])
def test_every_end_token_ends_the_answer(tmp_path, ending):
    model = fake_model(tmp_path, answers=[f"one{ending}two"])
    done = model.generate(USER)
    assert (done.text, done.stats.finish_reason) == ("one", "stop")


def test_end_tokens_of_generation_config_count_too(tmp_path):
    letter = ord("t")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": letter, "top_p": 0.5}))
    model = fake_model(tmp_path, answers=[list(b"one two")])
    assert model.defaults.top_p == 0.5
    assert model.generate(USER).text == "one "


def test_limits_are_named_as_the_reason(tmp_path):
    model = fake_model(tmp_path, answers=[list(b"x" * 500)], context=60)
    done = model.generate(USER, max_tokens=3)
    assert (done.text, done.stats.finish_reason) == ("xxx", "length")
    full = model.generate(USER)
    assert full.stats.finish_reason == "context"
    assert full.stats.context_used == full.stats.context == 60
    assert full.stats.prompt_tokens + full.stats.usage.completion_tokens == 61  # the last one needs no place


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(tmp_path):
    model = fake_model(tmp_path, context=40)
    with pytest.raises(RequestError, match=r"the prompt has [\d,]+ tokens, but the context holds 40"):
        model.chat([{"role": "user", "content": "x " * 100}])


def test_stop_strings_cut_the_text(tmp_path):
    model = fake_model(tmp_path, answers=[list(b"one END two")])
    done = model.generate(USER, stop=["END"])
    assert (done.text, done.stats.finish_reason) == ("one ", "stop")
    assert model.generate(USER, stop="absent").text == "one END two"


def test_cancel_ends_the_answer_and_keeps_the_session(tmp_path):
    model = fake_model(tmp_path, answers=[list(b"abcdef"), "fine"])
    cancel = threading.Event()
    pieces = []
    for piece in model.chat(USER, cancel=cancel):
        pieces.append(piece)
        if text_of(pieces) == "abc":
            cancel.set()
    assert text_of(pieces) == "abc"
    assert pieces[-1].stats.finish_reason == "cancelled"
    assert model.generate(USER).text == "fine"


def test_cancel_during_the_prefill(tmp_path):
    model = fake_model(tmp_path)
    cancel = threading.Event()
    steps = []

    def on_prefill(done, total):
        steps.append((done, total))
        cancel.set()

    pieces = list(model.chat(USER, cancel=cancel, on_prefill=on_prefill))
    assert [piece.kind for piece in pieces] == ["stats"]
    assert pieces[0].stats.finish_reason == "cancelled"
    assert pieces[0].stats.usage.completion_tokens == 0
    assert len(steps) == 1


def test_two_answers_at_once_are_refused(tmp_path):
    model = fake_model(tmp_path, answers=["one two three"])
    first = model.chat(USER)
    next(first)
    with pytest.raises(BusyError):
        next(model.chat(USER))
    first.close()
    assert model.generate(USER).text == "one two three"


def grown(messages, answer, question):
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def test_a_refused_seeded_answer_leaves_the_kept_session(tmp_path):
    model = fake_model(tmp_path, answers=["one two three", "fine"])
    first = model.chat(USER)
    pieces = [next(first)]
    with pytest.raises(BusyError):
        model.generate(USER, seed=1)
    pieces += first
    answered = pieces[-1].stats
    second = model.generate(grown(USER, "one two three", "more"))
    assert second.stats.usage.cached_tokens == answered.prompt_tokens + answered.usage.completion_tokens


def test_refused_seeded_answers_of_other_threads_leave_the_kept_session(tmp_path):
    model = fake_model(tmp_path, answers=["one two three", "fine"])
    session, refused = model.session, []

    def ask():
        try:
            model.generate(USER, seed=1)
        except BusyError as error:
            refused.append(error)

    pieces = model.chat(USER)
    next(pieces)
    others = [threading.Thread(target=ask) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(refused) == len(others)
    answered = [*pieces][-1].stats
    assert model.session is session
    second = model.generate(grown(USER, "one two three", "more"))
    assert second.stats.usage.cached_tokens == answered.prompt_tokens + answered.usage.completion_tokens


def test_a_seeded_answer_with_a_mistake_leaves_the_kept_session(tmp_path):
    model = fake_model(tmp_path, answers=["sunny", "fine"])
    first = model.generate(USER).stats
    with pytest.raises(RequestError, match="top_p = 7"):
        model.generate(USER, seed=1, top_p=7)
    second = model.generate(grown(USER, "sunny", "more"))
    assert second.stats.usage.cached_tokens == first.prompt_tokens + first.usage.completion_tokens


def test_a_chat_uses_the_session_that_is_kept_when_it_begins(tmp_path):
    model = fake_model(tmp_path, answers=["seeded", "sunny", "fine"])
    begun_later = model.chat(USER)
    model.generate("another text", seed=1)  # drops the session that was kept until now
    first = [*begun_later][-1].stats
    second = model.generate(grown(USER, "sunny", "more"))
    assert second.stats.usage.cached_tokens == first.prompt_tokens + first.usage.completion_tokens


def test_an_answer_that_never_begins_opens_no_session(tmp_path, monkeypatch):
    model = fake_model(tmp_path)
    opened = []
    session = model.engine.session
    monkeypatch.setattr(model.engine, "session", lambda: opened.append(1) or session())
    model.chat(USER)
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate("", seed=1)
    assert not opened
    model.generate(USER)
    model.generate(USER)
    assert len(opened) == 1


def test_threads_that_want_the_session_at_once_get_the_same(tmp_path, monkeypatch):
    model = fake_model(tmp_path)
    session = model.engine.session
    both = threading.Barrier(2)

    def slowly():
        time.sleep(0.05)
        return session()

    def take():
        both.wait()
        seen.append(model.session)

    monkeypatch.setattr(model.engine, "session", slowly)
    seen = []
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] is seen[1]


def test_options_are_checked_before_anything_runs(tmp_path):
    model = fake_model(tmp_path)
    with pytest.raises(RequestError, match="top_p = 7"):
        model.chat(USER, top_p=7)
    with pytest.raises(RequestError, match="unknown sampling option 'topp'"):
        model.generate(USER, topp=0.5)
    assert not model.engine.prefills


def test_a_plain_completion_uses_no_template(tmp_path):
    model = fake_model(tmp_path, answers=["blue <think>x"])
    done = model.generate("The sky is <|im_end|>")
    assert model.engine.prompts == [model.tokenizer.encode("The sky is <|im_end|>")]
    assert done.text == "blue <think>x"
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate("")


def test_the_same_seed_gives_the_same_text(tmp_path, monkeypatch):
    model = fake_model(tmp_path)

    def noise(session):
        session._logits = lambda: torch.randn(model.engine.config.vocab_size, generator=generator) * 2
        return session

    texts = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(1)
        monkeypatch.setattr(model.engine, "session", lambda: noise(FakeSession(model.engine, 4096)))
        done = model.generate(USER, seed=seed, max_tokens=30, temperature=1.0)
        assert done.stats.seed == seed
        texts.append(done.tokens)
    assert texts[0] == texts[1] != texts[2]


def test_an_error_of_the_engine_is_no_cancellation(tmp_path):
    model = fake_model(tmp_path)

    def prefill(*_args, **_options):
        raise CheckpointError("model-1.safetensors: cut short")

    model.session.prefill = prefill
    with pytest.raises(CheckpointError):
        list(model.chat(USER))
    with pytest.raises(MoeboxError):
        model.generate(USER)  # and the lock is free again


def test_load_names_a_missing_tokenizer_before_it_loads_weights(tmp_path):
    synth(tmp_path / "model", "tiny", format="int4")
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: no such file"):
        api.load(tmp_path / "model")


def test_a_real_engine_answers(tmp_path):
    folder = tmp_path / "model"
    vocabulary = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer")).n_vocab
    synth(folder, "tiny", format="int4", config_overrides={"vocab_size": vocabulary})
    write_tokenizer(folder)
    model = api.load(folder)
    options = {"max_tokens": 8, "seed": 1, "temperature": 1.0}
    first = model.generate(USER, **options)
    assert first.stats.usage.cached_tokens == 0
    assert list(model.chat(USER, **options))[-1].stats.usage.cached_tokens == first.stats.prompt_tokens - 1
    assert model.generate(USER, **options).tokens == first.tokens
    assert model.logits(model.template.render(USER)).shape == (first.stats.prompt_tokens, vocabulary)
    greedy = [model.generate("Paris is", max_tokens=6, temperature=0).tokens for _ in range(2)]
    assert greedy[0] == greedy[1]
