import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebox.errors import MoeboxError, RequestError
from moebox.runtime.generate.sampling import Sampler, SamplingOptions, candidates, generation_defaults
from moebox.runtime.text.stop_strings import StopStrings

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def kept(logits, **options):
    """token -> normalised probability of what may be drawn."""
    weights, tokens, total = candidates(logits, SamplingOptions(temperature=1.0).with_(**options))
    return dict(zip(tokens.tolist(), (weights / total).tolist(), strict=True))


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """transformers' logits processors, in the order of its `generate`."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as hf

    processors = LogitsProcessorList([hf.TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(hf.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(hf.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(hf.MinPLogitsWarper(min_p))
    probabilities = processors(None, logits[None].double())[0].softmax(0)
    return {token: p for token, p in enumerate(probabilities.tolist()) if p > 0}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 1.0])
def test_probabilities_equal_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    ours, theirs = kept(logits, **options), reference(logits, **options)
    assert set(ours) == set(theirs)
    assert all(math.isclose(ours[token], theirs[token], rel_tol=1e-9) for token in ours)


def test_flat_logits_need_the_whole_vocabulary():
    flat = torch.zeros(2000)
    nucleus = kept(flat, top_p=0.75)
    assert len(nucleus) in (1500, 1501)  # the sum of 1500 times 1/2000 may round to either side of 0.75
    assert sorted(nucleus) == list(range(len(nucleus)))
    assert len(kept(flat, min_p=0.5)) == 2000


def test_a_draw_sorts_few_tokens_and_stays_exact():
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = SamplingOptions(temperature=1.0)
    everything, tokens, total = candidates(logits, options)
    assert len(tokens) == 20_000
    assert math.isclose(float(everything.sum()), total, rel_tol=1e-12)
    for share in (0.0, 0.01, 0.2, 0.999):
        weights, some, whole = candidates(logits, options, share)
        assert len(some) < 20_000 or share > 0.9
        assert torch.equal(some, tokens[: len(some)])
        assert float(weights.sum()) >= share * whole == share * total


def test_edges_of_the_filters():
    assert set(kept(LOGITS, top_p=1e-9)) == {1}
    assert set(kept(LOGITS, min_p=1.0)) == {1}
    assert set(kept(LOGITS, top_k=2)) == {1, 2}
    assert set(kept(LOGITS)) == {0, 1, 2, 3, 4}


def test_greedy_takes_the_first_best():
    assert Sampler(SamplingOptions(temperature=0)).sample(LOGITS) == 1
    assert Sampler(SamplingOptions(temperature=0)).sample(torch.tensor([1.0, 5.0, 5.0])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_draws_follow_the_probabilities(options):
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=5).with_(**options))
    draws = 4000
    counts = Counter(sampler.sample(LOGITS) for _ in range(draws))
    expected = kept(LOGITS, **options)
    assert set(counts) <= set(expected)
    chi2 = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    assert chi2 < 20  # 4 degrees of freedom: exceeded once in 2000 seeds


def test_the_same_seed_gives_the_same_tokens():
    def tokens(seed):
        sampler = Sampler(SamplingOptions(temperature=1.5, top_p=0.95, seed=seed))
        torch.manual_seed(0)
        return [sampler.sample(torch.randn(500)) for _ in range(40)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_without_a_seed_a_fresh_one_is_reported():
    seeds = {Sampler(SamplingOptions()).seed for _ in range(4)}
    assert len(seeds) == 4


def test_repetition_penalty_covers_prompt_and_answer():
    logits = torch.tensor([2.0, 1.9, -1.0])
    options = SamplingOptions(temperature=0, repetition_penalty=1.5)
    sampler = Sampler(options, prompt=[0])
    assert sampler.sample(logits) == 1  # 2.0 / 1.5 < 1.9
    assert sampler.sample(logits) == 0  # now both are penalised
    assert Sampler(options).sample(torch.tensor([-1.0, -1.1])) == 0
    assert Sampler(options, prompt=[0]).sample(torch.tensor([-1.0, -1.1])) == 1  # negative: multiplied


def test_penalty_equals_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    prompt = torch.tensor([[0, 3, 3]])
    sampler = Sampler(SamplingOptions(repetition_penalty=1.7), prompt[0].tolist())
    expected = RepetitionPenaltyLogitsProcessor(1.7)(prompt, LOGITS[None].clone())[0]
    assert torch.equal(sampler._penalised(LOGITS), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = torch.full((5,), float("-inf")) if bad is None else torch.tensor([1.0, bad])
    with pytest.raises(MoeboxError, match="not finite"):
        Sampler(SamplingOptions()).sample(logits)


def test_masked_logits_are_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    sampler = Sampler(SamplingOptions(temperature=5.0, seed=0))
    assert {sampler.sample(logits) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature = -0.1 is out of range\nIt must be 0 to 100"),
        ({"temperature": "hot"}, "temperature = 'hot' is not a number"),
        ({"temperature": float("nan")}, "temperature = nan is not a number"),
        ({"top_p": 0}, r"top_p = 0 is out of range\nIt must be above 0, at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 1.5}, "top_k = 1.5 is not a whole number"),
        ({"min_p": 2}, "min_p = 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": True}, "seed = True"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": ("",)}, "stop = "),
        ({"stop": (5,)}, "stop = "),
        ({"temprature": 1}, r"unknown sampling option 'temprature'\nKnown: max_tokens, temperature"),
    ],
)
def test_bad_options_are_named_with_their_value(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingOptions().with_(**options)


def test_stop_may_be_one_string_or_a_list():
    assert SamplingOptions(stop="a").stop == ("a",)
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")


def test_defaults_come_from_the_checkpoint_only_where_present(tmp_path):
    assert generation_defaults(tmp_path) == (SamplingOptions(), ())
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_length": 262144, "eos_token_id": 163586}))
    assert generation_defaults(tmp_path) == (SamplingOptions(), (163586,))
    path.write_text(json.dumps({"temperature": 1.0, "top_p": 0.95, "eos_token_id": [1, 2], "min_p": None}))
    assert generation_defaults(tmp_path) == (SamplingOptions(temperature=1.0, top_p=0.95), (1, 2))
    path.write_text(json.dumps({"do_sample": False}))
    assert generation_defaults(tmp_path)[0].temperature == 0
    path.write_text(json.dumps({"top_p": 3}))
    with pytest.raises(RequestError, match=r"generation_config\.json: top_p = 3"):
        generation_defaults(tmp_path)
    path.write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(RequestError, match=r"generation_config\.json: eos_token_id = 'x'"):
        generation_defaults(tmp_path)


def run_stops(stops, chunks):
    filter_ = StopStrings(stops)
    said = ""
    for chunk in chunks:
        said += filter_.push(chunk)
        if filter_.stopped:
            return said
    return said + filter_.finish()


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab#", max_size=4), max_size=8),
    st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_chunking(chunks, stops):
    text = "".join(chunks)
    one_by_one = run_stops(stops, text)
    assert run_stops(stops, chunks) == one_by_one
    if not any(stop in text for stop in stops):
        assert one_by_one == text
    else:
        end, begin = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
        assert one_by_one == text[:begin]
        assert not any(stop in text[: end - 1] for stop in stops)


def test_a_stop_string_over_two_pieces_is_never_shown():
    filter_ = StopStrings(["END"])
    assert filter_.push("abcE") == "abc"
    assert filter_.push("N") == ""
    assert filter_.push("X") == "ENX"
    assert filter_.push("yENDz") == "y"
    assert filter_.stopped
