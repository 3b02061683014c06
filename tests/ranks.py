"""Scripts in two processes, joined by gloo on the CPU, as `accelerate launch` starts them.

`start_ranks` runs a script in two ranks without the seconds of its imports: they are forked from a process that has
imported the scripts already (multiprocessing's fork server, which pytest's process starts once). The ranks get the
environment that accelerate would give them. Each is a process of its own, with its own exit code, so that nothing is
to be reset between two scripts, and a rank that crashes or hangs harms no other. No rank is ended because the other
failed: both must end by themselves.

`launch` starts `accelerate launch` itself, for tests of what the launcher does.
"""

import itertools
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from torch.distributed import TCPStore

BY_DDP = ("--multi_gpu",)  # with --cpu the launcher starts one process, with --multi_gpu two wherever it is
BY_FSDP = ("--config_file", ROOT / "captioner" / "training" / "fsdp.yaml", "--mixed_precision", "no")  # exact on a CPU
PROCESSES = ("--num_processes", 2, "--main_process_port", 0)
LAUNCH = ("-m", "accelerate.commands.launch", *BY_DDP, *PROCESSES)  # what Python is told before the script
SECONDS = 200  # that a script may take

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ranks", "main", "eval", "tyro", "matplotlib.backends.backend_agg"])


@dataclass
class Ended:
    """The outcome of two ranks: exit code, stdout and stderr of each; `launch` has them as one."""

    codes: list[int] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    errs: list[str] = field(default_factory=list)

    @property
    def returncode(self) -> int:
        return next(filter(None, self.codes), 0)

    @property
    def out(self) -> str:
        return "".join(self.outs)

    @property
    def err(self) -> str:
        return "".join(self.errs)


def start_server() -> None:
    """Start the process that ranks are forked from. It imports on while this one goes on."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
        multiprocessing.forkserver.ensure_running()


@contextmanager
def start_ranks(script: Path, *args, cwd: Path | Sequence[Path], how: tuple = BY_DDP) -> Iterator[Ended]:
    """Run the script in two ranks; what came of them is there when the block ends, in which a test may do other work.

    With a sequence for `cwd` each has a folder of its own, as on two machines. Raises AssertionError if a rank has not
    ended SECONDS later.
    """
    start_server()
    ended = Ended()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet, as the launcher's
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(2)]
        for path in itertools.chain(*files):
            path.touch()
        command = [str(script), *map(str, args)]
        folders = [cwd] * 2 if isinstance(cwd, Path) else cwd
        ranks = [
            SERVER.Process(
                target=_run, args=(command, folders[rank], make_environment(rank, store.port, how), *files[rank])
            )
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        try:
            yield ended
            end = time.monotonic() + SECONDS
            for rank in ranks:
                rank.join(max(0, end - time.monotonic()))
            ended.codes = [rank.exitcode for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
            ended.outs, ended.errs = (
                [path.read_text(errors="replace") for path in paths] for paths in zip(*files, strict=True)
            )
    assert None not in ended.codes, f"exit codes after {SECONDS} s: {ended.codes}\n{ended.out}\n{ended.err}"


def make_environment(rank: int, port: int, how: tuple) -> dict[str, str]:
    """This process's environment, with the variables that the launchers of accelerate and torch add for a rank."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*map(str, [*how, *PROCESSES]), "script"]))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return prepare_multi_gpu_env(args) | {name: str(value) for name, value in (place | store).items()}


def _run(command: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """What `python script args` does, in this process, which was forked for it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


@contextmanager
def launch(script: Path, *args, cwd: Path, how: tuple = BY_DDP) -> Iterator[Ended]:
    """The same by `accelerate launch` itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, *PROCESSES, script, *args]
    pipe, ended = subprocess.PIPE, Ended()
    with subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield ended
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.terminate()  # nothing, if it has ended; else the launcher ends the two
    ended.codes, ended.outs, ended.errs = [process.returncode], [out], [err]
