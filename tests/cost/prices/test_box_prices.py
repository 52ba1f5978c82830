import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebox.cost.energy.power_model import PowerModel
from moebox.cost.prices.box_prices import HOURS_PER_MONTH, MONTH_S, Prices, load_prices, prices_path
from moebox.errors import PricesError


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/moebox"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_month_is_a_twelfth_of_a_year():
    assert HOURS_PER_MONTH == 365 * 24 / 12 == 730
    assert MONTH_S == 2_628_000


def test_without_a_file_the_defaults_hold():
    prices = load_prices()
    assert prices == Prices()
    assert prices.electricity_per_kwh == 0.176
    assert prices.hardware_price is None
    assert prices.hardware_per_month == 0
    assert PowerModel(prices.idle_watts, prices.watts_per_core, prices.dram_watts) == PowerModel()


def test_options_override_the_users_file(config):
    written(config / "prices.toml", "electricity_per_kwh = 0.31\nhardware_price = 25_000\nlife_months = 48")
    assert prices_path() == config / "prices.toml"
    prices = load_prices(life_months=24, residual=1000, utilisation=None)
    assert prices.electricity_per_kwh == 0.31
    assert prices.hardware_per_month == (25_000 - 1000) / 24
    assert prices.utilisation is None


def test_a_named_file_replaces_the_users(config, tmp_path):
    written(config / "prices.toml", "electricity_per_kwh = 0.31")
    assert load_prices(written(tmp_path / "mine.toml", "other_per_month = 50")) == Prices(other_per_month=50)


def test_every_key_can_stand_in_a_file(tmp_path):
    wanted = Prices(0.4, 9000.0, 60.0, 500.0, 20.0, 0.5, 40.0, 3.0, 9.0, "EUR", 0.86)
    text = "\n".join(f"{key} = {value!r}" for key, value in asdict(wanted).items())
    assert load_prices(written(tmp_path / "all.toml", text)) == wanted


def test_an_unknown_key_is_named_with_its_file_and_near_ones(tmp_path):
    path = written(tmp_path / "p.toml", "electricity_per_kw = 0.3")
    with pytest.raises(PricesError) as caught:
        load_prices(path)
    assert caught.value.what == f"{path}: unknown key 'electricity_per_kw' = 0.3"
    assert "electricity_per_kwh" in caught.value.fix


def test_an_unknown_key_without_similar_ones_shows_all_keys(tmp_path):
    with pytest.raises(PricesError) as caught:
        load_prices(written(tmp_path / "p.toml", "xyz = 1"))
    assert all(key in caught.value.fix for key in asdict(Prices()))


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("electricity_per_kwh = -0.1", "0 or more"),
        ("electricity_per_kwh = nan", "0 or more"),
        ("electricity_per_kwh = inf", "0 or more"),
        ('electricity_per_kwh = "0.3"', "0 or more"),
        ("hardware_price = 1" + 400 * "0", "0 or more"),
        ("hardware_price = true", "0 or more"),
        ("life_months = 0.5", "1 or more"),
        ("utilisation = 0", "from 0.001 to 1"),
        ("utilisation = 25", "from 0.001 to 1"),
        ('currency = "dollars"', "three letters"),
        ("per_usd = 0", "above 0"),
        ("[electricity_per_kwh]", "0 or more"),
    ],
)
def test_a_bad_value_is_named_with_file_key_and_fix(tmp_path, line, fix):
    path = written(tmp_path / "p.toml", line)
    with pytest.raises(PricesError) as caught:
        load_prices(path)
    assert str(path) in caught.value.what
    assert line.strip("[]").split(" = ")[0] in caught.value.what
    assert fix in caught.value.fix


def test_a_bad_option_is_named_as_an_option():
    with pytest.raises(PricesError, match=r"options: utilisation = 1\.5"):
        load_prices(utilisation=1.5)


@pytest.mark.parametrize("text", ["hardware_price = 100\nresidual = 200", "residual = 1"])
def test_a_residual_above_the_price_is_refused_with_its_file(tmp_path, text):
    path = written(tmp_path / "p.toml", text)
    with pytest.raises(PricesError, match="above hardware_price") as caught:
        load_prices(path)
    assert caught.value.what.startswith(str(path))


def test_another_currency_needs_its_rate():
    with pytest.raises(PricesError, match="one US dollar costs in EUR"):
        Prices(currency="EUR")
    assert Prices(currency="EUR", per_usd=0.86).per_usd == 0.86


def test_a_file_that_was_named_must_exist(tmp_path):
    with pytest.raises(PricesError, match=r"missing\.toml: cannot be read"):
        load_prices(tmp_path / "missing.toml")


@pytest.mark.parametrize("data", [b"electricity_per_kwh 0.3", b"\xff\xfe= 1"])
def test_a_file_that_is_not_toml_is_named(tmp_path, data):
    path = tmp_path / "p.toml"
    path.write_bytes(data)
    with pytest.raises(PricesError, match=r"p\.toml: not TOML"):
        load_prices(path)


@given(st.sampled_from(sorted(asdict(Prices()))), st.one_of(st.floats(), st.text(max_size=5), st.booleans()))
def test_accepted_values_are_finite_numbers(key, value):
    base = Prices(hardware_price=1e308)
    try:
        prices = replace(base, **{key: value})
    except PricesError:
        return
    numbers = [item for item in asdict(prices).values() if not isinstance(item, str) and item is not None]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert math.isfinite(prices.hardware_per_month) and prices.hardware_per_month >= 0
    assert math.isfinite(1 / (prices.utilisation or 1))
