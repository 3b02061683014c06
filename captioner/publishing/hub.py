"""A copy of an adapter, or of its captions, on the Hugging Face hub.

push_to_hub(Path("blip2-finetuned"), "name/of-repository")               # a private repository
push_captions(Path("blip2-finetuned"), "name/of-data-set")               # its captions, without images
"""

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token

from captioner.data.examples import Example
from captioner.data.run_record import read_run
from captioner.data.splits import read_split
from captioner.publishing.model_card import format_card
from captioner.publishing.records import ADAPTER, check_adapter, name_base, read_scores, strip_paths
from captioner.runtime.errors import UserError
from captioner.runtime.files import read_json

UPLOADED = (  # what a user of the adapter needs; with the card, run.json and scores.json
    *ADAPTER,
    *("processor_config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)

FLAGS = {"model": "--push-to-hub", "dataset": "--push-captions"}  # by kind of repository
SPLITS_ON_HUB = {"train": "train", "val": "validation", "test": "test"}  # what the hub calls them


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload what a user of the adapter needs to the repository `repo`, which is made private if it isn't there.

    The card is written for it anew; paths of this machine are taken out of the JSON files. Returns the repository's
    address. Raises UserError when there is nothing to upload, or when the hub doesn't take it.
    """
    check_adapter(folder)
    format_card(folder, repo)  # complains before anything is created
    return _upload(repo, "model", functools.partial(stage_files, folder), f"adapter is safe in {folder}")


def push_captions(folder: Path, repo: str) -> str:
    """Upload the captions of the adapter in `folder`, without images, to the data set `repo`, as push_to_hub does."""
    splits = {name: read_split(folder, split) for split, name in SPLITS_ON_HUB.items()}
    stage = functools.partial(stage_captions, splits)
    return _upload(repo, "dataset", stage, f"captions are safe in {folder / 'split.csv'}")


def _upload(repo: str, kind: str, stage: Callable[[Path, str], None], kept: str) -> str:
    """Make the private repository `repo` of that kind, and upload what stage(folder, repository) writes.

    `kept` says in the error what is safe, and where.
    """
    try:
        if get_token() is None:
            raise PermissionError("not logged in")
        api = HfApi()
        url = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as staging:
            stage(Path(staging), url.repo_id)
            said = f"Upload the {kept.split()[0]}"
            api.upload_folder(repo_id=url.repo_id, repo_type=kind, folder_path=staging, commit_message=said)
    except Exception as error:  # of the hub, the network, the uploader's threads: they have no common type
        raise UserError(
            f"{FLAGS[kind]} {repo}: can't be uploaded ({describe_failure(error)}). The {kept}. "
            "Log in with hf auth login and a token that may write there, check the name and the connection, then "
            "upload it with the same command and --resume"
        ) from None
    return str(url)


def describe_failure(error: Exception) -> str:
    """What the hub or the network said, on one line; of a failed transfer what made it fail."""
    said = f"{error} {error.__cause__}" if type(error) is RuntimeError else str(error)
    return " ".join(re.sub(r"For more information check: \S+", "", said).split())[:300]


def stage_files(folder: Path, staging: Path, repo: str) -> None:
    """Copy what is uploaded to the folder `staging`; nothing in it names a folder of this machine."""
    for name in UPLOADED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    run, scores = read_run(folder), read_scores(folder)
    adapter = read_json(folder / "adapter_config.json", "train again with python main.py")
    records = {
        "run.json": strip_paths(run),
        "scores.json": scores and strip_paths(scores),
        "adapter_config.json": {**strip_paths(adapter), "base_model_name_or_path": name_base(run)},
    }
    for name, record in records.items():
        if record is not None:
            (staging / name).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (staging / "README.md").write_text(format_card(folder, repo), encoding="utf-8")


def stage_captions(splits: dict[str, list[Example]], staging: Path, repo: str) -> None:
    """Write a CSV for each split to the folder `staging`, and a card by which load_dataset() finds them."""
    import pandas as pd  # here: it takes a while, and most runs don't upload captions

    for name, examples in splits.items():
        rows = [(e.name, caption, e.group) for e in examples for caption in e.captions]
        pd.DataFrame(rows, columns=["name", "caption", "group"]).to_csv(staging / f"{name}.csv", index=False)
    files = "".join(f"  - split: {name}\n    path: {name}.csv\n" for name in splits)
    images = sum(map(len, splits.values()))
    card = f"""---
task_categories:
- image-to-text
configs:
- config_name: default
  data_files:
{files}---
# {repo.rpartition("/")[2]}

Captions of {images:,} images, which are not part of it: `name` is an image's file, `group` what is in one split alone.
"""
    (staging / "README.md").write_text(card, encoding="utf-8")
