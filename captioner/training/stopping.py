"""When a run saves within an epoch, and how a signal stops it."""

import os
import signal
import time
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
        self.answer: tuple[torch.Tensor, torch.cuda.Event] | None = None  # of the step before; when it is on the CPU

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
        """Whether any process is due, the same in all of them.

        On a GPU as of the step before: to wait for this step's answer, the CPU could launch nothing until it is there.
        """
        flag = torch.full((1,), float(due), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if not flag.is_cuda:
            return bool(flag)
        before, self.answer = self.answer, (flag.to("cpu", non_blocking=True), torch.cuda.Event())
        self.answer[1].record()
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])

    def after_save(self) -> None:
        self.saved, self.answer = time.monotonic(), None
        if any(gather(lambda: self.signal is not None)):
            raise Stopped
