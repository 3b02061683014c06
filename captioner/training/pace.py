"""When a run saves within an epoch, and how a signal stops it."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from transformers import TrainerCallback

from captioner.runtime.processes import gather


class Stopped(Exception):
    """Training was asked to stop, and has saved its state."""


class Pace(TrainerCallback):
    """Saves within epochs every `minutes`, and saves and stops on SIGTERM and Ctrl-C.

    A second signal stops at once. Use as a context manager around train().
    """

    def __init__(self, minutes: float, steps_per_epoch: int, world_size: int):
        self.seconds, self.steps_per_epoch, self.world_size = 60 * minutes, steps_per_epoch, world_size
        self.signal: int | None = None
        self.saved = time.monotonic()
        self.asked: Callable | None = None  # on a GPU: what gives the answer to what the processes were asked last

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        said = f"\n{signal.Signals(number).name}: stops as soon as the state is saved; again: at once\n"
        with suppress(OSError):
            os.write(2, said.encode())  # by no print(): the signal may have come in the midst of one

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_epoch == 0 or state.global_step >= state.max_steps:
            return  # the end of an epoch is saved anyway, after its validation
        due = self.signal is not None or time.monotonic() - self.saved >= self.seconds
        if self.world_size > 1:
            due = self._is_any_due(due, args.device)
        if due:
            control.should_save = True

    def _is_any_due(self, due: bool, device: torch.device) -> bool:
        """Whether a process is due, the same in all of them; on a GPU as of the step before, so that it need not wait.

        The CPU would else launch nothing until the step is done.
        """
        flag = torch.full((1,), float(due), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if not flag.is_cuda:
            return bool(flag)
        before, self.asked = self.asked, send_to_cpu(flag)
        return before is not None and bool(before())

    def after_save(self) -> None:
        self.saved, self.asked = time.monotonic(), None
        if any(gather(lambda: self.signal is not None)):
            raise Stopped


def send_to_cpu(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy values to the CPU while the GPU goes on; what is returned gives them, without waiting for more."""
    copy = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if values.is_cuda else None
    if arrived:
        arrived.record()

    def get() -> torch.Tensor:
        if arrived:
            arrived.synchronize()
        return copy

    return get
