import pytest

from surgery_r1_jax import labellist, vocabulary
from surgery_r1_jax.errors import InputError

LINES = """seq_2/frame000|What organ is being operated?|kidney|7,9,1186,438
seq_10/frame001|What organ is being operated?|kidney|1,1,1281,1025

seq_2/frame000|What is the state of bipolar_forceps?|Looping|6,638,534,941
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "labels.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", "\r\n"), b"\xef\xbb\xbf" + LINES.encode()])
def test_lines_become_frames_with_the_paths_their_images_would_have(write, text):
    first, second = labellist.read(write(text))
    assert (first.id, first.sequence, str(first.image)) == ("seq_2/frame000", "seq_2", "seq_2/frame000.png")
    assert [record.answer for record in first.records] == ["kidney", "Looping"]
    assert first.records[1].kind == vocabulary.STATE
    assert first.records[1].source.endswith("labels.txt:4")
    assert second.records[0].box == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seq_2/frame000|What organ is being operated?|kidney", ":2:16: 2 fields"),
        ("seq_2/frame000|What organ is being operated?|liver|7,9,1186,438", ":2:46: 'liver' is none of the 18"),
        ("seq_2/frame000|What organ is being operated?|kidney|7,9,1186", ":2:53: '7,9,1186' is not a box"),
        ("../frame000|What organ is being operated?|kidney|7,9,1186,438", ":2:1: '../frame000' is not the name"),
        ("/frame000|What organ is being operated?|kidney|7,9,1186,438", ":2:1: '/frame000' is not the name"),
        ("a\\b|What organ is being operated?|kidney|7,9,1186,438", ":2:1: "),
        ("no bar", ":2:1: 'no bar' is not the name of a frame"),
        (b"\xff|", ":2:1: not UTF-8"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(write, line, message):
    path = write(LINES.splitlines()[0].encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(InputError) as refusal:
        labellist.read(path)
    assert str(refusal.value).startswith(f"{path}{message}")
    assert str(refusal.value).endswith("; mend or remove the line")


def test_an_empty_list_and_a_missing_one_are_refused(write, tmp_path):
    with pytest.raises(InputError, match="holds no label"):
        labellist.read(write("\n"))
    with pytest.raises(InputError, match="cannot be read"):
        labellist.read(tmp_path / "none.txt")


def test_a_box_that_leaves_the_frame_is_clipped_and_told(write, caplog):
    (frame,) = labellist.read(write("seq_4/a|Where is suction located?|left-top|7,976,19,1260"))
    assert frame.records[0].box[3] == 1
    assert "1 boxes clipped" in caplog.text
