"""Sessions: reuse of the cache, refusals, and the state after an interruption."""

import logging
import threading

import pytest
import torch

import moebox.runtime.engine.cpu_runner as runner_module
from helpers.runtime import make_checkpoint
from moebox.errors import CheckpointError, ConfigError, PlanError, RequestError
from moebox.runtime.engine.cpu_plan import budget_for_share, plan_cpu_memory
from moebox.runtime.engine.engine import Cancelled, Engine, common_prefix
from moebox.runtime.engine.options import LoadOptions

TOKENS = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder, LoadOptions(dtype=torch.float32, context=100))


@pytest.fixture
def small_chunks(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "chunk_tokens", 10)


def same(a, b):
    return torch.allclose(a, b, atol=1e-4)


def test_sizes_are_reported(engine, folder):
    config = engine.config
    assert engine.folder == folder
    assert engine.context == 100
    assert engine.kv_bytes_per_token == config.num_hidden_layers * (64 + 16) * 4
    assert engine.experts_bytes == config.experts_bytes
    elements = sum(torch.Size(shape).numel() for shape in config.backbone_shapes().values())
    assert engine.backbone_bytes == 4 * elements


def test_load_reports_progress(folder):
    calls = []
    Engine.load(folder, LoadOptions(progress=lambda *call: calls.append(call)))
    for stage in ("backbone", "experts"):
        done = [done for name, done, _ in calls if name == stage]
        (total,) = {total for name, _, total in calls if name == stage}
        assert done == sorted(done)
        assert done[-1] == total


def test_one_warning_says_that_moebox_did_not_write_the_checkpoint(folder, caplog):
    with caplog.at_level(logging.WARNING, "moebox"):
        Engine.load(folder)
    assert caplog.text.count("six reads") == 1


def test_sessions_do_not_share_a_cache(engine):
    one, two = engine.session(), engine.session()
    expected = one.prefill(TOKENS)
    two.prefill(TOKENS[::-1])
    assert same(one.decode(3), engine.logits([*TOKENS, 3])[-1])
    assert one.tokens == [*TOKENS, 3]
    assert two.tokens == TOKENS[::-1]
    assert same(expected, engine.logits(TOKENS)[-1])


def test_whole_prompt_again_recomputes_the_last_token(engine):
    session = engine.session()
    first = session.prefill(TOKENS)
    assert same(session.prefill(TOKENS), first)
    assert (session.reused, session.computed) == (len(TOKENS) - 1, 1)


def test_shorter_prompt_truncates(engine):
    session = engine.session()
    session.prefill(TOKENS)
    assert same(session.prefill(TOKENS[:20]), engine.logits(TOKENS[:20])[-1])
    assert session.tokens == TOKENS[:20]


def test_a_prompt_without_a_common_prefix(engine):
    session = engine.session()
    session.prefill(TOKENS)
    other = [token ^ 1 for token in TOKENS]
    assert same(session.prefill(other), engine.logits(other)[-1])
    assert session.reused == 0


def test_prefill_progress(engine, small_chunks):
    calls = []
    engine.session().prefill(TOKENS[:25], on_progress=lambda *call: calls.append(call))
    assert calls == [(0, 25), (10, 25), (20, 25), (25, 25)]


@pytest.mark.parametrize("kind", ["event", "callable"])
def test_cancel_keeps_finished_chunks(engine, small_chunks, kind):
    event = threading.Event()
    session = engine.session()

    def cancel_after_two(done, _total):
        if done == 20:
            event.set()

    with pytest.raises(Cancelled):
        session.prefill(
            TOKENS, on_progress=cancel_after_two, cancel=event if kind == "event" else event.is_set
        )
    assert session.tokens == TOKENS[:20]
    assert session.computed == 20
    assert same(session.prefill(TOKENS), engine.logits(TOKENS)[-1])
    assert session.reused == 20


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_interrupt_in_the_middle_of_a_layer(engine, small_chunks, monkeypatch, step):
    session = engine.session()
    session.prefill(TOKENS[:15])
    last = engine.runner.model.model.layers[-1].mlp

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(TOKENS) if step == "prefill" else session.decode(5)
    monkeypatch.undo()
    assert session.tokens == TOKENS[:15]
    assert same(session.decode(9), engine.logits([*TOKENS[:15], 9])[-1])


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(engine):
    session = engine.session(context=30)
    with pytest.raises(RequestError, match=r"31 tokens do not fit the context of 30"):
        session.prefill(TOKENS[:31])
    session.prefill(TOKENS[:30])
    with pytest.raises(RequestError, match=r"31 tokens do not fit the context of 30"):
        session.decode(1)
    assert session.tokens == TOKENS[:30]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "no tokens"), ([1, 512], "512 is outside"), ([-1], "-1 is outside"), ([0] * 101, "101 tokens")],
)
def test_bad_tokens(engine, tokens, message):
    for compute in (engine.logits, engine.session().prefill):
        with pytest.raises(RequestError, match=message):
            compute(tokens)


def test_the_context_of_a_session_is_limited(engine):
    with pytest.raises(RequestError, match="101 tokens"):
        engine.session(context=101)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, PlanError, "'cuda:99': torch sees"),
        ({"device": "tpu"}, PlanError, "'tpu'"),
        ({"device": "stand-in", "backbone": "int8"}, PlanError, "'int8' on stand-in"),
        ({"device": "stand-in", "dtype": torch.float32}, PlanError, "float32 on stand-in"),
        ({"vram": 1 << 30}, PlanError, "asked to compute, or torch sees no GPU"),
        ({"backbone": "fp4"}, PlanError, "'fp4' is unknown"),
        ({"context": 5000}, PlanError, "5000 tokens.*4096"),
        ({"context": 0}, PlanError, "context of 0"),
        ({"ram": 1 << 20, "dtype": torch.bfloat16}, PlanError, r"needs 27\.0 MiB.*8 of 16 exp.* is 1\.0 MiB"),
        ({"ram": 1 << 60}, PlanError, "only .* free"),
        ({"threads": 0}, PlanError, "threads = 0"),
    ],
)
def test_options_that_cannot_be_served(folder, options, error, message):
    with pytest.raises(error, match=message):
        Engine.load(folder, LoadOptions(**options))


def test_budget_that_fits(folder):
    loaded = Engine.load(folder, LoadOptions(ram=64 << 20))
    assert loaded.plan.experts_fit
    assert loaded.plan.planned_bytes <= 64 << 20
    assert loaded.context == loaded.config.max_position_embeddings


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_budget_for_some_of_the_experts(folder, engine, share):
    budget = budget_for_share(engine.config, torch.float32, "bf16", 100, share)
    loaded = Engine.load(folder, LoadOptions(dtype=torch.float32, context=100, ram=budget))
    assert loaded.plan.rows == 16 * share
    assert loaded.plan.planned_bytes <= budget
    assert torch.equal(loaded.logits(TOKENS), engine.logits(TOKENS))


def test_the_machines_memory_without_a_budget(engine):
    config = engine.config
    all_of_it = budget_for_share(config, torch.bfloat16, "bf16", 512, 1)
    roomy = plan_cpu_memory(config, torch.bfloat16, "bf16", None, None, free_ram=2 * all_of_it)
    assert roomy.experts_fit
    assert roomy.context == config.max_position_embeddings
    some = budget_for_share(config, torch.bfloat16, "bf16", 512, 0.75)
    tight = plan_cpu_memory(config, torch.bfloat16, "bf16", None, 512, free_ram=int(some / 0.95) + 100)
    assert tight.rows == 12
    with pytest.raises(PlanError, match=r"needs .* \+ 8 of 16 experts .*free memory is"):
        plan_cpu_memory(config, torch.bfloat16, "bf16", None, None, free_ram=1 << 20)


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Engine.load(tmp_path)


def test_truncated_shard(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        Engine.load(folder)


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("native", "backbone", "expected"),
    [
        (True, "bf16", torch.bfloat16),
        (False, "bf16", torch.float32),
        (False, "int8", torch.bfloat16),
    ],
)
def test_default_dtype(engine, monkeypatch, native, backbone, expected):
    monkeypatch.setattr(runner_module, "native_bf16", lambda: native)
    assert runner_module.default_dtype(engine.config, backbone) is expected
    monkeypatch.setattr(runner_module, "SMALL_BACKBONE_BYTES", 1000)
    assert runner_module.default_dtype(engine.config, backbone) is torch.bfloat16
