"""BDD100K labels -> captions, a CSV of name,raw_caption.

python bdd100k_data_pipeline.py --labels bdd100k_labels_images_val.json --output bdd100k_captions.csv
python bdd100k_data_pipeline.py              # the val labels of the Kaggle data set
python bdd100k_data_pipeline.py --demo       # drawn scenes
"""

from config import PipelineConfig, parse_args, run_script
from data import caption_labels, find_labels


def main(config: PipelineConfig) -> None:
    caption_labels(config, find_labels(config), config.output)


if __name__ == "__main__":
    run_script(main, parse_args(PipelineConfig))
