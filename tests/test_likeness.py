"""Pictures that are the same to the eye are found whatever was done to their files, and different ones are not."""

import io

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageEnhance

from surgery_r1_jax import check, labels, leaks, likeness, records, synth, vocabulary
from surgery_r1_jax.records import Frame


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    synth.write(root, frames=30, seed=1, size=(160, 128), max_tools=2)
    return records.read(root)


def opened(frame):
    with Image.open(frame.image) as image:
        return image.convert("RGB")


def jpeg(image, quality=50):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


SAME = {
    "saved as JPEG": jpeg,
    "saved badly": lambda image: jpeg(image, 25),
    "half the size": lambda image: image.resize((80, 64)),
    "another shape": lambda image: image.resize((200, 200)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L"),
}


def bits(one, other):
    return (likeness.fingerprint(one) ^ likeness.fingerprint(other)).bit_count()


@pytest.mark.parametrize("what", SAME)
def test_the_same_picture_keeps_its_fingerprint(frames, what):
    assert max(bits(opened(frame), SAME[what](opened(frame))) for frame in frames) <= likeness.ALIKE


def test_different_frames_are_far_apart(frames):
    prints = [likeness.fingerprint(opened(frame)) for frame in frames]
    assert min((a ^ b).bit_count() for i, a in enumerate(prints) for b in prints[:i]) > 2 * likeness.ALIKE


def test_the_real_frames_are_far_apart_and_found_again(real_frames):
    found = records.read(real_frames, on_problem=lambda problem: None)
    pictures = [opened(frame).reduce(2) for frame in found]
    prints = [likeness.fingerprint(picture) for picture in pictures]
    again = [likeness.fingerprint(jpeg(picture)) for picture in pictures]
    assert [(ours, theirs) for ours, theirs, _ in likeness.nearest(prints, again)] == [(i, i) for i in range(13)]


def test_the_waves_are_those_of_scipy():
    grey = np.random.default_rng(0).uniform(0, 255, (32, 32))
    theirs = scipy.fft.dctn(grey)[:8, :8] / 4
    np.testing.assert_allclose(likeness._COSINES @ grey @ likeness._COSINES.T, theirs)


def test_pictures_of_nothing_are_like_no_other():
    assert likeness.fingerprint(Image.new("RGB", (64, 64), (90, 20, 20))) is None
    assert likeness.nearest([None, 5], [None, 5, 4, 0xFF]) == [(1, 1, 0), (1, 2, 1)]
    assert likeness.nearest([None], [3]) == []


ASKED = labels.Record("What organ is being operated?", "kidney", (0.0, 0.0, 1.0, 1.0), vocabulary.ORGAN, None, "f:1")


def frame(name, image, sequence):
    return Frame(name, sequence, image, 160, 128, (ASKED,))


def test_what_two_splits_share_is_told_with_both_pictures(frames, tmp_path):
    one, two, three = frames[:3]
    jpeg(opened(one)).save(tmp_path / "again.jpg")
    (tmp_path / "copy.png").write_bytes(two.image.read_bytes())
    train = [frame("a", one.image, "s1"), frame("b", two.image, "s2")]
    val = [
        frame("c", tmp_path / "again.jpg", "s3"),
        frame("d", tmp_path / "copy.png", "s4"),
        frame("e", three.image, "s2"),
    ]
    summary = check.examine(tmp_path, [*train, *val], splits={"train": train, "val": val})
    assert summary.equal_images == (("b", "d"),)
    ((ours, theirs, distance),) = summary.near_images
    assert (ours, theirs) == ("a", "c") and distance <= likeness.ALIKE
    found = {
        (problem.severity, problem.reason.split(",")[0].split("/")[0], problem.image) for problem in summary.problems
    }
    assert found == {
        ("error", "sequence s2 is in split train and in val; keep it in one of them", str(three.image)),
        ("error", "the same image as ", str(tmp_path / "copy.png")),
        ("warning", "looks like ", str(tmp_path / "again.jpg")),
    }
    clean = check.examine(tmp_path, train, splits={"train": train[:1], "val": train[1:]})
    assert clean.problems == ()


def test_a_frame_that_is_there_twice_is_an_error(frames, tmp_path):
    twice = [frame("a", frames[0].image, "s1"), frame("a", frames[1].image, "s1")]
    (problem,) = check.examine(tmp_path, twice, splits={"train": twice}).problems
    assert problem.severity == "error" and problem.reason.startswith("frame a again, first ")
    assert leaks.sequences({"train": twice}) == []
