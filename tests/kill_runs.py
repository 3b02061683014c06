"""Kill training at random moments, let it go on, and see that the same adapter comes out.

    python tests/kill_runs.py --count 20 --folder /tmp/kills                      # the demo's run
    python tests/kill_runs.py --count 3 --folder /tmp/kills -- --labels ... --model ...    # any other run of main.py

One run that nobody disturbs gives the SHA-256 of the adapter. Then `count` times a new run is killed with SIGKILL,
with all its workers, at a random moment of its life (loading, training, validation, writing of a checkpoint, saving),
once or more, and started again with the same command until it ends by itself. Prints a row for each: when it was
killed, what the next run went on from, and whether the adapter is the same. Exit code 1 if any is not.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MAIN = Path(__file__).parent.parent / "main.py"


def start(flags: list[str], folder: Path, log) -> subprocess.Popen:
    command = [sys.executable, str(MAIN), *flags, "--output", "adapter", "--run-name", "run"]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def run_to_end(flags: list[str], folder: Path) -> tuple[str, float, str]:
    """(SHA-256 of the adapter, seconds, output) of a run that nobody disturbs."""
    began = time.monotonic()
    log = folder / "log.txt"
    with open(log, "w") as file:
        code = start(flags, folder, file).wait()
    if code:
        sys.exit(f"main.py ended with {code}:\n{log.read_text()[-3000:]}")
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(adapter).hexdigest(), time.monotonic() - began, log.read_text()


def kill_at(flags: list[str], folder: Path, seconds: float) -> bool:
    """Whether the run was alive when it was killed after `seconds`."""
    with open(folder / "killed.txt", "w") as file:
        process = start(flags, folder, file)
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="of main.py, after --; none: --demo")
    args = parser.parse_args()
    flags = args.flags or ["--demo", "--wandb", "disabled", "--save-minutes", "0.02"]
    folder = args.folder.resolve()
    (folder / "undisturbed").mkdir(parents=True, exist_ok=True)
    expected, seconds, _ = run_to_end(flags, folder / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s, adapter {expected[:16]}", flush=True)
    rng, failures = random.Random(args.seed), 0
    for number in range(args.count):
        here = folder / f"killed-{number}"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        if (folder / "undisturbed" / "demo-data").is_dir():  # drawn before: every run draws what is not there
            shutil.copytree(folder / "undisturbed" / "demo-data", here / "demo-data")
        moments = [rng.uniform(0, seconds) for _ in range(rng.choice((1, 1, 2)))]
        killed = [moment for moment in moments if kill_at(flags, here, moment)]
        got, _, output = run_to_end(flags, here)
        went_on = [line for line in output.splitlines() if line.startswith("goes on") or "is damaged" in line]
        same = got == expected
        failures += not same
        told = ", ".join(f"{moment:.1f} s" for moment in killed) or "no time, it had ended"
        print(f"{number}: killed after {told}; {'; '.join(went_on) or 'began anew'}; "
              f"{'same adapter' if same else 'ANOTHER ADAPTER'}", flush=True)  # fmt: skip
        shutil.rmtree(here)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
