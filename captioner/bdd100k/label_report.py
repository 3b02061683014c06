"""What was read of label files, and what was left out and why: a plain record."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from captioner.bdd100k.facts import AREAS, Frame, ObjectKind
from captioner.runtime.errors import escape_controls

LISTED = 20  # frames left out that are listed by name for each reason


@dataclass
class LabelReport:
    """What was read, and what was left out and why. Counts are of frames unless the name says otherwise."""

    frames: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason: frames
    listed: dict[str, list[str]] = field(default_factory=dict)  # reason: names of the first frames
    remarks: Counter[str] = field(default_factory=Counter)  # what is not as it should be, and not counted: times
    choices: Counter[str] = field(default_factory=Counter)  # what is to be known, but no fault: times
    variants: Counter[str] = field(default_factory=Counter)
    attributes: dict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )  # attribute: value: frames
    objects: Counter[ObjectKind] = field(default_factory=Counter)  # kind: objects
    boxes_a_frame: Counter[int] = field(default_factory=Counter)
    near_duplicates: int = 0  # boxes
    caption_words: Counter[int] = field(default_factory=Counter)  # words of a caption: captions

    def skip(self, reason: str, name: object) -> None:
        self.skipped[reason] += 1
        listed = self.listed.setdefault(reason, [])
        if len(listed) < LISTED:
            listed.append(escape_controls(str(name)[:80]))

    def add(self, frames: Sequence[Frame]) -> None:
        """Count frames that are used."""
        if not frames:
            return
        self.frames += len(frames)
        for name in ("time_of_day", "weather", "scene", "traffic_light"):
            self.attributes[name].update([getattr(frame.facts, name) or "none" for frame in frames])
        objects, boxes_a_frame = self.objects, []
        for frame in frames:
            boxes = 0
            for kind, count in frame.facts.objects.items():
                objects[kind] += count
                if kind[0] not in AREAS:
                    boxes += count
            boxes_a_frame.append(boxes)
        self.boxes_a_frame.update(boxes_a_frame)

    def merge(self, other: "LabelReport") -> None:
        """Add what another process counted."""
        self.frames += other.frames
        self.near_duplicates += other.near_duplicates
        for name in ("skipped", "remarks", "choices", "variants", "objects", "boxes_a_frame"):
            getattr(self, name).update(getattr(other, name))
        for name, counts in other.attributes.items():
            self.attributes[name].update(counts)
        for reason, names in other.listed.items():
            self.listed[reason] = (self.listed.get(reason, []) + names)[:LISTED]

    def to_json(self) -> dict:
        """All counts as JSON types."""
        return {
            "frames": self.frames,
            "variants": dict(self.variants),
            "left_out": {reason: {"frames": n, "first": self.listed[reason]} for reason, n in self.skipped.items()},
            "remarks": dict(self.remarks + self.choices),
            **{name: dict(counts.most_common()) for name, counts in self.attributes.items()},
            "objects": {kind.phrase: n for kind, n in self.objects.most_common()},
            "objects_a_frame": {str(n): frames for n, frames in sorted(self.boxes_a_frame.items())},
            "near_duplicate_boxes": self.near_duplicates,
            "caption_words": {str(n): captions for n, captions in sorted(self.caption_words.items())},
        }

    def __str__(self) -> str:
        variants = ", ".join(f"{count:,} of {variant}" for variant, count in self.variants.most_common())
        lines = [f"{self.frames:,} frames used, {self.skipped.total():,} left out; read: {variants or 'nothing'}"]
        for reason, count in self.skipped.most_common():
            names = self.listed.get(reason, [])
            more = ", ..." if count > 3 else ""
            lines.append(f"  {count:>9,} left out: {reason} ({', '.join(names[:3])}{more})")
        lines += [f"  {count:>9,} x {remark}" for remark, count in (self.remarks + self.choices).most_common()]
        return "\n".join(lines)
