"""Results of checks: what a topic puts into each, and bandwidths beside earlier ones."""

import pytest

from moebox.instruments.doctor.checks.base import Check, Topic, much_faster_earlier
from moebox.offload.machine.profile import Part

TOPIC = Topic("gpu.pcie", "cuda:1", {"pcie_gbps": 20.0})


def test_a_topic_makes_results_with_its_id_subject_and_figures():
    common = {"subject": "cuda:1", "figures": {"pcie_gbps": 20.0}}

    assert TOPIC.passed("fast") == Check("gpu.pcie", "pass", "fast", **common)
    assert TOPIC.warning("slow", "time", "a slot") == Check(
        "gpu.pcie", "warn", "slow", "time", "a slot", **common
    )
    assert TOPIC.failed("none", "all", "a card").status == "fail"
    assert TOPIC.skipped("no GPU", "buy one") == Check("gpu.pcie", "skip", "no GPU", "", "buy one", **common)


def test_an_error_of_a_measurement_is_a_warning_with_the_errors_fix():
    assert TOPIC.not_measured(OSError("no memory\nRaise the limit.")).fix == "Raise the limit."
    check = TOPIC.not_measured(OSError("no memory"))
    assert (check.status, check.seen, check.fix) == (
        "warn",
        "not measured: no memory",
        "Close other programs.",
    )


@pytest.mark.parametrize(("gbps", "is_slower"), [(74.0, True), (75.0, False), (110.0, False)])
def test_an_earlier_bandwidth_counts_if_less_than_three_quarters_are_left(gbps, is_slower):
    before = Part("cpu", "a CPU", "2026-01-31T10:00:00Z", {"ram_gbps": 100.0})

    earlier = much_faster_earlier(before, "ram_gbps", gbps)

    assert (earlier is not None) == is_slower
    assert earlier is None or (earlier.gbps, earlier.day) == (100.0, "2026-01-31")


def test_without_an_earlier_figure_there_is_nothing_to_compare():
    assert much_faster_earlier(None, "ram_gbps", 1.0) is None
    assert much_faster_earlier(Part("cpu", "a CPU", "2026-01-31", {}), "ram_gbps", 1.0) is None
