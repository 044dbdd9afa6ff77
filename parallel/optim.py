"""AdamW over flat units, the norm of all gradients, and the course of the learning rate."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallel.collectives import RankError, all_gather_async_
from parallel.data_parallel import DataParallel, Unit, check_replicas_equal, describe_nonfinite, on_host
from parallel.mesh import Mesh
from parallel.order import gather_in_order
from parallel.training_state import Piece

Schedule = Literal["constant", "linear", "cosine"]

DRIFT_EVERY = 100  # steps between comparisons of the weights that ranks hold in common
MAX_SKIPPED = 5  # steps skipped in a row before the run is given up
NORM_BLOCK = 1 << 16  # entries turned into float64 at a time on a CPU: they stay in its cache


@dataclass(frozen=True)
class Optim:
    """Flags of the optimizer, alike in every script."""

    lr: float = 3e-4
    """learning rate after warm-up"""
    schedule: Schedule = "constant"
    """course of the learning rate after warm-up; linear and cosine end at 0 with the run's last step"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """decoupled, of matrices only; times the learning rate per step (Loshchilov and Hutter 2019)"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay per step of Adam's means of gradients and of their squares"""
    eps: float = 1e-8
    """added to the root of the mean square that a step is divided by (Huang et al. 2024, arXiv 2403.17031: 1e-5)"""
    max_grad_norm: float = 1.0
    """L2 norm over all gradients to which they are scaled down; 0 = no clipping"""

    def __post_init__(self):
        for name in ("lr", "warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--optim.{name.replace('_', '-')} {getattr(self, name)} should be a number from 0 on")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--optim.betas {' '.join(map(str, self.betas))} should be two numbers from 0 to below 1")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"--optim.eps {self.eps} should be a number above 0")

    def lr_multiplier(self, step: int, total_steps: int) -> float:
        return lr_multiplier(step, self.schedule, self.warmup_steps, total_steps)


def lr_multiplier(step: int, schedule: Schedule, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by in the step after `step` finished ones; 1 at most.

    It rises linearly over warmup_steps, then stays (constant) or falls to 0 at total_steps (linear, cosine).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clip_grad_norm(model: DataParallel, max_norm: float, mesh: Mesh) -> float:
    """L2 norm of all gradients, squares summed in float64; the optimizer then divides by max(1, norm / max_norm).

    The gradients themselves are left as they are: the optimizer's own pass scales them. max_norm 0 clips nothing.
    Communication: every rank squares its part of each unit, whichever parts it holds, and one all-gather of a number
        over all ranks brings the sums together: the same bits under zero 0 to 3. It compares what the ranks have called
        since the start, too: see `gather_in_order`.
    Returns: the norm before clipping, the same on all ranks, NaN or infinite if a gradient is.
    Source: Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.
    """
    squares = [torch.zeros((), dtype=torch.float64, device=mesh.device)]
    for unit in model.units:
        if unit.trainable:
            grad, first = unit.own(unit.flat_grad), unit.part.start
            for start, stop in unit.counted_slices():
                squares.append(sum_of_squares(grad[max(start - first, 0) : max(stop - first, 0)]))
    model.grad_norm = math.sqrt(gather_in_order(torch.stack(squares).sum(), mesh).sum().item())
    model.grad_divisor = max(1.0, (model.grad_norm + 1e-6) / max_norm) if max_norm else 1.0
    return model.grad_norm


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares in float64, 0-dim, without a float64 copy of x.

    On a CPU blocks of it are widened one by one: six times as fast as the norm that torch computes in float64.
    """
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dtype=torch.float64) ** 2
    total = torch.zeros((), dtype=torch.float64)
    for block in x.split(NORM_BLOCK):
        wide = block.double()
        total += wide.dot(wide)
    return total


class AdamW:
    """Adam with decoupled weight decay on matrices, over the flat units of a model, with float32 master weights.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2        (bias-corrected: m', v')
        w <- w - lr weight_decay w - lr m' / (sqrt(v') + eps)

    The master copy of bfloat16 parameters, m and v are float32; float32 and float64 parameters are their own master.
    From zero 1 on a rank steps over its part of each unit and holds state for that alone. Offloaded, all this lies in
    the host's memory, where gradients come and the steps are made; what stays on the device is weights and gradients.
    Args: lr: one for all, or one for each role that has trainable parameters.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    def __init__(
        self,
        model: DataParallel,
        lr: float | dict[str, float],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.model, self.betas, self.eps = model, betas, eps
        self.units = [unit for unit in model.units if unit.trainable]
        self.roles = {unit: unit.name.partition(".")[0] for unit in self.units}
        self.lr = lr if isinstance(lr, dict) else dict.fromkeys(self.roles.values(), lr)
        missing = sorted(set(self.roles.values()) - set(self.lr))
        if missing:
            raise ValueError(f"no learning rate for {', '.join(missing)}, which has trainable parameters")
        self.offload = "optimizer" in model.layout.offload
        device = torch.device("cpu") if self.offload else model.mesh.device
        self.steps = torch.zeros((), dtype=torch.float32, device=device)  # taken
        self.num_skipped = torch.zeros(())  # in a row, until now
        self.num_unchecked = 0  # steps since the weights were compared
        self.state: dict[Unit, dict[str, Tensor]] = {}
        self._weights: dict[Unit, Tensor] = {}  # what this rank steps over of each unit's `flat`
        self.grads: dict[Unit, tuple[Tensor, Tensor]] = {}  # gradients of that, and where the step reads them
        self._groups: dict[tuple, list[list[Tensor]]] = {}  # (role, decay, dtype) -> weights, gradients, m, v
        for unit in self.units:
            flat, grad, decayed = unit.flat, unit.flat_grad, unit.num_decayed if weight_decay else 0
            if unit.zero:
                flat, grad = unit.own(flat), unit.own(grad)
                decayed = min(max(decayed - unit.part.start, 0), grad.numel())
            source, master = grad, flat if flat.dtype == grad.dtype else flat.to(grad.dtype)
            if self.offload:
                grad, master = on_host(grad), on_host(master)
            self.state[unit] = {"master": master, "m": torch.zeros_like(grad), "v": torch.zeros_like(grad)}
            self._weights[unit], self.grads[unit] = flat, (source, grad)
            tensors = [master, grad, self.state[unit]["m"], self.state[unit]["v"]]
            for decay, part in ((weight_decay, slice(decayed)), (0.0, slice(decayed, None))):
                if grad[part].numel():
                    group = self._groups.setdefault((self.roles[unit], decay, grad.dtype), [[], [], [], []])
                    for column, tensor in zip(group, tensors, strict=True):
                        column.append(tensor[part])

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0, frozen: tuple[str, ...] = ()) -> bool:
        """One step with the gradients that `clip_grad_norm` has measured; afterwards they are no longer meaningful.

        Args: lr_scale: what `lr_multiplier` gives. frozen: roles that this step leaves as they are.
        Returns: False if the norm is not finite: then nothing has changed, on any rank.
        Communication: under zero 1 and 2, and for heads under zero 3, one all-gather over dp of each unit's weights.
            Every DRIFT_EVERY steps the hashes of `check_replicas_equal`.
        Raises: RankError, naming parameter and rank, for the fifth such step in a row or drifted weights.
        """
        model = self.model
        assert model.grad_norm is not None, "clip_grad_norm comes before step, and once for each"
        if not math.isfinite(model.grad_norm):
            self._skip()
            return False
        self.num_skipped.zero_()
        self.steps += 1
        divisor = None
        if model.grad_divisor > 1:
            divisor = torch.tensor(model.grad_divisor, dtype=torch.float32, device=self.steps.device)
        stepped = [unit for unit in self.units if self.roles[unit] not in frozen]
        if self.offload:
            self._fetch(stepped)
        for (role, decay, _), (weights, grads, m, v) in self._groups.items():
            if role in frozen:
                continue
            torch._fused_adamw_(
                weights,
                grads,
                m,
                v,
                [],
                [self.steps] * len(weights),
                lr=self.lr[role] * lr_scale,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
            )
        for unit in stepped:
            if self.state[unit]["master"] is not self._weights[unit]:
                self._weights[unit].copy_(self.state[unit]["master"], non_blocking=True)
        shared = [unit for unit in stepped if unit.zero and unit.full is None]
        gathers = [all_gather_async_(unit.flat, self._weights[unit], unit.dp, unit.name) for unit in shared]
        for gather in gathers:
            gather.wait()
        model.grad_norm = None
        self.num_unchecked += 1
        if self.num_unchecked == DRIFT_EVERY:
            self.num_unchecked = 0
            check_replicas_equal(model.units, model.mesh, "a device or a collective has failed: --resume goes on")
        return True

    def _fetch(self, units: list[Unit]) -> None:
        """Gradients into the host's memory, and weights that are their own master."""
        for unit in units:
            source, grad = self.grads[unit]
            grad.copy_(source, non_blocking=True)
            if unit.flat.dtype == grad.dtype:
                self.state[unit]["master"].copy_(self._weights[unit], non_blocking=True)
        if self.model.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.model.mesh.device)

    def _skip(self) -> None:
        """Warns for the first of a row of skipped steps, ends the run with the last."""
        self.num_skipped += 1
        if self.num_skipped in (1, MAX_SKIPPED):
            found = self.model.mesh.gather_objects(describe_nonfinite(self.model, self.model.mesh))
            culprit = next(filter(None, found), "the norm of finite gradients overflows")
            if self.num_skipped == MAX_SKIPPED:
                raise RankError(
                    f"{MAX_SKIPPED} optimizer steps in a row skipped: {culprit}; "
                    "lower the learning rate, or look at the data of this step"
                )
            if self.model.mesh.is_logger:
                warnings.warn(f"optimizer step skipped on all ranks: {culprit}", stacklevel=3)
        self.model.grad_norm = None

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint holds beside the weights: the counters, and m, v and (of bfloat16 parameters) master as
        "<full name>|m" and so on."""
        for name, counter in (("steps", self.steps), ("num_skipped", self.num_skipped)):
            yield Piece(f"optimizer|{name}", [], (), counter, self.model.mesh.is_logger)
        for unit, state in self.state.items():
            for key, flat in state.items():
                if key != "master" or flat.dtype != unit.flat.dtype:
                    yield from unit.pieces(flat, f"|{key}")
