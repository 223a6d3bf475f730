"""The page of `data check`: it shows what was found, every problem with its picture, and lets nothing in or out."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from test_check import GOOD, write
from test_hostile_images import noise

from surgery_r1_jax import check, data_page, labels, records, survey, vocabulary

EVIL = '<script>alert("x")</script>\x1b[2J\u202e'


class Page(HTMLParser):
    """Text, tags and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.images = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "image":
            self.images[attributes["id"]] = attributes["href"]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Frames of three splits, with something wrong of each sort."""
    root = tmp_path_factory.mktemp("data")
    for index, sequence in enumerate(("seq_2", "seq_2", "seq_6", "seq_1")):
        path = write(root, f"{sequence}/frame{index:03}", size=(90, 60))
        noise(size=(90, 60)).rotate(90 * index).save(path)
    bad = f"What {EVIL}?|Idle|1,1,2,2\nWhat is the state of stapler?|Idle|70,3,200,30\n"
    write(root, "seq_2/frame009", GOOD + bad, size=(90, 60))
    write(root, "seq_3/frame004").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def made(tree):
    problems = []
    frames = records.read(tree, on_problem=problems.append)
    summary = check.examine(tree, frames, problems)
    return summary, data_page.render(summary, frames, survey.notes(summary))


def test_every_problem_is_on_the_page_with_its_place(made):
    summary, text = made
    words = re.sub(r"\s+", " ", " ".join(Page(text).words))
    assert summary.errors >= 2 and summary.warnings >= 1
    for problem in summary.problems:
        for part in (problem.reason, problem.source):
            shown = data_page.pictures.visible(part)
            assert re.sub(r"\s+", " ", shown) in words
    for note in survey.notes(summary):
        assert note in words
    assert all(name in words for name in vocabulary.CLASSES)


def test_pictures_of_problems_and_samples_are_embedded_once_and_their_boxes_drawn(made):
    summary, text = made
    page = Page(text)
    used = [attributes["href"][1:] for tag, attributes in page.tags if tag == "use"]
    assert set(used) == set(page.images)
    for url in page.images.values():
        image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        image.load()
    shown = [problem for problem in summary.problems if problem.image]
    assert len(used) >= len(shown) + 4
    drawn = [attributes for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "prediction"]
    assert len(drawn) == sum(problem.box is not None for problem in shown) > 0
    outside = next(problem for problem in summary.problems if problem.box and problem.box[2] > 1)
    assert float(drawn[0]["x"]) == pytest.approx(480 * outside.box[0], abs=0.1)
    assert float(drawn[0]["width"]) == pytest.approx(480 * (1.1 - outside.box[0]), abs=0.1)


def test_nothing_of_a_label_becomes_markup_and_nothing_is_fetched(made):
    _, text = made
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;script&gt;" in text and "\x1b" not in text and "\u202e" not in text
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src")]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)


def test_the_same_data_gives_the_same_page(made, tree):
    frames = records.read(tree, on_problem=lambda problem: None)
    assert data_page.render(made[0], frames, survey.notes(made[0])) == made[1]


def test_where_boxes_lie_is_counted_cell_by_cell(tree):
    frames = records.read(tree, on_problem=lambda problem: None)
    places = data_page._places(vocabulary.STATE, frames)
    boxes = [record.box for frame in frames for record in frame.records if record.kind == vocabulary.STATE]
    cells = len(places.shares)
    for row in range(cells):
        for column in range(cells):
            x, y = (column + 0.5) / cells, (row + 0.5) / cells
            covered = sum(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
            assert places.shares[row][column] == pytest.approx(covered / len(boxes))
    assert sum(places.sides) == len(boxes)


def test_a_data_set_in_order_and_one_of_errors_alone_have_pages(tmp_path):
    write(tmp_path / "fine", "seq_2/frame000")
    assert survey.main(tmp_path / "fine", html_path=tmp_path / "fine.html") == 0
    assert "nothing is wrong" in (tmp_path / "fine.html").read_text()
    write(tmp_path / "bad", "seq_2/frame000", "a|b\n")
    assert survey.main(tmp_path / "bad", html_path=tmp_path / "bad.html") == 1
    assert "1 error<" in (tmp_path / "bad.html").read_text()


def test_more_problems_than_a_page_holds_are_counted(tmp_path):
    write(tmp_path, "seq_2/frame000", GOOD + "a|b\n" * 200)
    survey.main(tmp_path, html_path=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert f"Of 200 the first {data_page.MOST_PROBLEMS} are shown" in text
    assert text.count('class="why"') == data_page.MOST_PROBLEMS + 1  # and the one sample


def test_the_page_of_the_real_frames(real_frames, tmp_path):
    assert survey.main(real_frames, html_path=tmp_path / "page.html") == 0
    page = Page((tmp_path / "page.html").read_text())
    assert sum(tag == "rect" and a.get("class") == "prediction" for tag, a in page.tags) == 2
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("'Idel' is none of the 18 answer classes", "... is none of the ... answer classes"),
        ("unknown question 'What is the colour?'", "unknown question ..."),
        ("box 9,9,8,10 is empty or inverted; it needs x1 < x2", "box ... is empty or inverted"),
        ("box leaves the image: 7,976,19,1260 on 1280x1024; it is clipped", "box leaves the image"),
        ("EXIF orientation 6; turned upright", "EXIF orientation ..."),
        ("the same image as /a/b.png, which is in split train", "the same image as ... which is in split train"),
    ],
)
def test_problems_are_counted_by_kind(reason, kind):
    assert data_page._general(reason) == kind


def test_an_inverted_box_is_drawn_between_its_corners():
    assert data_page._around(labels.Problem("error", "f:1", "x", None, (0.5, 0.9, 0.2, 0.1))) == (0.2, 0.1, 0.5, 0.9)
    assert data_page._around(labels.Problem("error", "f:1", "x", None, (0.5, 0.9, 0.5, 0.1))) is None
