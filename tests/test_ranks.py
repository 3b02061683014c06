"""Whether the ranks of ranks.py are what accelerate launch starts, and what becomes of one that fails."""

import json
import os
import time

import pytest
import ranks
from ranks import BY_DDP, BY_FSDP, launch, start_ranks

SHOW = """
import json, os, sys
with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(dict(os.environ), file)
"""
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {}
print("ends")
"""
HANG = "print('hangs', flush=True); print(os.getpid(), file=open('hangs', 'w')); import time; time.sleep(600)"


@pytest.mark.slow
@pytest.mark.parametrize("how", [BY_DDP, BY_FSDP])
def test_ranks_have_the_environment_of_launched_processes(tmp_path, how):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    for start in (launch, start_ranks):
        with start(script, start.__name__, cwd=tmp_path, how=how) as ended:
            pass
        assert ended.returncode == 0, ended.err
    for rank in range(2):
        launched, forked = (
            {
                name: value
                for name, value in json.loads((tmp_path / f"{start}-{rank}.json").read_text()).items()
                if name.startswith(("ACCELERATE_", "FSDP_", "OMP_")) or name in PLACE
            }
            for start in ("launch", "start_ranks")
        )
        assert forked == launched and set(PLACE) < set(launched)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [("os.kill(os.getpid(), signal.SIGKILL)", -9, ""), ("raise ValueError('broken')", 1, "ValueError: broken")],
)
def test_a_rank_that_fails_leaves_the_other_and_its_environment_alone(tmp_path, fault, code, said):
    (tmp_path / "fail.py").write_text(FAIL.format(fault))
    with start_ranks(tmp_path / "fail.py", cwd=tmp_path) as failed:
        pass
    assert failed.codes == [0, code]
    assert failed.outs == ["ends\n", ""] and failed.errs[0] == "" and said in failed.errs[1]
    assert "RANK" not in os.environ


def test_a_rank_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS", 3)
    (tmp_path / "fail.py").write_text(FAIL.format(HANG))
    with (
        pytest.raises(AssertionError, match=r"exit codes after 3 s: \[0, None\]\nends\nhangs"),
        start_ranks(tmp_path / "fail.py", cwd=tmp_path),
    ):
        while not (tmp_path / "hangs").exists():  # the server may have to import yet
            time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs").read_text()), 0)


SHARE = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from captioner.runtime.processes import share_folder
with share_folder(Path("adapter")) as here:
    print(here == Path("adapter"), here.name, sorted((path.name, path.read_text()) for path in here.glob("w*")))
print(here.exists())
"""


def test_a_process_without_the_folder_of_the_first_has_a_copy_for_a_while(tmp_path):
    """Another machine's folder may be absent, or hold an older adapter; what is there stays as it is."""
    script = tmp_path / "share.py"
    script.write_text(SHARE.format(root=str(ranks.ROOT)))
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine, content in zip(machines, ("new", "old"), strict=True):
        (machine / "adapter" / "checkpoints").mkdir(parents=True)
        (machine / "adapter" / "weights").write_text(content)
    for cwd, shared in ((machines, "False"), (machines[0], "True")):
        with start_ranks(script, cwd=cwd) as ended:
            pass
        assert ended.codes == [0, 0], ended.err
        files = "adapter [('weights', 'new')]"
        assert ended.outs == [f"True {files}\nTrue\n", f"{shared} {files}\n{shared}\n"]
    assert (machines[1] / "adapter" / "weights").read_text() == "old"
