"""What a file is that people mistake for labels, captions or images, or get instead of them: tables of signatures."""

import re
from collections.abc import Sequence

WANTED = "--labels takes BDD100K's label files (.json, .jsonl, .json.gz, .zip) and folders of them"
_UNPACK, _FETCH, _CONVERT = "unpack it and give the folder", "fetch it again", f"{WANTED}: convert it"

# (how it begins, what it is, the remedy where labels are wanted); the first that fits counts. Only files that are not
# what is wanted are held against it.
_SIGNATURES = [
    (rb"\s*\Z", "it is empty", _FETCH),
    (rb"\0+\Z", "it holds zero bytes alone, as an unfinished download does", _FETCH),
    (rb"\0\x05\x16[\0\x07]", "it is an AppleDouble file, macOS's notes on a file", "give the file without ._"),
    # text in other encodings, and what stands in for a file
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|[{\[]\0\0\0|\0\0\0[{\[]", "it is UTF-32 text", "save it as UTF-8"),
    (rb"\xff\xfe|\xfe\xff|\s?\0?[!-~]\0[\s!-~]\0|\s?\0[!-~]\0[\s!-~]", "it is UTF-16 text", "save it as UTF-8"),
    (rb"version https://git-lfs", "it is a Git LFS pointer, not the file itself", "fetch the file with git lfs pull"),
    (rb"/?(\.\./)*(\.git/)?annex/objects/", "it is a git-annex pointer", "fetch the file with git annex get"),
    # archives
    (rb"PK\x03\x04|PK\x05\x06", "it is a zip archive", "name it .zip"),
    (rb"\x1f\x8b", "it is packed by gzip", "name it .json.gz"),
    (rb"(?s).{257}ustar", "it is a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "it is a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "it is a RAR archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "it is packed by zstd", _UNPACK),
    (rb"BZh[1-9]", "it is packed by bzip2", _UNPACK),
    (rb"\xfd7zXZ\0", "it is packed by xz", _UNPACK),
    (rb"\x04\x22\x4d\x18", "it is packed by lz4", _UNPACK),
    (rb"\x1f[\x9d\xa0]", "it is packed by compress", _UNPACK),
    # images and other documents
    (rb"\xff\xd8\xff", "it is a JPEG image", WANTED),
    (rb"\x89PNG", "it is a PNG image", WANTED),
    (rb"GIF8", "it is a GIF image", WANTED),
    (rb"(?s)BM.{4}\0{4}", "it is a BMP image", WANTED),
    (rb"II\*\0|MM\0\*", "it is a TIFF image", WANTED),
    (rb"(?s)RIFF.{4}WEBP", "it is a WebP image", WANTED),
    (rb"(?s).{4}ftyp(hei|hev|mif1|avif)", "it is a HEIC or AVIF image", WANTED),
    (rb"(?s).{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI", "it is a video", WANTED),
    (rb"%PDF", "it is a PDF document", WANTED),
    (rb"\xd0\xcf\x11\xe0", "it is an Office document", WANTED),
    # tables, arrays and data bases
    (rb"PAR1", "it is a Parquet table", _CONVERT),
    (rb"ARROW1|\xff\xff\xff\xff.\x0f?\0\0", "it is an Arrow table", _CONVERT),
    (rb"\x89HDF", "it is an HDF5 file", _CONVERT),
    (rb"\x93NUMPY", "it is a NumPy array", _CONVERT),
    (rb"\x80[\x02-\x05]", "it is a pickle, which is not opened, since that can run code", _CONVERT),
    (rb"SQLite format", "it is an SQLite data base", _CONVERT),
    # text
    (rb"(?is)\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body|script)", "it is a web page, as of a login", _FETCH),
    (rb"(?s)\s*(<\?xml.*?\?>\s*)?<annotation", "it is in Pascal VOC's format", _CONVERT),
    (rb"\s*<[?\w]", "it is XML", _CONVERT),
    (rb"(\d+([ \t]+-?\d*\.?\d+(e-?\d+)?){4,}\s*?(\r?\n|\Z))+", "it is in YOLO's format", _CONVERT),
    (rb"(?s)[\[{(]\s*[\[{(]?\s*'", "it is Python's notation, not JSON", "write it with json.dump"),
    (rb"\s*(#[^\n]*\s+)*(\[\[?[\w.-]+\]\]?\s*(#.*)?\r?\n|[\w.-]+ *= )", "it is TOML or INI text", _CONVERT),
    (rb"%YAML|\s*(#[^\n]*\s+)*(---|(- )?[\w -]+:(\s|\Z))", "it is YAML text", _CONVERT),
    (
        rb"[^\0-\x1f,;{}\[\]]+([,;\t][^\0-\x1f,;{}\[\]]*)+\r?\n",
        "it is a CSV table",
        f"{WANTED}: captions go to --captions, other tables must be converted",
    ),
]
_SIGNATURES = [(re.compile(pattern), what, remedy) for pattern, what, remedy in _SIGNATURES]

# (keys that an object has, whose format it is)
_FORMATS = [
    ({"images", "annotations"}, "COCO's format, of which --captions takes captions"),
    ({"annotations", "categories"}, "COCO's format"),
    ({"image_id", "bbox"}, "COCO's results"),
    ({"image_id", "category_id"}, "COCO's results"),
    ({"image_id", "caption"}, "COCO's captions, which go to --captions"),
    ({"shapes", "imagePath"}, "LabelMe's format"),
    ({"_via_img_metadata"}, "VIA's format"),
    ({"regions", "filename"}, "VIA's format"),
    ({"image", "annotations"}, "CreateML's format"),
    ({"data", "annotations"}, "Label Studio's format"),
    ({"data", "predictions"}, "Label Studio's format"),
    ({"openlabel"}, "OpenLABEL's format"),
    ({"imgHeight", "objects"}, "Cityscapes' format"),
    ({"type", "features"}, "GeoJSON"),
    ({"nbformat"}, "a notebook"),
    ({"file_name"}, "a metadata file of the hub, whose captions go to --captions"),
    ({"error"}, "a server's message of an error"),
    ({"code", "message"}, "a server's message of an error"),
]


def name_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins with `head` and is not what is wanted, and the remedy; None if that is not known."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    return next(((what, remedy) for pattern, what, remedy in _SIGNATURES if pattern.match(head)), None)


def name_pointer(head: bytes) -> str | None:
    """What stands in for a file, if that begins with `head`, and the remedy; None: nothing does."""
    what, remedy = name_kind(head) or ("", "")
    return f"{what.removeprefix('it is ')}; {remedy}" if "pointer" in what else None


def name_format(value: dict) -> str | None:
    """Whose format an object is in that is no frame; None if that is not known."""
    return next((name for keys, name in _FORMATS if keys <= value.keys()), None)


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file is no one's labels or images: macOS's notes (._a, __MACOSX/), copies (.ipynb_checkpoints/)."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in parts)
