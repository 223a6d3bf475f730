"""Boxes on frames: they stand where they should, both can be seen, and nothing odd gets in or out."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from surgery_r1_jax import pictures

GREY = (90, 80, 80)
TRUTH, PREDICTION = map(ImageColor.getrgb, (pictures.TRUTH, pictures.PREDICTION))
LEFT = (0.1, 0.25, 0.4, 0.75)
RIGHT = (0.6, 0.25, 0.9, 0.75)


def plain(width=600, height=480):
    return Image.new("RGB", (width, height), GREY)


def painted(image, colour):
    """Where the picture has exactly this colour: bool [height, width]."""
    return (np.asarray(image) == colour).all(-1)


def extent(mask):
    """x0, y0, x1, y1 of what is set, with exclusive far edges."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(("name", "colour"), [("truth", TRUTH), ("prediction", PREDICTION)])
def test_a_box_is_drawn_around_its_edges(name, colour):
    image = plain()
    drawn = pictures.draw(image, **{name: LEFT}).crop((0, 0, *image.size))
    assert extent(painted(drawn, colour)) == pytest.approx((60, 120, 240, 360), abs=2)
    assert not painted(drawn, colour)[125:355, 65:235].any()


def test_the_true_box_is_dashed_and_the_predicted_box_is_not():
    drawn = pictures.draw(plain(), truth=LEFT, prediction=RIGHT)
    assert 0.3 < painted(drawn, TRUTH)[120, 60:240].mean() < 0.8
    assert painted(drawn, PREDICTION)[120, 362:538].all()


def test_a_perfect_prediction_leaves_both_boxes_visible():
    top_edge = pictures.draw(plain(), truth=LEFT, prediction=LEFT).crop((60, 120, 240, 121))
    assert painted(top_edge, TRUTH).mean() > 0.3
    assert painted(top_edge, PREDICTION).mean() > 0.2


def test_lines_grow_with_the_frame_and_small_frames_are_enlarged():
    def thickness(width):
        drawn = pictures.draw(plain(width, width), prediction=(0.2, 0.2, 0.8, 0.8))
        return painted(drawn, PREDICTION)[: drawn.width, drawn.width // 2].sum() / 2

    assert thickness(2400) >= 3 * thickness(600)
    assert pictures.draw(plain(96, 64)).size == (480, 320)


def test_the_caption_stands_below_the_frame_and_leaves_it_alone():
    image = plain()
    before = image.tobytes()
    drawn = pictures.draw(image, lines=["kidney, IoU 0.91", "as the capsule shows " * 20])
    assert drawn.crop((0, 0, *image.size)).tobytes() == before == image.tobytes()
    strip = np.asarray(drawn.crop((0, image.height, *drawn.size)).convert("L"))
    assert (strip < 100).sum() > 500
    assert (strip[:, -8:] > 200).all()  # wrapped, not cut off at the border
    assert pictures.draw(image).size == image.size


def test_a_caption_never_grows_without_bound():
    assert pictures.draw(plain(), lines=["word " * 10_000, *["\n" * 1000]]).height < 480 + 60 * 30


edges = st.one_of(st.floats(), st.integers(-(10**400), 10**400), st.floats(0, 1))


@settings(deadline=None, max_examples=60)
@given(st.tuples(edges, edges, edges, edges), st.text())
def test_no_box_and_no_text_can_break_a_picture(box, text):
    drawn = pictures.draw(plain(480, 384), truth=box, prediction=box, lines=[text])
    assert drawn.width == 480
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        assert pictures.drawable(box) is None


def test_hidden_characters_are_spelt_out():
    assert (
        pictures.visible("a\x1b[31m\u202e\ud800\x00\nb\tc\u00e9") == "a<U+001B>[31m<U+202E><U+D800><U+0000>\nb\tc\u00e9"
    )


def decoded(url):
    head, _, body = url.partition(",")
    assert head == "data:image/jpeg;base64"
    data = base64.b64decode(body, validate=True)
    return data, Image.open(io.BytesIO(data))


def test_an_embedded_frame_carries_its_pixels_and_nothing_else():
    exif = Image.Exif()
    exif[0x010E] = "patient 4711"
    buffer = io.BytesIO()
    plain(960, 768).save(buffer, "JPEG", exif=exif, comment=b"patient 4711", icc_profile=b"patient 4711")
    image = Image.open(buffer)
    data, small = decoded(pictures.data_url(image))
    assert b"4711" in buffer.getvalue() and b"4711" not in data
    assert small.size == (480, 384)
    assert np.abs(np.asarray(small).astype(int) - GREY).max() <= 3
    assert pictures.data_url(image) == pictures.data_url(image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_an_embedded_frame_may_have_any_mode(mode):
    _, small = decoded(pictures.data_url(Image.new(mode, (64, 48))))
    assert (small.mode, small.size) == ("RGB", (64, 48))


def test_an_embedded_frame_keeps_to_its_limit():
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1280, 3), np.uint8)
    data, small = decoded(pictures.data_url(Image.fromarray(noise), limit=30_000))
    assert len(data) <= 30_000
    assert abs(small.width / small.height - 1.25) < 0.02


def test_named_boxes_are_all_drawn_with_their_names_and_the_caption():
    drawn = pictures.named(plain(), [("a", LEFT), ("b", RIGHT)], ["a: grasper open"])
    assert drawn.size[0] == 600
    assert drawn.height > 480
    blue = painted(drawn.crop((0, 0, 600, 480)), TRUTH)
    assert extent(blue) == pytest.approx((60, 120, 540, 360), abs=2)
    bare = painted(pictures.named(plain(), [("", LEFT), ("", RIGHT)]), TRUTH)
    assert blue[125:150, 65:90].sum() > bare[125:150, 65:90].sum()
