"""Load of the cores by other programs."""

from moebox.instruments.measure.cpu_load import busy_cpus, is_quiet


def test_up_to_a_tenth_of_the_allowed_cpus_may_be_busy():
    assert is_quiet(1.6, allowed=16)
    assert not is_quiet(1.7, allowed=16)


def test_this_machines_load_is_no_more_than_its_cpus():
    assert busy_cpus() >= 0
