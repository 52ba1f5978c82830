"""The decode program's guesses: what the next router says of this layer's input. Answers do not change."""

from dataclasses import dataclass

import pytest
import torch

from helpers.offload.gpu import DEVICES, need
from moebox.offload.memory.ram_slab import row_stride
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.gpu_plan import least_vram_bytes
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model.mlp import MoE

TOKENS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(3)).tolist()
CONTEXT, PROMPT = 64, 20


@dataclass
class Always:
    """Replaces the trial: always on."""

    on: bool = True
    trying: bool = False
    change: float | None = None
    why_off: str = ""

    def observe(self, _seconds, _to_read):
        return False


def load(folder, device, slots=12, **options):
    config = Engine.load(folder, LoadOptions(device="cpu")).config
    vram = least_vram_bytes(config, CONTEXT) + slots * row_stride(config)
    return Engine.load(
        folder, LoadOptions(device=need(device), context=CONTEXT, vram=vram, statistics=False, **options)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("guesses") / "model", "tiny", format="int4").folder


@pytest.mark.parametrize("device", DEVICES)
def test_guesses_are_the_next_routers(folder, device):
    engine = load(folder, device)
    runner, session = engine.runner, engine.session()
    experts, box, ops = runner.experts, runner.experts.mailbox, runner.experts.device.ops
    assert experts.ahead is not None
    experts.upload_ahead(Always())
    gates = [layer.mlp.gate for layer in runner.model.model.layers if isinstance(layer.mlp, MoE)]
    session.prefill(TOKENS[:PROMPT])
    for position in range(PROMPT, PROMPT + 8):
        session.decode(TOKENS[position])
        assert (box.predicted[1:, 0] == 1).all()
        for layer in range(1, len(gates)):
            state = box.hidden[layer - 1].to(experts.device.torch_device)
            logits = ops.gemv(state, gates[layer].weight, torch.float32)
            ids, _ = ops.route(logits[None], gates[layer].e_score_correction_bias, engine.config)
            assert box.predicted_ids[layer].tolist() == ids[0].tolist()
    report = experts.ahead.report()
    assert 0 < report.found[1] <= report.picked[1] <= 8 * (len(gates) - 1) * engine.config.num_experts_per_tok
    assert report.issued == report.used + report.late + report.wrong


@pytest.mark.parametrize("device", DEVICES)
def test_answers_with_and_without(tmp_path, device):
    """All experts are picked, so that rounding changes no pick. The road of an expert depends on timing."""
    folder = synth(tmp_path / "m", "tiny", format="int4", config_overrides={"n_routed_experts": 4}).folder
    engine, trial = load(folder, device, slots=4), Always()
    expected = engine.logits(TOKENS)
    engine.runner.experts.upload_ahead(trial)
    session = engine.session()
    session.prefill(TOKENS[:PROMPT])
    for position in range(PROMPT, len(TOKENS)):
        trial.on = position % 3 > 0
        logits = session.decode(TOKENS[position])
        assert (logits - expected[position]).norm() <= 4e-2 * expected[position].norm()
        assert bool(engine.runner.experts.mailbox.predicted[1, 0]) == trial.on
    assert engine.runner.experts.ahead.report().recall[1] == 1.0


def test_it_can_be_left_out(folder):
    assert load(folder, "stand-in", prefetch=False).runner.experts.ahead is None
