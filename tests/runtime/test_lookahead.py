"""What the next layers' routers are asked."""

import pytest
import torch

from helpers.tiers import small_config
from moebox.runtime.lookahead import GateLookahead
from moebox.runtime.model import KimiK2


def random_model(**changes):
    """A model whose routers have random weights; nothing else of it is used."""
    config = small_config(num_hidden_layers=5, **changes)
    model = KimiK2(config, None, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}])
def test_names_what_the_next_routers_would_choose_for_this_state(groups):
    model = random_model(**groups)
    hidden = torch.randn(1, model.config.hidden_size).bfloat16()
    predictions = GateLookahead(model).predict(1, hidden)
    assert [ahead for ahead, _ in predictions] == [1, 2]
    for ahead, named in predictions:
        gate = model.model.layers[model.config.first_k_dense_replace + 1 + ahead].mlp.gate
        chosen, _ = gate(hidden)
        assert sorted(named[: model.config.num_experts_per_tok]) == sorted(chosen[0].tolist())
        assert len(set(named.tolist())) == len(named) == 2 * model.config.num_experts_per_tok


def test_the_likeliest_comes_first():
    model = random_model()
    hidden = torch.randn(1, model.config.hidden_size)
    [(_, named)] = GateLookahead(model).predict(2, hidden)
    gate = model.model.layers[-1].mlp.gate
    scores = (gate.weight @ hidden[0]).sigmoid() + gate.e_score_correction_bias
    assert named.tolist() == scores.argsort(descending=True)[: len(named)].tolist()


def test_no_layer_beyond_the_last_is_asked():
    model = random_model()
    hidden = torch.randn(1, model.config.hidden_size)
    lookahead = GateLookahead(model)
    assert [len(lookahead.predict(moe, hidden)) for moe in range(4)] == [2, 2, 1, 0]


def test_never_names_more_than_there_are():
    model = random_model(n_routed_experts=6)
    [(_, named)] = GateLookahead(model).predict(2, torch.randn(1, model.config.hidden_size))
    assert sorted(named.tolist()) == list(range(6))
