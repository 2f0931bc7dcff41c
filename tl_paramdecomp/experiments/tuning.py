"""Fine-tuning a model along chosen subnetworks only: how far along each is all that is learned.

Local Loss Landscape Decomposition (arXiv 2504.00194, section 5) proposes it; a model is moved by a handful of numbers, each
of which belongs to something it already does.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.errors import DataError, DivergedError, SettingError
from tl_paramdecomp.patching.subnetworks import perturbed
from tl_paramdecomp.patching.target import checked_adapter, frozen
from tl_paramdecomp.settings import Count, Positive, Seed, fit
from tl_paramdecomp.sites import check_rows

TuningLoss = Callable[[Tensor, Batch], Float[Tensor, ""]]
"""From the moved model's outputs and the batch to what is made small."""


def tune_along(
    model: Any,
    decomposition: SubnetworkDecomposition,
    subnetworks: Iterable[int],
    data: Any,
    *,
    steps: int,
    loss: TuningLoss | None = None,
    batch_size: int = 16,
    lr: float = 0.03,
    seed: int = 0,
    progress: bool = True,
) -> dict[int, float]:
    """Learn how far to move along each of the chosen subnetworks; use the result with `perturbed(model, decomposition, ...)`.

    Args:
        model: The target, on any host; it stays as it is.
        decomposition: From `L3D`.
        subnetworks: Which.
        data: As `decompose` takes it.
        steps: Steps of Adam, its learning rate falling linearly to 0.
        loss: What to make small; None: cross-entropy of the next token, in nats, over the positions that count.
        batch_size: Rows per step.
        lr: Learning rate, in units of the subnetworks' norm of 1.
        seed: Order of the rows.
        progress: Show a progress bar.

    Returns:
        How far along each subnetwork, by its number.

    Raises:
        SettingError: No subnetwork is given, or one twice; steps or lr is not positive.
        DivergedError: The loss is NaN or infinite.
        ComponentIndexError, TargetMismatchError, DeviceError, DataError: As `perturbed` and `decompose`.
    """
    adapter = checked_adapter(model, decomposition)
    if loss is None:
        need_logits(adapter, "The loss of next tokens needs", "give a loss of the outputs (loss=...)")
    chosen = [decomposition.index(k) for k in subnetworks]
    if not chosen or len(set(chosen)) < len(chosen):
        raise SettingError(f"Give at least one subnetwork, each once; given {chosen}.")
    steps, lr, seed = fit(steps, Count, "steps"), fit(lr, Positive, "lr"), fit(seed, Seed, "seed")
    source = batch_source(data, batch_size, seed, model=adapter, decomposition=decomposition)
    source.check()
    dtype = next(decomposition.parameters()).dtype
    deltas = {k: torch.zeros((), dtype=dtype, device=adapter.device, requires_grad=True) for k in chosen}
    optimiser = torch.optim.Adam(list(deltas.values()), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 - step / steps)
    bar = tqdm(range(steps), desc="tuning", disable=not progress)
    with frozen(adapter), frozen(decomposition), torch.enable_grad(), perturbed(model, decomposition, deltas):
        for step in bar:
            batch = source.batch(step).to(adapter.device)
            check_rows(batch.tokens, batch.attention_mask)
            if loss is None and batch.tokens.is_floating_point():
                raise DataError(
                    f"The rows are {batch.tokens.dtype}, no token ids with a next one; give a loss (loss=...)."
                )
            value = (loss or next_token_loss)(adapter.forward(batch.tokens, batch.attention_mask), batch)
            if not bool(torch.isfinite(value)):
                raise DivergedError(f"The loss is {value.item()} at step {step} of tuning; lower lr, now {lr}.")
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.4f}")
    return {k: delta.item() for k, delta in deltas.items()}


def next_token_loss(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of the next token in nats, mean over the positions whose next token counts."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    found = -log_p.gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
    if batch.attention_mask is None:
        return found.mean()
    counted = (batch.attention_mask[:, 1:] * batch.attention_mask[:, :-1]).to(found)
    return (found * counted).sum() / counted.sum().clamp(min=1.0)
