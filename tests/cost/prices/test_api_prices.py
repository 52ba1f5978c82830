import logging
import os
from datetime import UTC, date, datetime
from types import SimpleNamespace

import pytest

from moebox.cost.prices import api_prices as module
from moebox.cost.prices.api_prices import ApiPrice, api_prices
from moebox.errors import PricesError

OWN = """
[house-model]
input_per_million = 0.4
output_per_million = 1.6
cached_per_million = 0.1
provider = "the other team"
dated = 2026-11-01

["GPT 5"]
input_per_million = 1
output_per_million = 8
"""


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/moebox"


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "api.toml"
    path.write_text(OWN, encoding="utf-8")
    os.utime(path, (1_790_000_000, 1_790_000_000))
    return path


def test_hosted_models_are_found_by_several_spellings():
    found = api_prices(["kimi-k2-thinking", "GPT-5", "Claude Sonnet 4.5", "grok 4"])
    assert [price.name for price in found] == ["Kimi K2 Thinking", "GPT-5", "Claude Sonnet 4.5", "Grok 4"]
    for price in found:
        assert 0 < price.cached_per_million <= price.input_per_million < price.output_per_million
        assert price.origin.startswith("genai-prices ")
        assert date(2026, 11, 1) <= date.fromisoformat(price.dated) <= datetime.now(UTC).date()


def test_a_name_may_contain_the_provider():
    (price,) = api_prices(["openrouter/moonshotai/kimi-k2-thinking"])
    assert price.provider == "OpenRouter"


def test_every_name_that_is_suggested_is_known():
    for name in module._model_names():
        provider, model = module._find(module._plain(name))
        assert name in (f"{provider.id}/{model.id}", model.id)


def test_a_provider_without_a_price_for_cached_tokens_takes_the_input_price():
    (price,) = api_prices(["moonshotai/kimi-k2"])
    assert price.cached_per_million == price.input_per_million


def test_the_lowest_step_of_a_tiered_price_is_used():
    from genai_prices.types import TieredPrices

    name, listed = next(
        (f"{provider.id}/{model.id}", prices.input_mtok)
        for provider in module._snapshot().providers
        for model in provider.models
        if isinstance((prices := model.get_prices(datetime.now(UTC))).input_mtok, TieredPrices)
    )
    assert api_prices([name])[0].input_per_million == float(listed.base)


def test_dollars_are_converted():
    (dollars,), (euros,) = api_prices(["gpt-5"]), api_prices(["gpt-5"], per_usd=0.5)
    assert euros.output_per_million == dollars.output_per_million / 2
    assert euros.cached_per_million == dollars.cached_per_million / 2


def test_the_users_own_file_comes_first(own):
    house, gpt, grok = api_prices(["House Model", "gpt-5", "grok-4"], own, per_usd=0.5)
    assert house == ApiPrice("house-model", "the other team", 0.4, 1.6, 0.1, "2026-11-01", str(own))
    changed = date.fromtimestamp(1_790_000_000).isoformat()
    assert gpt == ApiPrice("GPT 5", "api.toml", 1.0, 8.0, 1.0, changed, str(own))
    assert grok.origin.startswith("genai-prices")


def test_the_file_in_the_config_folder_is_read_without_being_named(config, own):
    config.mkdir(parents=True)
    (config / "api-prices.toml").write_bytes(own.read_bytes())
    (price,) = api_prices(["house-model"])
    assert price.origin == str(config / "api-prices.toml")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("kimi-k2-thinkin", "kimi-k2-thinking"),
        ("claude-sonnet-45", "claude-sonnet-4-5"),
        ("hause-model", "house-model"),
        ("openrouter/kimi-k2", "openrouter/moonshotai/kimi-k2"),
        ("qwen3-coder", "openrouter/qwen/qwen3-coder"),
    ],
)
def test_an_unknown_name_shows_near_ones(own, name, near):
    with pytest.raises(PricesError, match=f"no price of a model named '{name}'") as caught:
        api_prices([name], own)
    assert near in caught.value.fix.partition("?")[0].removeprefix("did you mean ").split(", ")


@pytest.mark.parametrize("name", ["", "zzzzzzzz"])
def test_an_unknown_name_without_similar_ones_names_the_users_file(config, name):
    with pytest.raises(PricesError) as caught:
        api_prices([name])
    assert str(config / "api-prices.toml") in caught.value.fix


def test_a_model_that_is_not_sold_by_the_token_is_refused():
    with pytest.raises(PricesError, match="not sold by the token"):
        api_prices(["openai/text-embedding-3-small"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input_per_million = 1", "outside of a table"),
        ("[m]\noutput_per_million = 1", "input_per_million = None"),
        ("[m]\ninput_per_million = -1\noutput_per_million = 1", "input_per_million = -1"),
        ('[m]\ninput_per_million = "1"\noutput_per_million = 1', "input_per_million = '1'"),
        ("[m]\ninput_per_million = 1\noutput_per_million = nan", "output_per_million = nan"),
        ("[m]\ninput_per_million = 1\noutput_per_million = 1\ncached = 1", "unknown key 'cached' = 1"),
        ("[m]\ninput_per_million = 1\noutput_per_million = 1\ndated = 2026", "dated = 2026"),
        ("[m", "not TOML"),
    ],
)
def test_a_bad_file_is_named_with_key_and_value(tmp_path, text, said):
    path = tmp_path / "api.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PricesError) as caught:
        api_prices(["m"], path)
    assert str(path) in caught.value.what and said in caught.value.what
    assert caught.value.fix


def test_a_file_that_was_named_must_exist(tmp_path):
    with pytest.raises(PricesError, match=r"missing\.toml: cannot be read"):
        api_prices([], tmp_path / "missing.toml")


def test_data_of_an_unknown_release_is_dated_by_its_newest_price(monkeypatch, caplog):
    today = datetime.now(UTC).date()
    changes = [date(2020, 1, 2), date(2024, 5, 6), today.replace(year=today.year + 1, day=1), None]
    conditions = [SimpleNamespace(constraint=day and SimpleNamespace(start_date=day)) for day in changes]
    models = [SimpleNamespace(prices=conditions), SimpleNamespace(prices=object())]
    data = SimpleNamespace(providers=[SimpleNamespace(models=models)])
    monkeypatch.setattr(module, "_snapshot", lambda: data)
    monkeypatch.setattr(module, "version", lambda package: "9.9.9")
    monkeypatch.setattr(module, "_data", module._data.__wrapped__)
    with caplog.at_level(logging.WARNING, "moebox"):
        assert module._data() == ("9.9.9", "2024-05-06")
    assert "its newest price is of 2024-05-06" in caplog.text
