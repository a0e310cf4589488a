"""Trains the FastGRNN router on what the bank believes about the logged queries, or on their outcomes alone.

Beliefs cover every config, which a log of one config per query does not, and are far less noisy (the bank is a teacher,
as in Hinton et al. 2015, "Distilling the knowledge in a neural network"). Only outcomes can teach what the bank never
sees: numeric features, and earlier queries of a session.
Suffixes: Q queries, N rows, B queries of a batch, T steps, I inputs, D dims, F numeric features, C configs.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.config import RouterConfig
from rb_gpu.learn.progress import step
from rb_gpu.learn.router_net import RouterNet, Thresholding
from rb_gpu.params import ConfigTable
from rb_gpu.router import FastGRNNRouter

log = logging.getLogger(__name__)

LEAST_QUERIES = 20
VALIDATION_BATCH = 8192
PROGRESS_EPOCHS = 10
# known outcomes on the last queries below which the confidence is not recalibrated
LEAST_KNOWN = 50
# batch size as a share of the queries, and its bounds
BATCH_SHARE, LEAST_BATCH, LARGEST_BATCH = 1 / 32, 128, 4096


@dataclass(frozen=True)
class Lessons:
    """What a router learns from, all on one device; the last `validating` queries validate.

    x_XI: (X, I) float32 embeddings, each followed by F numeric features. step_QT: (Q, T) int64 rows of x, oldest first,
    the query's own last; -1 before a session's start. utility_QC, weight_QC: (Q, C) float32 mean outcome in the
    objective's unit and its weight >= 0 (decay over propensity), 0 where the config did not run. belief_QC: the bank's
    expected gain over the default, or None.
    """

    x_XI: Tensor
    step_QT: Tensor
    utility_QC: Tensor
    weight_QC: Tensor
    belief_QC: Tensor | None
    validating: int
    features: int = 0


@dataclass(frozen=True)
class RouterTraining:
    """A trained router, the mean loss of its utilities by epoch on both slices, and the epoch (from 0) of its weights.
    calibrated_on: number of outcomes of the last queries that its confidence was calibrated on; 0 if they were too few.
    """

    router: FastGRNNRouter
    train_loss: list[float]
    valid_loss: list[float]
    best_epoch: int
    calibrated_on: int


@dataclass(frozen=True)
class _Targets:
    """The targets of the utility head, their weights, and which configs ran.

    Utility is level + offset + spread·value: beliefs are learned about each config's mean, outcomes about the mean of
    all. beaten_QC, known_QC: whether the config beat the default, and the weight of that outcome, which sums to 1 over
    configs on average. ran_R: ids of the configs that ran; a mask would make the host wait for the device to count.
    """

    value_QC: Tensor
    weight_QC: Tensor
    start_C: Tensor
    offset_C: Tensor
    spread: Tensor
    level: Tensor
    ran_C: Tensor
    ran_R: Tensor
    beaten_QC: Tensor
    known_QC: Tensor

    def utility(self, value_BC: Tensor) -> Tensor:
        """(B, C) in the objective's unit; −inf for a config that never ran."""
        utility_BC = value_BC * self.spread + self.offset_C + self.level
        return utility_BC.masked_fill(~self.ran_C, -math.inf)


def train_router(
    lessons: Lessons, configs: ConfigTable, config: RouterConfig, generator: torch.Generator, device: torch.device
) -> RouterTraining:
    """Trains on all queries but those that validate, which decide when to stop and which epoch's weights are kept.

    The losses add up. utility: squared error to the bank's belief about each config, or without beliefs to the outcomes
    of the configs that ran, weighted. tier, context, ef, probes: cross-entropy to those of the best config by the same
    target, each query weighted by what is at stake, the best config's lead over the mean one; temperature: squared
    error, weighted likewise. confidence: cross-entropy to whether the router's own choice got more than the default on
    that query, or, if the default did not run on it, than the default's rows elsewhere; finally scaled and shifted
    (Platt 1999) on the last queries. Adam; the learning rate follows a cosine, anew in each phase of thresholding. A
    config that never ran is predicted a standard deviation below the worst, so that it is never preferred.

    Same lessons, generator state and device: same weights. Raises DataError if queries are too few, malformed or do not
    match each other, and ConfigError if the loss is not finite.
    """
    queries = len(lessons.step_QT)
    training = queries - lessons.validating
    _check_lessons(lessons, configs, training)
    target = _targets(lessons, training, configs.default)
    net = _net(lessons, configs, config, training).to(device, torch.float32)
    net.initialise(generator, recurrent=bool((lessons.step_QT[:, :-1] >= 0).any()))
    with torch.no_grad():
        net.linear("utility").bias.copy_(target.start_C)
    values = _values_of(configs, device)
    batch = min(max(int(BATCH_SHARE * queries), LEAST_BATCH), LARGEST_BATCH)
    batch = batch if config.batch_size == "auto" else int(config.batch_size)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    thin = Thresholding(net.cell, config.sparsity, config.epochs)
    steps = config.epochs * math.ceil(training / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimiser, steps)
    train_loss: list[float] = []
    valid_loss: list[float] = []
    best, best_epoch, least = net.state_dict(), 0, math.inf

    def loss_of(picked: Tensor) -> Tensor:
        """(2,) losses summed over the picked queries: of the utilities, and of the other heads."""
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            out = _outputs(net, lessons, picked)
        out = {name: value.float() for name, value in out.items()}
        return _loss(out, target, lessons, picked, values, configs.default)

    for epoch in range(thin.epochs):
        order = torch.randperm(training, generator=generator, device=device)
        total = torch.zeros(2, dtype=torch.float32, device=device)
        for picked in torch.split(order, batch):
            loss = loss_of(picked)
            optimiser.zero_grad()
            torch.autograd.backward(loss.sum() / len(picked))
            optimiser.step()
            schedule.step()
            thin.after_step(epoch)
            total[0] += loss[0].detach() / training
        with torch.no_grad():
            for picked in torch.split(torch.arange(training, queries, device=device), VALIDATION_BATCH):
                total[1] += loss_of(picked)[0] / (queries - training)
        # the only wait for the device in an epoch
        losses = total.tolist()
        if not all(map(math.isfinite, losses)):
            raise ConfigError(
                f"router.learning_rate={config.learning_rate:g}: the loss is not finite after epoch {epoch}; lower it, "
                "or look for NaN in the embeddings"
            )
        train_loss.append(losses[0])
        valid_loss.append(losses[1])
        step("router", epoch + 1, thin.epochs, "epochs")
        if epoch % PROGRESS_EPOCHS == 0:
            log.info("router: epoch %d of at most %d, loss %.4f, validation loss %.4f", epoch, thin.epochs, *losses)
        if thin.settled(epoch) and losses[1] <= least:
            best, best_epoch, least = copy.deepcopy(net.state_dict()), epoch, losses[1]
        elif thin.settled(epoch) and epoch - best_epoch >= config.patience:
            break
    net.load_state_dict(best)
    _finish_utility(net, target)
    with torch.no_grad():
        known = _calibrate(net, lessons, target, torch.arange(training, queries, device=device), configs.default)
    return RouterTraining(net.export(), train_loss, valid_loss, best_epoch, known)


def _outputs(net: RouterNet, lessons: Lessons, picked: Tensor) -> dict[str, Tensor]:
    step_BT = lessons.step_QT[picked]
    return net.forward(lessons.x_XI[step_BT.clamp(min=0)], step_BT >= 0)


def _check_lessons(lessons: Lessons, configs: ConfigTable, training: int) -> None:
    queries = len(lessons.step_QT)
    if queries < LEAST_QUERIES:
        raise DataError(
            f"{queries} queries are too few to train a router; give {LEAST_QUERIES} or more, or set router=off"
        )
    tables = [lessons.utility_QC, lessons.weight_QC, *([] if lessons.belief_QC is None else [lessons.belief_QC])]
    shapes = [tuple(table.shape) for table in tables]
    if shapes != [(queries, len(configs))] * len(tables) or lessons.x_XI.shape[1] <= lessons.features:
        raise DataError(f"utility, weight and belief have shapes {shapes}; give ({queries}, {len(configs)}) each")
    finite = all(bool(table.isfinite().all()) for table in tables)
    if not finite or not bool((lessons.weight_QC >= 0).all() & (lessons.weight_QC[:training] > 0).any()):
        raise DataError("utility or weight is not finite, or no weight is above 0; check cost, latency and propensity")


def _net(lessons: Lessons, configs: ConfigTable, config: RouterConfig, training: int) -> RouterNet:
    """An untrained net. Numeric features are standardised by their mean and spread over the training queries."""
    dim = lessons.x_XI.shape[1] - lessons.features
    numbers_QF = lessons.x_XI[lessons.step_QT[:training, -1], dim:]
    mean_F = numbers_QF.mean(0)
    spread_F = (numbers_QF - mean_F).square().mean(0).sqrt()
    scale_F = torch.where(spread_F > 0, spread_F, torch.ones_like(spread_F))
    return RouterNet(dim, config, configs, mean_F, scale_F)


def _targets(lessons: Lessons, training: int, default: int) -> _Targets:
    weight_QC, utility_QC = lessons.weight_QC / lessons.weight_QC[:training].sum() * training, lessons.utility_QC
    mass_C = weight_QC[:training].sum(0)
    ran_C = mass_C > 0
    ran_R = torch.nonzero(ran_C).squeeze(1)
    beating = {"ran_C": ran_C, "ran_R": ran_R, "beaten_QC": _beaten(lessons, training, default), "known_QC": weight_QC}
    if lessons.belief_QC is not None:
        belief_QC = lessons.belief_QC
        mean_C = belief_QC[:training].mean(0)
        spread = (belief_QC[:training] - mean_C).std().clamp(min=1e-6)
        # beliefs are gains over the default: their mean distance from the outcomes is the level
        level = (weight_QC * (utility_QC - belief_QC))[:training].sum() / training
        value_QC, even_QC = (belief_QC - mean_C) / spread, torch.full_like(belief_QC, 1.0 / belief_QC.shape[1])
        return _Targets(value_QC, even_QC, torch.zeros_like(mean_C), mean_C, spread, level, **beating)
    level = (weight_QC * utility_QC)[:training].sum() / training
    spread = ((weight_QC * (utility_QC - level).square())[:training].sum() / training).sqrt().clamp(min=1e-6)
    start_C = (weight_QC * (utility_QC - level))[:training].sum(0) / mass_C.clamp(min=1e-30) / spread
    value_QC = torch.where(weight_QC > 0, (utility_QC - level) / spread, torch.zeros_like(utility_QC))
    return _Targets(value_QC, weight_QC, start_C, torch.zeros_like(start_C), spread, level, **beating)


def _values_of(configs: ConfigTable, device: torch.device) -> dict[str, Tensor]:
    """Each head's target for each config, (C,)."""
    columns = {
        "tier": configs.tier.astype(np.int64),
        "context": np.unique(configs.context_tokens, return_inverse=True)[1],
        "ef": np.unique(configs.ef_search, return_inverse=True)[1],
        "probes": np.unique(configs.n_probes, return_inverse=True)[1],
        "temperature": configs.temperature,
    }
    return {name: torch.from_numpy(values).to(device) for name, values in columns.items()}


def _loss(
    out: dict[str, Tensor], target: _Targets, lessons: Lessons, picked: Tensor, values: dict[str, Tensor], default: int
) -> Tensor:
    """(2,) the losses of the utility head and of all others, summed over the picked queries."""
    value_BC, weight_BC = target.value_QC[picked], target.weight_QC[picked]
    loss = torch.zeros_like(value_BC[:, 0])
    with torch.no_grad():
        predicted_BC = target.utility(out["utility"])
        known_BC = predicted_BC if lessons.belief_QC is None else target.utility(value_BC)
        best_B = known_BC.argmax(1)
        ran_BR = known_BC[:, target.ran_R]
        stake_B = (ran_BR.max(1).values - ran_BR.mean(1)) / target.spread
        chosen_B = predicted_BC.argmax(1)
        beat_B, weight_B = _beat(chosen_B, target.beaten_QC[picked], target.known_QC[picked], default)
    for name in ("tier", "context", "ef", "probes"):
        loss = loss + stake_B * functional.cross_entropy(out[name], values[name][best_B], reduction="none")
    loss = loss + stake_B * (out["temperature"][:, 0] - values["temperature"][best_B]).square()
    doubt = functional.binary_cross_entropy_with_logits(out["confidence"][:, 0], beat_B, reduction="none")
    utility = (weight_BC * (out["utility"] - value_BC).square()).sum()
    return torch.stack([utility, (loss + weight_B * doubt).sum()])


def _beaten(lessons: Lessons, training: int, default: int) -> Tensor:
    """(Q, C) whether each config's outcome was higher than the default's on that query. If the default did not run on
    it: the share of the default's training rows (or of all, if it never ran) with a lower outcome, as two independent
    rows would compare.
    """
    utility_QC, weight_QC = lessons.utility_QC, lessons.weight_QC
    ran_Q = weight_QC[:, default] > 0
    rows = utility_QC[:training, default][ran_Q[:training]].sort().values
    if len(rows) == 0:
        rows = utility_QC[:training][weight_QC[:training] > 0].sort().values
    less_QC = torch.searchsorted(rows, utility_QC.contiguous()).float() / len(rows)
    return torch.where(ran_Q[:, None], (utility_QC > utility_QC[:, default, None]).float(), less_QC)


def _beat(chosen_B: Tensor, beaten_BC: Tensor, weight_BC: Tensor, default: int) -> tuple[Tensor, Tensor]:
    """Whether the chosen config beat the default on each query (B,), and the weight of that outcome. The default does
    not beat itself, which is known with weight 1.
    """
    beat_B, known_B = (table.gather(1, chosen_B[:, None])[:, 0] for table in (beaten_BC, weight_BC))
    left_B = chosen_B != default
    return torch.where(left_B, beat_B, torch.zeros_like(beat_B)), torch.where(left_B, known_B, 1.0)


def _finish_utility(net: RouterNet, target: _Targets) -> None:
    """Folds the scaling into the utility head, and puts configs that never ran below the one of lowest mean."""
    head, ran_C = net.linear("utility"), target.ran_C
    with torch.no_grad():
        head.weight *= target.spread
        head.bias.mul_(target.spread).add_(target.offset_C + target.level)
        lowest = torch.where(ran_C, head.bias, torch.full_like(head.bias, math.inf)).argmin()
        # no masked assignment: under deterministic algorithms, torch before 2.8 cannot broadcast its value on a GPU
        head.weight.copy_(torch.where(ran_C[:, None], head.weight, head.weight[lowest]))
        head.bias.copy_(torch.where(ran_C, head.bias, head.bias[lowest] - target.spread))


def _calibrate(net: RouterNet, lessons: Lessons, target: _Targets, last: Tensor, default: int) -> int:
    """Scales and shifts the confidence's logit to fit the outcomes of the last queries on which the router leaves the
    default and its choice ran. Returns their number, or 0 if they are too few or all alike.
    """
    parts = [_outputs(net, lessons, picked) for picked in torch.split(last, VALIDATION_BATCH)]
    chosen_B = torch.cat([part["utility"].argmax(1) for part in parts])
    logit_B = torch.cat([part["confidence"][:, 0] for part in parts])
    beat_B, weight_B = _beat(chosen_B, target.beaten_QC[last], target.known_QC[last], default)
    used = (weight_B > 0) & (chosen_B != default)
    logit, beat, weight = (v[used].double().cpu().numpy() for v in (logit_B, beat_B, weight_B))
    if len(beat) < LEAST_KNOWN or beat.min() == beat.max():
        return 0
    scale, shift = platt(logit, beat, weight)
    head = net.linear("confidence")
    head.weight.mul_(scale)
    head.bias.mul_(scale).add_(shift)
    return len(beat)


def platt(
    logit_B: npt.NDArray[np.float64], beat_B: npt.NDArray[np.float64], weight_B: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Scale >= 0 and shift of logits that maximise the likelihood of outcomes in [0, 1], smoothed as Platt (1999)."""
    positive, negative = float(weight_B @ beat_B), float(weight_B @ (1 - beat_B))
    high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
    target_B = low + (high - low) * beat_B

    def loss(both: npt.NDArray[np.float64]) -> float:
        z_B = both[0] * logit_B + both[1]
        return float(weight_B @ (np.logaddexp(0.0, z_B) - target_B * z_B))

    found = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=[(0.0, None), (None, None)])
    return float(found.x[0]), float(found.x[1])
