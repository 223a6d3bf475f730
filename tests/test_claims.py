import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import claims, vocabulary


def test_a_text_becomes_claims_in_its_order():
    reading = claims.read(
        "Two tools: the stapler and the clip applier. The Stapler [1, 2, 3, 4.5] at Left Top of the kidney fires "
        "staples. It rests. The applier, top-right. The answer is Idle."
    )
    listed, also, stapler, applier, asked = (claim for claim in reading.claims if claim != claims.Claim())
    assert (listed.tools, also.tools, stapler.tools) == ({"stapler"}, {"clip_applier"}, {"stapler"})
    assert (stapler.boxes, stapler.places, stapler.states) == ([(1, 2, 3, 4.5)], [{"left-top"}], [{"Staple"}])
    assert (applier.tools, applier.places) == ({"clip_applier"}, [{"right-top"}])
    assert (asked.tools, asked.states) == (frozenset(), [{"Idle"}])
    assert (reading.counts, reading.organs, reading.of_organ) == ([2], {"kidney"}, True)
    assert reading.last[vocabulary.STATE] == {"Idle"}
    assert reading.last_box == (1, 2, 3, 4.5)


def test_every_name_is_found_in_every_spelling():
    for name in vocabulary.EXTENDED_CLASSES:
        for spelt in (name, name.replace("_", " "), name.replace("_", "-"), name.replace("-", " ")):
            reading = claims.read(f"Here: {spelt}.")
            (kind,) = reading.last
            assert reading.last[kind] == {name}
            assert name in (vocabulary.ORGANS, vocabulary.STATES, vocabulary.LOCATIONS, vocabulary.TOOLS)[kind]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(alphabet="The forceps kidney Idle left-top[1, 2, 3, 4]().;:not answer two tools\n", max_size=300))
def test_no_text_does_more_than_be_refused(text):
    with contextlib.suppress(claims.Unreadable):
        claims.read(text)


@pytest.mark.parametrize(
    "piece",
    [
        "left-top ",
        "[1, 2, 3, 4] ",
        "the forceps is Idle; ",
        "[",
        "are ",
        "left ",
        "a. ",
        "Idle ",
        "_",
        "kidney ",
        "two ",
    ],
)
def test_time_grows_no_faster_than_the_text(monkeypatch, piece):
    monkeypatch.setattr(claims, "MAX_CHARS", 1 << 20)

    def seconds(size):
        text = (piece * (size // len(piece) + 1))[:size]
        best = float("inf")
        for _ in range(3):
            since = time.process_time()
            with contextlib.suppress(claims.Unreadable):
                claims.read(text)
            best = min(best, time.process_time() - since)
        return best

    assert seconds(32_000) < 9 * max(seconds(8_000), 1e-4)  # 4 times the length; squared it would be 16 times
