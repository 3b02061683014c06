"""BDD100K labels -> captions, a CSV of name,raw_caption.

python bdd100k_data_pipeline.py --labels bdd100k_labels_images_val.json --output bdd100k_captions.csv
python bdd100k_data_pipeline.py --census     # the val labels of the Kaggle data set, and what they hold
python bdd100k_data_pipeline.py --demo       # drawn scenes
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where the package is, which PYTHONSAFEPATH leaves out

from captioner.data.label_captions import caption_labels, check_replaceable, find_labels
from captioner.runtime.cli import run_script
from captioner.runtime.errors import go_on_without
from captioner.runtime.files import lock_folder, name_run, split_revision
from config import BASE_MODEL, DEMO_FOLDER, PipelineConfig, parse_args

TOKENISED = 2000  # captions whose tokens are counted for the census


def count_tokens(captions: list[str]) -> tuple[Counter[int], str]:
    """Lengths in tokens, and whose: the default model's tokenizer if it was fetched before, else the demo's."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    name, revision = split_revision(BASE_MODEL)
    file = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    if not isinstance(file, str):
        name, file = "demo's", DEMO_FOLDER / "base/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    encoded = tokenizer.encode_batch(captions[:: max(1, len(captions) // TOKENISED)], add_special_tokens=False)
    return Counter(len(caption.ids) for caption in encoded), f"{name} tokenizer"


def main(config: PipelineConfig) -> None:
    check_replaceable(config.output, "--output")
    run_dir = name_run(config.run_name, "-labels")
    with lock_folder(run_dir, "--run-name"):
        report = caption_labels(config.source, find_labels(config), config.output, run_dir)
        if config.census:
            from captioner.bdd100k.census import draw_census, print_census  # here: they need pandas
            from captioner.data.caption_files import read_captions

            tokens, tokenizer = count_tokens(read_captions(config.output)["caption"].tolist())
            print_census(report, tokens, tokenizer)
            with go_on_without(f"image in {run_dir / 'census.png'}"):
                draw_census(report, tokens, run_dir / "census.png")
                print(f"census drawn in {run_dir / 'census.png'}")


if __name__ == "__main__":
    run_script(main, parse_args(PipelineConfig))
