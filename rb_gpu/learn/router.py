"""Trains the FastGRNN router on logged trajectories.

Suffixes: N rows, B rows of a batch, D dims, H hidden units, C configs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rb_gpu.learn.config import RouterConfig
from rb_gpu.params import ConfigTable
from rb_gpu.router import NORM_EPSILON, FastGRNNRouter

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class RouterTraining:
    """A trained router and its loss by epoch; best_epoch's weights are the router's."""

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
        """The next hidden state (B, H)."""
        mixed = (x_BD @ self.w1) @ self.w2 + (h_BH @ self.u1) @ self.u2
        gate = torch.sigmoid(mixed + self.bias_gate)
        candidate = torch.tanh(mixed + self.bias_candidate)
        return gate * h_BH + (torch.sigmoid(self.zeta) * (1 - gate) + torch.sigmoid(self.nu)) * candidate


class RouterNet(nn.Module):
    """The cell over single queries and its heads."""

    def __init__(self, dim: int, config: RouterConfig, configs: ConfigTable) -> None:
        super().__init__()
        self.cell = FastGRNNCell(dim, config.hidden, config.rank)
        self.values = {
            "context": np.unique(configs.context_tokens),
            "ef": np.unique(configs.ef_search),
            "probes": np.unique(configs.n_probes),
        }
        widths = {name: len(values) for name, values in self.values.items()}
        widths |= {"tier": len(configs.tiers), "temperature": 1, "utility": len(configs), "confidence": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden, width) for name, width in widths.items()})

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """Raw outputs of every head, (B, width) each."""
        normal_BD = functional.layer_norm(x_BD, x_BD.shape[1:], eps=NORM_EPSILON)
        h_BH = self.cell.forward(normal_BD, x_BD.new_zeros(len(x_BD), self.cell.w2.shape[1]))
        return {name: self.linear(name).forward(h_BH) for name in self.heads}

    def linear(self, name: str) -> nn.Linear:
        """One head."""
        return cast(nn.Linear, self.heads[name])

    def export(self, tiers: tuple[str, ...]) -> FastGRNNRouter:
        """The light side's router with these weights."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self.cell.named_parameters()}
        for name in self.heads:
            head = self.linear(name)
            arrays[f"{name}_weight"] = head.weight.detach().cpu().numpy()
            arrays[f"{name}_bias"] = head.bias.detach().cpu().numpy()
        arrays |= {f"{name}_values": values.astype(np.float32) for name, values in self.values.items()}
        return FastGRNNRouter(arrays, tiers)


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
    """Trains on rows oldest first: embedding (N, D), config tried, utility got, weight (decay over propensity).

    utility head: squared error on the config that was tried. tier, context, ef, probes: cross-entropy to what was
    tried, weighted by exp(standardised utility), so that what did well is imitated; temperature likewise by squared
    error. confidence: P(the tried config's utility beats the default's predicted one). The newest tenth of the rows
    decides when to stop. Raises ValueError under 20 rows.
    """
    if len(x_ND) < 20:
        raise ValueError(f"{len(x_ND)} rows are too few to train a router; give 20 or more, or set router=off")
    net = RouterNet(x_ND.shape[1], config, configs).to(device)
    _initialise(net, generator)
    targets = _targets(net, config_id_N, configs, device)
    mean, spread = utility_N.mean(), utility_N.std().clamp(min=1e-6)
    standard_N = (utility_N - mean) / spread
    weight_N = weight_N / weight_N.mean()
    train_rows = len(x_ND) - max(1, int(VALIDATION_SHARE * len(x_ND)))
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    train_loss: list[float] = []
    valid_loss: list[float] = []
    best, best_epoch = copy.deepcopy(net.state_dict()), 0
    valid = torch.arange(train_rows, len(x_ND), device=device)

    def loss_of(rows: Tensor) -> Tensor:
        return _loss(net.forward(x_ND[rows]), rows, targets, standard_N, weight_N, configs.default)

    for epoch in range(config.epochs):
        order = torch.randperm(train_rows, generator=generator, device=device)
        total = torch.zeros((), device=device)
        net.train()
        for start in range(0, train_rows, config.batch_size):
            rows = order[start : start + config.batch_size]
            loss = loss_of(rows)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            total += loss.detach() * len(rows)
        net.eval()
        with torch.no_grad():
            parts = [loss_of(part) * len(part) for part in torch.split(valid, 65_536)]
        train_loss.append(float(total) / train_rows)
        valid_loss.append(float(torch.stack(parts).sum()) / len(valid))
        if valid_loss[epoch] <= min(valid_loss):
            best, best_epoch = copy.deepcopy(net.state_dict()), epoch
        elif epoch - best_epoch >= config.patience:
            break
    net.load_state_dict(best)
    # the utility head learned standardised utilities; the light side speaks the objective's unit
    head = net.linear("utility")
    with torch.no_grad():
        head.weight *= spread
        head.bias.copy_(head.bias * spread + mean)
    return RouterTraining(net.export(configs.tiers), train_loss, valid_loss, best_epoch)


def _initialise(net: RouterNet, generator: torch.Generator) -> None:
    """Glorot's normal start, drawn from the job's own generator."""
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim == 2:
                value.normal_(0.0, (2.0 / sum(value.shape)) ** 0.5, generator=generator)
            elif name.startswith("heads") and name.endswith("bias"):
                value.zero_()


def _targets(net: RouterNet, config_id_N: Tensor, configs: ConfigTable, device: torch.device) -> dict[str, Tensor]:
    """What each row tried, as each head's target (N,)."""
    columns = {
        "tier": configs.tier.astype(np.int64),
        "context": np.searchsorted(net.values["context"], configs.context_tokens),
        "ef": np.searchsorted(net.values["ef"], configs.ef_search),
        "probes": np.searchsorted(net.values["probes"], configs.n_probes),
        "temperature": configs.temperature,
    }
    by_config = {name: torch.from_numpy(values).to(device)[config_id_N] for name, values in columns.items()}
    return by_config | {"config": config_id_N}


def _loss(
    out: dict[str, Tensor],
    rows: Tensor,
    targets: dict[str, Tensor],
    standard_N: Tensor,
    weight_N: Tensor,
    default: int,
) -> Tensor:
    config, utility, weight = targets["config"][rows], standard_N[rows], weight_N[rows]
    tried = out["utility"].gather(1, config[:, None])[:, 0]
    loss = (weight * (tried - utility).square()).mean()
    imitation = weight * utility.clamp(-3, 3).exp()
    imitation = imitation / imitation.mean().clamp(min=1e-6)
    for name in ("tier", "context", "ef", "probes"):
        loss = loss + (imitation * functional.cross_entropy(out[name], targets[name][rows], reduction="none")).mean()
    temperature = out["temperature"][:, 0] - targets["temperature"][rows]
    loss = loss + (imitation * temperature.square()).mean()
    beats = (utility > out["utility"][:, default].detach()).float()
    doubt = functional.binary_cross_entropy_with_logits(out["confidence"][:, 0], beats, reduction="none")
    return loss + (weight * (config != default) * doubt).mean()
