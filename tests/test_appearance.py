import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from surgery_r1_jax import appearance, options

KINDS = ("light", "colour", "smoke", "blood")


def tissue(size=(320, 256), seed=0):
    """A picture in the colours of tissue, bright and dark, with fine detail."""
    rng = np.random.default_rng(seed)
    shade = np.asarray(Image.fromarray(rng.integers(30, 220, (6, 7), np.uint8)).resize(size, 2), float)
    rows = shade[..., None] * (1.0, 0.5, 0.45) + rng.normal(0, 12, (*size[::-1], 3))
    return Image.fromarray(rows.clip(0, 255).astype(np.uint8))


def numbers(picture):
    return np.asarray(picture, float)


def test_factors_of_one_change_nothing():
    picture = tissue()
    assert appearance.relight(picture, 1, 1, 1).tobytes() == picture.tobytes()
    assert np.abs(numbers(appearance.tint(picture, 1, 1, 1)) - numbers(picture)).max() <= 1


@pytest.mark.parametrize(("brightness", "contrast", "gamma"), [(1.3, 1, 1), (1, 1.4, 1), (1, 1, 0.7), (0.8, 0.8, 1.2)])
def test_light_is_what_the_formula_says_pixel_by_pixel(brightness, contrast, gamma):
    picture = tissue()
    level = np.minimum(numbers(picture) / 255 * brightness, 1) ** gamma
    middle = min(numbers(picture).mean() / 255 * brightness, 1) ** gamma
    wanted = 255 * np.clip(middle + contrast * (level - middle), 0, 1)
    assert np.abs(numbers(appearance.relight(picture, brightness, contrast, gamma)) - wanted).max() <= 1.5


def test_saturation_and_white_balance():
    picture = tissue()
    grey = numbers(appearance.tint(picture, 0, 1, 1))
    assert np.ptp(grey, axis=-1).max() <= 1
    luminance = numbers(picture) @ (0.299, 0.587, 0.114)
    assert np.abs(grey[..., 0] - luminance).max() <= 1
    warm = numbers(appearance.tint(Image.new("RGB", (8, 8), (120, 120, 120)), 1, 1.2, 0.9))[0, 0]
    assert warm[0] > 120 > warm[2]
    assert warm[0] / warm[1] == pytest.approx(1.2, abs=0.02)
    assert warm @ (0.299, 0.587, 0.114) == pytest.approx(120, abs=1)


def test_smoke_hides_detail_and_colour_the_more_the_denser_it_is():
    picture = numbers(tissue())
    detail, colour = [], []
    for density in (0.0, 0.4, 0.8):
        smoky = numbers(appearance.fume(tissue(), density, np.random.default_rng(5)))
        detail.append(np.abs(np.diff(smoky, axis=1)).mean())
        colour.append(np.ptp(smoky, axis=-1).mean())
        assert np.abs(smoky - picture).max() < 255 * (density + 0.01)  # what is there still shows
    assert detail[0] > detail[1] > detail[2] > 0.2 * detail[0]
    assert colour[0] > colour[1] > colour[2]


@pytest.mark.parametrize("cover", [0.05, 0.15, 0.4])
def test_blood_covers_about_its_share_in_dark_red_and_brightens_nothing(cover):
    before, shares = numbers(tissue()), []
    for seed in range(6):
        after = numbers(appearance.spill(tissue(), cover, np.random.default_rng(seed)))
        bloody = after[..., 1] < 0.6 * before[..., 1] - 1
        shares.append(bloody.mean())
        assert (after <= before + 1).all()
        red, green, blue = after[bloody & (before[..., 0] > 60)].mean(0)
        assert red > 3 * max(green, blue)
        assert np.abs(after - before).mean(-1)[~bloody].mean() < 12
    assert 0.4 * cover < np.mean(shares) < 1.5 * cover


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_any_size_of_picture_keeps_its_size_and_the_same_draw_its_bytes(width, height, kind, seed):
    picture = tissue((width, height))
    before = picture.tobytes()
    one, two = (
        appearance.change(picture, options.Augment(**{kind: 1.0}), np.random.default_rng(seed)) for _ in range(2)
    )
    assert (one.size, one.mode) == (picture.size, "RGB")
    assert one.tobytes() == two.tobytes()
    assert picture.tobytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_one_changes_every_picture_and_of_zero_none(kind):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        picture = tissue((64, 48), seed)
        assert appearance.change(picture, options.Augment(**{kind: 1.0}), rng).tobytes() != picture.tobytes()
        assert appearance.change(picture, options.Augment(), rng) is picture


def test_extreme_shapes_are_taken():
    for size in ((2000, 10), (10, 2000)):
        for kind in KINDS:
            changed = appearance.change(tissue(size), options.Augment(**{kind: 1.0}), np.random.default_rng(0))
            assert changed.size == size
