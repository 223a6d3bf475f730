import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from surgery_r1_jax import boxes, metrics, vocabulary
from surgery_r1_jax.errors import InputError

seeds = st.integers(0, 2**32 - 1)
answers = st.lists(st.tuples(st.integers(0, 17), st.integers(-1, 17)), min_size=1, max_size=40)


def random_arrays(seed, n):
    """Predictions of every quality for n questions on n // 3 + 1 frames, as the arguments of `compare`."""
    random = np.random.default_rng(seed)
    gold_answer = random.integers(0, 18, n)
    guess = random.integers(-1, 18, n)
    corners = np.sort(random.random((n, 2, 2)), axis=1).reshape(n, 4)
    return dict(
        pred_answer=np.where(random.random(n) < 0.6, gold_answer, guess),
        gold_answer=gold_answer,
        pred_box=corners + random.choice((0, 0, 0.05, 0.3), (n, 1)) * random.random((n, 4)),
        box_ok=random.random(n) < 0.9,
        gold_box=corners,
        kind=np.array([vocabulary.class_kind(index) for index in gold_answer], int),
        frame=random.integers(0, n // 3 + 1, n),
    )


def outcomes_of(pairs):
    """Outcomes of (gold, predicted) answers with perfect boxes."""
    gold, given = np.array(pairs).T
    box = np.tile((0.1, 0.1, 0.4, 0.4), (len(gold), 1))
    ok = np.ones(len(gold), bool)
    kind = [vocabulary.class_kind(index) for index in gold]
    return metrics.compare(pred_answer=given, gold_answer=gold, pred_box=box, box_ok=ok, gold_box=box, kind=kind)


def flat(table):
    """A table as one flat dict."""
    kinds = {f"{kind}/{name}": value for kind, part in table["by_kind"].items() for name, value in part.items()}
    return {**{name: value for name, value in table.items() if name != "by_kind"}, **kinds}


@settings(deadline=None, max_examples=150)
@given(answers)
def test_accuracy_and_macro_f1_equal_scikit_learn(pairs):
    found = metrics.summarise(outcomes_of(pairs))
    gold, given = np.array(pairs).T
    assert found["accuracy"] == accuracy_score(gold, given)
    official = precision_recall_fscore_support(gold, given, average="macro", zero_division=1)[2]
    assert found["macro_f1"] == pytest.approx(official, abs=1e-12)
    present = f1_score(gold, given, labels=np.unique(gold), average="macro", zero_division=0)
    assert found["macro_f1_true"] == pytest.approx(present, abs=1e-12)
    everything = f1_score(gold, given, labels=range(18), average="macro", zero_division=0)
    assert found["macro_f1_18"] == pytest.approx(everything, abs=1e-12)


@pytest.mark.parametrize(
    ("pairs", "macro_f1", "macro_f1_true"),
    [
        ([(3, 3)], 1, 1),
        ([(3, -1)], 0, 0),
        ([(3, 3), (3, -1)], 1 / 3, 2 / 3),  # the unreadable answer is a class of its own
        ([(3, 3), (3, 5)], 1 / 3, 2 / 3),  # and so is one that is never true
        ([(3, 3), (5, 5)], 1, 1),
        ([(3, 5), (5, 3)], 0, 0),
    ],
)
def test_macro_f1_on_cases_worked_by_hand(pairs, macro_f1, macro_f1_true):
    found = metrics.summarise(outcomes_of(pairs))
    assert found["macro_f1"] == pytest.approx(macro_f1) and found["macro_f1_true"] == pytest.approx(macro_f1_true)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 25])
def test_every_figure_equals_a_plain_python_oracle(n):
    arrays = random_arrays(n, n)
    right = [a == g for a, g in zip(arrays["pred_answer"], arrays["gold_answer"], strict=True)]
    ious, legacy = [], []
    for box, gold, ok in zip(arrays["pred_box"], arrays["gold_box"], arrays["box_ok"], strict=True):
        ok = ok and box[0] < box[2] and box[1] < box[3]
        ious.append(overlap(box, gold, 0.0) if ok else 0.0)
        legacy.append(overlap(box, gold, 1.0) if ok else 0.0)
    placed = [value >= 0.5 for value in ious]
    found = metrics.summarise(metrics.compare(**arrays))
    moving = [r for r, kind in zip(right, arrays["kind"], strict=True) if kind != 0]
    assert found["n"] == n
    assert found["accuracy"] == sum(right) / n
    assert found["accuracy_no_organ"] == (sum(moving) / len(moving) if moving else 0)
    assert found["miou"] == pytest.approx(math.fsum(ious) / n, abs=1e-14)
    assert found["miou_legacy"] == pytest.approx(math.fsum(legacy) / n, abs=1e-14)
    assert found["joint_rate"] == sum(r and p for r, p in zip(right, placed, strict=True)) / n
    assert found["agreement_rate"] == sum(r == p for r, p in zip(right, placed, strict=True)) / n
    illusions = [not p for r, p in zip(right, placed, strict=True) if r]
    assert found["illusion_rate"] == (sum(illusions) / len(illusions) if illusions else 0)


def overlap(a, b, grow):
    """IoU of two valid boxes after moving their far edges out."""
    a, b = ((x0, y0, x1 + grow, y1 + grow) for x0, y0, x1, y1 in (a, b))
    inter = math.prod(max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 25))
def test_order_padding_and_batches_change_no_bit(seed, n):
    arrays = random_arrays(seed, n)
    whole = metrics.table(metrics.compare(**arrays))
    random = np.random.default_rng(seed)

    order = random.permutation(n)
    assert metrics.table(metrics.compare(**{name: array[order] for name, array in arrays.items()})) == whole

    size = 8  # the last batch is filled up with rubbish, and batches stand side by side as [batches, size]
    missing = -n % size
    folded = {}
    for name, array in arrays.items():
        rubbish = array[random.integers(0, n, missing)] if name != "pred_box" else np.full((missing, 4), np.nan)
        folded[name] = np.concatenate([array, rubbish]).reshape(-1, size, *array.shape[1:])
    valid = (np.arange(n + missing) < n).reshape(-1, size)
    assert metrics.table(metrics.compare(**folded, valid=valid)) == whole

    parts = [metrics.compare(**{name: array[i : i + 3] for name, array in arrays.items()}) for i in range(0, n, 3)]
    joined = metrics.Outcomes(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    assert metrics.table(joined) == whole


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_every_figure_is_a_share(seed):
    table = metrics.table(metrics.compare(**random_arrays(seed, 20)))
    for name, value in flat(table).items():
        if name.split("/")[-1] == "n":
            assert type(value) is int and 0 < value <= 20, name
        else:
            assert type(value) is float and 0 <= value <= 1, name
    assert table["miou_legacy"] >= table["miou"]
    assert table["joint_rate"] <= table["accuracy"]
    assert sum(part["n"] for part in table["by_kind"].values()) == table["n"] == 20


def test_a_kind_in_the_table_is_the_summary_of_its_questions():
    outcomes = metrics.compare(**random_arrays(0, 200))
    table = metrics.table(outcomes)
    assert list(table["by_kind"]) == ["organ", "state", "location"]
    located = metrics.summarise(outcomes, outcomes.kind == vocabulary.LOCATION)
    del located["accuracy_no_organ"]
    assert table["by_kind"]["location"] == located
    assert "organ" not in metrics.table(outcomes_of([(3, 3)]))["by_kind"]


def test_an_unreadable_box_counts_nothing_in_either_miou_and_as_a_parse_failure():
    box, gold = (
        [(0.4, 0.4, 0.1, 0.1), (math.nan,) * 4, (0.1, 0.1, 0.4, 0.4), (0.1, 0.1, 0.4, 0.4)],
        (0.1, 0.1, 0.4, 0.4),
    )
    found = metrics.summarise(
        metrics.compare(
            pred_answer=[3, 3, 3, 3],
            gold_answer=[3] * 4,
            pred_box=box,
            box_ok=[True, True, False, True],
            gold_box=[gold] * 4,
            kind=[1] * 4,
        )
    )
    assert found["miou"] == found["miou_legacy"] == 0.25
    assert found["parse_failure_rate"] == 0.75 and found["accuracy"] == 1
    assert found["illusion_rate"] == 0.75 and found["joint_rate"] == 0.25


def test_a_share_of_nothing_is_zero():
    outcomes = outcomes_of([(3, 5), (0, 2)])
    assert metrics.summarise(outcomes)["illusion_rate"] == 0
    empty = metrics.summarise(outcomes, np.zeros(2, bool))
    assert empty["n"] == 0 and not any(empty.values())
    nobody = metrics.Outcomes(*(array[:0] for array in outcomes))
    assert metrics.table(nobody) == {**empty, "by_kind": {}}
    assert set(metrics.intervals(nobody, draws=2).values()) == {(0.0, 0.0)}


def test_questions_without_gold_are_padding():
    assert metrics.summarise(outcomes_of([(3, 3), (-1, -1)]))["n"] == 1


def test_intervals_are_seeded_and_hold_the_figure():
    outcomes = metrics.compare(**random_arrays(0, 300))
    found = metrics.summarise(outcomes)
    intervals = metrics.intervals(outcomes, draws=200)
    assert intervals == metrics.intervals(outcomes, draws=200) != metrics.intervals(outcomes, draws=200, seed=1)
    for name in ("accuracy", "miou", "joint_rate", "illusion_rate", "parse_failure_rate"):
        low, high = intervals[name]
        assert 0 <= low < found[name] < high <= 1 and high - low < 0.25, name
    assert "n" not in intervals


def test_intervals_resample_frames_and_not_questions():
    random = np.random.default_rng(0)
    right = np.repeat(random.random(40) < 0.5, 10)  # all ten questions of a frame share their fate
    outcomes = outcomes_of([(3, 3 if ok else 5) for ok in right])._replace(frame=np.repeat(np.arange(40), 10))
    low, high = metrics.intervals(outcomes, draws=300)["accuracy"]
    alone_low, alone_high = metrics.intervals(outcomes._replace(frame=np.arange(400)), draws=300)["accuracy"]
    assert high - low > 2 * (alone_high - alone_low)


QUESTIONS = ("What organ is being operated?", "What is the state of suction?", "Where is suction located?")


def lines_of(arrays):
    """The lines of a predictions file with the same content as the arrays."""
    rows = []
    for i, index in enumerate(arrays["gold_answer"]):
        answer = int(arrays["pred_answer"][i])
        row = dict(
            frame=f"seq_1/frame{arrays['frame'][i]:03}",
            question=QUESTIONS[arrays["kind"][i]],
            answer=vocabulary.CLASSES[index],
            box=arrays["gold_box"][i].tolist(),
            pred_answer=vocabulary.CLASSES[answer] if answer >= 0 else None,
            pred_box=arrays["pred_box"][i].tolist() if arrays["box_ok"][i] else None,
            iou=0.123,  # stored scores are not believed
            text="",
            reason="OK",
        )
        rows.append(json.dumps(row))
    return rows


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 25))
def test_a_predictions_file_gives_the_bits_of_the_live_run(tmp_path_factory, seed, n):
    arrays = random_arrays(seed, n)
    path = tmp_path_factory.mktemp("run") / "predictions.jsonl"
    path.write_text("\n".join(lines_of(arrays)) + "\n")
    live, stored = metrics.compare(**arrays), metrics.from_predictions(path)
    assert metrics.table(stored) == metrics.table(live)
    assert metrics.intervals(stored, draws=5) == metrics.intervals(live, draws=5)


def broken(**changes):
    (line,) = lines_of(random_arrays(0, 1))
    return json.dumps({**json.loads(line), **changes})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"frame": ', "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('"\udcff"', "not a JSON object"),
        ("9" * 5000, "not a JSON object"),
        ("[1, 2]", "expected a JSON object, found [1, 2]"),
        ('{"frame": "seq_1/frame000"}', "key 'question' is missing"),
        (broken(answer="spleen"), "'answer' \"spleen\" is none of the 18 classes"),
        (broken(answer=None), "'answer' must be a string, found null"),
        (broken(pred_answer=3), "'pred_answer' must be a string, found 3"),
        (broken(frame=["a"]), "'frame' must be a string"),
        (broken(box=None), "'box' must be four numbers"),
        (broken(box=[0.5, 0.1, 0.2, 0.4]), "'box' must have x0 < x1 and y0 < y1"),
        (broken(box=[0, 0, math.nan, 1]), "'box' must have x0 < x1 and y0 < y1"),
        (broken(box=[0, 0, 10**400, 1]), "'box' must have x0 < x1 and y0 < y1"),
        (broken(pred_box=[0, 0, 1]), "'pred_box' must be four numbers"),
        (broken(pred_box=[0, 0, 1, True]), "'pred_box' must be four numbers"),
        (broken(pred_box="0 0 1 1"), "'pred_box' must be four numbers"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, reason):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes("\n".join(["", *lines_of(random_arrays(0, 2)), line]).encode(errors="surrogateescape"))
    with pytest.raises(InputError) as refused:
        metrics.from_predictions(path)
    assert str(refused.value).startswith(f"{path}:4: ") and reason in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < len(str(path)) + 200


def test_a_missing_or_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, reason in (("empty.jsonl", "holds no predictions"), ("none.jsonl", "cannot read the predictions")):
        with pytest.raises(InputError, match=reason):
            metrics.from_predictions(tmp_path / name)


def test_what_a_model_may_write_is_never_refused_only_wrong(tmp_path):
    path = tmp_path / "predictions.jsonl"
    wild = [dict(pred_answer="liver"), dict(pred_box=[0.5, 0.5, 0.1, 0.1]), dict(pred_box=[0, 0, 10**400, 1])]
    path.write_text("\n".join(broken(**changes) for changes in wild))
    assert metrics.table(metrics.from_predictions(path))["parse_failure_rate"] == 1


def test_per_question_overlap_is_that_of_boxes():
    arrays = random_arrays(3, 50)
    outcomes = metrics.compare(**arrays)
    read = outcomes.boxed
    np.testing.assert_array_equal(outcomes.iou[read], boxes.iou(arrays["pred_box"], arrays["gold_box"], np)[read])
    assert outcomes.iou.dtype == np.float64 and not np.any(outcomes.iou[~read])
