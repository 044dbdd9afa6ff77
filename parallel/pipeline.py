"""One step's forward and backward passes over its micro-batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.collectives import all_reduce_
from parallel.data_parallel import DataParallel


def forward_backward(
    model: DataParallel,
    microbatches: list[dict],
    loss_fn: Callable[[dict], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, float]:
    """Adds the gradients of the summed loss over all micro-batches of all replicas to those of the model.

    Args: loss_fn: gives a micro-batch's loss, already divided by the num_tokens of the whole batch, and its metrics,
        0-dim tensors of which the same names appear everywhere. Replicas may have different numbers of micro-batches
        under zero 0 and 1 only, where nothing is communicated before the last.
    Communication: gradients as `DataParallel` reduces them, during the backward passes; one all-reduce (sum) of the
        metrics over dp, and one (max) if there are names that begin with max_.
    Returns: "loss" and every metric, summed over micro-batches and replicas (max_...: their maximum), as floats.
    """
    assert microbatches, "a replica without a micro-batch does not know the names of the metrics"
    model.mesh.at("update")
    total: dict[str, Tensor] = {}
    for i, microbatch in enumerate(microbatches):
        loss, metrics = loss_fn(microbatch)
        is_last = i == len(microbatches) - 1
        model.start_sync(is_last)
        loss.backward()
        model.finish_sync(is_last)
        for name, value in {"loss": loss, **metrics}.items():
            value = value.detach().double()
            if name in total:
                value = torch.maximum(total[name], value) if name.startswith("max_") else total[name] + value
            total[name] = value
    return reduce_metrics(total, model.mesh)


def reduce_metrics(metrics: dict[str, Tensor], mesh) -> dict[str, float]:
    """0-dim tensors to floats, summed over dp (names that begin with max_: their maximum); one transfer to the host."""
    sums = [name for name in metrics if not name.startswith("max_")]
    maxima = [name for name in metrics if name.startswith("max_")]
    parts = []
    for names, op in ((sums, "sum"), (maxima, "max")):
        if names:
            part = torch.stack([metrics[name].to(mesh.device) for name in names])
            all_reduce_(part, mesh.dp, op)
            parts.append(part)
    return dict(zip(sums + maxima, torch.cat(parts).tolist(), strict=True))
