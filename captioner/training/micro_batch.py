"""How many frames fit into one forward pass."""

import torch
from accelerate.utils import send_to_device

from captioner.blip2.batches import CaptionCollator, CaptionDataset
from captioner.fast.caption_loss import caption_nll
from captioner.fast.packing import PackedCollator

CPU_MICRO_BATCH = 4  # frames a forward pass on a CPU, where more only take memory
SPARE_MEMORY = 0.05  # share of a GPU that a micro-batch must leave free


def list_micro_batches(batch_size: int) -> list[int]:
    """The sizes that divide an effective batch of `batch_size` on one device, largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def find_micro_batch(model, dataset: CaptionDataset, batch_size: int, device, dtype, fast: bool) -> int:
    """The most frames, of those that divide `batch_size`, whose forward and backward pass fit the device.

    Tried with the longest captions of the dataset; on a CPU the most up to CPU_MICRO_BATCH. Gradients are cleared.
    """
    sizes = list_micro_batches(batch_size)
    if device.type == "cpu":
        return next(size for size in sizes if size <= CPU_MICRO_BATCH)
    collator = (PackedCollator if fast else CaptionCollator)(model.config)
    longest = sorted(range(len(dataset)), key=lambda row: -len(dataset.caption_ids[row]))
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # bytes of AdamW's state
    total = torch.cuda.get_device_properties(device).total_memory
    outside = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)  # of other programs
    for size in sizes:
        rows = [dataset[longest[place % len(longest)]] for place in range(size)]
        torch.cuda.reset_peak_memory_stats(device)
        if _fits(model.train(), send_to_device(collator(rows), device), dtype, fast):
            peak = torch.cuda.max_memory_allocated(device)
            if peak + moments + outside <= (1 - SPARE_MEMORY) * total:
                break
    torch.cuda.reset_peak_memory_stats(device)
    return size


def _fits(model, batch: dict[str, torch.Tensor], dtype: torch.dtype, fast: bool) -> bool:
    try:
        if fast:
            loss = caption_nll(model, **batch).sum()
        else:
            with torch.autocast("cuda", dtype):
                loss = model(**batch).loss
        loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
