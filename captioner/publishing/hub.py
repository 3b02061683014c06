"""A copy of an adapter on the Hugging Face hub.

push_to_hub(Path("blip2-finetuned"), "name/of-repository")               # a private repository
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token

from captioner.data.run_record import read_run
from captioner.publishing.merge import check_adapter
from captioner.publishing.model_card import format_card
from captioner.publishing.records import ADAPTER, name_base, read_scores, strip_paths
from captioner.runtime.errors import UserError
from captioner.runtime.files import read_json

UPLOADED = (  # what a user of the adapter needs; with the card, run.json and scores.json
    *ADAPTER,
    *("processor_config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload what a user of the adapter needs to the repository `repo`, which is made private if it isn't there.

    The card is written for it anew; paths of this machine are taken out of the JSON files. Returns the repository's
    address. Raises UserError when there is nothing to upload, or when the hub doesn't take it.
    """
    check_adapter(folder)
    format_card(folder, repo)  # complains before anything is created
    try:
        if get_token() is None:
            raise PermissionError("not logged in")
        api = HfApi()
        url = api.create_repo(repo, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as staging:
            stage_files(folder, Path(staging), url.repo_id)
            api.upload_folder(repo_id=url.repo_id, folder_path=staging, commit_message="Upload the adapter")
    except Exception as error:  # of the hub, the network, the uploader's threads: they have no common type
        raise UserError(
            f"--push-to-hub {repo}: can't be uploaded ({describe_failure(error)}). The adapter is safe in {folder}. "
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
