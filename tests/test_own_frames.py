"""The README's section "Your own frames", followed to the letter; and GRPO on such a folder."""

import contextlib
import functools
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import toy
from PIL import Image, ImageDraw
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import cli, fresh, grpo, log, options, rewards, vocabulary
from surgery_r1_jax.errors import InputError

HOME = Path(__file__).resolve().parents[1]
SECTION = (HOME / "README.md").read_text("utf-8").partition("## Your own frames\n")[2].partition("\n## ")[0]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the reader stands: two PNGs, the table and the declaration as the README has them."""
    place = tmp_path_factory.mktemp("own")
    (place / "configs").symlink_to(HOME / "configs")
    mine = place / "data" / "mine"
    mine.mkdir(parents=True)
    for name, colour, box in (("a", (150, 40, 40), (40, 30, 120, 90)), ("b", (40, 60, 150), (20, 10, 90, 60))):
        picture = Image.new("RGB", (160, 128), colour)
        ImageDraw.Draw(picture).rectangle(box, fill=(200, 200, 200))
        picture.save(mine / f"{name}.png")
    (table,), (about,) = blocks("csv"), blocks("json")
    (mine / "records.csv").write_text(table)
    (mine / "data.json").write_text(about)
    return place


@pytest.fixture(scope="module")
def followed(place, few_devices):  # noqa: F811
    """Every command of the section in its order, with the smallest of models; what each printed."""
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(fresh, "write", functools.partial(fresh.write, sizes=toy.SIZES))
        for line in "".join(blocks("bash")).splitlines():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert cli.main(shlex.split(line)[1:]) == 0, line
            printed[line] = out.getvalue()
    return printed


def test_the_readers_commands_lead_to_right_answers(followed, place):
    scores = json.loads((place / "runs/mine/all.json").read_text())
    assert scores["classes"] == ["open", "closed", "vessel", "nothing"]
    assert scores["n"] == 4 and scores["accuracy"] == 1.0 and scores["miou"] > 0.7
    assert "macro_f1_18" not in scores and set(scores["by_kind"]) == {"other"}
    assert scores["floors"]["blank_image"]["accuracy"] < 1  # it looks
    (asked,) = (told for line, told in followed.items() if line.startswith("surgery-r1 ask"))
    assert "answer:    open" in asked and "not in the grammar" not in asked
    page = (place / "runs/mine/report.html").read_text()
    assert "What does the grasper hold?" in page and "vessel" in page and "data:image/jpeg" in page
    assert json.loads((place / "runs/mine/model/classes.json").read_text()) == scores["classes"]


def test_the_readers_exports_are_there(followed, place):
    for name, key in (("messages", "messages"), ("sharegpt", "conversations")):
        rows = [json.loads(line) for line in (place / f"data/mine_{name}/train.jsonl").open()]
        assert len(rows) == 4 and all((place / f"data/mine_{name}" / row["images"][0]).is_file() for row in rows)
        assert key in rows[0]


def test_the_readers_python_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(blocks("python")[0], names)
    assert len(names["frame"]["records"]["question"]) == 2 and names["frame"]["image"].shape == (128, 160, 3)


@pytest.mark.slow
def test_grpo_reinforces_on_own_answers(followed, place, uneven_rewards, monkeypatch):
    monkeypatch.chdir(place)
    settings = options.GRPO(
        model="runs/mine",
        samples=4,
        data=options.Data(root="data/mine", split="all", frames=2, questions=2),
        sampler=options.Sampler(max_tokens=24),
        schedule=options.Schedule(steps=2, log_every=1),
        evaluation=options.Evaluation(split="all", frames=2, questions=2, max_tokens=48),
    )
    assert grpo.train(settings, place / "runs/grpo")["n"] == 4
    rows = [row for row in log.read_metrics(place / "runs/grpo/metrics.jsonl") if row["split"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[0]["rewards/accuracy/mean"] > 0


def test_a_reward_that_reads_a_quadrant_off_the_class_needs_the_official_classes():
    geometry = options.Reward(coherence_form="geometry")
    for classes in (vocabulary.CLASSES, vocabulary.EXTENDED_CLASSES):
        rewards.require_places(geometry, classes)
    rewards.require_places(options.Reward(), ("open", "closed"))
    with pytest.raises(InputError, match="geometry needs the official classes"):
        rewards.require_places(geometry, ("open", "closed"))
