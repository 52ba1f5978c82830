"""The page in a real browser: a mark for each figure, no errors, no network requests, readable text."""

import io
import json
import shutil
from datetime import datetime, timedelta

import pytest
from rich.console import Console
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from helpers.ledger import changed, make_record
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.page.page import render_page, write_page
from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import Prices
from moebox.cost.report.page import report_page
from moebox.cost.report.report import ReportOptions, empty_report, make_report
from moebox.cost.report.text import render_report
from moebox.cost.scenario.page import scenario_page
from moebox.cost.scenario.scenario import find_scenario, run_scenario
from moebox.cost.usage import IdleSpell, Joules, Traffic
from moebox.errors import MoeboxError

EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script>&{{ 7 * 7 }}'
FIRST = datetime(2026, 11, 2, 9)
DAYS = 9
HOSTED = (
    ApiPrice("K2 Thinking", "Moonshot", 0.6, 2.5, 0.15, "2026-11-10", "genai-prices 1"),
    ApiPrice("GPT-5", "OpenAI", 1.25, 10.0, 0.125, "2026-11-10", "genai-prices 1"),
    ApiPrice("Sonnet 4.5", "Anthropic", 3.0, 15.0, 0.3, "2026-11-10", "genai-prices 1"),
)
CONTRAST = """
const colour = text => {
  const parts = text.match(/[\\d.]+/g).map(Number);
  const scale = text.startsWith('color(srgb') ? 255 : 1;
  return [...parts.slice(0, 3).map(part => part * scale), parts.length > 3 ? parts[3] : 1];
};
const light = rgb => rgb.slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = node => {
  for (; node; node = node.parentElement) {
    const found = colour(getComputedStyle(node).backgroundColor);
    if (found[3] > 0) return found;
  }
  return [255, 255, 255, 1];
};
const found = [];
document.querySelectorAll('details').forEach(node => node.open = true);
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement;
  const seen = node.checkVisibility({visibilityProperty: true}) && !node.closest('svg');
  if (!seen || !walk.currentNode.data.trim()) continue;
  const [a, b] = [light(colour(getComputedStyle(node).color)), light(behind(node))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.data.trim()]);
}
return found;
"""


@pytest.fixture(scope="module")
def browser():
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"no {missing[0]}: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    yield driver
    driver.quit()


def record(day, number, model):
    return make_record(
        id=f"{day}-{number}",
        begun_s=(FIRST + timedelta(days=day, hours=number)).timestamp(),
        model=model,
        user="ana",
        prompt_tokens=3000,
        cached_tokens=1000 * (number % 2),
        completion_tokens=700 + 100 * day,
        queue_s=0.0,
        prefill_s=4.0,
        decode_s=31.0,
        finish_reason="stop",
        energy=(Joules("gpu", 12_000.0, "counter"), Joules("cpu", 3_000.0, "estimated")),
        traffic=Traffic(600, 300, 20, 10**9, 10**10, 10**8),
    )


def made_report(folder, days=DAYS, **asked):
    """Requests on every day but the fourth, of two models; the name of one contains markup."""
    with Ledger.open(folder / "ledger.sqlite3") as ledger:
        for day in range(days):
            if day != 3:
                ledger.add(*(record(day, number, EVIL if number else "k2") for number in range(3)))
        ledger.add_idle(IdleSpell(FIRST.timestamp(), 9_000.0, (Joules("gpu", 700_000.0, "counter"),)))
        prices = asked.pop("prices", Prices(hardware_price=25_000, other_per_month=40))
        asked = ReportOptions(prices, api=asked.pop("api", HOSTED), **asked)
        return make_report(ledger, asked, (FIRST + timedelta(days=days)).timestamp())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return made_report(tmp_path_factory.mktemp("ledger"), subscription=200.0)


@pytest.fixture(scope="module")
def pages(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    scenario = run_scenario(find_scenario("kimi-k2-h100"))
    write_page(report_page(report), folder / "report.html")
    write_page(scenario_page(scenario), folder / "scenario.html")
    return folder


def opened(browser, path, scheme="light", width=1200):
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    return browser


def marks(browser, chart, kind=""):
    return browser.find_elements(By.CSS_SELECTOR, f"#{chart} .mark{kind and '.' + kind}")


@pytest.mark.slow
def test_every_figure_has_its_mark(browser, pages, report):
    opened(browser, pages / "report.html")
    days = len(report.days)
    assert days == DAYS - 1
    for kind in ("answers", "prompt", "cached"):
        assert len(marks(browser, "tokens-by-day", kind)) == days
    for kind in ("electricity", "hardware", "other"):
        assert len(marks(browser, "money-by-day", kind)) == days
    assert len(marks(browser, "parts")) == 2 * 3
    assert len(marks(browser, "hosted", "api")) == len(HOSTED)
    assert len(marks(browser, "hosted")) == len(HOSTED) + 2
    assert len(browser.find_elements(By.CSS_SELECTOR, "#break-even .line")) == len(HOSTED) + 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#break-even .dot")) == 2
    assert len(marks(browser, "energy", "electricity")) == 2
    assert len(marks(browser, "energy", "idle")) == 1
    assert len(marks(browser, "places")) == 3
    rows = browser.find_elements(By.CSS_SELECTOR, "[aria-label='By model'] tbody tr")
    assert len(rows) == len(report.lines) + 1


def test_heights_of_marks_are_proportional_to_their_figures(browser, pages, report):
    opened(browser, pages / "report.html")
    heights = [mark.size["height"] for mark in marks(browser, "tokens-by-day", "answers")]
    tokens = [line.totals.usage.completion_tokens for line in report.days]
    for height, count in zip(heights, tokens, strict=True):
        assert height / heights[0] == pytest.approx(count / tokens[0], rel=0.05)
    first, second = (mark.rect for mark in marks(browser, "tokens-by-day")[:2])
    assert second["y"] + second["height"] == pytest.approx(first["y"], abs=1.5)


@pytest.mark.parametrize("name", ["report.html", "scenario.html"])
def test_a_page_makes_no_request_and_logs_no_error(browser, pages, name):
    opened(browser, pages / name)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [(pages / name).as_uri()]
    assert browser.find_elements(By.TAG_NAME, "script") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report.html", "scenario.html"])
def test_every_text_has_enough_contrast(browser, pages, name, scheme):
    opened(browser, pages / name, scheme)
    body = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (body == "rgb(247, 245, 240)") == (scheme == "light")
    found = browser.execute_script(CONTRAST)
    assert len(found) > 100
    weakest, text = min(found)
    assert weakest >= 4.5, text


@pytest.mark.parametrize("name", ["report.html", "scenario.html"])
def test_a_phone_shows_all_of_its_width(browser, pages, name):
    opened(browser, pages / name, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    chart = browser.find_element(By.CSS_SELECTOR, ".plot")
    assert 300 < chart.size["width"] <= 390


def test_names_of_models_are_not_read_as_markup(browser, pages):
    opened(browser, pages / "report.html")
    assert browser.title.startswith("moebox cost: ")
    heads = browser.find_elements(By.CSS_SELECTOR, "[aria-label='By model'] tbody th")
    assert [head.text for head in heads] == [EVIL, "k2", "Together"]
    assert browser.find_elements(By.TAG_NAME, "img") == []


def test_the_scenarios_rows_have_marks(browser, pages):
    opened(browser, pages / "scenario.html")
    scenario = run_scenario(find_scenario("kimi-k2-h100"))
    assert len(marks(browser, "developers", "api")) == len(scenario.by_developers)
    # Two hosted models have one price, and so one line; the box has two.
    assert len(browser.find_elements(By.CSS_SELECTOR, "#by-speed .line")) == len(scenario.hosted) - 1 + 2
    rows = browser.find_elements(By.CSS_SELECTOR, "[aria-label='By speed'] tbody tr")
    assert len(rows) == len(scenario.by_speed)


def test_a_quarter_is_shown_by_weeks(tmp_path):
    page = report_page(made_report(tmp_path, days=100))
    (tokens, money) = page.sections[0].blocks
    assert tokens.title == "Tokens by week"
    assert len({mark.x for mark in tokens.chart.marks}) == 15
    assert len({mark.x for mark in money.chart.marks}) == 15


def test_without_prices_the_comparisons_are_left_out(tmp_path):
    page = report_page(made_report(tmp_path, days=2, prices=Prices(), api=()))
    ids = [block.id for section in page.sections for block in section.blocks if block.id]
    assert ids == ["tokens-by-day", "money-by-day", "parts", "energy", "places"]
    assert "left out" not in render_page(page)


def test_an_empty_ledger_says_how_to_fill_it(tmp_path):
    page = report_page(empty_report(ReportOptions(Prices()), tmp_path / "none"))
    assert page.sections == ()
    assert "moebox run" in render_page(page)


def test_a_page_that_cannot_be_written(report, tmp_path):
    with pytest.raises(MoeboxError, match=r"nowhere/report\.html: cannot be written"):
        write_page(report_page(report), tmp_path / "nowhere" / "report.html")


def test_requests_that_computed_nothing(tmp_path):
    cancelled = changed(
        record(0, 0, "k2"), prompt_tokens=0, cached_tokens=0, completion_tokens=0, prefill_s=0.0
    )
    with Ledger.open(tmp_path / "l") as ledger:
        ledger.add(changed(cancelled, decode_s=0.0))
        report = make_report(ledger, ReportOptions(Prices(hardware_price=25_000), api=HOSTED))
    assert "Nothing was computed" in render_page(report_page(report))
    render_report(report, Console(file=(shown := io.StringIO()), width=120))
    assert "Nothing was computed" in shown.getvalue()


@pytest.mark.parametrize(
    "prices",
    [
        Prices(hardware_price=0.0),
        Prices(hardware_price=25_000, utilisation=1.0),
        Prices(hardware_price=25_000, utilisation=0.001),
        Prices(other_per_month=100.0),
        Prices(electricity_per_kwh=0.0),
        Prices(hardware_price=10.0, residual=10.0, currency="EUR", per_usd=0.9),
    ],
)
def test_pages_of_odd_prices(tmp_path, prices):
    free = ApiPrice("Free", "Nobody", 0.0, 0.0, 0.0, "2026-11-10", "test")
    for api in ((free,), (free, *HOSTED)):
        text = render_page(report_page(made_report(tmp_path, days=2, prices=prices, api=api)))
        assert "nan" not in text and "inf" not in text.replace("info", "")
