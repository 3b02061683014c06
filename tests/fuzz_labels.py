"""Damage label files in many ways and see that the reader answers each with frames, counted gaps, or one clear error.

    python tests/fuzz_labels.py --count 100000 [--seed 0] [FILE ...]

Files are label files to damage: drawn ones if none are given. What must hold for every damaged file: no exception but
UserError, and frames in = frames used + frames left out. Prints a table of the outcomes.
"""

import argparse
import copy
import functools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tqdm import tqdm

from captioner.bdd100k import frames, label_report
from captioner.bdd100k import label_files as reader
from captioner.runtime.errors import UserError
from demo.draw import draw_scene

ODD_VALUES = [
    None, True, False, 0, -1, 3.5, 1e308, 10**30, "", "x", "-1", "=1+1", "../../x.jpg", "/etc/passwd", "a\x00.jpg",
    "https://example.org/a.jpg", "é.jpg", "x" * 1_000_000, [], {}, [[]], [None], {"a": 1}, ["car"], [1, "G"], "G",
]  # fmt: skip
ODD_BYTES = [b"", b"\x00", b"\xff", b"{", b"}", b"[", b"]", b",", b'"', b"NaN", b"-", b"1e999", b"\\u0000", b"[" * 5000,
             b'},{"name":', b'"name":"x.jpg",', b"null"]  # fmt: skip


def damage_value(value, rng: random.Random):
    """A JSON value with something at some depth replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, (list, dict)) and place:
        key = rng.randrange(len(place)) if isinstance(place, list) else rng.choice(list(place))
        if rng.random() < 0.3 or not isinstance(place[key], (list, dict)):
            break
        place = place[key]
    if not isinstance(place, (list, dict)) or not place:
        return rng.choice(ODD_VALUES)
    match rng.randrange(4):
        case 0:
            place[key] = rng.choice(ODD_VALUES)
        case 1:
            del place[key]
        case 2 if isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        case _ if isinstance(place, dict):
            place[rng.choice(["Name", "frames", "objects", key.upper()])] = place.pop(key)
    return value


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, flipped, or with odd ones put in."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(1) + data[at + 1 :]
        case 2:
            return data[:at] + rng.choice(ODD_BYTES) + data[at:]
        case _:
            return data[:at] + data[at + rng.randrange(40) :]


def check_file(path: Path, piece: int) -> str:
    """Read one file; the outcome by name. Any exception but UserError passes on, as does a wrong count."""
    reader.PIECE = piece  # small ones, so that small files are cut too
    report = label_report.LabelReport()
    used, frames_in = 0, count_frames(path)
    try:
        for frame in reader.read_labels([path], report):
            used += 1
            assert frames.NAME.fullmatch(frame.name), frame.name
    except UserError as error:
        assert str(path) in str(error), error
        return "no usable frame" if "no usable frame" in str(error) else "error with the file's name"
    assert used == report.frames, (used, report.frames)
    assert frames_in == used + report.skipped.total(), (frames_in, used, report.skipped)
    return "frames left out, counted" if report.skipped else "all frames used"


def count_frames(path: Path) -> int | None:
    """Frames in the file by the json module, an independent reader; None when it is no JSON.

    It is lenient with strings, as ours is with those that it skips unread.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig", errors="replace"), strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        wrapped = value.get("name") is None and isinstance(value.get("frames"), list)
        return len(value["frames"]) if wrapped else 1
    return len(value) if isinstance(value, list) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, start = random.Random(args.seed), time.perf_counter()
    reader._run_jobs = map  # in this process: starting others for each file would take all the time
    reader.tqdm = functools.partial(tqdm, disable=True)
    values = [json.loads(file.read_bytes()) for file in args.files] or [[draw_scene(seed)[1] for seed in range(4)]]
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "labels.json")
        for number in tqdm(range(args.count), mininterval=10):
            value = rng.choice(values)
            for _ in range(rng.randrange(3)):
                value = damage_value(value, rng)
            data = json.dumps(value, indent=rng.choice([None, 4])).encode()
            if rng.random() < 0.6:
                data = damage_bytes(data, rng)
            path.write_bytes(data)
            try:
                outcomes[check_file(path, rng.choice([2**9, 2**11, 2**22]))] += 1
            except BaseException:
                print(f"file {number} of seed {args.seed}, kept in fuzz_labels.failed.json: {data[:300]!r}")
                Path("fuzz_labels.failed.json").write_bytes(data)
                raise
    for outcome, count in outcomes.most_common():
        print(f"{count:>9,} {outcome}")
    print(f"{args.count:,} damaged files, no other exception, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
