"""What hosted models cost: the data that `genai-prices` brings along, and a user's own file over it.

Nothing is fetched. A file of one's own has a table for each model, with or without quotes:

    [house-model]
    input_per_million = 0.4
    output_per_million = 1.6
    cached_per_million = 0.1    # left out: the input price
    provider = "the other team" # left out: the file's name
    dated = 2026-11-01          # left out: the day on which the file was changed
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
"""When versions of genai-prices were uploaded to PyPI; the package itself holds no date of its data."""

KEYS = ["input_per_million", "output_per_million", "cached_per_million", "provider", "dated"]


@dataclass(frozen=True)
class ApiPrice:
    """List price of a hosted model, per million tokens.

    Attributes:
        name: the model's.
        provider: who serves it at this price.
        input_per_million, output_per_million: for prompts and answers; where a provider asks more for long
            prompts, the price of short ones.
        cached_per_million: for tokens of a prompt that the provider still held; the input price where
            the provider has no other.
        dated: ISO date of the data.
        origin: `genai-prices` and its version, or the file.
    """

    name: str
    provider: str
    input_per_million: float
    output_per_million: float
    cached_per_million: float
    dated: str
    origin: str


def own_prices_path() -> Path:
    """The user's file of API prices, which need not exist."""
    return config_folder() / "api-prices.toml"


def api_prices(names: Sequence[str], own: Path | None = None, per_usd: float = 1.0) -> list[ApiPrice]:
    """The prices of `names`, in order, as they are today.

    Args:
        names: of models in the user's file or of genai-prices (`gpt-5`, `Claude Sonnet 4.5`), or with who
            serves them (`openrouter/moonshotai/kimi-k2-thinking`). Upper case and spaces do not matter.
        own: the user's file, in the currency of `Prices`; None: `own_prices_path()` if there is one.
        per_usd: `Prices.per_usd`, by which the dollars of genai-prices are converted.

    Raises:
        PricesError: a name that is not known, with near ones, or a bad file.
    """
    where = own_prices_path() if own is None else own
    ours = read_own(where, missing_ok=own is None)
    return [ours.get(_plain(name)) or _hosted(name, list(ours), per_usd) for name in names]


def read_own(path: Path, missing_ok: bool = False) -> dict[str, ApiPrice]:
    """Prices of the user's own file, by name in lower case with `-` for spaces.

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
    fresh, answer, cached = (rate or 0.0 for rate in rates)
    dated = _iso_date(path, name, given["dated"])
    return ApiPrice(name, str(given["provider"]), fresh, answer, cached, dated, str(path))


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
    fresh, answer = _per_million(prices.input_mtok, per_usd), _per_million(prices.output_mtok, per_usd)
    cached = _per_million(prices.cache_read_mtok, per_usd)
    if fresh is None or answer is None:
        fix = f"name another, or write its prices into {own_prices_path()}"
        raise PricesError(f"{provider.id}/{model.id} is not sold by the token", fix)
    cached = fresh if cached is None else cached
    release, dated = _data()
    shown = model.name or model.id
    return ApiPrice(shown, provider.name, fresh, answer, cached, dated, f"genai-prices {release}")


def _per_million(dollars: Any, per_usd: float) -> float | None:
    # A tiered price has its lowest step as `base`.
    return None if dollars is None else float(getattr(dollars, "base", dollars)) * per_usd


def _find(name: str) -> tuple[Provider, ModelInfo] | None:
    """A model by its own name, or by `provider/name`, whose exact name counts before what resembles it."""
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
    """The fix of an unknown name; one without a provider is looked for at all of them."""
    known = {own: own for own in ours}
    for full in _model_names():
        known.setdefault(_plain(full if "/" in name else full.rpartition("/")[2]), full)
    close = [known[near] for near in difflib.get_close_matches(name, known, n=5, cutoff=0.6)]
    asked = f"did you mean {', '.join(close)}? " if close else "name it as provider/model, "
    return f"{asked}or write its prices into {own_prices_path()}"


def _model_names() -> Iterator[str]:
    """Models under their own names where those say the provider, and all as `provider/name`."""
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
    # Half a second of imports that only a comparison needs.
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot()


@cache
def _data() -> tuple[str, str]:
    """Version and date of the data."""
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
