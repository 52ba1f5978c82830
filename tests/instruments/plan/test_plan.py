"""`moebox plan`: parts add up, refusals have numbers, changes are ranked, the text has all figures."""

import json
from dataclasses import replace

import huggingface_hub.constants
import pytest
from click.testing import CliRunner
from rich.console import Console

from helpers.convert import Hub, make_source
from moebox.cli import main_group
from moebox.config import load_config
from moebox.errors import CheckpointError, PlanError, RequestError
from moebox.instruments.measure import cpu_load
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan import box as plan_box
from moebox.instruments.plan import probe as plan_probe
from moebox.instruments.plan.box import BoxOptions, find_box, ram_to_buy
from moebox.instruments.plan.hits import find_hit_predictor
from moebox.instruments.plan.placement import DISK, GPU, RAM
from moebox.instruments.plan.plan import PlanOptions, loaded_line, make_plan
from moebox.instruments.plan.report import PlannedModel, plan_on
from moebox.instruments.plan.speed import CPU_BOX, ColdReads
from moebox.instruments.plan.text import render_plan
from moebox.offload.machine.hardware import cpu_identity
from moebox.offload.machine.profile import MachineProfile
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.cpu_runner import default_dtype
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.engine.plan_parts import learned_bytes

GIB = 1 << 30
K2 = shape_config("kimi-k2")


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    synth(folder, "tiny", format="int4")
    return folder


@pytest.fixture
def measured(monkeypatch):
    """This box with made-up measurements; test_probe.py tests real ones."""
    monkeypatch.setattr(plan_box, "cpu_figures", lambda *_: {"ram_gbps": 10.0, "cpu_tflops": 0.1})
    monkeypatch.setattr(plan_probe, "probe_cpu", lambda *_: replace(CPU_BOX, layer_s=0.002))
    monkeypatch.setattr(plan_probe, "probe_disk", lambda *_: ColdReads(0.0005, 0.4))
    monkeypatch.setattr(cpu_load, "busy_cpus", lambda: 0.0)


def k2(gpu="h100-80gb", ram=640 * GIB, context=32768, **box):
    return make_plan(
        PlanOptions(shape="kimi-k2", box=BoxOptions(gpu=gpu, ram=ram, nvme_gbps=7, **box), context=context)
    )


def budget_for(config, share):
    """RAM, in bytes, that holds a share of the experts beside the backbone and 512 tokens, without a GPU."""
    return budget_for_share(config, default_dtype(config, "bf16"), "bf16", 512, share)


def taken(plan, place):
    return sum(part.nbytes for part in plan.placement.parts if part.place == place)


def test_the_parts_fill_an_80_gb_card():
    plan = k2()

    free = plan.box.free_vram - taken(plan, GPU)
    assert 0 <= free < K2.expert_bytes
    assert plan.placement.near_experts == K2.n_keys
    assert taken(plan, DISK) == 0
    assert taken(plan, RAM) == K2.experts_bytes + learned_bytes(K2, 1)
    assert plan.pick_shares.disk == 0
    assert plan.pick_shares.gpu + plan.pick_shares.ram == pytest.approx(1)


@pytest.mark.slow
def test_a_box_that_cannot_hold_the_model_reads_the_rest_from_the_disk():
    plan = k2(ram=400 * GIB)

    experts = [part.experts for part in plan.placement.parts]
    assert sum(experts) == K2.n_keys
    assert 0.95 * 400 * GIB - K2.expert_bytes < taken(plan, RAM) <= 0.95 * 400 * GIB
    assert plan.placement.disk_experts > 0 < plan.pick_shares.disk
    assert plan.tokens_per_s < k2().tokens_per_s


def test_without_a_gpu_everything_is_in_ram_or_on_the_disk():
    plan = k2(gpu="none", ram=200 * GIB)

    assert taken(plan, GPU) == 0
    assert taken(plan, RAM) <= 0.95 * 200 * GIB
    assert taken(plan, DISK) + taken(plan, RAM) > K2.experts_bytes
    assert plan.pick_shares.gpu == 0 < plan.pick_shares.disk


def test_a_card_that_is_too_small_is_refused_with_the_numbers():
    with pytest.raises(
        PlanError, match=r"needs 26\.\d GiB before the first expert .* free are 23.*: 2\.6 GiB are missing"
    ):
        k2(gpu="rtx-4090-24gb")


def test_ram_that_is_too_small_is_refused_with_the_numbers():
    with pytest.raises(PlanError, match=r"needs 2\d\.\d GiB .*free memory is 15.* are missing"):
        k2(gpu="none", ram=16 * GIB)


@pytest.mark.parametrize("box", [{"nvme_gbps": 0}, {"ram_gbps": -1}])
def test_bandwidths_that_are_not_above_0_are_refused(box):
    with pytest.raises(PlanError, match="must be above 0"):
        make_plan(PlanOptions(shape="kimi-k2", box=BoxOptions(gpu="h100-80gb", **box)))


def test_an_int8_backbone_on_a_gpu_is_refused():
    box = BoxOptions(gpu="h100-80gb")
    with pytest.raises(PlanError, match="bf16"):
        make_plan(PlanOptions(shape="kimi-k2", box=box, backbone="int8"))


def test_later_releases_of_k2_have_a_longer_context():
    plan = k2(context=262144)

    assert plan.placement.context == 262144
    assert [decode.cached_tokens for decode in plan.decode] == [4096, 262144]
    with pytest.raises(PlanError, match="context of 262145 tokens"):
        k2(context=262145)


def test_changes_are_sorted_by_gain():
    gains = [change.gain for change in k2(ram=400 * GIB, context=131072).changes]

    assert len(gains) == 5
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0.1


@pytest.mark.slow
def test_the_change_to_ram_for_all_experts_leaves_none_on_the_disk():
    changes = {change.what: change for change in k2(ram=400 * GIB).changes}

    more = next(what for what in changes if what.startswith("RAM for all experts"))
    enough = int(more.rpartition(": ")[2].partition(".")[0])
    assert k2(ram=enough * GIB).placement.disk_experts == 0
    assert k2(ram=enough * GIB).tokens_per_s == pytest.approx(changes[more].tokens_per_s)


def test_a_box_without_a_disk_tier_gains_nothing_from_a_second_drive():
    assert not any("drive" in change.what for change in k2().changes)


def test_ram_is_bought_in_steps():
    assert [ram_to_buy(nbytes) // GIB for nbytes in (1, 64 * GIB, 64 * GIB + 1)] == [64, 64, 128]
    assert ram_to_buy(3.5 * GIB, step=GIB) == 4 * GIB


def test_assumed_ram_holds_all_experts():
    plan = k2(ram=None)

    assert plan.placement.disk_experts == 0
    assert any("assumed, enough for all experts" in source for source in plan.box.sources)


@pytest.mark.slow
def test_this_box_is_measured_once(model, measured, monkeypatch):
    options = PlanOptions(str(model))
    first = make_plan(options)
    for name in ("probe_cpu", "probe_disk"):
        monkeypatch.delattr(plan_probe, name)

    assert make_plan(options).decode == first.decode
    assert first.box.ceilings.ram_gbps == 10
    assert first.box.efficiency.layer_s == 0.002
    assert first.box.efficiency.nvme * first.box.ceilings.nvme_gbps == pytest.approx(0.4)


def test_what_is_measured_on_a_busy_box_is_not_kept(model, measured, monkeypatch):
    monkeypatch.setattr(cpu_load, "busy_cpus", lambda: 100.0)

    plan = make_plan(PlanOptions(str(model)))

    assert any("busy" in source for source in plan.box.sources)
    assert MachineProfile.load().find("cpu", cpu_identity()) is None


def test_a_budget_of_more_ram_than_this_box_has_means_another_box(model):
    config = load_config(model)

    assert find_box(BoxOptions(ram=1 << 50), config, [model]).free_ram == 1 << 50
    assert find_box(BoxOptions(), config, [model], measure=False) is None


def test_a_budget_on_this_box_is_obeyed_as_run_obeys_it(model, measured):
    budget = budget_for(load_config(model), 0.75)

    plan = make_plan(PlanOptions(str(model), box=BoxOptions(ram=budget), context=512))
    engine = Engine.load(model, LoadOptions(device="cpu", ram=budget, context=512, statistics=False))

    assert taken(plan, RAM) == engine.plan.planned_bytes
    assert 0 < plan.placement.disk_experts < plan.placement.keys
    line = loaded_line(engine)
    engine.close()
    assert f"{plan.placement.near_experts} of {plan.placement.keys} experts" in line
    assert f"{plan.placement.disk_experts} on disk only" in line
    assert "tok/s" in line


def test_without_measurements_the_line_has_no_speed(model):
    engine = Engine.load(model, LoadOptions(device="cpu", context=512, statistics=False))

    line = loaded_line(engine)

    engine.close()
    assert line.startswith("plan: backbone")
    assert "tok/s" not in line


def test_figures_of_another_version_are_measured_again(model, measured):
    config = load_config(model)
    find_box(BoxOptions(), config, [model])
    profile = MachineProfile.load()
    old = [key for key in profile.to_dict()["parts"] if key["kind"] == "run"]
    assert len(old) == 2
    for part in old:
        profile.put("run", part["identity"], {"another": 1.0})
    profile.save()
    assert find_box(BoxOptions(), config, [model], measure=False) is None

    box = find_box(BoxOptions(), config, [model])

    assert box.efficiency.layer_s == 0.002


def test_less_ram_is_never_faster(model, measured):
    config = load_config(model)
    box = find_box(BoxOptions(), config, [model])
    curve = find_hit_predictor(config, model, None)
    budgets = [budget_for(config, share) for share in (0.5, 0.75, 1)]

    rates = [
        plan_on(PlannedModel("tiny", config, model), replace(box, ram=budget), curve, 512).tokens_per_s
        for budget in budgets
    ]

    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


@pytest.mark.slow
def test_a_model_on_the_hub_is_planned_from_its_headers(tmp_path, monkeypatch):
    source = make_source(tmp_path / "fp8")
    hub = Hub(source, "org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    plan = make_plan(PlanOptions("org/tiny", box=BoxOptions(gpu="rtx-5090-32gb")))

    hub.close()
    config = load_config(source)
    assert plan.model.config == config
    assert plan.placement.keys == config.n_keys
    assert "`moebox quantize` makes its experts INT4" in plan.model.note
    ranges = [span for _, path, span in hub.requests if path.endswith(".safetensors")]
    assert ranges
    assert all(ranges), "a whole shard was fetched"


@pytest.mark.parametrize("options", [{}, {"model": "x", "shape": "tiny"}, {"model": "no such folder"}])
def test_exactly_one_model_must_be_given(options):
    with pytest.raises(RequestError):
        make_plan(PlanOptions(**options))


def test_an_unquantized_model_can_be_planned(tmp_path, measured, monkeypatch):
    synth(tmp_path / "fp8", "tiny")

    def refuse(*_):
        raise CheckpointError("not quantized")

    monkeypatch.setattr(plan_probe, "probe_disk", refuse)

    plan = make_plan(PlanOptions(str(tmp_path / "fp8")))

    assert plan.tokens_per_s > 0
    assert any("disk: 3 GB/s, assumed" in source for source in plan.box.sources)


def test_the_terminal_shows_every_place_and_the_arithmetic(capsys):
    plan = k2(ram=400 * GIB, context=262144)

    render_plan(plan, Console(highlight=False))

    shown = capsys.readouterr().out
    for part in plan.placement.parts:
        assert part.what in shown
        assert f"{part.nbytes:,}" in shown
    for wanted in ("132 + 55", "what would help most", "docs/benchmarks.md", "262,144", "published"):
        assert wanted in shown
    assert all(len(line) <= 130 for line in shown.splitlines())


def test_json_has_all_figures():
    command = ["plan", "--shape", "kimi-k2", "--gpu", "h100-80gb", "--ram", "640GiB", "--json"]
    result = CliRunner().invoke(main_group, command)

    report = json.loads(result.stdout)
    assert report["decode"][0]["tokens_per_s"] > 1
    assert report["places"]["keys"] == 23040
    assert sum(part["experts"] for part in report["places"]["parts"] if part["place"] == "RAM") == 23040
    assert {"ceilings", "efficiency", "sources"} <= report["box"].keys()


def test_the_command_takes_a_model_or_a_shape():
    for command in (["plan"], ["plan", "x", "--shape", "tiny"]):
        assert CliRunner().invoke(main_group, command).exit_code == 2
