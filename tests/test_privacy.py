"""What is hidden in image files stays there, and what a model or a label says cannot steer a terminal.

Every frame carries text in all the places that PNG and JPEG have for it; training, evaluation, export, report and a
crash must let none of it out.
"""

import base64
import io
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image, PngImagePlugin
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import chat, checkpoint, cli, evaluate, images, pictures, sampling

CANARY = "CANARY-JANE-DOE-1961"
XMP = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><dc:creator>{CANARY}</dc:creator></x:xmpmeta>'
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\u200b"
CONTROL = {character for character in STEERING if not character.isprintable()}


def exif():
    """ImageDescription, Artist and Copyright."""
    held = Image.Exif()
    for tag in (0x010E, 0x013B, 0x8298):
        held[tag] = CANARY
    return held


def plant(path, kind):
    """Save a picture again with text wherever the format takes some; returns the file."""
    image, out = Image.open(path).convert("RGB"), path.with_suffix(f".{kind}")
    profile = b"\0" * 128 + CANARY.encode()
    if kind == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", CANARY)
        text.add_text("Patient", CANARY * 20, zip=True)
        text.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(out, pnginfo=text, exif=exif(), icc_profile=profile)
    else:
        path.unlink()
        image.save(out, quality=95, exif=exif(), xmp=XMP.encode(), comment=CANARY, icc_profile=profile)
    with out.open("ab") as file:
        file.write(CANARY.encode())  # behind the picture
    return out


def seen_in(raw):
    """How often the text is in a file: as it is, in pictures inside a page, and in compressed parts of a picture."""
    found = raw.count(CANARY.encode()) + raw.decode("utf-16-le", "ignore").count(CANARY)
    for url in re.findall(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)", raw):
        found += seen_in(base64.b64decode(url))
    if raw[:3] in (b"\x89PN", b"\xff\xd8\xff"):
        with Image.open(io.BytesIO(raw)) as image:
            found += f"{image.info} {dict(image.getexif())}".count(CANARY)
    for start in re.finditer(rb"zTXt[^\0]*\0\0", raw):
        found += zlib.decompressobj().decompress(raw[start.end() :]).count(CANARY.encode())
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data whose every picture carries the text, a start model, and a frame cut off in the middle."""
    home = toy.write_start(tmp_path_factory.mktemp("privacy"), frames=6)
    paths = sorted(home.glob("data/seq_*/left_frames/*.png"))
    for number, path in enumerate(paths):
        assert seen_in(plant(path, ("png", "jpg")[number % 2]).read_bytes()) >= 6, path
    return home


def outputs(home, *folders):
    return [path for folder in folders for path in (home / folder).rglob("*") if path.is_file()]


def test_no_text_of_a_picture_leaves_by_logs_checkpoints_exports_or_reports(place, capfd, monkeypatch):
    def decode(graph, params, prompts, words, settings):  # nothing to compile: what is drawn does not matter
        places = prompts.branch_ids_BJT.shape[:2]
        return sampling.Rollout(jnp.zeros((*places, 4), jnp.int32), None, None, jnp.ones(places, bool))

    monkeypatch.setattr(evaluate, "decode", decode)
    monkeypatch.setattr(chat.Chat, "decode", lambda self, ids: f"<answer>{STEERING}</answer>")
    run, out = place / "run", place / "out"
    config = place / "run.yaml"
    config.write_text(
        f"model: {place / 'start'}\ndata: {{root: {place / 'data'}, frames: 2, questions: 9}}\n"
        "schedule: {steps: 1, log_every: 1}\nevaluation: {frames: 2, questions: 9}\n"
    )
    data, scores = str(place / "data"), str(out / "all.json")
    for words in (
        ("sft", "--config", str(config), "--out", str(run)),
        ("evaluate", "--checkpoint", str(run), "--data", data, "--split", "all", "--out", scores),
        ("export", str(run), str(out / "hf")),
        ("report", scores, "--out", str(out / "report.html"), "--data", data),
    ):
        assert cli.main(words) == 0, words
    held = outputs(place, "run", "out")
    assert {path.name for path in held} >= {
        "metrics.jsonl",
        "all.json",
        "README.md",
        "report.html",
        "model.safetensors",
    }
    assert b"data:image/jpeg;base64" in (out / "report.html").read_bytes()
    assert [path for path in held if seen_in(path.read_bytes())] == []
    leaves = jax.tree.leaves(checkpoint.load_model(run).params)  # compressed in their files
    assert sum(np.asarray(leaf).tobytes().count(CANARY.encode()) for leaf in leaves) == 0
    printed = "".join(capfd.readouterr())
    assert CANARY not in printed and "accuracy" in printed
    assert not CONTROL & set(printed) and not CONTROL & set((out / "report.html").read_text())


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_damaged_picture_is_refused_without_its_text(place, tmp_path, capfd, kind):
    path = next(place.glob(f"data/seq_*/left_frames/*.{kind}"))
    raw = path.read_bytes()
    cut = tmp_path / f"cut.{kind}"
    question = "What organ is being operated?"
    for size in (len(raw) // 2, 400, 200, 60):
        cut.write_bytes(raw[:size])
        assert cli.main(["ask", "--checkpoint", str(place / "start"), "--image", str(cut), question]) == 2
    shown = "".join(capfd.readouterr())
    assert shown.count("error:") == 4 and CANARY not in shown


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("lines", [(), ("an answer",)])
def test_a_picture_that_is_drawn_on_carries_nothing_along(place, tmp_path, kind, lines):
    picture = images.load(next(place.glob(f"data/seq_*/left_frames/*.{kind}")))
    pictures.draw(picture, lines=lines).save(tmp_path / "drawn.png", "PNG")
    assert seen_in((tmp_path / "drawn.png").read_bytes()) == 0
    assert seen_in(pictures.data_url(picture).encode()) == 0


def test_control_characters_of_labels_and_names_do_not_reach_the_terminal(place, tmp_path, capfd):
    label = next(place.glob("data/seq_2/vqla/label/*.txt"))
    root = tmp_path / f"data{STEERING.replace(chr(13), '')}"
    for path, text in (
        (root / "seq_2" / "vqla" / "label" / label.name, f"{STEERING}|kidney|1,1,2,2\n"),
        (root / "config.json", f'{{"model_type": "{STEERING}"}}'.replace("\x1b", "\\u001b").replace("\x07", "")),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cli.main(["data", "check", str(root)]) == 1
    assert cli.main(["doctor", "--checkpoint", str(root)]) == 2
    assert cli.main(["export", str(root), str(tmp_path / "out")]) == 2
    shown = "".join(capfd.readouterr())
    assert "owned" in shown and not CONTROL & set(shown)
