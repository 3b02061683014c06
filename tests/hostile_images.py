"""Hostile images, each opened in a process of its own: outcome, seconds, peak MB above an empty process.

python -m tests.hostile_images
"""

import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import psutil
from PIL import Image

LIMIT_SECONDS, LIMIT_MB = 5, 400  # of one image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes((width + 1) * min(height, 64))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + data + chunk(b"IEND", b"")


def make_images(folder: Path) -> list[Path]:
    bomb = zlib.compress(bytes(300_000_000), 9)
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "green")]
    Image.new("1", (30_000, 30_000)).save(folder / "900-megapixels.png")
    Image.new("L", (65_500, 700)).save(folder / "65500-wide.jpg")
    frames[0].save(folder / "whole.jpg")
    for kind in ("gif", "webp"):
        frames[0].save(folder / f"animated.{kind}", save_all=True, append_images=frames[1:])
        (folder / f"animated-{kind}.jpg").write_bytes((folder / f"animated.{kind}").read_bytes())
        (folder / f"animated.{kind}").unlink()
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "png-named.jpg", "PNG")
    contents = {
        "65535-squared.png": png(65_535, 65_535),
        "text-bomb.png": png(64, 64, chunk(b"zTXt", b"a\0\0" + bomb)),
        "icc-bomb.png": png(64, 64, chunk(b"iCCP", b"a\0\0" + bomb)),
        "many-texts.png": png(64, 64, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))] * 200),
        "truncated.jpg": (folder / "whole.jpg").read_bytes()[:400],
        "svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def measure(path: Path) -> dict:
    """What a process of its own says of opening `path`; more than LIMIT_SECONDS raises TimeoutExpired."""
    command = [sys.executable, "-m", "tests.hostile_images", str(path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def open_one(path: Path) -> dict:
    from captioner.data.image_decoding import open_image
    from captioner.runtime.errors import UserError
    from captioner.scoring.report import make_thumbnail

    sizes, done, process = [], threading.Event(), psutil.Process()

    def sample() -> None:  # getrusage would count the peak of the parent too
        while not done.wait(0.001):
            sizes.append(process.memory_info().rss)

    before, start = process.memory_info().rss, time.perf_counter()
    threading.Thread(target=sample, daemon=True).start()
    try:
        outcome = f"read, {open_image(path).size}"
    except UserError as error:
        outcome = "refused" if str(path) in str(error) else "not named"
    shown = make_thumbnail(path, 320, 80) is not None
    seconds = round(time.perf_counter() - start, 2)
    done.set()
    peak = (max(sizes, default=before) - before) / 2**20
    return {"outcome": outcome, "shown": shown, "seconds": seconds, "mb": round(peak)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(open_one(Path(sys.argv[1]))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for path in make_images(Path(folder)):
                found = measure(path)
                print(f"{path.name:<22}{found['outcome']:<20}{found['seconds']:>6.2f} s{found['mb']:>6} MB")
