"""Recording: all layers of every token, once and in order; traces on disk, also where the drive is full."""

import gc
import logging
import resource
from multiprocessing import get_context

import numpy as np
import pytest

from moebox.offload.routing.recorder import BLOCK_TOKENS, KEPT_SHARE, RoutingRecorder, TraceSink
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace

LAYERS, EXPERTS, TOP_K = 4, 12, 3


class Collector:
    """A sink that keeps its picks."""

    def __init__(self):
        self.parts, self.closed = [], 0

    def add(self, ids, prefill):
        self.parts.append((ids.copy(), prefill))

    def close(self):
        self.closed += 1

    @property
    def ids(self):
        return np.concatenate([ids for ids, _ in self.parts])


@pytest.fixture
def picks():
    return synthetic_trace(100, LAYERS, EXPERTS, TOP_K).ids


@pytest.fixture
def sink():
    return Collector()


@pytest.fixture
def recorder(sink):
    return RoutingRecorder(LAYERS, EXPERTS, TOP_K, [sink])


def record_layers(recorder, chunk, layers=range(LAYERS)):
    for moe in layers:
        recorder.layer(moe, chunk[:, moe].astype(np.int64))


def test_prompts_and_decoded_tokens_arrive_in_order(recorder, sink, picks):
    record_layers(recorder, picks[:40])
    for token in range(40, 80):
        recorder.token(picks[token])
    record_layers(recorder, picks[80:90])
    for token in range(90, 100):
        record_layers(recorder, picks[token : token + 1])
    recorder.flush()

    assert np.array_equal(sink.ids, picks)
    assert [prefill for ids, prefill in sink.parts if len(ids) in (40, 10)] == [True, True, False]
    assert max(len(ids) for ids, prefill in sink.parts if not prefill) == BLOCK_TOKENS


def test_buffers_may_be_reused_at_once(recorder, sink, picks):
    prompt, token = np.empty((30, TOP_K), np.int64), np.empty((LAYERS, TOP_K), np.int32)
    for moe in range(LAYERS):
        prompt[:] = picks[:30, moe]
        recorder.layer(moe, prompt)
    for number in range(30, 40):
        token[:] = picks[number]
        recorder.token(token)
    recorder.flush()

    assert np.array_equal(sink.ids, picks[:40])


def test_a_chunk_that_was_cancelled_is_dropped(recorder, sink, picks):
    record_layers(recorder, picks[:30], layers=range(2))
    record_layers(recorder, picks[30:50])
    record_layers(recorder, picks[50:51], layers=range(3))
    record_layers(recorder, picks[51:52])
    record_layers(recorder, picks[52:54], layers=range(1))
    recorder.flush()

    assert np.array_equal(sink.ids, picks[[*range(30, 50), 51]])


def test_layers_without_the_first_ones_are_dropped(recorder, sink, picks):
    record_layers(recorder, picks[:5], layers=range(1, LAYERS))
    recorder.layer(0, picks[:4, 0])
    recorder.layer(2, picks[:4, 2])
    recorder.layer(1, picks[:4, 1])
    recorder.layer(0, picks[:4, 0])
    recorder.layer(1, picks[:3, 1])
    recorder.flush()

    assert sink.parts == []


def test_closing_gives_the_rest_and_closes_each_sink_once(recorder, sink, picks):
    recorder.token(picks[0])
    recorder.close()
    recorder.close()

    assert np.array_equal(sink.ids, picks[:1])
    assert sink.closed == 1


@pytest.mark.parametrize("experts", [EXPERTS, 40000])
def test_a_trace_holds_every_token(tmp_path, picks, experts):
    path = tmp_path / "routing.npz"
    sink = TraceSink(path, experts, "tiny")

    sink.add(picks[:60], prefill=True)
    sink.add(picks[60:], prefill=False)
    sink.close()

    trace = RoutingTrace.load(path)
    assert np.array_equal(trace.ids, picks)
    assert (trace.n_experts, trace.source) == (experts, "tiny")
    assert [file.name for file in tmp_path.iterdir()] == ["routing.npz"]


def test_no_tokens_leave_an_earlier_trace_alone(tmp_path, picks):
    path = tmp_path / "routing.npz"
    RoutingTrace(picks, EXPERTS, "earlier").save(path)

    TraceSink(path, EXPERTS).close()

    assert RoutingTrace.load(path).source == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_trace_where_nothing_can_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match="No such file or directory"):
        TraceSink(tmp_path / "missing" / "routing.npz", EXPERTS)


def test_two_recordings_to_one_file_are_refused(tmp_path, picks):
    first = TraceSink(tmp_path / "routing.npz", EXPERTS)
    first.add(picks, prefill=True)

    with pytest.raises(OSError, match="another process is recording to it"):
        TraceSink(tmp_path / "routing.npz", EXPERTS)

    first.close()
    assert RoutingTrace.load(tmp_path / "routing.npz").tokens == len(picks)


def test_the_partial_file_of_a_killed_process_is_not_used(tmp_path, picks):
    (tmp_path / ".routing.npz.partial").write_bytes(b"left behind")
    sink = TraceSink(tmp_path / "routing.npz", EXPERTS)
    sink.add(picks, prefill=True)
    sink.close()

    assert np.array_equal(RoutingTrace.load(tmp_path / "routing.npz").ids, picks)


def record_on_a_small_drive(path, limit_bytes, results):
    """Record 300 tokens with a limit on the size of files; puts the log messages into `results`."""
    gc.freeze()  # the parent's thread pools have no threads here: collecting one would wait for ever
    caught = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())
    logging.getLogger("moebox").addHandler(handler)
    sink = TraceSink(path, EXPERTS, "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    for token in synthetic_trace(300, LAYERS, EXPERTS, TOP_K).ids:
        sink.add(token[None], prefill=False)
    sink.close()
    results.put(caught)


def test_a_full_drive_is_logged_once_and_the_first_tokens_stay(tmp_path):
    path, context = tmp_path / "routing.npz", get_context("fork")
    results = context.Queue()

    process = context.Process(target=record_on_a_small_drive, args=(path, 5000, results))
    process.start()
    (message,) = results.get(timeout=60)
    process.join()

    trace = RoutingTrace.load(path)
    assert trace.tokens == int(5000 // 24 * KEPT_SHARE)
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"recording stops, the first {trace.tokens} tokens stay")
    assert np.array_equal(trace.ids, synthetic_trace(300, LAYERS, EXPERTS, TOP_K).ids[: trace.tokens])
    assert [file.name for file in tmp_path.iterdir()] == ["routing.npz"]
