"""Each answer adds a row to the ledger, however it ends; the row has the figures that are shown."""

import json
import threading
import time

import pytest
from click.testing import CliRunner

from helpers.chat import FakeSession, fake_model, run_program
from helpers.offload.gpu import DEVICES, need
from helpers.paths import TINY_K2
from moebox.cli import main_group
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.usage import SECONDS, TOKENS, TRAFFIC_FIELDS, Joules, Traffic
from moebox.errors import BusyError, MoeboxError, PricesError, RequestError
from moebox.quantize.convert import quantize
from moebox.runtime.api import load
from moebox.runtime.terminal.cost_text import energy_text, hits_text

USER = [{"role": "user", "content": "the secret of the weather"}]


@pytest.fixture(autouse=True)
def ledger_path(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBOX_LEDGER", str(tmp_path / "ledger"))
    return tmp_path / "ledger"


@pytest.fixture
def prices(tmp_path, monkeypatch):
    """Write the user's file of prices."""
    folder = tmp_path / "config" / "moebox"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    return (folder / "prices.toml").write_text


@pytest.fixture
def model(tmp_path):
    with fake_model(tmp_path / "model", ledger=True, user="ada", answers=["sunny it is"]) as model:
        yield model


def requests(model):
    model.accounts.writer.flush()
    with Ledger.open(model.accounts.writer.path, read_only=True) as ledger:
        return list(ledger.requests())


def written(path):
    """User and model of all rows in the ledger."""
    if not path.exists():
        return []
    with Ledger.open(path) as ledger:
        return [(row.user, row.model) for row in ledger.requests()]


def test_an_answer_is_a_row_with_the_figures_of_its_stats(model):
    stats = [*model.chat(USER, queue_s=0.25)][-1].stats
    (row,) = requests(model)
    assert (row.model, row.user, row.finish_reason) == ("model", "ada", "stop")
    assert row.usage == stats.usage
    assert (row.usage.queue_s, row.usage.prompt_tokens) == (0.25, stats.prompt_tokens)
    passes = model.engine.passes
    assert row.usage.traffic == Traffic(0, 2 * passes, passes, 0, 3000 * passes, 1000 * passes)
    assert row.usage.joules > 0
    per_token = row.usage.joules / row.usage.computed_tokens
    assert stats.cost.electricity == pytest.approx(per_token / 3.6e6 * 0.176 * 1e6)


def test_the_next_answer_counts_only_its_own(model):
    model.generate(USER)
    before = model.engine.passes
    done = model.generate([*USER, {"role": "assistant", "content": "sunny it is"}, *USER], user="bob")
    first, second = requests(model)
    assert (first.user, second.user) == ("ada", "bob")
    assert second.usage.traffic.disk_hits == model.engine.passes - before
    assert second.usage.cached_tokens > 0
    assert done.stats.usage.energy == second.usage.energy
    assert second.begun_s >= first.begun_s + first.usage.work_s


def test_the_ledger_keeps_neither_prompt_nor_answer(model, ledger_path):
    model.generate(USER)
    model.close()
    kept = b"".join(path.read_bytes() for path in ledger_path.parent.glob("ledger*"))
    assert b"ada" in kept
    assert b"secret" not in kept
    assert b"sunny" not in kept


def test_an_answer_that_is_closed_early_is_a_cancelled_row(model):
    pieces = model.chat(USER)
    next(pieces)
    pieces.close()
    (row,) = requests(model)
    assert row.finish_reason == "cancelled"
    assert row.usage.completion_tokens >= 1
    assert row.usage.joules > 0


def test_a_prompt_that_is_cancelled_counts_what_was_read(model):
    cancel = threading.Event()

    def stop(done, total):
        if done >= total // 2:
            cancel.set()

    pieces = [*model.chat(USER, cancel=cancel, on_prefill=stop)]
    (row,) = requests(model)
    assert (row.finish_reason, row.usage.completion_tokens) == ("cancelled", 0)
    assert row.usage.prompt_tokens == model.count_tokens(USER) // 2
    assert row.usage.prefill_s > 0
    assert pieces[-1].stats.usage.computed_tokens == row.usage.computed_tokens > 0


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_an_answer_that_fails_is_a_row_with_an_error(model, monkeypatch, step):
    def broken(*_arguments, **_options):
        raise MoeboxError("a drive is gone")

    monkeypatch.setattr(FakeSession, step, broken)
    with pytest.raises(MoeboxError, match="a drive is gone"):
        model.generate(USER)
    (row,) = requests(model)
    assert row.finish_reason == "error"
    assert row.usage.completion_tokens == (step == "decode")
    monkeypatch.undo()
    assert model.generate(USER).text == "sunny it is"
    assert [row.finish_reason for row in requests(model)] == ["error", "stop"]


def test_a_refused_request_adds_no_row(model):
    first = model.chat(USER)
    next(first)
    with pytest.raises(BusyError):
        next(model.chat(USER))
    with pytest.raises(RequestError):
        model.generate(USER, top_p=3)
    assert [piece.kind for piece in first][-1] == "stats"
    assert len(requests(model)) == 1


def test_no_ledger(tmp_path, ledger_path):
    with fake_model(tmp_path / "model", ledger=False) as model:
        stats = model.generate(USER).stats
    assert stats.usage.energy
    assert stats.cost is not None
    assert not ledger_path.exists()


def test_run_json_has_energy_traffic_and_cost(tmp_path, capsys, prices):
    prices(
        "hardware_price = 26_280\nlife_months = 10\nelectricity_per_kwh = 0.36\n"
        "currency = 'EUR'\nper_usd = 0.9\n"
    )
    assert run_program(tmp_path / "model", {"run": {"prompt": "hi", "json": True}}) == 0
    report = json.loads(capsys.readouterr().out)
    assert {*TOKENS, "total_tokens"} == report["usage"].keys()
    assert report["timings"].keys() > set(SECONDS)
    assert report["traffic"].keys() == set(TRAFFIC_FIELDS)
    tokens = report["usage"]["prompt_tokens"] + report["usage"]["completion_tokens"]
    energy, cost = report["energy"], report["cost"]
    assert energy["joules_per_token"] == pytest.approx(energy["joules"] / tokens)
    assert energy["estimated"] == any(part["method"] == "estimated" for part in energy["sources"])
    assert sum(part["joules"] for part in energy["sources"]) == pytest.approx(energy["joules"])
    assert report["traffic"]["ram_hits"] == 2 * report["traffic"]["disk_hits"] > 0
    busy_s = report["timings"]["prefill_s"] + report["timings"]["decode_s"]
    assert cost["electricity"] == pytest.approx(energy["joules_per_token"] * 0.1)
    assert cost["hardware"] == pytest.approx(busy_s / 1000 / tokens * 1e6)
    assert cost["total"] == pytest.approx(cost["electricity"] + cost["hardware"])
    assert cost["at_full_utilisation"]["total"] == pytest.approx(cost["total"])
    assert (cost["currency"], cost["utilisation"]) == ("EUR", 1.0)


def test_a_mistake_in_the_prices_is_reported_before_anything_is_loaded(prices):
    prices("electricity = 0.2")
    with pytest.raises(PricesError, match="electricity_per_kwh"):
        load(TINY_K2)  # which is not quantized: that would be the next error


def test_energy_and_hits_as_text():
    energy = (Joules("gpu", 1010, "counter"), Joules("cpu", 200, "estimated"), Joules("dram", 30, "power"))
    assert energy_text(energy, 100) == "12.4 J/token (GPU 10.1, CPU 2.00 est., DRAM 0.30)"
    assert energy_text(energy, 0) is energy_text((), 5) is None
    assert hits_text(Traffic(56, 40, 4)) == "56 % GPU, 40 % RAM, 4.0 % disk"
    assert hits_text(Traffic()) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-k2") / "int4"
    quantize(TINY_K2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", *DEVICES])
def test_real_tiers_are_counted(folder, ledger_path, device):
    with load(folder, device=need(device) if device != "cpu" else device, context=256, user="ada") as model:
        config = model.engine.config
        stats = model.generate(USER, max_tokens=4, temperature=0).stats
        (row,) = requests(model)
    per_token = config.num_experts_per_tok * len(config.moe_layers)
    traffic = row.usage.traffic
    assert traffic == stats.usage.traffic
    assert traffic.hits >= stats.decoded_tokens * per_token
    assert traffic.cpu_bytes + traffic.pcie_bytes >= traffic.ram_hits * config.expert_bytes
    assert (traffic.gpu_hits > 0) == (device != "cpu")
    assert (row.model, row.user) == ("int4", "ada")
    with Ledger.open(ledger_path, read_only=True) as ledger:
        assert list(ledger.idle())


@pytest.mark.slow
def test_the_options_user_and_no_ledger(folder, ledger_path):
    command = ["run", str(folder), "hi", "--device", "cpu", "--context", "256", "--max-tokens", "2"]
    for options in (["--user", "bob", "--no-ledger"], ["--user", "ada"]):
        done = CliRunner().invoke(main_group, command + options, standalone_mode=False)
        assert done.exception is None
    # The command leaves the rows to its own thread and the end of the program.
    until_s = time.monotonic() + 10
    while not (rows := written(ledger_path)) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert rows == [("ada", "int4")]
