"""List prices of hosted models: from the package `genai-prices`, overridden by the user's own file.

Nothing is fetched from the network. The user's file has a table for each model, its name quoted or not:

    [house-model]
    input_per_million = 0.4
    output_per_million = 1.6
    cached_per_million = 0.1    # default: the input price
    provider = "the other team" # default: the file's name
    dated = 2026-11-01          # default: the day on which the file was changed
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.cost.prices.box_prices import near, number, read_toml
from moebox.errors import PricesError
from moebox.folders import config_folder

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, Provider

log = logging.getLogger("moebox")

RELEASED = {"0.2.3": date(2026, 11, 10)}
"""Days on which versions of genai-prices were uploaded to PyPI; the package has no date of its data."""

KEYS = ["input_per_million", "output_per_million", "cached_per_million", "provider", "dated"]


@dataclass(frozen=True)
class ApiPrice:
    """List prices of a hosted model, per million tokens.

    Attributes:
        name: of the model.
        provider: the company that serves it at this price.
        input_per_million, output_per_million: for prompts and answers; where long prompts cost more, the
            price of short ones.
        cached_per_million: for tokens of a prompt that the provider has cached; the input price where the
            provider has no price for them.
        dated: ISO date of the data.
        origin: `genai-prices` and its version, or the path of the user's file.
    """

    name: str
    provider: str
    input_per_million: float
    output_per_million: float
    cached_per_million: float
    dated: str
    origin: str


def own_prices_path() -> Path:
    """Path of the user's file of API prices, which need not exist."""
    return config_folder() / "api-prices.toml"


def api_prices(names: Sequence[str], own: Path | None = None, per_usd: float = 1.0) -> list[ApiPrice]:
    """Today's prices of `names`, in the same order.

    Args:
        names: models of the user's file or of genai-prices (`gpt-5`, `Claude Sonnet 4.5`), with or without
            the provider (`openrouter/moonshotai/kimi-k2-thinking`). Case does not matter, and a space is the
            same as `-`.
        own: the user's file, in the currency of `Prices`; None: `own_prices_path()`, if that file exists.
        per_usd: `Prices.per_usd`, which converts the US dollars of genai-prices.

    Raises:
        PricesError: a name is not known (the error names similar ones), or the file is bad.
    """
    where = own_prices_path() if own is None else own
    ours = read_own(where, missing_ok=own is None)
    return [ours.get(_plain(name)) or _hosted(name, list(ours), per_usd) for name in names]


def read_own(path: Path, missing_ok: bool = False) -> dict[str, ApiPrice]:
    """Prices of the user's own file, by name in lower case with `-` instead of spaces.

    Raises:
        PricesError: the file cannot be read, or holds an unknown key or a bad value.
    """
    tables = read_toml(path, missing_ok)
    changed = date.fromtimestamp(path.stat().st_mtime) if tables else None
    return {_plain(name): _own(path, name, table, changed) for name, table in tables.items()}


def _own(path: Path, name: str, table: Any, changed: date | None) -> ApiPrice:
    if not isinstance(table, dict):
        raise PricesError(f"{path}: {name} = {table!r} stands outside of a table", f"begin with [{name}]")
    for key, value in table.items():
        if key not in KEYS:
            raise PricesError(f"{path}: [{name}]: unknown key {key!r} = {value!r}", near(key, KEYS))
    given = {
        "cached_per_million": table.get("input_per_million"),
        "provider": path.name,
        "dated": changed,
        **table,
    }
    rates = [number(given.get(key)) for key in KEYS[:3]]
    for key, rate in zip(KEYS, rates, strict=False):
        if rate is None or rate < 0:
            raise PricesError(f"{path}: [{name}]: {key} = {given.get(key)!r}", "give a number of 0 or more")
    computed, answer, cached = (rate or 0.0 for rate in rates)
    dated = _iso_date(path, name, given["dated"])
    return ApiPrice(name, str(given["provider"]), computed, answer, cached, dated, str(path))


def _iso_date(path: Path, name: str, value: object) -> str:
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise PricesError(
            f"{path}: [{name}]: dated = {value!r}", "write a day, such as 2026-11-01"
        ) from error


def _hosted(name: str, ours: list[str], per_usd: float) -> ApiPrice:
    found = _find(_plain(name))
    if found is None:
        raise PricesError(f"no price of a model named {name!r} is known", _near_models(_plain(name), ours))
    provider, model = found
    prices = model.get_prices(datetime.now(UTC))
    computed, answer = _per_million(prices.input_mtok, per_usd), _per_million(prices.output_mtok, per_usd)
    cached = _per_million(prices.cache_read_mtok, per_usd)
    if computed is None or answer is None:
        fix = f"name another, or write its prices into {own_prices_path()}"
        raise PricesError(f"{provider.id}/{model.id} is not sold by the token", fix)
    cached = computed if cached is None else cached
    release, dated = _data()
    shown = model.name or model.id
    return ApiPrice(shown, provider.name, computed, answer, cached, dated, f"genai-prices {release}")


def _per_million(usd: Any, per_usd: float) -> float | None:
    # A price that rises with the length of prompts has its lowest step as `base`.
    return None if usd is None else float(getattr(usd, "base", usd)) * per_usd


def _find(name: str) -> tuple[Provider, ModelInfo] | None:
    """A model by its name or by `provider/name`; an exact name is preferred to genai-prices' own matching."""
    provider_id, slash, rest = name.partition("/")
    data = _snapshot()
    provider = next((item for item in data.providers if slash and item.id == provider_id), None)
    if provider is not None:
        for model in provider.models:
            if model.id.lower() == rest:
                return provider, model
    try:
        return data.find_provider_model(name if provider is None else rest, provider, None, None)
    except LookupError:
        return None


def _near_models(name: str, ours: list[str]) -> str:
    """The fix for an unknown name; a name without a provider is compared with those of all providers."""
    known = {own: own for own in ours}
    for full in _model_names():
        known.setdefault(_plain(full if "/" in name else full.rpartition("/")[2]), full)
    close = [known[near] for near in difflib.get_close_matches(name, known, n=5, cutoff=0.6)]
    near_ones = f"did you mean {', '.join(close)}? " if close else "name it as provider/model, "
    return f"{near_ones}or write its prices into {own_prices_path()}"


def _model_names() -> Iterator[str]:
    """All models as `provider/name`, and before them by their own names those that identify the provider."""
    providers = _snapshot().providers
    for provider in providers:
        if provider.model_match is not None:
            says = provider.model_match.is_match
            yield from (model.id for model in provider.models if says(model.id) and model.is_match(model.id))
    for provider in providers:
        yield from (f"{provider.id}/{model.id}" for model in provider.models)


def _plain(name: str) -> str:
    return "-".join(name.lower().split())


def _snapshot() -> DataSnapshot:
    # The import takes half a second, which only comparisons with hosted models need.
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot()


@cache
def _data() -> tuple[str, str]:
    """The version and the date of the data."""
    release = version("genai-prices")
    if release in RELEASED:
        return release, RELEASED[release].isoformat()
    dated = _newest_start()
    log.warning("genai-prices %s does not say when it was made: its newest price is of %s", release, dated)
    return release, dated


def _newest_start() -> str:
    """The last day up to today on which a price in the data changed."""
    today = datetime.now(UTC).date()
    changes = (
        getattr(item.constraint, "start_date", date.min)
        for provider in _snapshot().providers
        for model in provider.models
        if isinstance(model.prices, list)
        for item in model.prices
    )
    return max(day for day in changes if day <= today).isoformat()
