"""Sessions on a GPU: reuse of the cache, the state after an interruption, refusals."""

import gc
import threading

import pytest
import torch

from helpers.offload.gpu import DEVICES, need
from moebox.errors import DeviceError, RequestError
from moebox.offload.memory.ram_slab import row_stride
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.engine import Cancelled, Engine
from moebox.runtime.engine.gpu_plan import least_vram_bytes
from moebox.runtime.engine.options import LoadOptions

TOKENS = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(2)).tolist()
CONTEXT = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All experts are picked, so that rounding changes no pick."""
    folder = tmp_path_factory.mktemp("gpu") / "model"
    return synth(folder, "tiny", format="int4", config_overrides={"n_routed_experts": 4}).folder


@pytest.fixture(scope="module", params=DEVICES)
def engine(request, folder):
    config = Engine.load(folder, LoadOptions(device="cpu")).config
    vram = least_vram_bytes(config, CONTEXT) + 4 * row_stride(config)
    engine = Engine.load(folder, LoadOptions(device=need(request.param), context=CONTEXT, vram=vram))
    assert engine.plan.slots == 4
    return engine


@pytest.fixture
def small_chunks(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "chunk_tokens", 10)


@pytest.fixture(scope="module")
def cpu_engine(folder):
    return Engine.load(folder, LoadOptions(device="cpu", dtype=torch.float32, context=CONTEXT))


@pytest.fixture(scope="module")
def expected(cpu_engine):
    return cpu_engine.logits(TOKENS)


def close(a, b):
    return (a - b).norm() <= 4e-2 * b.norm()  # bf16 against fp32, one row


def test_chunks_then_tokens(engine, small_chunks, expected):
    session = engine.session()
    assert close(session.prefill(TOKENS[:41]), expected[40])  # the last chunk is a single token
    for position in range(41, 50):
        assert close(session.decode(TOKENS[position]), expected[position])
    assert session.tokens == TOKENS[:50]


def test_prefix_is_reused_and_truncated(engine, cpu_engine, expected):
    session = engine.session()
    session.prefill(TOKENS[:50])
    other = [*TOKENS[:30], 5, 6, 7]
    assert close(session.prefill(other), cpu_engine.logits(other)[-1])
    assert (session.reused, session.computed) == (30, 3)
    assert close(session.prefill(TOKENS), expected[-1])
    assert close(session.prefill(TOKENS[:20]), expected[19])
    assert (session.reused, session.computed) == (19, 1)


def test_sessions_do_not_share_a_cache(engine, expected):
    one, two = engine.session(), engine.session()
    one.prefill(TOKENS[:20])
    two.prefill(TOKENS[::-1])
    assert close(one.decode(TOKENS[20]), expected[20])


def test_the_next_session_gets_the_memory_of_the_last(engine):
    gc.collect()
    planned = engine.session()
    address = planned._cache.layers[0].data_ptr()
    assert engine.session()._cache.layers[0].data_ptr() != address
    del planned
    assert engine.session()._cache.layers[0].data_ptr() == address


def test_no_memory_for_another_cache(engine, monkeypatch):
    device, first = engine.runner._device, engine.session()

    def full(*_args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(device, "empty", full)
        with pytest.raises(RequestError, match="no GPU memory for the cache of another conversation"):
            engine.session()
    assert first.prefill(TOKENS[:2]).isfinite().all()


def test_cancel_between_layers(engine, small_chunks, expected):
    event = threading.Event()
    session = engine.session()
    with pytest.raises(Cancelled):
        session.prefill(TOKENS, on_progress=lambda done, _: done == 20 and event.set(), cancel=event)
    assert session.tokens == TOKENS[:20]
    assert close(session.prefill(TOKENS), expected[-1])
    assert session.reused == 20


@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupt_of_a_token(engine, monkeypatch, expected, moment):
    """The launched program ends, whether its host has begun or not."""
    session = engine.session()
    session.prefill(TOKENS[:15])
    serve_token = engine.runner.experts.serve_token

    def interrupt():
        if moment == "after":
            serve_token()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner.experts, "serve_token", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.decode(5)
    monkeypatch.undo()
    assert session.tokens == TOKENS[:15]
    for position in range(15, 18):
        assert close(session.decode(TOKENS[position]), expected[position])


def test_interrupt_of_a_prefill(engine, small_chunks, monkeypatch, expected):
    session = engine.session()
    session.prefill(TOKENS[:15])
    last = engine.runner.model.model.layers[-1].mlp

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(TOKENS)
    monkeypatch.undo()
    assert session.tokens == TOKENS[:15]
    assert close(session.decode(TOKENS[15]), expected[15])


def test_an_error_of_the_device_ends_the_token(engine, monkeypatch, expected):
    """`DecodeHost` raises every flag before it reports; the session stays as it was."""
    session = engine.session()
    session.prefill(TOKENS[:15])
    host = engine.runner.experts.decode_host

    def fail(*token):
        type(host).serve_token(host, *token)
        raise DeviceError("a copy failed")

    monkeypatch.setattr(host, "serve_token", fail)
    with pytest.raises(DeviceError):
        session.decode(TOKENS[15])
    monkeypatch.undo()
    assert session.tokens == TOKENS[:15]
    assert close(session.decode(TOKENS[15]), expected[15])


def test_refusals(engine):
    session = engine.session(context=30)
    session.prefill(TOKENS[:30])
    with pytest.raises(RequestError, match="31 tokens do not fit the context of 30"):
        session.decode(1)
    for compute in (engine.logits, engine.session().prefill):
        with pytest.raises(RequestError, match="512 is outside"):
            compute([1, 512])


def test_a_cache_of_another_runner(engine, cpu_engine):
    with pytest.raises(TypeError, match="not made by this runner"):
        engine.runner.forward([1], cpu_engine.runner.new_cache(10))


def test_short_of_memory_for_a_chunk(engine, monkeypatch, caplog, expected):
    """The chunk is halved, with a warning, until it fits."""
    forward, sizes = engine.runner.model.forward, []

    def full_above_20(token_ids, *rest):
        sizes.append(len(token_ids))
        if len(token_ids) > 20:
            raise torch.OutOfMemoryError
        return forward(token_ids, *rest)

    monkeypatch.setattr(engine.runner, "chunk_tokens", engine.runner.chunk_tokens)
    monkeypatch.setattr(engine.runner.model, "forward", full_above_20)
    assert close(engine.session().prefill(TOKENS), expected[-1])
    assert sizes == [60, 30, 15, 15, 30, 15, 15]
    assert engine.runner.chunk_tokens == 15
    assert "chunks of 60 tokens: going on with 30" in caplog.text


def test_no_memory_for_any_chunk(engine, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.runner.model, "forward", full)
    with pytest.raises(RequestError, match="no GPU memory for a chunk of 15 tokens"):
        engine.session().prefill(TOKENS)
