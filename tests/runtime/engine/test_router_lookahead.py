"""Predictions of the next layers' picks, and their recall."""

import pytest
import torch

from helpers.offload.store import AlwaysOn
from helpers.offload.tiers import small_config
from helpers.paths import TINY_K2
from moebox import load
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.statistics import RouterStatistics
from moebox.quantize.convert import quantize
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.router_lookahead import RouterLookahead
from moebox.runtime.model.kimi_k2 import KimiK2


def random_model(**changes):
    """A model whose routers have random weights; nothing else of it is used."""
    config = small_config(num_hidden_layers=5, **changes)
    model = KimiK2(config, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}])
def test_names_the_picks_of_the_next_routers_for_this_state(groups):
    model = random_model(**groups)
    hidden = torch.randn(1, model.config.hidden_size).bfloat16()
    predictions = list(RouterLookahead(model).predict(1, hidden))
    assert [ahead for ahead, _ in predictions] == [1, 2]
    for ahead, named in predictions:
        gate = model.model.layers[model.config.first_k_dense_replace + 1 + ahead].mlp.gate
        chosen, _ = gate(hidden)
        assert sorted(named[: model.config.num_experts_per_tok]) == sorted(chosen[0].tolist())
        assert len(set(named)) == len(named) == 2 * model.config.num_experts_per_tok


def test_the_likeliest_comes_first():
    model = random_model()
    hidden = torch.randn(1, model.config.hidden_size)
    [(_, named)] = RouterLookahead(model).predict(2, hidden)
    gate = model.model.layers[-1].mlp.gate
    scores = (gate.weight @ hidden[0]).sigmoid() + gate.e_score_correction_bias
    assert named == scores.argsort(descending=True)[: len(named)].tolist()


def test_no_layer_after_the_last_is_predicted():
    model = random_model()
    hidden = torch.randn(1, model.config.hidden_size)
    lookahead = RouterLookahead(model)
    assert [len(list(lookahead.predict(moe, hidden))) for moe in range(4)] == [2, 2, 1, 0]


def test_names_no_more_experts_than_there_are():
    model = random_model(n_routed_experts=6)
    [(_, named)] = RouterLookahead(model).predict(2, torch.randn(1, model.config.hidden_size))
    assert sorted(named) == list(range(6))


@pytest.mark.slow
def test_most_picks_of_tiny_k2_are_predicted(tmp_path):
    """Random predictions would name 9 %. The statistics that `moebox stats` shows count them, too."""
    quantize(TINY_K2, tmp_path / "int4")
    with load(tmp_path / "int4", context=1024) as model:
        config, dtype = model.engine.config, model.engine.dtype
    budget = budget_for_share(config, dtype, "bf16", 1024, 0.5)
    with load(tmp_path / "int4", context=1024, ram=budget) as model:
        prefetcher = model.engine.runner.model.model.layers[-1].mlp.experts.prefetcher
        prefetcher.trial = AlwaysOn()
        model.generate(
            [{"role": "user", "content": "A table for four, please."}], max_tokens=20, temperature=0.0
        )
        report = prefetcher.report()
    assert report.recall[1] > report.recall[2] > 0.5
    assert report.used + report.late > report.wrong / 2
    counts = RouterStatistics.open(ModelIdentity.of(tmp_path / "int4", config)).counts()
    assert counts.recall.tolist() == [[report.found[n], report.picked[n]] for n in (1, 2)]
