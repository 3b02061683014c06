"""Hypothesis strategies for the facts of a caption."""

from hypothesis import strategies as st

from captioner.bdd100k.facts import CLASSES, LIGHTS, MAX_COUNT, SCENES, TIMES_OF_DAY, WEATHERS, Facts, ObjectKind

kinds = st.builds(ObjectKind, st.sampled_from(sorted(CLASSES)), st.booleans(), st.booleans())
counts = st.dictionaries(kinds, st.integers(1, MAX_COUNT) | st.integers(1, 3), max_size=12)
lights = st.sampled_from([None, *LIGHTS])
all_facts = st.builds(
    Facts, st.sampled_from(TIMES_OF_DAY), st.sampled_from(WEATHERS), st.sampled_from(sorted(SCENES)), lights, counts
) | st.builds(Facts, traffic_light=lights, objects=counts)
