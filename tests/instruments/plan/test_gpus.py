"""GPU presets: names, ceilings, free memory, and the next larger one."""

import pytest

from helpers.paths import ROOT
from moebox.errors import PlanError
from moebox.instruments.plan.gpus import PRESETS, find_preset, next_larger


def test_ceilings_of_an_h200_are_those_that_were_measured():
    ceilings = find_preset("h200-141gb").ceilings(132.0, 5.4, 7.0)

    assert ceilings.hbm_gbps == pytest.approx(4270, rel=0.01)
    assert ceilings.pcie_gbps == pytest.approx(55, rel=0.01)
    assert ceilings.gpu_tflops == pytest.approx(798, rel=0.01)
    assert (ceilings.ram_gbps, ceilings.cpu_tflops, ceilings.nvme_gbps) == (132.0, 5.4, 7.0)


def test_free_memory_of_an_80_gb_card_is_less_the_drivers():
    free = find_preset("h100-80gb").free_bytes

    assert 78e9 < free < 81559 << 20


@pytest.mark.parametrize("name", PRESETS)
def test_names_contain_the_memory(name):
    named_gb = int(name.rpartition("-")[2].removesuffix("gb"))

    assert PRESETS[name].memory_bytes == pytest.approx(named_gb * 2**30, rel=0.08)


def test_an_unknown_name_is_refused_with_similar_ones():
    with pytest.raises(PlanError, match=r"h100-80g' is not known\nTry .*h100-80gb"):
        find_preset("h100-80g")


def test_the_next_larger_one_is_larger_and_no_slower():
    for preset in PRESETS.values():
        other = next_larger(preset)
        if other is not None:
            assert other.memory_bytes > preset.memory_bytes
            assert other.hbm_gbps >= preset.hbm_gbps
    assert next_larger(PRESETS["b200-180gb"]) is None


def test_the_table_of_the_documentation_has_all_of_them():
    lines = (ROOT / "docs" / "gpus.md").read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]

    figures = {
        name: (title, *(float(cell.replace(",", "")) for cell in cells)) for name, title, *cells, _ in rows
    }
    assert figures == {
        name: (
            preset.title,
            preset.memory_bytes / (1 << 20),
            preset.hbm_gbps,
            preset.pcie_gbps,
            preset.bf16_tflops,
        )
        for name, preset in PRESETS.items()
    }
