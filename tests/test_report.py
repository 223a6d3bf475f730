"""The page says what it was given, nothing else gets in or out, and it is the same page every time."""

import json
import math
import random
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.metrics import confusion_matrix

from surgery_r1_jax import cards, charts, metrics, report, vocabulary
from surgery_r1_jax.errors import InputError

# Made-up runs


TOOLS = ("bipolar_forceps", "monopolar_curved_scissors", "prograsp_forceps")
STATES = ("Idle", "Tissue_Manipulation", "Cutting", "Retraction")
EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=a()>\x1b[31m\u202e\ud800 {{ 7 * 7 }}'


def frame_picture(frame: str) -> Image.Image:
    """A small picture that differs from frame to frame: tissue, a kidney, two instruments."""
    rng = random.Random(ascii(frame))
    image = Image.new("RGB", (320, 256), (92, 26, 24))
    pen = ImageDraw.Draw(image)
    pen.ellipse((60, 70, 250 + rng.randint(-30, 30), 220), fill=(164, 74, 62))
    for _ in range(2):
        x, y = rng.randint(20, 280), rng.randint(20, 220)
        pen.line((x, y, rng.choice((0, 320)), rng.randint(0, 256)), fill=(188, 192, 198), width=15)
    return image


def gold(frames: int = 8) -> list[dict]:
    """Questions with answers and boxes, as the first half of a line of predictions.jsonl."""
    rng, rows = random.Random(5), []
    for index in range(frames):
        frame = f"seq_{(1, 5, 16)[index % 3]}/frame{index:03d}"
        rows.append((frame, vocabulary.ask(vocabulary.ORGAN), "kidney", [0.2, 0.25, 0.8, 0.9]))
        for tool in rng.sample(TOOLS, 2):
            x, y = rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.6)
            box = [x, y, x + rng.uniform(0.15, 0.35), y + rng.uniform(0.15, 0.35)]
            rows.append((frame, vocabulary.ask(vocabulary.STATE, tool), rng.choice(STATES), box))
            place = vocabulary.LOCATIONS[(box[0] > 0.35) + 2 * (box[1] > 0.35)]
            rows.append((frame, vocabulary.ask(vocabulary.LOCATION, tool), place, box))
    return [dict(zip(("frame", "question", "answer", "box"), row, strict=True)) for row in rows]


def stage(name: str, skill: float, *, rewards: bool = False, frames: int = 8) -> report.Stage:
    """A made-up model that is right about `skill` of the time and whose boxes are off by the rest."""
    rng, rows = random.Random(name), gold(frames)
    for row in rows:
        wrong = rng.choice([c for c in (*STATES, *vocabulary.LOCATIONS) if c != row["answer"]])
        given = row["answer"] if rng.random() < skill else wrong
        off = [rng.gauss(0, 0.25 * (1 - skill)) for _ in range(4)]
        x0, y0, x1, y1 = (edge + delta for edge, delta in zip(row["box"], off, strict=True))
        box = [min(x0, x1), min(y0, y1), max(x0, x1) + 0.01, max(y0, y1) + 0.01]
        read = rng.random() < 0.3 + skill
        think = f"The {row['question'].split()[2]} is at [{x0 * 320:.0f}, {y0 * 256:.0f}, {x1 * 320:.0f}, "
        think += f"{y1 * 256:.0f}]; it touches the tissue, so the answer is {given}."
        pixels = [round(edge * side) for edge, side in zip(box, (320, 256) * 2, strict=True)]
        answer = json.dumps({"answer": given, "bbox_2d": pixels})
        row |= {
            "pred_answer": given if read else None,
            "pred_box": box if read else None,
            "text": f"<think>{think}</think><answer>{answer}</answer>" if read else "The image shows a surgical",
            "reason": "OK" if read else "TRUNCATED",
        }
    table, ious = scored(rows)
    for row, iou in zip(rows, ious, strict=True):
        row["iou"] = iou
        if rewards:
            terms = {"format": float(row["reason"] == "OK"), "accuracy": float(row["pred_answer"] == row["answer"])}
            terms |= {"iou": iou, "coherence": terms["accuracy"] * (iou >= 0.5)}
            row["rewards"] = {**terms, "total": sum(terms.values())}
    return report.Stage(name, table, rows)


def scored(rows: list[dict]) -> tuple[dict, list[float]]:
    outcomes = metrics.compare(
        pred_answer=[vocabulary.class_index(row["pred_answer"] or "") for row in rows],
        gold_answer=[vocabulary.class_index(row["answer"]) for row in rows],
        pred_box=[row["pred_box"] or [0.0] * 4 for row in rows],
        box_ok=[row["pred_box"] is not None for row in rows],
        gold_box=[row["box"] for row in rows],
        kind=[vocabulary.question_kind(row["question"])[0] for row in rows],
    )
    return metrics.table(outcomes), outcomes.iou.tolist()


def curve(steps: int, *, rl: bool) -> list[dict]:
    rng, rows = random.Random(steps), []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        row = {"step": step, "grad_norm": rng.uniform(0.4, 1.2)}
        if not rl:
            row |= {"loss": 3.2 - 2.7 * done + rng.gauss(0, 0.12)}
            if step % (steps // 8) == 0:
                rows.append({"step": step, "split": "dev", "joint_rate": 0.55 * done})
        else:
            length = 90 + 30 * done + rng.gauss(0, 4)
            row |= {"reward": 1.9 + 0.8 * done + rng.gauss(0, 0.15), "kl": 0.05 * done + rng.uniform(0, 0.01)}
            row |= {"entropy": 0.6 - 0.35 * done + rng.gauss(0, 0.03), "completions/mean_length": length}
            row |= {"completions/min_length": length - 40, "completions/max_length": length + 60}
            row |= {f"rewards/{k}/mean": min(1, v + 0.3 * done + rng.gauss(0, 0.05)) for k, v in TERMS.items()}
        rows.append(row | timed(step, rng, rl=rl))
    return rows


def timed(step: int, rng: random.Random, *, rl: bool) -> dict:
    """What a step's line tells of its speed: the first is slow, every fortieth is followed by an evaluation."""
    spent = {"data_wait": rng.uniform(0.005, 0.02), "update": 1.0, "other": 0.01}
    spent |= {"rollout": 2.0, "reward": 0.2} if rl else {}
    spent |= {"compile": 3.0} if step == 1 else {"evaluation": 1.5, "checkpoint": 0.5} if step % 40 == 0 else {}
    row = {f"time/{phase}": seconds / sum(spent.values()) for phase, seconds in spent.items()}
    row |= {"elapsed_s": 3.0 * step, "speed/step_s": 1.1 + rng.uniform(0, 0.1), "speed/mfu": rng.uniform(0.38, 0.42)}
    row |= {"speed/tokens_per_s": rng.gauss(52_000, 900), "speed/frames_per_s": rng.gauss(29, 0.5)}
    row |= {"padding/prefix": rng.uniform(0, 0.1), "padding/branch": rng.uniform(0.2, 0.3), "memory/used_gib": 61.0}
    return row | ({"speed/completions_per_s": rng.gauss(310, 5)} if rl else {})


TERMS = {"format": 0.7, "accuracy": 0.5, "iou": 0.4, "coherence": 0.3}


def run_of_three(frames: int = 8) -> list[report.Stage]:
    base, sft, grpo = (
        stage("base", 0.1, frames=frames),
        stage("SFT", 0.6, frames=frames),
        stage("GRPO", 0.8, rewards=True, frames=frames),
    )
    return [
        base,
        report.Stage(sft.name, sft.metrics, sft.predictions, curve(240, rl=False)),
        report.Stage(grpo.name, grpo.metrics, grpo.predictions, curve(160, rl=True)),
    ]


FLOORS = {
    "question only": {"accuracy": 0.613, "macro_f1": 0.282, "by_kind": {"state": {"accuracy": 0.484}}},
    "median box": {"miou": 0.214, "miou_legacy": 0.655},
}


def page(tmp_path, stages=None, **changes):
    """The page of a run, as text."""
    given = {
        "title": "A run",
        "floors": FLOORS,
        "images": frame_picture,
        "facts": {"seed": "0"},
        "notes": ["Synthetic."],
    }
    report.write(tmp_path / "report.html", stages=stages or run_of_three(), **{**given, **changes})
    return (tmp_path / "report.html").read_text("utf-8")


class Reader(HTMLParser):
    """Collects tags, attributes, text and the cells of the tables."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.tables, self.text, self.cell = set(), [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = {"class": dict(attrs).get("class") or "", "text": "", "value": None}
            self.tables[-1][-1].append(self.cell)
        elif tag == "data":
            self.cell["value"] = float(dict(attrs)["value"])

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.cell["text"] += data.strip()


# The table of results


def results(html):
    """{scope: {label: cells}} of the table of results."""
    found, scope = {}, None
    for first, *cells in Reader(html).tables[0][1:]:
        if not cells:
            scope = found.setdefault(first["text"], {})
        else:
            scope[re.sub(r"\s*[↑↓]|\xa0", "", first["text"]).strip()] = cells
    return found


def test_every_figure_in_the_table_is_the_one_given(tmp_path):
    stages = run_of_three()
    table = results(page(tmp_path, stages))
    columns = [stage.metrics for stage in stages] + list(FLOORS.values())
    assert list(table) == ["All questions", "organ questions", "state questions", "location questions"]
    checked = 0
    for scope, rows in table.items():
        for key, label, _ in report.METRICS:
            for numbers, cell in zip(columns, rows.get(label, []), strict=False):
                source = numbers if scope == "All questions" else numbers.get("by_kind", {}).get(scope.split()[0], {})
                assert cell["value"] == source.get(key)
                shown = cell["text"].removesuffix("best")
                assert shown == ("–" if key not in source else f"{source[key]:.{0 if key == 'n' else 3}f}")
                checked += cell["value"] is not None
    assert checked == 3 * (9 + 3 * 8) + 5


def test_the_best_stage_is_marked_and_so_is_one_below_a_floor(tmp_path):
    def numbers(accuracy, illusion):
        return {"accuracy": accuracy, "illusion_rate": illusion, "n": 7}

    stages = [stage("a", 0.5), stage("b", 0.5), stage("c", 0.5)]
    given = [numbers(0.6, 0.3), numbers(0.7, 0.2), numbers(0.7, math.nan)]
    stages = [report.Stage(s.name, m, s.predictions) for s, m in zip(stages, given, strict=True)]
    rows = results(page(tmp_path, stages, floors={"floor": numbers(0.6, 0.9)}))["All questions"]
    marks = {label: [cell["class"].split() for cell in rows[label][:3]] for label in rows}
    assert ["best" in mark for mark in marks["Accuracy"]] == [False, True, True]
    assert ["low" in mark for mark in marks["Accuracy"]] == [True, False, False]
    assert ["best" in mark for mark in marks["Illusion rate"]] == [False, True, False]
    assert not any("low" in mark or "best" in mark for mark in marks["Questions, n"])
    assert rows["Illusion rate"][2]["text"] == "–"


# Safety


def test_nothing_a_model_writes_becomes_markup(tmp_path):
    def hostile(one):
        rows = [
            row | {"text": f"<think>{EVIL}</think>{EVIL}", "pred_answer": EVIL, "reason": EVIL}
            for row in one.predictions
        ]
        rows = [
            row | {"frame": EVIL + row["frame"], "question": row["question"] + EVIL, "answer": EVIL} for row in rows
        ]
        rows = [row | {"rewards": {EVIL: 1.0}} for row in rows]
        return report.Stage(EVIL, {**one.metrics, "by_kind": {EVIL: one.metrics}}, rows, one.curve)

    stages = [hostile(one) for one in run_of_three()]
    html = page(tmp_path, stages, title=EVIL, facts={EVIL: EVIL}, notes=[EVIL], floors={EVIL: {"n": 1}})
    reader = Reader(html)
    assert not reader.tags & {"script", "img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert not [c for c in html if not c.isprintable() and c not in "\n"]
    for shown in ("<script>", "{{ 7 * 7 }}", "<U+001B>[31m", "<U+202E>", "<U+D800>"):
        assert shown in reader.text


def test_the_page_asks_nobody_for_anything(tmp_path):
    html = page(tmp_path)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=", re.sub(r"base64,[A-Za-z0-9+/=]*", "", html))
    links = [value for name, value in Reader(html).attributes if name in ("href", "xlink:href")]
    assert links and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert "default-src 'none'" in html
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link.startswith("#")} <= set(ids)


# The file


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first = page(tmp_path)
    assert page(tmp_path) == first
    assert page(tmp_path, seed=1) != first


def test_the_page_stays_below_six_megabytes(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 640, 3), np.uint8))
    rows = [row | {"text": "so " * 5_000} for row in stage("GRPO", 0.5, frames=40).predictions]
    wordy = [report.Stage(name, {"n": 1}, rows, curve(1000, rl=True)) for name in ("a", "b", "c")]
    assert len(page(tmp_path, wordy, images=lambda _: noise, examples=36).encode()) < 6_000_000


def test_a_failure_leaves_the_old_page_as_it_was(tmp_path):
    before = page(tmp_path)

    def broken(frame):
        raise InputError(f"{frame}: gone")

    with pytest.raises(InputError, match="gone"):
        page(tmp_path, images=broken)
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_page_needs_no_pictures_no_curves_no_floors_and_only_one_stage(tmp_path):
    html = page(tmp_path, [stage("base", 0.4)], images=lambda _: None, floors={}, facts={}, notes=[])
    assert "data:image" not in html and "Unlearned" not in html and "Learning curves</h2>" not in html
    mute = [row | {"pred_answer": None, "pred_box": None, "iou": 0.0, "text": ""} for row in gold()]
    assert "no box 100" in page(tmp_path, [report.Stage("mute", scored(mute)[0], mute)])
    with pytest.raises(InputError, match="evaluate it first"):
        page(tmp_path, [report.Stage("empty", {}, [])])


# What is shown


def test_examples_are_drawn_before_anyone_sees_the_answers():
    def asked(stages):
        drawn = cards.side_by_side(stages, 7, seed=3)
        return [(frame, [question[0].question for question in questions]) for frame, questions in drawn.items()]

    good, bad = ([stage(name, skill) for name in ("base", "SFT")] for skill in (0.95, 0.05))
    assert asked(good) == asked(bad)
    assert sum(len(questions) for _, questions in asked(good)) == 7
    kinds = [[vocabulary.question_kind(question)[0] for question in questions] for _, questions in asked(good)]
    assert kinds == [[0, 1, 2], [0, 1, 2], [0]]
    orders = {tuple(cards.side_by_side([stage("base", 0.5)], 24, seed)) for seed in range(5)}
    assert len(orders) == 5  # the frames come in the seed's order, not in that of the files


def test_a_question_shows_the_answers_of_all_stages_to_that_very_question():
    stages = run_of_three()
    for questions in cards.side_by_side(stages, 12, seed=0).values():
        for question in questions:
            assert [card.stage for card in question] == ["base", "SFT", "GRPO"]
            assert len({(card.frame, card.question, card.answer, card.truth) for card in question}) == 1


def test_failures_are_what_they_are_said_to_be():
    stages = run_of_three(20)
    groups = {group.name: group for group in cards.failures(stages, 4, seed=0)}
    rows, before = stages[-1].predictions, stages[-2].predictions
    right = [row["pred_answer"] == row["answer"] for row in rows]
    illusions = [r and row["iou"] < 0.5 for r, row in zip(right, rows, strict=True)]
    assert groups["Illusions"].total == sum(illusions) > 4
    assert all(card.given == card.answer and card.iou < 0.5 for card in groups["Illusions"].cards)
    lost = sum(
        old["pred_answer"] == old["answer"] and old["iou"] >= 0.5 and not (r and row["iou"] >= 0.5)
        for old, row, r in zip(before, rows, right, strict=True)
    )
    assert groups["Unlearned"].total == lost > 0
    assert all(len(group.cards) == min(4, group.total) and group.of == len(rows) for group in groups.values())


def test_outcomes_agree_with_the_metrics():
    for one in run_of_three():
        counts = Counter(map(cards.outcome, one.predictions))
        n, numbers = len(one.predictions), one.metrics
        assert set(counts) <= set(cards.OUTCOMES)
        assert counts["joint"] / n == pytest.approx(numbers["joint_rate"])
        assert (counts["joint"] + counts["illusion"]) / n == pytest.approx(numbers["accuracy"])
        assert counts["illusion"] == pytest.approx(numbers["illusion_rate"] * numbers["accuracy"] * n)


def test_the_confusion_table_agrees_with_scikit_learn(tmp_path):
    stages = [stage("GRPO", 0.5, frames=30)]
    head, *body = Reader(page(tmp_path, stages)).tables[1]
    columns, rows = [cell["text"] for cell in head[1:-2]], [cells[0]["text"] for cells in body]
    pairs = [(row["answer"], row["pred_answer"] or "not readable") for row in stages[0].predictions]
    expected = confusion_matrix(*zip(*pairs, strict=True), labels=columns)
    assert columns[-1] == "not readable"
    assert [name for name in vocabulary.CLASSES if name in columns] == columns[:-1]
    for name, cells in zip(rows, body, strict=True):
        assert [int(cell["text"]) for cell in cells[1:-2]] == expected[columns.index(name)].tolist()


# Charts


def test_a_curve_ends_where_the_run_ends_and_is_smoothed_without_lag():
    rows = curve(200, rl=True)
    panel = next(panel for panel in charts.panels(rows) if panel.label == "Reward")
    values = np.array([row["reward"] for row in rows])
    assert [panel.raw[0][0], panel.raw[-1][0]] == [0, 1]
    top = max(values.max(), 0)
    assert [y for _, y in panel.raw] == pytest.approx(1 - values / top)
    middle = np.convolve(values, np.ones(21) / 21, "valid")
    assert [y for _, y in panel.smooth[10:-10]] == pytest.approx(1 - middle / top)
    assert panel.first == pytest.approx(values[:11].mean()) and panel.last == pytest.approx(values[-11:].mean())


def test_a_long_curve_is_thinned_but_keeps_its_spikes():
    rows = [{"step": step, "loss": 9.0 if step == 7777 else 1.0 + step % 2} for step in range(20_000)]
    (panel,) = charts.panels(rows)
    assert len(panel.raw) <= 300
    assert min(y for _, y in panel.raw) == 0


def test_values_that_are_not_finite_are_left_out_and_counted():
    rows = [{"step": s, "loss": v} for s, v in enumerate([3.0, None, math.nan, "2", 2.0, True, 1.0])]
    rows += [{"step": 3, "split": "dev", "loss": 50.0}, {"step": 4}]
    (panel,) = charts.panels(rows)
    assert (panel.dropped, len(panel.raw), panel.first, panel.last) == (4, 3, 3.0, 1.0)
    assert charts.panels(rows[:2]) == []


@pytest.mark.parametrize("top", [1e-7, 0.013, 0.99, 1.0, 3.2, 47.0, 512.0, 1e9])
def test_ticks_are_few_round_and_within_the_chart(top):
    (panel,) = charts.panels([{"step": 0, "loss": 0.0}, {"step": 10, "loss": top}])
    values = [float(tick.text) for tick in panel.y_ticks]
    assert 2 <= len(values) <= 5
    assert all(tick.at == pytest.approx(1 - value / top) for tick, value in zip(panel.y_ticks, values, strict=True))
    assert f"{values[1]:e}"[0] in "125"


def test_the_histogram_agrees_with_numpy():
    rows = [*stage("GRPO", 0.6, frames=30).predictions, {"pred_box": [0, 0, 1, 1], "iou": 1.0}]
    chart = charts.histogram("GRPO", rows)
    boxed = [row["iou"] for row in rows if row["pred_box"] is not None]
    assert chart.counts == np.histogram(boxed, bins=20, range=(0, 1))[0].tolist()
    assert chart.boxless == len(rows) - len(boxed) > 0
    assert chart.median == pytest.approx(np.median(boxed))


# From folders


def folders(tmp_path, stages):
    """Every stage as a run's folder, and the data set of its frames."""
    for one in stages:
        folder = tmp_path / one.name
        folder.mkdir()
        files = {"predictions.jsonl": one.predictions, "metrics.jsonl": one.curve, "sessions.jsonl": one.starts}
        for name, rows in files.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        known = {
            "floors": FLOORS,
            "facts": {f"{one.name} seconds": "12"},
            "notes": ["Synthetic."],
            "data": str(tmp_path / "data"),
        }
        known |= one.metrics | {"split": "val"}
        (folder / "metrics.json").write_text(json.dumps(known), "utf-8")
    for row in stages[0].predictions:
        sequence, frame = row["frame"].split("/")
        for part in ("left_frames", "vqla/label"):
            (tmp_path / "data" / sequence / part).mkdir(parents=True, exist_ok=True)
        frame_picture(row["frame"]).save(tmp_path / "data" / sequence / "left_frames" / f"{frame}.png")
        label = tmp_path / "data" / sequence / "vqla/label" / f"{frame}_QAL.txt"
        label.write_text("What organ is being operated?|kidney|10,20,210,220\n", "utf-8")
    return [tmp_path / one.name for one in stages]


def test_folders_make_the_same_table_as_what_they_were_written_from(tmp_path):
    stages = run_of_three()
    assert report.run(folders(tmp_path, stages), tmp_path / "out" / "r.html") == 0
    html = (tmp_path / "out" / "r.html").read_text("utf-8")
    assert results(html) == results(page(tmp_path, stages))
    assert "data:image/jpeg" in html and "GRPO seconds" in html and html.count("Synthetic.") == 1


def test_a_stored_score_is_never_believed(tmp_path):
    stages = [stage("base", 0.2)]
    for row in stages[0].predictions:
        row["iou"] = 1.0
    (folder,) = folders(tmp_path, stages)
    (folder / "metrics.json").write_text('{"accuracy": 1.0, "miou": 1.0}', "utf-8")
    report.run([folder], tmp_path / "r.html")
    assert results((tmp_path / "r.html").read_text("utf-8")) == results(page(tmp_path, stages, floors={}))


def test_a_broken_folder_is_named(tmp_path):
    (folder,) = folders(tmp_path, [stage("base", 0.2)])
    (folder / "metrics.json").write_text("[]", "utf-8")
    with pytest.raises(InputError, match=r"base/metrics\.json: not a JSON object"):
        report.run([folder], tmp_path / "r.html")
    (folder / "predictions.jsonl").write_text("{}\n", "utf-8")
    (folder / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"base/predictions\.jsonl:1"):
        report.run([folder], tmp_path / "r.html")
    (folder / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match=r"base/predictions\.jsonl: cannot read"):
        report.run([folder], tmp_path / "r.html")


# Speed


def test_the_page_says_where_the_time_went_and_how_much_was_done(tmp_path):
    html = page(tmp_path)
    text = re.sub(r"\s+", " ", Reader(html[html.index('id="speed"') : html.index('id="places"')]).text)
    split = charts.time_split(curve(160, rl=True))
    shares = {area.label: area.share for area in split.areas}
    for label, share in shares.items():
        assert f"{label} {100 * share:.1f} %" in text
    assert sum(shares.values()) == pytest.approx(1) and shares["rollout"] > shares["update"] > shares["evaluation"] > 0
    for label in ("Tokens/s", "Completions/s", "MFU", "Padding of branches", "Device memory, GiB"):
        assert label in text
    assert text.count("Completions/s") == 1  # SFT draws none


def starts(*lost_and_down):
    """The lines of sessions.jsonl of a run that was begun, and started anew after so much lost and down time."""
    return [{"step": 0, "lost_s": lost, "down_s": down} for lost, down in [(0.0, 0.0), *lost_and_down]]


def test_the_page_says_what_restarts_cost(tmp_path):
    stages = run_of_three()
    told = [
        ("SFT", starts((70.5, 200.0), (7.5, 40.0)), "3 starts: 12.0 min in the run, 78 s lost", "4.0 min down."),
        ("GRPO", starts((9000.0, None)), "2 starts: 8.0 min in the run, 2.5 h lost", "0 s down."),
    ]
    for stage, (name, lines, *_) in zip(stages[1:], told, strict=True):
        assert stage.name == name
        stage.starts[:] = lines
    report.run(folders(tmp_path, stages), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text("utf-8")
    parts = html[html.index('id="speed"') : html.index('id="places"')].split("<h3>")[1:]
    for part, (name, _, begin, end) in zip(parts, told, strict=True):
        assert part.startswith(name) and f"<p>{begin} by going back to checkpoints, {end}</p>" in part
    for stage in stages:
        stage.starts[1:] = []
    assert " starts: " not in page(tmp_path, stages)


def test_a_run_that_tells_no_times_has_no_part_about_speed(tmp_path):
    stages, bare = run_of_three(), run_of_three()
    for stage in bare:
        stage.curve[:] = [{k: v for k, v in row.items() if "time/" not in k} for row in stage.curve]
    assert 'id="speed"' in page(tmp_path, stages) and 'id="speed"' not in page(tmp_path, bare)


def test_bands_of_time_lie_on_each_other_and_fill_the_chart():
    for steps in (8, 300):
        split = charts.time_split(curve(steps, rl=True))
        middle = lambda area: len(area.outline) // 2  # noqa: E731
        tops = [area.outline[: middle(area)] for area in split.areas]
        bottoms = [area.outline[middle(area) :][::-1] for area in split.areas]
        assert {y for _, y in bottoms[0]} == {1.0} and [y for _, y in tops[-1]] == pytest.approx([0] * len(tops[-1]))
        for top, bottom in zip(tops, bottoms[1:], strict=False):
            assert top == bottom
        assert (tops[0][0][0], tops[0][-1][0]) == (0.0, 1.0) and len(tops[0]) <= 120


def test_lines_count_by_the_time_that_they_stand_for():
    rows = [{"step": 1, "elapsed_s": 9.0, "time/compile": 1.0}, {"step": 2, "elapsed_s": 10.0, "time/update": 1.0}]
    rows.insert(1, {"step": 1, "split": "dev", "elapsed_s": 9.5, "accuracy": 0.5})
    shares = {area.phase: area.share for area in charts.time_split(rows).areas}
    assert shares == pytest.approx({"compile": 0.9, "update": 0.1})
    (update,) = (area for area in charts.time_split(rows, most=1).areas if area.phase == "update")
    assert {round(y, 9) for _, y in update.outline} == {1.0, 0.9}
    assert charts.time_split([{"step": 1, "elapsed_s": 1.0, "loss": 2.0}]) is None
    assert charts.time_split([{"step": 1, "time/update": float("nan")}, {"step": None, "time/update": 1}]) is None
