"""Boxes in the wrong space are named, and sound ones never are."""

import random

import pytest

from surgery_r1_jax import check, spaces
from surgery_r1_jax.labels import parse_line
from surgery_r1_jax.spaces import Written

SIZES = {"EndoVis": (1280, 1024), "full HD": (1920, 1080), "small": (320, 256), "square": (512, 512)}


def boxes(size, count=200, seed=0):
    """Boxes in pixels as instruments make them: they come in over the borders of the frame."""
    rng, (width, height) = random.Random(seed), size
    found = []
    for _ in range(count):
        x0, x1 = sorted(rng.sample(range(width + 1), 2))
        y0, y1 = sorted(rng.sample(range(height + 1), 2))
        side = rng.randrange(5)
        found.append(((0, x0)[side != 0], (0, y0)[side != 1], (width, x1)[side != 2], (height, y1)[side != 3]))
    return found


def as_unit(box, size):
    return [edge / side for edge, side in zip(box, size * 2, strict=True)]


WRITERS = {
    "x1, y1, x2, y2 in pixels": lambda box, size: box,
    "x1, y1, x2, y2 in 0..1": as_unit,
    "x1, y1, x2, y2 in 0..1000": lambda box, size: [round(1000 * edge) for edge in as_unit(box, size)],
    "x, y, width, height in pixels": lambda box, size: (*box[:2], box[2] - box[0], box[3] - box[1]),
    "y1, x1, y2, x2 in pixels": lambda box, size: [box[i] for i in (1, 0, 3, 2)],
}
READERS = {"pixel": lambda size: size, "unit": lambda size: (1, 1), "thousand": lambda size: (1000, 1000)}
MEANT = {"pixel": "x1, y1, x2, y2 in pixels", "unit": "x1, y1, x2, y2 in 0..1", "thousand": "x1, y1, x2, y2 in 0..1000"}


def said(writer, reader, size, **options):
    """What is said of boxes written one way and read another."""
    extent = READERS[reader](size) * 2
    written = (
        [n / side for n, side in zip(WRITERS[writer](box, size), extent, strict=True)] for box in boxes(size, **options)
    )
    return spaces.doubt([Written(tuple(box), *size) for box in written], reader)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_space_that_boxes_were_written_in_is_named(writer, reader, size):
    told = said(writer, reader, SIZES[size])
    if writer == MEANT[reader]:
        assert told is None
    elif size == "square" and writer.startswith("y1"):  # a square has no way to tell, but for the numbers' range
        assert told is None or reader != "pixel"
    else:
        assert told == f"the boxes look like {writer}, and are read as {MEANT[reader]}"


@pytest.mark.parametrize("seed", range(50))
def test_sound_boxes_are_never_doubted_however_few(seed):
    rng = random.Random(seed)
    for reader, writer in MEANT.items():
        assert said(writer, reader, SIZES["EndoVis"], count=rng.randint(1, 60), seed=seed) is None


def test_boxes_that_keep_away_from_the_border_are_not_doubted():
    rng = random.Random(0)
    middle = [Written((0.4, 0.4, rng.uniform(0.5, 0.7), rng.uniform(0.5, 0.7)), 1280, 1024) for _ in range(100)]
    assert spaces.doubt(middle) is None
    assert spaces.doubt([]) is None


def label_lines(shared):
    return (shared / "labels_train.txt").read_text().splitlines()


@pytest.mark.parametrize("space", ["pixels", "thousandths"])
def test_the_9014_real_boxes(real_frames, space):
    written = []
    for line in label_lines(real_frames.parent):
        x0, y0, x1, y1 = (int(corner) - 1 for corner in line.rpartition("|")[2].split(","))
        if space == "thousandths":
            x0, y0, x1, y1 = (1000 * x0 // 1280, 1000 * y0 // 1024, 1000 * x1 // 1280, 1000 * y1 // 1024)
        written.append(Written((x0 / 1280, y0 / 1024, x1 / 1280, y1 / 1024), 1280, 1024))
    told = spaces.doubt(written)
    assert told is None if space == "pixels" else told and "0..1000" in told


def test_a_box_of_parts_of_the_image_is_named_on_its_line():
    for text in ("0.1,0.2,0.5,1.0", "0,0,1,0.25"):
        with pytest.raises(Exception, match=r"f:1:38: .* four integers .*; it looks like parts of the image, 0\.\.1"):
            parse_line(f"What organ is being operated?|kidney|{text}", "f:1", 1280, 1024)


def test_check_names_the_space_of_a_folder(tmp_path):
    """The label files of a data set of 0..1000, clipped, refused and sound lines together."""
    from test_check import write

    tools = "What is the state of suction?|Idle|{},{},{},{}\n"
    for index, box in enumerate(boxes((640, 480), 40)):
        corners = [round(1000 * edge) for edge in as_unit(box, (640, 480))]
        write(tmp_path, f"seq_2/frame{index:03}", tools.format(*corners), colour=index, size=(640, 480))
    reasons = [problem.reason for problem in check.inspect(tmp_path).problems]
    assert any(
        reason.startswith("the boxes look like x1, y1, x2, y2 in 0..1000, and are read as") for reason in reasons
    )
