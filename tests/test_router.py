"""FastGRNN against the paper's scalar equations, torch against NumPy, and the blend."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from rb_gpu.errors import ArtifactError
from rb_gpu.learn.config import RouterConfig
from rb_gpu.learn.router import FastGRNNCell, RouterNet, _initialise, train_router
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.router import FastGRNNRouter, RouterDecision, blend, blend_share, forward_with_reasoning
from rb_gpu.types import OptimizedParams, ParamSource

CONFIGS = ConfigTable.from_params(
    [
        SearchParams(ef_search=e, model_tier=t, context_tokens=c, temperature=0.5)
        for e in (16, 64) for t, c in (("small", 1000), ("large", 4000))
    ],
    ("small", "large"),
    0,
)  # fmt: skip
DIM = 12


def net(seed: int = 0) -> RouterNet:
    made = RouterNet(DIM, RouterConfig(hidden=7, rank=3), CONFIGS)
    _initialise(made, torch.Generator().manual_seed(seed))
    return made


def test_a_step_is_the_papers():
    made = net()
    router, cell = made.export(CONFIGS.tiers), made.cell
    x = np.random.default_rng(0).normal(size=DIM)
    normal = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    value = {name: p.detach().double().numpy() for name, p in cell.named_parameters()}
    expected = oracles.fastgrnn_cell(
        normal.tolist(), [0.0] * 7, (value["w1"] @ value["w2"]).T.tolist(), (value["u1"] @ value["u2"]).T.tolist(),
        value["bias_gate"].tolist(), value["bias_candidate"].tolist(), float(value["zeta"]), float(value["nu"]),
    )  # fmt: skip
    np.testing.assert_allclose(router.hidden_state(x), expected, atol=1e-6)


def test_a_session_is_step_after_step():
    made = net(1)
    router = made.export(CONFIGS.tiers)
    steps = torch.randn(5, DIM, generator=torch.Generator().manual_seed(2))
    h = torch.zeros(1, 7)
    for x in torch.nn.functional.layer_norm(steps, (DIM,)):
        h = made.cell.forward(x[None], h)
    np.testing.assert_allclose(router.hidden_state(steps.numpy()), h[0].detach().numpy(), atol=1e-5)


def test_numpy_equals_torch():
    made = net(3)
    router = made.export(CONFIGS.tiers)
    x = torch.randn(20, DIM, generator=torch.Generator().manual_seed(4))
    theirs = made.forward(x)
    for i in range(20):
        for name, value in router.heads(x[i].numpy()).items():
            np.testing.assert_allclose(value, theirs[name][i].detach().numpy(), atol=1e-5)


def test_gradients_of_the_cell():
    cell = FastGRNNCell(4, 3, 2).double()
    with torch.no_grad():
        for i, value in enumerate(cell.parameters()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(i)).double())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell.forward, (x, h))


def test_the_file_reads_back_and_damage_is_refused(tmp_path):
    router = net(5).export(CONFIGS.tiers)
    path = tmp_path / "router.safetensors"
    path.write_bytes(router.to_bytes())
    x = np.random.default_rng(0).normal(size=DIM)
    assert FastGRNNRouter.load(path).forward(x) == router.forward(x)
    content = path.read_bytes()
    assert b"small" in content
    with pytest.raises(ArtifactError, match="cannot be read"):
        FastGRNNRouter.from_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="format_version=9"):
        FastGRNNRouter.from_bytes(content.replace(b'format_version\\": 1', b'format_version\\": 9'))
    with pytest.raises(ArtifactError, match="cannot be read"):
        FastGRNNRouter.load(tmp_path / "none")
    arrays = dict(router._arrays)
    with pytest.raises(ArtifactError, match="w2"):
        FastGRNNRouter(arrays | {"w2": arrays["w2"][:, :-1][:-1]}, CONFIGS.tiers)
    with pytest.raises(ArtifactError, match="nu"):
        FastGRNNRouter(arrays | {"nu": np.float32(np.nan).reshape(())}, CONFIGS.tiers)
    with pytest.raises(ArtifactError, match="missing"):
        FastGRNNRouter({k: v for k, v in arrays.items() if k != "u1"}, CONFIGS.tiers)


@pytest.mark.parametrize("features", [np.zeros(DIM + 1), np.zeros((2, 3, 4)), np.full(DIM, np.nan), np.zeros((0, DIM))])
def test_features_of_the_wrong_shape_are_named(features):
    with pytest.raises(ValueError, match=rf"expected finite \({DIM},\)"):
        net().export(CONFIGS.tiers).forward(features)


ROUTER = SearchParams(ef_search=16, model_tier="small", context_tokens=4000, temperature=0.4)
BANK = SearchParams(ef_search=64, model_tier="large", context_tokens=1000, temperature=1.0)


def answer(confidence: float, pattern: int | None = 3) -> OptimizedParams:
    return OptimizedParams(BANK, confidence, ParamSource(pattern), 0.9, 0.1, 1, "")


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.5, 0.500001, 0.6, 0.8, 0.95, 1.0])
def test_the_blend_is_ramped(confidence):
    decision = blend(RouterDecision(ROUTER, 0.5, 0, ROUTER), answer(confidence), CONFIGS)
    expected = oracles.blend_ramped(
        oracles.Params(16, 8, "small", 4000, 0.4), oracles.Params(64, 8, "large", 1000, 1.0), confidence,
        [1000, 4000],
    )  # fmt: skip
    assert decision.params.temperature == pytest.approx(expected.temperature)
    assert decision.params.context_tokens == expected.context_tokens
    assert (decision.params.ef_search, decision.params.n_probes) == (16, 8)
    assert decision.tier_from_bank is (confidence >= 0.95)
    assert decision.params.model_tier == ("large" if confidence >= 0.95 else "small")
    assert (decision.router_params, decision.bank_params) == (ROUTER, BANK)


def test_the_share_starts_at_nothing_and_ends_at_thirty_percent():
    assert blend_share(0.5) == 0.0
    assert blend_share(0.5 + 1e-9) < 1e-8
    assert blend_share(1.0) == pytest.approx(0.3)


def test_a_default_never_sets_the_tier():
    decision = blend(RouterDecision(ROUTER, 0.5, 0, ROUTER), answer(0.99, pattern=None), CONFIGS)
    assert decision.params.model_tier == "small"
    assert not decision.tier_from_bank


def test_any_router_can_be_blended_and_the_embedding_is_its_own_argument():
    class Fixed:
        def forward(self, features):
            return RouterDecision(ROUTER, 0.5, None, ROUTER)

    class Bank:
        configs = CONFIGS

        def optimized_params(self, query):
            if np.shape(query) != (5,):
                raise ValueError(f"query has shape {np.shape(query)}, expected (5,)")
            return answer(0.9)

    decision = forward_with_reasoning(Fixed(), np.zeros(2), Bank(), np.zeros(5))
    assert decision.reasoning_pattern_id == 3
    assert decision.reasoning_confidence == 0.9
    with pytest.raises(ValueError, match="expected"):
        forward_with_reasoning(Fixed(), np.zeros(2), Bank(), np.zeros(2))


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each of four directions has its own best config, worth 1 over the others."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(4, (n,), generator=g)
    x = 3 * torch.eye(DIM)[group] + 0.5 * torch.randn(n, DIM, generator=g)
    config = torch.randint(4, (n,), generator=g)
    return x, config, (config == group).float() + 0.1 * torch.randn(n, generator=g), group


def test_training_finds_which_config_suits_which_query():
    x, config, utility, _ = planted(3000, 0)
    settings = RouterConfig(hidden=16, rank=8, epochs=25, batch_size=128, learning_rate=0.01)

    def trained():
        generator = torch.Generator().manual_seed(0)
        return train_router(x, config, utility, torch.ones(3000), CONFIGS, settings, generator, torch.device("cpu"))

    first, again = trained(), trained()
    assert first.router.to_bytes() == again.router.to_bytes()
    assert first.valid_loss[first.best_epoch] == min(first.valid_loss)
    fresh, _, _, group = planted(300, 1)
    chosen = np.array([first.router.forward(q.numpy()).config_id for q in fresh])
    assert (chosen == group.numpy()).mean() > 0.95
    utilities = np.array([first.router.heads(q.numpy())["utility"] for q in fresh])
    assert utilities[np.arange(300), group.numpy()].mean() == pytest.approx(1.0, abs=0.15)
    decided = [first.router.forward(q.numpy()).params for q in fresh]
    wanted = [CONFIGS[int(g)] for g in group]
    assert np.mean([d.model_tier == w.model_tier for d, w in zip(decided, wanted, strict=True)]) > 0.9
    assert np.mean([d.ef_search == w.ef_search for d, w in zip(decided, wanted, strict=True)]) > 0.9
    assert np.mean([abs(d.temperature - 0.5) for d in decided]) < 0.1


def test_too_few_rows_are_named():
    x, config, utility, _ = planted(10, 0)
    with pytest.raises(ValueError, match="10 rows are too few"):
        train_router(
            x, config, utility, torch.ones(10), CONFIGS, RouterConfig(), torch.Generator(), torch.device("cpu")
        )
