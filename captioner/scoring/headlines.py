"""The scores that are shown first, and what they are called: printed, in the report and in the model card.

shown = choose_headlines(scores["scores"])
"""

from typing import NamedTuple


class Headline(NamedTuple):
    """How one score is called."""

    group: str  # of scores.json that it is in
    title: str  # of a column
    words: str  # where there is room
    hint: str  # what it is, in the report
    metric: str | None = None  # its name on the hub; None: it is not in the model card
    scale: int = 1  # the end of its scale

    def find(self, groups: dict, name: str) -> dict | None:
        """Its figure in what scores.json has of a set of captions."""
        return groups.get(self.group, {}).get(name)


HEADLINES = {
    "facts_f1": Headline("facts", "facts F1", "facts F1", "of the facts said and of those there, those right", "f1"),
    "time_of_day": Headline("facts", "time", "time of day", "share of images", "accuracy"),
    "weather": Headline("facts", "weather", "weather", "share of images", "accuracy"),
    "scene": Headline("facts", "scene", "scene", "share of images", "accuracy"),
    "traffic_light": Headline("facts", "light", "traffic light", "share of images; none counts too", "accuracy"),
    "objects_f1": Headline("facts", "objects", "objects F1", "kind and count both right", "f1"),
    "whole_caption": Headline("facts", "whole", "whole caption", "every fact right and nothing else said", "accuracy"),
    "BLEU-4": Headline("corpus_bleu", "BLEU-4", "BLEU-4", "words in sequence", "bleu"),
    "CIDEr-D": Headline("cider_d", "CIDEr-D", "CIDEr-D", "rare words in sequence; 0 to 10", "cider", 10),
}
# Shown in the report, beneath those.
MORE = {
    "boxed_f1": Headline("facts", "boxed", "boxed objects F1", "objects, lanes and drivable areas left out"),
    "ROUGE-L": Headline("rouge_l", "ROUGE-L", "ROUGE-L", "longest common subsequence", "rouge"),
    "METEOR": Headline("meteor", "METEOR", "METEOR (nltk)", "words and their order", "meteor"),
    "CHAIRs": Headline("hallucination", "CHAIRs", "CHAIRs", "captions with a class that is not there; less is better"),
    "CHAIRi_boxed": Headline(
        "hallucination", "CHAIRi", "CHAIRi", "objects invented, lanes and drivable areas left out; less is better"
    ),
}
RANKED_BY = "facts_f1"  # the verdict, slices and images
# Shown of captions that are scored as text alone. CIDEr-D comes first and is what the verdict and images are ranked by:
# it is made for several references, and low for one caption that is said of all images.
TEXT_HEADLINES = {name: (HEADLINES | MORE)[name] for name in ("CIDEr-D", "BLEU-4", "ROUGE-L", "METEOR")}


def choose_headlines(groups: dict) -> dict[str, Headline]:
    """The headlines of what scores.json has of a set of captions: with facts where facts were scored."""
    if "facts" in groups:
        return HEADLINES
    return {name: headline for name, headline in TEXT_HEADLINES.items() if headline.find(groups, name)}
