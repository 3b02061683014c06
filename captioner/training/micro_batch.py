"""How many frames fit into one forward pass."""

from collections.abc import Callable

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor

from captioner.blip2.batches import CaptionCollator, list_lengths
from captioner.blip2.loading import pick_dtype

CPU_MICRO_BATCH = 4  # frames a forward pass on a CPU, where more only take memory
SPARE_MEMORY = 0.05  # share of a GPU that a micro-batch must leave free


def list_micro_batches(batch_size: int) -> list[int]:
    """The sizes that divide an effective batch of `batch_size` on one device, largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def compute_loss(model, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss of a batch, in the precision in which the Trainer computes it."""
    with torch.autocast(model.device.type, pick_dtype(model.device)):
        return model(**batch).loss


def find_micro_batch(
    model,
    dataset: Dataset,
    batch_size: int,
    collator: CaptionCollator,
    compute_loss: Callable[..., Tensor],
) -> int:
    """The most frames, of those that divide `batch_size`, whose forward and backward pass fit the model's device.

    The pass is that of compute_loss(model, batch), of a batch as the collator makes it. Tried with the longest captions
    of the dataset; on a CPU the most up to CPU_MICRO_BATCH. Gradients are cleared.
    """
    sizes, device = list_micro_batches(batch_size), model.device
    if device.type == "cpu":
        return next(size for size in sizes if size <= CPU_MICRO_BATCH)
    lengths = list_lengths(dataset)
    longest = sorted(range(len(dataset)), key=lambda row: -lengths[row])
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # bytes of AdamW's state
    total = torch.cuda.get_device_properties(device).total_memory
    outside = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)  # of other programs
    for size in sizes:
        rows = [dataset[longest[place % len(longest)]] for place in range(size)]
        torch.cuda.reset_peak_memory_stats(device)
        if _fits(model.train(), send_to_device(collator(rows), device), compute_loss):
            peak = torch.cuda.max_memory_allocated(device)
            if peak + moments + outside <= (1 - SPARE_MEMORY) * total:
                break
    torch.cuda.reset_peak_memory_stats(device)
    return size


def _fits(model, batch: dict[str, Tensor], compute_loss: Callable[..., Tensor]) -> bool:
    try:
        compute_loss(model, batch).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
