import numpy as np
import pytest
from PIL import Image, ImageColor

from surgery_r1_jax import cli, options, pictures, sheet, synth
from surgery_r1_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sheet")
    synth.write(root / "data", frames=5, seed=3, size=(112, 84), max_tools=2, sequences=("seq_2",))
    (root / "run.yaml").write_text(f"model: none\ndata:\n  root: {root / 'data'}\n")
    return root


def command(folder, *more):
    return ["data", "augment", "--config", str(folder / "run.yaml"), "--out", str(folder / "out.png"), *more]


def test_the_command_draws_a_row_for_each_frame(folder, capsys):
    flipped = "--data.augment.flip_left_right=1"
    assert cli.main(command(folder, flipped, "--frames", "2")) == 0
    assert "out.png" in capsys.readouterr().out
    two = Image.open(folder / "out.png")
    assert cli.main(command(folder, flipped, "--frames", "5")) == 0
    five = Image.open(folder / "out.png")
    assert two.width == five.width > 4 * 112
    assert five.height > 2 * two.height
    assert (np.asarray(five) == ImageColor.getrgb(pictures.TRUTH)).all(-1).sum() > 1000
    assert [path.name for path in folder.glob("*.part")] == []


def test_a_configuration_that_changes_nothing_is_refused(folder, capsys):
    assert cli.main(command(folder)) == 2
    assert "data.augment changes nothing; give a share" in capsys.readouterr().err


def lit(folder):
    data = options.Data(root=str(folder / "data"), augment=options.Augment(light=1.0))
    return options.SFT(model="none", data=data)


def test_a_folder_that_is_not_there_is_told(folder):
    with pytest.raises(InputError, match=r"out\.png: cannot be written"):
        sheet.write(lit(folder), folder / "missing" / "out.png", count=1)


def test_more_frames_than_there_are_are_each_drawn_once(folder):
    sheet.write(lit(folder), folder / "five.png", count=5)
    sheet.write(lit(folder), folder / "fifty.png", count=50)
    assert (folder / "five.png").read_bytes() == (folder / "fifty.png").read_bytes()
