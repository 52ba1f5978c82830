"""Missing experts are shared between the roads: each is taken once, from its end of the queue."""

from types import SimpleNamespace

import numpy as np
import pytest

from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.prefill.road_costs import RoadCosts
from moebox.offload.prefill.two_roads import MissQueue, TwoRoads


class Roads:
    """Both roads, which keep the experts that they were given."""

    def __init__(self, costs, counts):
        self.uploaded, self.computed, self.costs, self.counts = [], [], costs, counts
        self.running = False

    def upload(self, first, n):
        assert 0 < n <= UPLOAD_GROUP
        self.uploaded += range(first, first + n)

    def queued_s(self):
        return len(self.uploaded) * self.costs.upload_s

    def begin(self, first, n):
        assert not self.running
        self.running = True
        self.computed += reversed(range(first, first + n))
        return float(self.costs.cpu_s(self.counts[first : first + n]).sum())

    def end(self):
        self.running = False


@pytest.mark.parametrize("cpu_gbps", [1e-6, 10.0, 40.0, 1e6])
def test_the_roads_meet(cpu_gbps):
    costs = RoadCosts(24_772_608, 1.0, pcie_gbps=40.0, cpu_gbps=cpu_gbps)
    counts = np.arange(100, 0, -1)
    roads = Roads(costs, counts)
    two = TwoRoads(roads, SimpleNamespace(begin=roads.begin, end=roads.end), costs, counts, tail_s=0.0)
    two.share(MissQueue(10, 100))
    assert roads.uploaded == list(range(10, 10 + len(roads.uploaded)))
    assert roads.computed == list(range(99, 99 - len(roads.computed), -1))
    assert len(roads.uploaded) + len(roads.computed) == 90
    assert (len(roads.computed) == 0) == (cpu_gbps < 1)


def test_a_queue_is_taken_from_both_ends():
    misses = MissQueue(3, 8)
    assert (misses.take_front(2), misses.take_back(1), len(misses)) == (3, 7, 2)
    assert (misses.take_front(2), bool(misses)) == (5, False)
