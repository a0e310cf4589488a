"""The router in torch: the FastGRNN cell, its heads, the thresholding that makes it sparse, and its export.

Suffixes: B queries of a batch, T steps, D embedding dims, F numeric features, I = D + F inputs, H hidden units.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rb_gpu.learn.config import RouterConfig
from rb_gpu.params import ConfigTable
from rb_gpu.router import NORM_EPSILON, FastGRNNRouter
from rb_gpu.router_file import HEADS

FACTORS = ("w1", "w2", "u1", "u2")


class FastGRNNCell(nn.Module):
    """One step of FastGRNN (Kusupati et al. 2018, equations 4 to 6) with low-rank W = W1·W2 and U = U1·U2."""

    def __init__(self, inputs: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(inputs, min(rank, inputs)))
        self.w2 = nn.Parameter(torch.empty(min(rank, inputs), hidden))
        self.u1 = nn.Parameter(torch.empty(hidden, min(rank, hidden)))
        self.u2 = nn.Parameter(torch.empty(min(rank, hidden), hidden))
        self.bias_gate = nn.Parameter(torch.ones(hidden))
        self.bias_candidate = nn.Parameter(torch.zeros(hidden))
        # initial values of the paper: ζ = 1 and ν = −4 let the candidate through and add little
        self.zeta = nn.Parameter(torch.tensor(1.0))
        self.nu = nn.Parameter(torch.tensor(-4.0))

    def forward(self, x_BI: Tensor, h_BH: Tensor) -> Tensor:
        """The next hidden state (B, H) from the step's normalised input and the last state."""
        mixed = (x_BI @ self.w1) @ self.w2 + (h_BH @ self.u1) @ self.u2
        gate = torch.sigmoid(mixed + self.bias_gate)
        candidate = torch.tanh(mixed + self.bias_candidate)
        return gate * h_BH + (torch.sigmoid(self.zeta) * (1 - gate) + torch.sigmoid(self.nu)) * candidate


class RouterNet(nn.Module):
    """The cell over the last T queries of a session, and its heads. feature_mean, feature_scale: (F,), scale > 0."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self, dim: int, config: RouterConfig, configs: ConfigTable, feature_mean: Tensor, feature_scale: Tensor
    ) -> None:
        super().__init__()
        self.dim, self.configs = dim, configs
        self.cell = FastGRNNCell(dim + len(feature_mean), config.hidden, config.rank)
        self.register_buffer("feature_mean", feature_mean)
        self.register_buffer("feature_scale", feature_scale)
        widths = {
            "tier": len(configs.tiers),
            "context": len(set(configs.context_tokens.tolist())),
            "ef": len(set(configs.ef_search.tolist())),
            "probes": len(set(configs.n_probes.tolist())),
            "temperature": 1,
            "utility": len(configs),
            "confidence": 1,
        }
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden, widths[name]) for name in HEADS})

    def forward(self, x_BTI: Tensor, there_BT: Tensor) -> dict[str, Tensor]:
        """Raw outputs of every head, (B, width) each. there_BT: which steps exist; others leave the state unchanged."""
        normal = functional.layer_norm(x_BTI[..., : self.dim], (self.dim,), eps=NORM_EPSILON)
        numbers = (x_BTI[..., self.dim :] - self.feature_mean) / self.feature_scale
        normal_BTI = torch.cat([normal, numbers], dim=2)
        h_BH = x_BTI.new_zeros(len(x_BTI), self.cell.w2.shape[1])
        for t in range(x_BTI.shape[1]):
            after_BH = self.cell.forward(normal_BTI[:, t], h_BH)
            h_BH = torch.where(there_BT[:, t, None], after_BH, h_BH)
        # only utilities train the cell: the other heads' losses are noisier and must not distort it
        rest_BH = h_BH.detach()
        return {name: self.linear(name).forward(h_BH if name == "utility" else rest_BH) for name in self.heads}

    def linear(self, name: str) -> nn.Linear:
        """One head."""
        return cast(nn.Linear, self.heads[name])

    def initialise(self, generator: torch.Generator, recurrent: bool) -> None:
        """Glorot normal initialisation of the factors from the given generator; the heads start at 0.

        U2 starts at 0 if no session has a second step, because what is never trained must not be noise.
        """
        cell = self.cell
        with torch.no_grad():
            for value in (cell.w1, cell.w2, cell.u1, cell.u2):
                value.normal_(0.0, (2.0 / sum(value.shape)) ** 0.5, generator=generator)
            if not recurrent:
                cell.u2.zero_()
            for value in self.heads.parameters():
                value.zero_()

    def export(self) -> FastGRNNRouter:
        """The light package's router with these weights."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self.cell.named_parameters()}
        for name in self.heads:
            head = self.linear(name)
            arrays[f"{name}_weight"] = head.weight.detach().cpu().numpy()
            arrays[f"{name}_bias"] = head.bias.detach().cpu().numpy()
        arrays["feature_mean"] = self.feature_mean.cpu().numpy()
        arrays["feature_scale"] = self.feature_scale.cpu().numpy()
        return FastGRNNRouter(arrays, self.configs)


class Thresholding:
    """Iterative hard thresholding in the paper's three phases (section 3.2.2), of `phase_epochs` each.

    First all entries of the factors of W and U are trained. Then only the largest 1 − sparsity of each factor's entries
    are kept after every step, and which ones may change. Last, the kept entries are trained alone.
    """

    def __init__(self, cell: FastGRNNCell, sparsity: float, phase_epochs: int) -> None:
        self.factors = [cast(Tensor, getattr(cell, name)) for name in FACTORS] if sparsity > 0 else []
        self.sparsity, self.phase_epochs = sparsity, phase_epochs
        self.epochs = 3 * phase_epochs if self.factors else phase_epochs
        self.kept: list[Tensor] = []

    def settled(self, epoch: int) -> bool:
        """Whether the weights of this epoch have their final support, so that they may be the ones kept."""
        return not self.factors or epoch >= 2 * self.phase_epochs

    @torch.no_grad()
    def after_step(self, epoch: int) -> None:
        """Sets all entries to 0 that are not kept."""
        if not self.factors or epoch < self.phase_epochs:
            return
        if not self.settled(epoch) or not self.kept:
            self.kept = [self._largest(factor) for factor in self.factors]
        for factor, kept in zip(self.factors, self.kept, strict=True):
            factor.mul_(kept)

    def _largest(self, factor: Tensor) -> Tensor:
        count = max(1, round((1 - self.sparsity) * factor.numel()))
        places = factor.abs().flatten().topk(count).indices
        kept = torch.zeros(factor.numel(), dtype=torch.bool, device=factor.device)
        kept[places] = True
        return kept.view_as(factor)
