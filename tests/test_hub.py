"""The command lines without flags: the real clients of Kaggle and the Hugging Face hub against servers on this machine.

Everything is fetched under the names that a user fetches it under; the model is the small one of the demo.
"""

import csv
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from loopback import COMMIT, MODEL, PADDING, HubServer, KaggleServer
from pickles import Planted

from captioner.bdd100k.download import IMAGE_FOLDER, LABEL_FILES

BASE = ROOT / "demo" / "base"
SCENES = 16
SHORT = ["--max-steps", "1", "--dataloader-workers", "0"]
NEVER_FETCHED = {"README.md": b"# BLIP-2", "pytorch_model.bin": bytes(2 << 20)}
pytestmark = pytest.mark.slow  # the clients read where their servers are when a process imports them

BIG, SMALL = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PIECE = 10 << 20  # bytes that huggingface_hub writes at once, and resumes from
CUT = PIECE + (100 << 10)
NOWHERE = "http://127.0.0.1:9"  # nobody answers there

# Kaggle's 15 GB need not be free here: the interpreter reads this file when it starts.
ROOMY_DISK = """
import collections, shutil
shutil.disk_usage = lambda folder: collections.namedtuple("Usage", "total used free")(1 << 40, 0, 1 << 40)
"""


class Site(NamedTuple):
    """Two servers, a fresh cache, and a folder to start the scripts in."""

    kaggle: KaggleServer
    hub: HubServer
    environment: dict[str, str]
    cwd: Path

    def run(self, script: str, *flags: str, cwd: Path | None = None, **environment: str):
        command = [sys.executable, ROOT / script, *flags]
        environment = self.environment | environment
        return subprocess.run(
            command, cwd=cwd or self.cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def fail(self, script: str, *flags: str) -> str:
        """Run what must fail as an error of the user's does: exit code 2, and one line, which is returned."""
        failed = self.run(script, *flags)
        assert "Traceback" not in failed.stderr, failed.stderr
        assert failed.returncode == 2, failed.stderr
        [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
        assert not list(self.cwd.glob("blip2-finetuned/adapter*"))
        return line


@contextmanager
def open_site(folder: Path, kaggle_files: Mapping[str, bytes], hub_files: Mapping[str, bytes]) -> Iterator[Site]:
    ours = ("HF_", "HUGGING", "TRANSFORMERS_", "KAGGLE")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(ROOMY_DISK)
    (folder / "cwd").mkdir()
    # more threads than free cores make these small matrices slow
    kept |= {"PYTHONPATH": str(folder / "site"), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with KaggleServer(kaggle_files, folder) as kaggle, HubServer(hub_files, folder, large=1 << 17) as hub:
        # Kaggle's server is named as a proxy, which the hub's must not go through: its "no_proxy" comes last
        yield Site(kaggle, hub, kept | kaggle.environment | hub.environment, folder / "cwd")


@pytest.fixture(scope="module")
def kaggle_files(tmp_path_factory) -> dict[str, bytes]:
    """Drawn scenes in the layout of the Kaggle data set: {path: bytes}."""
    from demo.draw import draw_dataset

    labels = draw_dataset(tmp_path_factory.mktemp("drawn"), range(SCENES), workers=1)
    images = (labels.parent / "images").iterdir()
    files = {f"{IMAGE_FOLDER}/val/{image.name}": image.read_bytes() for image in images}
    return files | {LABEL_FILES["val"]: labels.read_bytes(), LABEL_FILES["train"]: b"[]", PADDING: os.urandom(3 << 20)}


def read_base() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in BASE.iterdir()}


def read_sharded_base() -> dict[str, bytes]:
    """The base model's files with its weights in two, as the large checkpoint has them."""
    from safetensors.torch import load, save

    files = read_base()
    weights = load(files.pop("model.safetensors"))
    small = [name for name in weights if name.startswith("qformer.encoder.layer.0.attention.")]
    shards = {BIG: weights.keys() - set(small), SMALL: small}
    files |= {shard: save({name: weights[name] for name in names}) for shard, names in shards.items()}
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def break_archive_and_reset(folder: Path, kaggle_files: Mapping[str, bytes]) -> None:
    """Kaggle's archive breaks off, and is resumed; then the hub resets the connection: huggingface_hub gives up."""
    with open_site(folder, kaggle_files, read_base()) as site:
        site.kaggle.cut_after = 5 << 19  # 2.5 MiB of 3: kagglehub has written two pieces of 1 MiB
        error = site.fail("main.py", *SHORT)
        assert "Kaggle" in error and "run the same command again" in error

        site.hub.cut_at, site.hub.reset = CUT, True
        error = site.fail("main.py", *SHORT)
        assert MODEL in error and "reset by peer" in error
        assert site.kaggle.calls == [LABEL_FILES["val"], "", ""]
        assert site.kaggle.served[-1] == ("", 2 << 20, len(site.kaggle.archive) - (2 << 20))
        assert site.hub.served[-1] == ("model.safetensors", 0, CUT)


def break_weights(folder: Path, kaggle_files: Mapping[str, bytes]) -> None:
    """The weights break off each time: huggingface_hub gives up. Then once: it goes on from there, and no harm is done.

    The weights are in two files, as in the large checkpoint: transformers fetches them by other ways than one.
    """
    sharded = read_sharded_base()
    with open_site(folder, kaggle_files, sharded) as site:
        site.hub.cut_at, site.hub.cuts = CUT, math.inf
        error = site.fail("main.py", *SHORT)
        assert MODEL in error and "closed connection" in error
        tries = [part for part in site.hub.served if part[0] == BIG]
        assert tries[:2] == [(BIG, 0, CUT), (BIG, PIECE, CUT - PIECE)]

        site.hub.cuts = 1
        trained = site.run("main.py", *SHORT)
        assert trained.returncode == 0, trained.stderr
        assert (site.cwd / "blip2-finetuned/adapter_model.safetensors").is_file()
        again = [part for part in site.hub.served if part[0] == BIG][len(tries) :]
        assert again == [(BIG, 0, CUT), (BIG, PIECE, len(sharded[BIG]) - PIECE)]
        assert sorted(name for name, _, _ in site.hub.served if name != BIG) == sorted(sharded.keys() - {BIG})
        assert site.kaggle.calls == [LABEL_FILES["val"], ""]


CASES = [break_archive_and_reset, break_weights]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, kaggle_files):
    """The cases at work, beside each other and the other tests: their time is mostly imports."""
    with ThreadPoolExecutor() as pool:
        yield {case: pool.submit(case, tmp_path_factory.mktemp(case.__name__), kaggle_files) for case in CASES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, kaggle_files, cases):
    """A site at which main.py and eval.py have run with no flag, and what the hub had sent before eval.py."""
    with open_site(tmp_path_factory.mktemp("hub"), kaggle_files, read_base() | NEVER_FETCHED) as site:
        trained = site.run("main.py")
        assert trained.returncode == 0, trained.stderr
        fetched = list(site.hub.served)
        evaluated = site.run("eval.py")
        assert evaluated.returncode == 0, evaluated.stderr
        yield site, fetched, evaluated.stdout


def test_no_flag_is_needed(finished):
    """main.py leaves an adapter in ./blip2-finetuned, and eval.py scores it."""
    site, _, printed = finished
    output = site.cwd / "blip2-finetuned"
    assert (output / "adapter_model.safetensors").stat().st_size > 100_000
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL
    assert json.loads((output / "run.json").read_text())["config"]["model"] == f"{MODEL}@{COMMIT}"
    with open(output / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == SCENES
    images_root = Path(json.loads((output / "run.json").read_text())["images_root"])
    assert images_root.is_relative_to(site.kaggle.cache)
    assert all((images_root / row["image"]).is_file() for row in rows)
    assert "BLEU-4" in printed
    [scores] = [json.loads(file.read_text()) for file in site.cwd.glob("logs/*-eval/scores.json")]
    assert scores["n"] == sum(row["split"] == "test" for row in rows) > 0
    assert set(scores["scores"]["corpus_bleu"]) == {f"BLEU-{n}" for n in range(1, 5)}


def test_each_file_is_fetched_once_and_none_in_vain(finished):
    site, fetched, _ = finished
    assert sorted(fetched) == sorted((name, 0, len(content)) for name, content in read_base().items())
    assert site.kaggle.calls == [LABEL_FILES["val"], ""]
    assert [start for _, start, _ in site.kaggle.served] == [0, 0]


def test_what_was_fetched_is_not_fetched_again(finished, tmp_path):
    """A second run asks the hub and gets no file; without a network both scripts run as well."""
    site, fetched, _ = finished
    calls = len(site.hub.calls)
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": NOWHERE, "http_proxy": NOWHERE, "HTTP_PROXY": NOWHERE}
    (tmp_path / "online").mkdir()
    (tmp_path / "offline").mkdir()
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(site.run, "main.py", *SHORT, cwd=tmp_path / "online"),
            pool.submit(site.run, "main.py", *SHORT, cwd=tmp_path / "offline", **offline),
            pool.submit(site.run, "eval.py", "--run-name", "offline", **offline),
        ]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr
    for folder in ("online", "offline"):
        assert (tmp_path / folder / "blip2-finetuned/adapter_model.safetensors").is_file()
    assert (site.cwd / "logs/offline/scores.json").is_file()
    assert len(site.hub.calls) > calls
    assert site.hub.served == fetched
    assert site.kaggle.calls == [LABEL_FILES["val"], ""]


def test_a_model_of_pickles_is_not_fetched(tmp_path, kaggle_files):
    """Weights in a .bin alone, which would run code: refused with the reason, and not even asked for."""
    mark = tmp_path / "ran"
    files = read_base()
    del files["model.safetensors"]
    files |= {"pytorch_model.bin": pickle.dumps(Planted(mark)) + bytes(1 << 18)}
    with open_site(tmp_path, kaggle_files, files) as site:
        error = site.fail("main.py", *SHORT)
        assert MODEL in error and "Weights are read from safetensors alone" in error
        assert "pytorch_model.bin" not in {name for name, _, _ in site.hub.served}
        assert not list(site.hub.home.rglob("*.bin"))
        assert not [call for call in site.hub.calls if "/commits/" in call or "/discussions" in call]
    assert not mark.exists()


@pytest.mark.parametrize("case", CASES)
def test_broken_download_is_one_message(cases, case):
    cases[case].result()
