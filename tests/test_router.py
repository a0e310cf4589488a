"""FastGRNN against the paper's scalar equations, torch against NumPy, the file, the blend, and training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import oracles
import pytest
import torch
from conftest import make_bank, queries_near
from safetensors.numpy import save as save_tensors

from rb_gpu.bank import ReasoningBank
from rb_gpu.errors import ArtifactError, ConfigError, DataError
from rb_gpu.learn.config import RouterConfig
from rb_gpu.learn.router import FastGRNNCell, RouterNet, RouterTraining, train_router
from rb_gpu.params import ConfigTable, SearchParams
from rb_gpu.router import FORMAT_VERSION, FastGRNNRouter, RouterDecision, blend, blend_share, forward_with_reasoning
from rb_gpu.types import OptimizedParams, ParamSource

CONFIGS = ConfigTable.from_params(
    [
        SearchParams(ef_search=e, model_tier=t, context_tokens=c, temperature=0.5)
        for e in (16, 64) for t, c in (("small", 1000), ("large", 4000))
    ],
    ("small", "large"),
    0,
)  # fmt: skip
DIM, HIDDEN, RANK = 12, 7, 3
CPU = torch.device("cpu")


def net(seed: int = 0) -> RouterNet:
    """Every weight random: what training starts from has zeros that would hide a missing term."""
    made = RouterNet(DIM, RouterConfig(hidden=HIDDEN, rank=RANK), CONFIGS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_(0.0, 0.7, generator=generator)
    return made


def scalar_cell(x: list[float], h: list[float], p: dict[str, np.ndarray]) -> list[float]:
    """One step as Kusupati et al. 2018 write it, in loops, low-rank products included."""

    def sigmoid(v: float) -> float:
        return 1.0 / (1.0 + math.exp(-v))

    ranks_w = [sum(x[d] * p["w1"][d][r] for d in range(len(x))) for r in range(p["w1"].shape[1])]
    ranks_u = [sum(h[i] * p["u1"][i][r] for i in range(len(h))) for r in range(p["u1"].shape[1])]
    after = []
    for j in range(len(h)):
        mixed = sum(ranks_w[r] * p["w2"][r][j] for r in range(len(ranks_w)))
        mixed += sum(ranks_u[r] * p["u2"][r][j] for r in range(len(ranks_u)))
        z = sigmoid(mixed + p["bias_gate"][j])
        candidate = math.tanh(mixed + p["bias_candidate"][j])
        after.append(z * h[j] + (sigmoid(p["zeta"]) * (1 - z) + sigmoid(p["nu"])) * candidate)
    return after


def test_a_session_is_the_papers_steps_one_after_the_other():
    made = net()
    weights = {name: p.detach().double().numpy() for name, p in made.cell.named_parameters()}
    steps = np.random.default_rng(0).normal(3.0, 2.0, size=(4, DIM))
    h = [0.0] * HIDDEN
    for t, step in enumerate(steps):
        mean = sum(step) / DIM
        spread = math.sqrt(sum((v - mean) ** 2 for v in step) / DIM + 1e-5)
        h = scalar_cell([(v - mean) / spread for v in step], h, weights)
        np.testing.assert_allclose(made.export().hidden_state(steps[: t + 1]), h, atol=1e-5)
    np.testing.assert_array_equal(made.export().hidden_state(steps[0]), made.export().hidden_state(steps[:1]))


def test_numpy_equals_torch():
    made, x = net(3), torch.randn(20, DIM, generator=torch.Generator().manual_seed(4))
    router, theirs = made.export(), made.forward(x)
    for i in range(20):
        for name, value in router.heads(x[i].numpy()).items():
            np.testing.assert_allclose(value, theirs[name][i].detach().numpy(), atol=1e-5)


def test_forward_takes_the_best_of_every_head():
    made, x = net(4), torch.randn(40, DIM, generator=torch.Generator().manual_seed(5))
    made.linear("temperature").weight.data *= 20  # past both ends of the range
    router, heads = made.export(), made.forward(x)
    decisions = [router.forward(row.numpy()) for row in x]
    for i, decision in enumerate(decisions):
        out = {name: value[i].detach().numpy() for name, value in heads.items()}
        assert decision.params.model_tier == ("small", "large")[out["tier"].argmax()]
        assert decision.params.context_tokens == (1000, 4000)[out["context"].argmax()]
        assert decision.params.ef_search == (16, 64)[out["ef"].argmax()]
        assert decision.params.n_probes == 8
        assert decision.params.temperature == pytest.approx(np.clip(out["temperature"][0], 0, 2), abs=1e-4)
        assert decision.config_id == out["utility"].argmax()
        assert decision.router_confidence == pytest.approx(1 / (1 + np.exp(-out["confidence"][0])), abs=1e-5)
        assert (decision.router_params, decision.bank_params, decision.blend_factor) == (decision.params, None, 0.0)
    assert {d.params.temperature for d in decisions} >= {0.0, 2.0}


def test_gradients_of_the_cell():
    cell = FastGRNNCell(4, 3, 2).double()
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in cell.parameters()]
    names = [name for name, _ in cell.named_parameters()]
    x, h = (torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    inputs = [value.requires_grad_() for value in (x, h, *parts)]

    def step(x, h, *values):
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (x, h))

    assert torch.autograd.gradcheck(step, inputs)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(DIM + 1), rf"shape \({DIM + 1},\), expected \({DIM},\)"),
        (np.zeros((2, 3, 4)), "expected"),
        (np.zeros((0, DIM)), "expected"),
        (np.full(DIM, np.nan), "NaN"),
        (np.r_[np.inf, np.zeros(DIM - 1)], "infinity"),
        (np.arange(DIM) * 1e30, "too large"),
    ],
)
def test_wrong_features_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        net().export().forward(features)


# the file


def content_with(router: FastGRNNRouter, arrays: dict | None = None, **metadata: object) -> bytes:
    said = {"format_version": FORMAT_VERSION, **router.sizes, **asdict(router.choices), **metadata}
    return save_tensors({**router.arrays, **(arrays or {})}, {"router": json.dumps(said)})


def test_the_file_reads_back(tmp_path):
    router = net(5).export()
    path = tmp_path / "router.safetensors"
    path.write_bytes(router.to_bytes())
    again = FastGRNNRouter.load(path)
    x = np.random.default_rng(0).normal(size=(3, DIM))
    assert again.forward(x) == router.forward(x)
    assert again.to_bytes() == router.to_bytes() == content_with(router)
    assert again.sizes == {"dim": DIM, "hidden": HIDDEN, "rank": RANK, "recurrent_rank": RANK, "configs": 4}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": 1}, "format_version=1"),
        ({"tiers": ["small", "small"]}, "tiers"),
        ({"tiers": ["small", ["large"]]}, "tiers"),
        ({"tiers": ["small"]}, "tier_weight"),
        ({"ef_search": [-3, 64]}, "ef_search"),
        ({"ef_search": [16, 2**32]}, "ef_search"),
        ({"ef_search": [64, 16]}, "ascending"),
        ({"n_probes": [True]}, "n_probes"),
        ({"n_probes": [8.5]}, "n_probes"),
        ({"context_tokens": 4000}, "cannot be read"),
        ({"context_tokens": [1000, 4000, 8000]}, "context_weight"),
        ({"dim": DIM + 1}, "its arrays are"),
        ({"rank": None}, "its arrays are"),
    ],
)
def test_damaged_metadata_is_refused(metadata, message):
    with pytest.raises(ArtifactError, match=message):
        FastGRNNRouter.from_bytes(content_with(net().export(), **metadata))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w2": np.zeros((RANK + 1, HIDDEN), np.float32)}, f"w2 has {RANK + 1} along R, expected {RANK}"),
        ({"bias_gate": np.zeros((HIDDEN, 1), np.float32)}, "bias_gate"),
        ({"w1": np.zeros((0, RANK), np.float32)}, "w1 has 0"),
        ({"nu": np.array(np.nan, np.float32)}, "nu"),
        ({"utility_bias": np.array([0, 1, np.inf, 2], np.float32)}, "utility_bias"),
        ({"utility_bias": np.zeros(4)}, "float64"),
        ({"extra": np.zeros(1, np.float32)}, "extra is missing or unknown"),
    ],
)
def test_damaged_arrays_are_refused(arrays, message):
    with pytest.raises(ArtifactError, match=message):
        FastGRNNRouter.from_bytes(content_with(net().export(), arrays))


def test_unreadable_files_are_refused(tmp_path):
    router = net().export()
    content = router.to_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\xff" * 64, save_tensors(router.arrays)):
        with pytest.raises(ArtifactError, match="cannot be read"):
            FastGRNNRouter.from_bytes(damaged)
    with pytest.raises(ArtifactError, match="none cannot be read"):
        FastGRNNRouter.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="u1 is missing"):
        FastGRNNRouter({k: v for k, v in router.arrays.items() if k != "u1"}, router.choices)


# the blend

ROUTER = SearchParams(ef_search=16, model_tier="small", context_tokens=4000, temperature=0.4)
BANK = SearchParams(ef_search=64, model_tier="large", context_tokens=1000, temperature=1.0)


def answer(confidence: float, pattern: int | None = 3, params: SearchParams = BANK) -> OptimizedParams:
    return OptimizedParams(params, confidence, ParamSource(pattern), 0.9, 0.1, 1, "")


def decided(params: SearchParams = ROUTER) -> RouterDecision:
    return RouterDecision(params, 0.5, 0, params)


@pytest.mark.parametrize("confidence", [0.0, 0.3, 0.5, 0.500001, 0.6, 0.8, 0.949, 0.95, 1.0])
def test_the_blend_is_ramped(confidence):
    # tried contexts near enough that a full blend reaches another one
    tried = [1000, 3200, 3600, 4000]
    configs = ConfigTable.from_params([SearchParams(context_tokens=c) for c in tried], ("auto",), 0)
    decision = blend(decided(), answer(confidence), configs)
    expected = oracles.blend_ramped(
        oracles.Params(16, 8, "small", 4000, 0.4), oracles.Params(64, 8, "large", 1000, 1.0), confidence, tried
    )
    assert decision.params.temperature == pytest.approx(expected.temperature)
    assert decision.params.context_tokens == expected.context_tokens
    assert (decision.params.ef_search, decision.params.n_probes) == (16, 8)
    assert decision.tier_from_bank is (confidence >= 0.95)
    assert decision.params.model_tier == ("large" if confidence >= 0.95 else "small")
    assert (decision.router_params, decision.bank_params) == (ROUTER, BANK)
    assert (decision.reasoning_confidence, decision.reasoning_pattern_id) == (
        (confidence, 3) if confidence > 0.5 else (0.0, None)
    )


def test_context_moves_to_a_tried_value():
    configs = ConfigTable.from_params([SearchParams(context_tokens=c) for c in (1000, 3200, 4000)], ("auto",), 0)
    # 4000 - 0.3 * 3000 = 3100
    assert blend(decided(), answer(1.0), configs).params.context_tokens == 3200
    assert blend(decided(), answer(0.6), configs).params.context_tokens == 4000


def test_the_share_is_continuous_at_half_and_thirty_percent_at_one():
    assert blend_share(0.5) == blend_share(0.2) == blend_share(math.nan) == 0.0
    assert 0.0 < blend_share(0.5 + 1e-9) < 1e-8
    assert blend_share(0.75) == pytest.approx(0.3 * 0.75 * 0.5)
    assert blend_share(1.0) == pytest.approx(0.3)


def test_an_unknown_confidence_moves_nothing():
    assert blend(decided(), answer(math.nan), CONFIGS) == replace(decided(), bank_params=BANK)


def test_the_tier_comes_from_a_sure_pattern_only_and_is_reported():
    from_default = blend(decided(), answer(0.99, pattern=None), CONFIGS)
    assert (from_default.params.model_tier, from_default.tier_from_bank) == ("small", False)
    agreed = blend(decided(), answer(0.99, params=replace(BANK, model_tier="small")), CONFIGS)
    assert (agreed.params.model_tier, agreed.tier_from_bank) == ("small", False)


class Fixed:
    """A router that is not ours."""

    def forward(self, features):
        return RouterDecision(ROUTER, 0.5, None, ROUTER)


def test_any_router_is_blended_with_a_real_bank_on_its_own_embedding():
    data = make_bank()
    bank = ReasoningBank(data)
    queries = queries_near(data, 40, noise=0.05)
    surest = max(queries, key=lambda q: bank.optimized_params(q).confidence)
    wanted = bank.optimized_params(surest)
    assert wanted.confidence > 0.5
    decision = forward_with_reasoning(Fixed(), np.zeros(2), bank, surest)
    assert decision.bank_params == wanted.params
    assert decision.reasoning_pattern_id == wanted.source.pattern_id
    assert decision.params.temperature == pytest.approx(
        0.4 + blend_share(wanted.confidence) * (wanted.params.temperature - 0.4)
    )
    own = net().export()
    with pytest.raises(ValueError, match=rf"shape \({DIM},\), expected \(16,\)"):
        own.forward_with_reasoning(np.arange(DIM), bank, query_embedding=np.arange(DIM))
    with pytest.raises(ValueError, match=rf"shape \(16,\), expected \({DIM},\)"):
        own.forward_with_reasoning(surest, bank, query_embedding=surest)
    assert own.forward_with_reasoning(np.arange(DIM), bank, query_embedding=surest).bank_params == wanted.params


# training

SETTINGS = RouterConfig(hidden=16, rank=8, epochs=12, batch_size=128, learning_rate=0.01)


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each of four directions has its own best config, worth 1 over the others."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(4, (n,), generator=g)
    x = 3 * torch.eye(DIM)[group] + 0.5 * torch.randn(n, DIM, generator=g)
    config = torch.randint(4, (n,), generator=g)
    return x, config, (config == group).float() + 0.1 * torch.randn(n, generator=g), group


def trained(x, config, utility, weight=None, *, seed=0, settings=SETTINGS) -> RouterTraining:
    weight = torch.ones(len(x)) if weight is None else weight
    return train_router(x, config, utility, weight, CONFIGS, settings, torch.Generator().manual_seed(seed), CPU)


@pytest.fixture(scope="module")
def learnt() -> RouterTraining:
    return trained(*planted(3000, 0)[:3])


def test_training_finds_which_config_suits_which_query(learnt):
    x, _, _, group = planted(300, 1)
    decisions = [learnt.router.forward(q.numpy()) for q in x]
    # a constant choice is right for a quarter of the queries
    assert np.mean([d.config_id == int(g) for d, g in zip(decisions, group, strict=True)]) > 0.95
    for name in ("model_tier", "ef_search", "context_tokens"):
        right = [
            getattr(d.params, name) == getattr(CONFIGS[int(g)], name) for d, g in zip(decisions, group, strict=True)
        ]
        assert np.mean(right) > 0.9, name
    assert np.mean([abs(d.params.temperature - 0.5) for d in decisions]) < 0.1


def test_utilities_are_in_the_objectives_unit():
    x, config, utility, group = planted(3000, 0)
    router = trained(x, config, 40 * utility + 7).router
    fresh, _, _, group = planted(300, 1)
    out = np.array([router.heads(q.numpy())["utility"] for q in fresh])
    best = np.arange(4) == group.numpy()[:, None]
    assert out[best].mean() == pytest.approx(47, abs=4)
    assert out[~best].mean() == pytest.approx(7, abs=4)


def test_confidence_is_high_where_leaving_the_default_pays(learnt):
    x, _, _, group = planted(300, 1)
    confidence = np.array([learnt.router.forward(q.numpy()).router_confidence for q in x])
    # group 0's best is the default: no other config beats it
    assert confidence[group.numpy() == 0].mean() < 0.1
    assert confidence[group.numpy() != 0].mean() > 0.3


def test_the_best_epoch_is_kept_and_training_stops_early(learnt):
    assert learnt.valid_loss[learnt.best_epoch] == min(learnt.valid_loss)
    x, config, _, _ = planted(400, 2)
    noise = torch.randn(400, generator=torch.Generator().manual_seed(3))
    # far more epochs than a loss on noise keeps falling
    stopped = trained(x, config, noise, settings=replace(SETTINGS, epochs=60, patience=3))
    assert len(stopped.valid_loss) == len(stopped.train_loss) == stopped.best_epoch + 1 + 3
    # the weights of that epoch: training for just so long gives them too
    again = trained(x, config, noise, settings=replace(SETTINGS, epochs=stopped.best_epoch + 1))
    assert again.router.to_bytes() == stopped.router.to_bytes()


def test_same_seed_same_bits():
    rows = planted(600, 0)[:3]
    settings = replace(SETTINGS, epochs=3)
    first = trained(*rows, settings=settings)
    assert first.router.to_bytes() == trained(*rows, settings=settings).router.to_bytes()
    assert first.router.to_bytes() != trained(*rows, seed=1, settings=settings).router.to_bytes()


def test_rows_of_weight_zero_teach_nothing():
    x, config, utility, _ = planted(2000, 0)
    lies = torch.arange(2000) % 2 == 0
    router = trained(x, config, torch.where(lies, -utility, utility), (~lies).float()).router
    fresh, _, _, group = planted(200, 1)
    assert np.mean([router.forward(q.numpy()).config_id == int(g) for q, g in zip(fresh, group, strict=True)]) > 0.9


@pytest.mark.parametrize("never", [0, 3])
def test_a_config_that_never_ran_is_never_preferred(never):
    x, config, utility, _ = planted(1500, 0)
    kept = config != never
    router = trained(x[kept], config[kept], utility[kept], settings=replace(SETTINGS, epochs=4)).router
    everywhere = 5 * torch.randn(500, DIM, generator=torch.Generator().manual_seed(9))
    assert never not in {router.forward(q.numpy()).config_id for q in torch.cat([everywhere, planted(200, 1)[0]])}


def test_a_session_does_not_pass_through_untrained_weights(learnt):
    """Single queries teach U nothing: it must be 0, not noise."""
    assert not (learnt.router.arrays["u1"] @ learnt.router.arrays["u2"]).any()


def broken(**columns: torch.Tensor) -> list[torch.Tensor]:
    x, config, utility, _ = planted(100, 0)
    return list({"x": x, "config": config, "utility": utility, "weight": torch.ones(100), **columns}.values())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([column[:10] for column in broken()], "10 rows are too few"),
        (broken(config=torch.full((100,), 4)), r"outside \[0, 4\)"),
        (broken(config=torch.full((100,), -1)), r"outside \[0, 4\)"),
        (broken(utility=torch.full((100,), torch.nan)), "not finite"),
        (broken(weight=torch.ones(100).index_fill(0, torch.tensor([3]), -1.0)), "not finite, or"),
        (broken(weight=torch.zeros(100)), "no weight is above 0"),
        (broken(weight=torch.ones(99)), "shapes"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(rows, message):
    with pytest.raises(DataError, match=message):
        trained(*rows)


def test_a_loss_that_is_no_number_stops_the_job():
    x, config, utility, _ = planted(100, 0)
    x[5] = torch.nan
    with pytest.raises(ConfigError, match="no number after epoch 0"):
        trained(x, config, utility)
