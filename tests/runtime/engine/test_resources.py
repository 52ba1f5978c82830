"""The owner of what loading opens: order, once, half-way, garbage collection and the end of the program."""

import gc
import subprocess
import sys
import textwrap

import pytest

from moebox.runtime.engine.resources import Resources


class Owner:
    """Something that can be garbage-collected."""


@pytest.fixture
def closed():
    return []


@pytest.fixture
def resources(closed):
    made = Resources()
    made.add(lambda: closed.append("store"))
    made.add_recording(lambda: closed.append("statistics"))
    made.add(lambda: closed.append("experts"))
    made.add_recording(lambda: closed.append("trace"))
    yield made
    made.close()


ORDER = ["trace", "statistics", "experts", "store"]


def test_recordings_are_closed_first_and_the_last_added_before_those_before_it(resources, closed):
    resources.close()
    assert closed == ORDER


def test_closing_twice_closes_once(resources, closed):
    resources.close()
    resources.close()
    assert closed == ORDER


def test_what_is_added_after_closing_is_closed_by_the_next_close(resources, closed):
    resources.close()
    resources.add(lambda: closed.append("late"))
    resources.close()
    assert closed == [*ORDER, "late"]


def test_a_load_that_succeeds_leaves_all_open(resources, closed):
    with resources:
        pass
    assert closed == []


def test_a_load_that_fails_half_way_closes_what_it_has_opened(closed):
    resources = Resources()

    def load():
        with resources:
            resources.add_recording(lambda: closed.append("statistics"))
            resources.add(lambda: closed.append("store"))
            raise MemoryError("no room for the experts")

    with pytest.raises(MemoryError, match="no room"):
        load()
    assert closed == ["statistics", "store"]


def test_an_error_in_closing_is_raised_after_all_are_closed(resources, closed):
    def fail():
        raise OSError("the drive is full")

    resources.add_recording(fail)
    with pytest.raises(OSError, match="drive is full"):
        resources.close()
    assert closed == ORDER


def test_garbage_collection_of_the_owner_leaves_the_recordings_open(resources, closed):
    owner = Owner()
    resources.close_with(owner)
    del owner
    gc.collect()
    assert closed == ["experts", "store"]
    resources.close()
    assert closed == ["experts", "store", "trace", "statistics"]


@pytest.mark.parametrize("dropped", [False, True], ids=["owner left", "owner dropped"])
def test_the_end_of_the_program_closes_in_order(dropped):
    script = f"""
        import gc
        from moebox.runtime.engine.resources import Resources

        class Owner:
            pass

        owner, resources = Owner(), Resources()
        resources.add(lambda: print("store"))
        resources.add_recording(lambda: print("statistics"))
        resources.add(lambda: print("experts"))
        resources.close_with(owner)
        if {dropped}:
            del owner
            gc.collect()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not result.stderr
    order = ["experts", "store", "statistics"] if dropped else ["statistics", "experts", "store"]
    assert result.stdout.split() == order


def test_closing_forgets_the_end_of_the_program():
    script = """
        from moebox.runtime.engine.resources import Resources

        resources = Resources()
        resources.close()
        resources.add(lambda: print("closed again"))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not result.stdout
