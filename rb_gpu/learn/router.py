"""Trains the FastGRNN router (Kusupati et al. 2018) on logged trajectories.

Rows are single queries, one step each from h = 0. U then has no part in any answer and gets no gradient, so U2 starts,
and stays, at 0: a session of several steps is read as a gated average of its steps, not through random weights.

Suffixes: N rows, B rows of a batch, D dims, H hidden units, C configs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from rb_gpu.errors import ConfigError, DataError
from rb_gpu.learn.config import RouterConfig
from rb_gpu.params import ConfigTable
from rb_gpu.router import HEADS, NORM_EPSILON, FastGRNNRouter, RouterChoices

VALIDATION_SHARE = 0.1
LEAST_ROWS = 20
# a row's pull on the classification heads is exp(standardised utility), from 1/20 to 20 times the mean row's
IMITATION_RANGE = 3.0
VALIDATION_BATCH = 65_536


@dataclass(frozen=True)
class RouterTraining:
    """A trained router, its mean loss by epoch on both slices, and the epoch (from 0) whose weights it has."""

    router: FastGRNNRouter
    train_loss: list[float]
    valid_loss: list[float]
    best_epoch: int


class FastGRNNCell(nn.Module):
    """One step of FastGRNN (Kusupati et al. 2018, equations 4 to 6) with low-rank W = W1·W2 and U = U1·U2."""

    def __init__(self, dim: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(dim, min(rank, dim)))
        self.w2 = nn.Parameter(torch.empty(min(rank, dim), hidden))
        self.u1 = nn.Parameter(torch.empty(hidden, min(rank, hidden)))
        self.u2 = nn.Parameter(torch.empty(min(rank, hidden), hidden))
        self.bias_gate = nn.Parameter(torch.ones(hidden))
        self.bias_candidate = nn.Parameter(torch.zeros(hidden))
        # the paper's start: ζ = 1 and ν = −4 let the candidate through and add little
        self.zeta = nn.Parameter(torch.tensor(1.0))
        self.nu = nn.Parameter(torch.tensor(-4.0))

    def forward(self, x_BD: Tensor, h_BH: Tensor) -> Tensor:
        """The next hidden state (B, H) from the step's normalised input and the last state."""
        mixed = (x_BD @ self.w1) @ self.w2 + (h_BH @ self.u1) @ self.u2
        gate = torch.sigmoid(mixed + self.bias_gate)
        candidate = torch.tanh(mixed + self.bias_candidate)
        return gate * h_BH + (torch.sigmoid(self.zeta) * (1 - gate) + torch.sigmoid(self.nu)) * candidate


class RouterNet(nn.Module):
    """The cell over single queries and its heads."""

    def __init__(self, dim: int, config: RouterConfig, configs: ConfigTable) -> None:
        super().__init__()
        self.cell = FastGRNNCell(dim, config.hidden, config.rank)
        self.choices = RouterChoices.of(configs)
        widths = {
            "tier": len(self.choices.tiers),
            "context": len(self.choices.context_tokens),
            "ef": len(self.choices.ef_search),
            "probes": len(self.choices.n_probes),
            "temperature": 1,
            "utility": len(configs),
            "confidence": 1,
        }
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden, widths[name]) for name in HEADS})

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """Raw outputs of every head, (B, width) each."""
        normal_BD = functional.layer_norm(x_BD, x_BD.shape[1:], eps=NORM_EPSILON)
        h_BH = self.cell.forward(normal_BD, x_BD.new_zeros(len(x_BD), self.cell.w2.shape[1]))
        return {name: self.linear(name).forward(h_BH) for name in self.heads}

    def linear(self, name: str) -> nn.Linear:
        """One head."""
        return cast(nn.Linear, self.heads[name])

    def export(self) -> FastGRNNRouter:
        """The light side's router with these weights."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self.cell.named_parameters()}
        for name in self.heads:
            head = self.linear(name)
            arrays[f"{name}_weight"] = head.weight.detach().cpu().numpy()
            arrays[f"{name}_bias"] = head.bias.detach().cpu().numpy()
        return FastGRNNRouter(arrays, self.choices)


def train_router(
    x_ND: Tensor,
    config_id_N: Tensor,
    utility_N: Tensor,
    weight_N: Tensor,
    configs: ConfigTable,
    config: RouterConfig,
    generator: torch.Generator,
    device: torch.device,
) -> RouterTraining:
    """Trains on logged rows, oldest first; the last tenth decides when to stop.

    x_ND: (N, D) float32 query embeddings. config_id_N: (N,) int64 row of `configs` that ran. utility_N: (N,) float32
    in the objective's unit. weight_N: (N,) float32 >= 0, decay over propensity. All on `device`, as is `generator`.

    utility: squared error on the config that ran, of utility standardised over the training rows. tier, context, ef,
    probes: cross-entropy to what ran, each row weighted by weight·exp(standardised utility), so that what did well is
    imitated; temperature likewise by squared error. confidence: the chance that the utility got beats the one
    predicted of the default (of any row, where the default never ran), learned on rows that left the default; so it
    speaks of the configs as the log chose them. Losses add up; Adam; the epoch of least validation loss is kept.
    The utility head starts at each config's mean; a config that never ran is predicted a standard deviation under the
    one of lowest mean, so that it is never preferred.

    Same rows, generator state and device: same weights. Raises DataError where rows are too few, malformed or do not
    fit each other, and ConfigError where the loss is no number.
    """
    rows = len(x_ND)
    train_rows = rows - max(1, int(VALIDATION_SHARE * rows))
    _check_rows(x_ND, config_id_N, utility_N, weight_N, len(configs), train_rows)
    weight_N = weight_N / weight_N[:train_rows].mean()
    mean, spread = utility_N[:train_rows].mean(), utility_N[:train_rows].std().clamp(min=1e-6)
    standard_N = (utility_N - mean) / spread
    imitation_N = weight_N * standard_N.clamp(-IMITATION_RANGE, IMITATION_RANGE).exp()
    net = RouterNet(x_ND.shape[1], config, configs).to(device)
    _initialise(net, generator)
    means_C = _means(config_id_N[:train_rows], standard_N[:train_rows], weight_N[:train_rows], len(configs))
    with torch.no_grad():
        net.linear("utility").bias.copy_(torch.from_numpy(np.nan_to_num(means_C)))
    targets = _targets(net, config_id_N, configs, device)
    targets |= {
        "utility": standard_N,
        "weight": weight_N,
        "imitation": imitation_N / imitation_N[:train_rows].mean().clamp(min=1e-6),
    }
    default = None if np.isnan(means_C[configs.default]) else configs.default
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    valid = torch.arange(train_rows, rows, device=device)
    train_loss: list[float] = []
    valid_loss: list[float] = []
    best, best_epoch = net.state_dict(), 0

    def loss_of(picked: Tensor) -> Tensor:
        """Summed over the picked rows."""
        return _loss(net.forward(x_ND[picked]), {name: column[picked] for name, column in targets.items()}, default)

    for epoch in range(config.epochs):
        order = torch.randperm(train_rows, generator=generator, device=device)
        total = torch.zeros(2, device=device)
        for picked in torch.split(order, config.batch_size):
            loss = loss_of(picked)
            optimiser.zero_grad()
            torch.autograd.backward(loss / len(picked))
            optimiser.step()
            total[0] += loss.detach() / train_rows
        with torch.no_grad():
            for picked in torch.split(valid, VALIDATION_BATCH):
                total[1] += loss_of(picked) / len(valid)
        # the epoch's only wait for the device
        losses = total.tolist()
        if not all(map(math.isfinite, losses)):
            raise ConfigError(
                f"router.learning_rate={config.learning_rate:g}: the loss is no number after epoch {epoch}; lower it, "
                "or look for NaN in the embeddings"
            )
        train_loss.append(losses[0])
        valid_loss.append(losses[1])
        if losses[1] <= min(valid_loss):
            best, best_epoch = copy.deepcopy(net.state_dict()), epoch
        elif epoch - best_epoch >= config.patience:
            break
    net.load_state_dict(best)
    _finish_utility(net.linear("utility"), means_C, mean, spread)
    return RouterTraining(net.export(), train_loss, valid_loss, best_epoch)


def _check_rows(
    x_ND: Tensor, config_id_N: Tensor, utility_N: Tensor, weight_N: Tensor, configs: int, train_rows: int
) -> None:
    rows = len(x_ND)
    if rows < LEAST_ROWS:
        raise DataError(f"{rows} rows are too few to train a router; give {LEAST_ROWS} or more, or set router=off")
    shapes = [tuple(column.shape) for column in (x_ND, config_id_N, utility_N, weight_N)]
    if x_ND.ndim != 2 or shapes[1:] != [(rows,)] * 3:
        raise DataError(f"x, config_id, utility and weight have shapes {shapes}; give (N, D) and three times (N,)")
    if not bool(((config_id_N >= 0) & (config_id_N < configs)).all()):
        raise DataError(f"config_id holds values outside [0, {configs}); quantise rows and configs together")
    if not bool(
        (utility_N.isfinite() & weight_N.isfinite() & (weight_N >= 0)).all() & (weight_N[:train_rows] > 0).any()
    ):
        raise DataError("utility or weight is not finite, or no weight is above 0; check cost, latency and propensity")


def _initialise(net: RouterNet, generator: torch.Generator) -> None:
    """Glorot's normal start of W1, W2 and U1, drawn from the job's own generator; U2 and the heads start at 0."""
    cell = net.cell
    with torch.no_grad():
        for value in (cell.w1, cell.w2, cell.u1):
            value.normal_(0.0, (2.0 / sum(value.shape)) ** 0.5, generator=generator)
        cell.u2.zero_()
        for value in net.heads.parameters():
            value.zero_()


def _means(config_id_N: Tensor, standard_N: Tensor, weight_N: Tensor, configs: int) -> npt.NDArray[np.float64]:
    """The weighted mean utility of each config (C,), NaN where it never ran."""
    # on the host: sums by atomics on a GPU differ from run to run
    config_id, weight = config_id_N.cpu().numpy(), weight_N.cpu().numpy().astype(np.float64)
    mass = np.bincount(config_id, weight, configs)
    total = np.bincount(config_id, weight * standard_N.cpu().numpy(), configs)
    return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), np.nan)


def _finish_utility(head: nn.Linear, means_C: npt.NDArray[np.float64], mean: Tensor, spread: Tensor) -> None:
    """Puts configs that never ran under the one of lowest mean for every query, and utilities in their own unit."""
    never, lowest = torch.from_numpy(np.isnan(means_C)).to(head.bias.device), int(np.nanargmin(means_C))
    with torch.no_grad():
        head.weight[never] = head.weight[lowest].clone()
        head.bias[never] = head.bias[lowest] - 1.0
        head.weight *= spread
        head.bias.copy_(head.bias * spread + mean)


def _targets(net: RouterNet, config_id_N: Tensor, configs: ConfigTable, device: torch.device) -> dict[str, Tensor]:
    """What each row tried, as each head's target (N,)."""
    columns = {
        "tier": configs.tier.astype(np.int64),
        "context": np.searchsorted(net.choices.context_tokens, configs.context_tokens),
        "ef": np.searchsorted(net.choices.ef_search, configs.ef_search),
        "probes": np.searchsorted(net.choices.n_probes, configs.n_probes),
        "temperature": configs.temperature,
        "left_default": (np.arange(len(configs)) != configs.default).astype(np.float32),
    }
    by_config = {name: torch.from_numpy(values).to(device)[config_id_N] for name, values in columns.items()}
    return by_config | {"config": config_id_N}


def _loss(out: dict[str, Tensor], target: dict[str, Tensor], default: int | None) -> Tensor:
    """The losses of all heads, added up over the rows; default: its config, None where it never ran."""
    utility, weight, imitation = target["utility"], target["weight"], target["imitation"]
    predicted = out["utility"].gather(1, target["config"][:, None])[:, 0]
    loss = weight * (predicted - utility).square()
    for name in ("tier", "context", "ef", "probes"):
        loss = loss + imitation * functional.cross_entropy(out[name], target[name], reduction="none")
    loss = loss + imitation * (out["temperature"][:, 0] - target["temperature"]).square()
    # standardised utilities have mean 0
    baseline = torch.zeros_like(utility) if default is None else out["utility"][:, default].detach()
    doubt = functional.binary_cross_entropy_with_logits(
        out["confidence"][:, 0], (utility > baseline).float(), reduction="none"
    )
    return (loss + weight * target["left_default"] * doubt).sum()
