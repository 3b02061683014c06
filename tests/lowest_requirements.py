"""Print requirements.txt with the lowest version that each line admits: `name>=a,<b` becomes `name==a`.

    python -m venv /tmp/lowest && . /tmp/lowest/bin/activate
    pip install torch==2.13.0                                       # the CPU build, where the lowest is not at hand
    python tests/lowest_requirements.py --without torch > /tmp/lowest.txt
    pip install -r /tmp/lowest.txt pytest pytest-timeout hypothesis pycocoevalcap fastjsonschema
    python -m pytest tests/test_config.py tests/bdd100k/test_captions.py tests/data/test_data.py \\
        tests/scoring/test_metrics.py tests/blip2/test_model.py tests/bdd100k/test_pipeline.py tests/test_end_to_end.py
"""

import argparse
import re
from pathlib import Path

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
LINE = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)(,<[0-9.]+)?")


def list_lowest(text: str) -> dict[str, str]:
    """{package: lowest version} of a requirements file, each line of which must name one."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    matches = {line: LINE.fullmatch(line) for line in lines if line}
    if wrong := [line for line, match in matches.items() if match is None]:
        raise SystemExit(f"{wrong[0]}: must be name>=version or name>=version,<version")
    return {match[1]: match[2] for match in matches.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", nargs="*", default=[], help="packages that are left out")
    args = parser.parse_args()
    for name, version in list_lowest(REQUIREMENTS.read_text()).items():
        if name not in args.without:
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
