"""`moebox stats`: figures, maps in the terminal and as a picture, replays, merging and forgetting."""

import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from helpers.tiny_k2 import micro_config
from moebox.errors import RequestError
from moebox.instruments.stats import heat_map
from moebox.instruments.stats import image as stats_image
from moebox.instruments.stats import report as stats_report
from moebox.instruments.stats.report import Forgotten, HitCurve, StatsOptions, report_stats
from moebox.instruments.stats.text import render_stats
from moebox.offload.routing.counts import Placement
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.replay import hit_curve
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace

LAYERS, EXPERTS, TOP_K = 2, 8, 3  # micro_config's


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A checkpoint's small files, and a data folder of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "micro"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(micro_config()))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    return folder


def picks(tokens, seed=0):
    return synthetic_trace(tokens, LAYERS, EXPERTS, TOP_K, seed).ids


def learn(model, ids, tiers=None, recall=None):
    statistics = RouterStatistics.open(ModelIdentity.of(model))
    statistics.add(ids, prefill=False)
    if tiers is not None:
        statistics.placement = lambda: tiers
    if recall is not None:
        statistics.note_recall(*recall)
    statistics.save()
    return statistics


def test_the_report_has_uses_ranks_and_recall(model):
    ids = np.tile(np.array([[0, 1, 2], [5, 6, 7]], np.int32), (40, 1, 1))
    ids[30:, 0] = [0, 1, 3]
    learn(model, ids, recall=(2, 30, 40))

    report = report_stats(StatsOptions(model, budgets=(0.25, 1.0)))

    assert (report.model, report.layers, report.n_experts, report.top_k) == ("micro", [1, 2], 8, 3)
    assert (report.tokens, report.decoded_kept) == (40, 40)
    np.testing.assert_allclose(report.use[0], np.array([40, 40, 30, 10, 0, 0, 0, 0]) / 15, rtol=1e-2)
    assert report.unused_for == [[0, 0, 10, 0, -1, -1, -1, -1], [-1, -1, -1, -1, -1, 0, 0, 0]]
    assert sorted(np.array(report.rank).ravel()) == list(range(16))
    assert {report.rank[0][0], report.rank[0][1], *report.rank[1][5:]} == set(range(5))
    assert report.shares == {"0.25": pytest.approx(160 / 240, rel=1e-2), "1": 1.0}
    assert report.recall == {"1": None, "2": 0.75}
    assert report.places is None
    assert json.loads(json.dumps(report.to_dict()))["digest"] == ModelIdentity.of(model).digest


def test_the_hit_curve_is_that_of_the_last_decoded_tokens(model, monkeypatch):
    monkeypatch.setattr(stats_report, "REPLAYED_LAYER_STEPS", 100 * LAYERS)
    ids = picks(150)
    learn(model, ids)

    curve = report_stats(StatsOptions(model, budgets=(0.3, 0.6))).curve

    assert curve.tokens == 100
    assert curve.hits == hit_curve(RoutingTrace(ids[-100:], EXPERTS), (0.3, 0.6))


def test_a_trace_is_replayed_without_the_model(tmp_path):
    trace = RoutingTrace(picks(80), EXPERTS, "elsewhere")
    trace.save(tmp_path / "trace.npz")

    curve = report_stats(StatsOptions(None, replay=tmp_path / "trace.npz", budgets=(0.5,)))

    assert curve == HitCurve("elsewhere", 80, (0.5,), hit_curve(trace, (0.5,)))
    assert list(curve.hits) == ["decayed", "lru", "lfu", "belady"]


def test_a_trace_of_another_shape_is_refused(model, tmp_path):
    learn(model, picks(10))
    synthetic_trace(10, 3, EXPERTS, TOP_K).save(tmp_path / "trace.npz")

    with pytest.raises(RequestError, match="3 MoE layers, 8 experts, top 3; the model has 2, 8, top 3"):
        report_stats(StatsOptions(model, replay=tmp_path / "trace.npz"))


def test_without_statistics_the_error_names_their_file(model, tmp_path):
    with pytest.raises(
        RequestError, match=r"micro: no router statistics yet; they would be in .*data/moebox"
    ):
        report_stats(StatsOptions(model))
    assert not (tmp_path / "data").exists()


def test_merging_adds_and_resetting_forgets(model, tmp_path, monkeypatch):
    learn(model, picks(30))
    file = ModelIdentity.of(model).folder() / "statistics.npz"
    elsewhere = file.replace(tmp_path / "elsewhere.npz")
    learn(model, picks(20))

    merged = report_stats(StatsOptions(model, merge=(elsewhere,)))
    assert merged.tokens == 50

    assert report_stats(StatsOptions(model, reset=True)) == Forgotten("micro", str(file), 50)
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"text", "not router statistics"), (None, "cannot be read")]
)
def test_a_file_that_cannot_be_merged_is_refused(model, tmp_path, content, message):
    learn(model, picks(30))
    file = tmp_path / "other.npz"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(RequestError, match=rf"other.npz: {message}"):
        report_stats(StatsOptions(model, merge=(file,)))
    assert file.exists() == (content is not None)


def test_a_placement_is_live_while_its_process_runs(model):
    tiers = np.arange(LAYERS * EXPERTS, dtype=np.uint8).reshape(LAYERS, EXPERTS) % 3
    learn(model, picks(30), tiers)

    places = report_stats(StatsOptions(model)).places

    assert places.tiers == tiers.tolist()
    assert (places.process, places.running) == (os.getpid(), True)
    # Another process has that number now: it began after the placement was saved.
    assert not stats_report.still_runs(Placement(tiers, 1000.0, os.getpid()))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not stats_report.still_runs(Placement(tiers, time.time(), ended.pid))


def rendered(report, **console):
    file = io.StringIO()
    render_stats(report, Console(file=file, highlight=False, **console))
    return file.getvalue()


def test_the_maps_are_drawn_with_characters_where_there_are_no_colours(model):
    ids = np.tile(np.array([[0, 1, 2], [5, 6, 7]], np.int32), (40, 1, 1))
    ids[30:, 0] = [0, 1, 3]
    learn(model, ids, np.array([[2, 2, 1, 1, 0, 0, 0, 0], [0] * 5 + [2, 1, 1]], np.uint8))

    lines = rendered(report_stats(StatsOptions(model))).splitlines()

    rows = [line for line in lines if line.startswith(("   1 ", "   2 "))]
    assert rows[0] == "   1 " + "▓▓▓▓▓▓▓▓▒▒▒▒::::" + " " * 16
    assert rows[1] == "   2 " + " " * 20 + "▓" * 12
    assert rows[2] == "   1 " + "█" * 8 + "▓" * 8 + "·" * 16
    assert rows[3] == "   2 " + "·" * 20 + "████▓▓▓▓▓▓▓▓"
    assert any("is running, said at" in line for line in lines)


def test_a_colour_terminal_gets_two_layers_a_line(model):
    learn(model, picks(50))

    text = rendered(
        report_stats(StatsOptions(model)), force_terminal=True, color_system="truecolor", width=80
    )

    assert text.count("▀") == 2 * 4 * EXPERTS  # two maps of one line each, four columns an expert
    assert "\x1b[38;2;" in text


def test_no_color_and_ascii_terminals_are_respected(model, monkeypatch):
    learn(model, picks(50))
    report = report_stats(StatsOptions(model))

    plain = rendered(report, force_terminal=True, no_color=True, width=80)
    assert "▀" not in plain

    class Ascii(io.StringIO):
        encoding = "ascii"

    file = Ascii()
    render_stats(report, Console(file=file, highlight=False))
    maps = [line for line in file.getvalue().splitlines() if line.startswith(("   1 ", "   2 "))]
    assert len(maps) == 4
    assert all(line.isascii() for line in maps)


def test_folding_takes_means_and_the_most_frequent_place():
    values = np.array([[0.0, 1, 2, 3, 4, 5, 6]])

    assert heat_map.fold(values, 3).tolist() == [[0.5, 2.5, 5.0]]
    assert heat_map.fold(values, 16).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]]
    assert heat_map.fold_places(np.array([[0, 0, 2, 1, 0, 2, 1, 1]]), 3, kinds=3).tolist() == [[0, 2, 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "experts"), [(LAYERS, EXPERTS), (60, 384), (1, 2000)])
def test_the_picture_shows_every_expert(tmp_path, layers, experts):
    statistics = RouterStatistics(ModelIdentity("m", "1", layers, experts, 2), tmp_path / "s.npz")
    ids = np.tile(np.array([3, 1], np.int32), (20, layers, 1))
    statistics.add(ids, prefill=False)
    statistics.save()
    report = stats_report.report_model(statistics, 0, StatsOptions(None, budgets=(0.5,)))

    stats_image.write_png(report, tmp_path / "map.png")

    picture = np.array(Image.open(tmp_path / "map.png"))
    width, height = stats_image.cell_pixels(layers, experts)
    hottest, never = (np.all(picture == heat_map.USE.colours[level], axis=-1) for level in (6, 0))
    lit = (hottest if experts > 8 else np.all(picture == heat_map.USE.colours[5], axis=-1)).sum()
    assert lit >= 2 * layers * width * height
    assert never.sum() >= (experts - 2) * layers * width * height


def test_a_picture_that_cannot_be_written_is_an_error(model, tmp_path):
    learn(model, picks(5))
    with pytest.raises(RequestError, match=r"missing/map.png: cannot be written: No such file or directory"):
        stats_image.write_png(report_stats(StatsOptions(model)), tmp_path / "missing" / "map.png")


def moebox(*arguments):
    command = [sys.executable, "-c", "from moebox.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_command(model, tmp_path):
    learn(model, picks(60))

    shown = moebox("stats", model, "--png", tmp_path / "map.png", "--json", "--budget", "25%,0.5")

    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["curve"]["budgets"] == [0.25, 0.5]
    assert Image.open(tmp_path / "map.png").format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "only --replay goes without"),
        (("--replay", "t.npz", "--reset"), "only --replay goes without"),
        (("--replay", "t.npz", "--budget", "5%,120%"), "is not a list of shares"),
        (("--replay", "t.npz", "--budget", "some"), "is not a list of shares"),
        (("--replay", "t.npz", "--policy", "fifo"), "there are decayed, lru, lfu, belady"),
    ],
)
def test_wrong_usage_is_refused(arguments, message):
    from click.testing import CliRunner

    from moebox.cli import main_group

    refused = CliRunner().invoke(main_group, ["stats", *arguments])

    assert refused.exit_code == 2
    assert message in " ".join(refused.output.split())
