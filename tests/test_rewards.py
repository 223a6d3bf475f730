import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import location, options, rewards, vocabulary

LABELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "labels_train.txt"
COHERENCE = ("joint", "joint_soft", "harmonic", "concord", "geometry", "think_answer", "think_box", "triple")
TAU, PENALTY = 0.5, 0.25
ROWS = 64  # of every batch, so that each function is compiled once

DTYPES = rewards.Judged(
    answer=np.int32,
    gold_answer=np.int32,
    box=np.float32,
    box_ok=bool,
    gold_box=np.float32,
    format_ok=bool,
    kind=np.int32,
    wants_answer=bool,
    wants_box=bool,
    think_answer=np.int32,
    think_box=np.float32,
    think_box_ok=bool,
    organ_box=np.float32,
    organ_ok=bool,
    valid=bool,
)

PERFECT = rewards.Judged(
    answer=15,
    gold_answer=15,
    box=(0.5, 0.5, 0.9, 0.9),
    box_ok=True,
    gold_box=(0.5, 0.5, 0.9, 0.9),
    format_ok=True,
    kind=2,
    wants_answer=True,
    wants_box=True,
    think_answer=15,
    think_box=((0.5, 0.5, 0.9, 0.9), (0.0,) * 4, (0.0,) * 4, (0.0,) * 4),
    think_box_ok=(True, False, False, False),
    organ_box=(0.2, 0.2, 0.6, 0.6),
    organ_ok=True,
    valid=True,
)


def stack(rows):
    """Rows of plain Python values as one Judged of arrays [ROWS, ...], filled up with padding."""
    rows = [*rows, *[PERFECT._replace(valid=False)] * (ROWS - len(rows))]
    with np.errstate(over="ignore"):  # 1e308 becomes an infinite float32, on purpose
        columns = zip(*rows, strict=True)
        return rewards.Judged(*(np.array(c, dtype) for c, dtype in zip(columns, DTYPES, strict=True)))


@jax.jit
def every_term(judged):
    """All terms there are, by name."""
    plain = (
        "well_formed",
        "accuracy",
        "iou",
        "iou_squared",
        "giou",
        "joint_soft",
        "harmonic",
        "think_answer",
        "think_box",
    )
    return {
        **{name: getattr(rewards, name)(judged) for name in plain},
        **{name: getattr(rewards, name)(judged, TAU) for name in ("iou_threshold", "joint", "triple")},
        "concord": rewards.concord(judged, TAU, PENALTY),
        "geometry": rewards.geometry(judged),
        "geometry_in_image": rewards.geometry(judged, "image", "smaller_y"),
    }


def earned(**changes):
    """All terms of the perfect completion with some changes, as floats."""
    return {name: float(term[0]) for name, term in every_term(stack([PERFECT._replace(**changes)])).items()}


def scored(config, **changes):
    """The score of the perfect completion with some changes, as floats."""
    return rewards.Rewards(*(float(term[0]) for term in rewards.score(stack([PERFECT._replace(**changes)]), config)))


def fine(box):
    return all(abs(edge) < 1e18 for edge in box) and box[0] < box[2] and box[1] < box[3]


def overlap(a, b):
    """(IoU, GIoU) of two valid boxes, as the textbooks write them."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    hull = math.prod(max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union, width * height / union - (hull - union) / hull


def expected(row):
    """The terms of one row, written down a second time without arrays."""
    box, gold, organ = (row[name] for name in ("box", "gold_box", "organ_box"))
    boxed = row["valid"] and row["wants_box"] and row["box_ok"] and fine(box)
    s, g = overlap(box, gold) if boxed else (0.0, -1.0)
    a = bool(row["valid"] and row["wants_answer"] and row["answer"] == row["gold_answer"])
    b = s >= TAU
    both = row["valid"] and row["wants_answer"] and row["wants_box"]
    traced = [t for t, ok in zip(row["think_box"], row["think_box_ok"], strict=True) if ok]
    near = max((overlap(t, box)[0] for t in traced if fine(t)), default=0.0) if boxed and both else 0.0
    concluded = both and a and row["think_answer"] == row["answer"]

    located = both and boxed and row["kind"] == vocabulary.LOCATION and row["answer"] >= 0
    in_organ, in_image = (
        located and location.LocationRule(*rule).answer(box, organ) == vocabulary.CLASSES[row["answer"]]
        for rule in (("organ", "larger_y"), ("image", "smaller_y"))
    )
    return {
        "well_formed": row["valid"] and row["format_ok"],
        "accuracy": a,
        "iou": s,
        "iou_squared": s * s,
        "iou_threshold": b,
        "giou": (1 + g) / 2,
        "joint": both and a and b,
        "joint_soft": s if both and a else 0,
        "harmonic": 2 * s / (1 + s) if both and a else 0,
        "concord": (1 if a and b else -PENALTY if a != b else 0) if both else 0,
        "geometry": in_organ and row["organ_ok"],
        "geometry_in_image": in_image,
        "think_answer": concluded,
        "think_box": near,
        "triple": concluded and b and (near >= TAU or not traced),
    }


def random_rows(seed):
    """A batch of rows that meet equal answers, equal boxes, shared edges, and every kind of broken number often."""
    random = np.random.default_rng(seed)

    def likely():
        return bool(random.random() < 0.85)

    def coarse_box(valid=True):
        box = random.integers(0, 10, 4) / 9
        if valid:
            x, y = (np.sort(random.choice(10, 2, replace=False)) / 9 for _ in "xy")
            box = (x[0], y[0], x[1], y[1])
        return tuple(map(float, box))

    def wild_box():
        return tuple(
            random.choice((math.nan, math.inf, -math.inf, 1e38, 1e308, -3.0, 200.0, -0.0, 0.0, 1.0), 4).tolist()
        )

    def any_box(friend):
        return (friend, coarse_box(), coarse_box(), coarse_box(valid=False), wild_box())[
            random.choice(5, p=(0.3, 0.3, 0.2, 0.1, 0.1))
        ]

    def row():
        gold_box, gold_answer = coarse_box(), int(random.choice((0, 1, 14, 15, 16, 17)))
        box, answer = any_box(gold_box), int(random.choice((gold_answer, gold_answer, -1, 1, 14, 17)))
        return rewards.Judged(
            answer=answer,
            gold_answer=gold_answer,
            box=box,
            box_ok=likely(),
            gold_box=gold_box,
            format_ok=likely(),
            kind=int(random.choice((0, 1, 2, 2, 3))),
            wants_answer=likely(),
            wants_box=likely(),
            think_answer=int(random.choice((answer, answer, -1, 15))),
            think_box=tuple(any_box(box) for _ in range(4)),
            think_box_ok=tuple(bool(random.random() < 0.3) for _ in range(4)),
            organ_box=coarse_box(),
            organ_ok=likely(),
            valid=likely(),
        )

    return [row() for _ in range(ROWS)]


seeds = st.integers(0, 2**32 - 1)


def near_tau(row):
    """Whether rounding may decide if a box of the row reaches TAU."""
    pairs = [(row.box, row.gold_box), *((think_box, row.box) for think_box in row.think_box)]
    return any(abs(overlap(*pair)[0] - TAU) < 1e-5 for pair in pairs if all(map(fine, pair)))


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_every_term_equals_a_plain_python_oracle(seed):
    batch = random_rows(seed)
    terms = jax.device_get(every_term(stack(batch)))
    for i, row in enumerate(batch):
        if not near_tau(row):
            for name, value in expected(row._asdict()).items():
                assert float(terms[name][i]) == pytest.approx(float(value), abs=1e-6), (name, row)


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_every_term_keeps_its_range_and_padding_earns_exactly_nothing(seed):
    judged = stack(random_rows(seed))
    terms = every_term(judged)
    for name, term in terms.items():
        assert term.dtype == jnp.float32 and term.shape == (ROWS,)
        assert np.all((term >= (-PENALTY if name == "concord" else 0)) & (term <= 1)), name
        assert not np.any(np.asarray(term)[~judged.valid]), name


@settings(deadline=None, max_examples=8)
@given(seeds)
def test_the_readings_of_coherence_are_ordered(seed):
    terms = every_term(stack(random_rows(seed)))
    assert np.all(terms["triple"] <= terms["joint"])
    assert np.all(terms["joint"] <= np.minimum(terms["accuracy"], terms["iou_threshold"]))
    assert np.all(terms["joint_soft"] <= terms["iou"])
    assert np.all(terms["joint_soft"] <= terms["harmonic"] + 1e-7)
    assert np.all(terms["concord"] <= terms["joint"])


@settings(deadline=None, max_examples=5)
@given(seeds)
def test_order_changes_nothing(seed):
    judged = stack(random_rows(seed))
    order = np.random.default_rng(seed).permutation(ROWS)
    shuffled = every_term(rewards.Judged(*(array[order] for array in judged)))
    for name, term in every_term(judged).items():
        np.testing.assert_array_equal(shuffled[name], term[order], name)


def test_score_weighs_and_adds_the_terms_for_every_form():
    judged = stack(random_rows(0))
    terms = every_term(judged)
    iou_forms = {"true": "iou", "threshold": "iou_threshold", "squared": "iou_squared", "giou": "giou"}
    for weight, (coherence, (form, iou)) in enumerate(zip(COHERENCE, [*iou_forms.items()] * 2, strict=True)):
        weights = dict(format_weight=weight, accuracy_weight=0.5, iou_weight=2.0, coherence_weight=1.5)
        config = options.Reward(**weights, iou_form=form, coherence_form=coherence, tau=TAU, concord_lambda=PENALTY)
        result = rewards.score(judged, config)
        wanted = [terms[name] for name in ("well_formed", "accuracy", iou, coherence)]
        for term, want in zip(result[:4], wanted, strict=True):
            np.testing.assert_allclose(term, want, atol=1e-6)
        np.testing.assert_allclose(result.total, np.array([*weights.values()]) @ np.array(wanted), atol=1e-5)


def test_a_perfect_completion_earns_four_and_an_empty_one_nothing():
    nothing = dict(answer=-1, box_ok=False, format_ok=False, think_answer=-1, think_box_ok=(False,) * 4)
    assert scored(options.Reward()) == (1, 1, 1, 1, 4)
    assert scored(options.Reward(), **nothing) == (0, 0, 0, 0, 0)


def test_a_part_that_is_not_wanted_earns_and_costs_nothing():
    for config in (options.Reward(), options.Reward(coherence_form="concord")):
        assert scored(config, wants_box=False) == (1, 1, 0, 0, 2)
        assert scored(config, wants_answer=False) == (1, 0, 1, 0, 2)


def test_two_unreadable_answers_are_not_a_match():
    assert earned(answer=-1, gold_answer=-1)["accuracy"] == 0


def test_the_right_answer_in_the_wrong_place_earns_no_coherence():
    terms = earned(box=(0.0, 0.0, 0.3, 0.3))
    assert terms["joint"] == terms["joint_soft"] == terms["harmonic"] == terms["triple"] == 0
    assert terms["accuracy"] == 1 and terms["concord"] == -PENALTY


def test_being_wrong_twice_earns_nothing_under_concord():
    assert earned(answer=3, box=(0.0, 0.0, 0.3, 0.3))["concord"] == 0


def test_a_consistent_error_earns_nothing_under_think_answer():
    assert earned(answer=3, think_answer=3)["think_answer"] == 0


def test_moving_box_and_gold_changes_geometry_but_not_iou():
    shifted = tuple(edge - 0.5 for edge in PERFECT.box)
    here, there = earned(), earned(box=shifted, gold_box=shifted)
    assert here["iou"] == there["iou"] == here["geometry"] == 1
    assert there["geometry"] == 0


def test_a_centre_level_with_the_organs_is_right_of_it_and_below():
    """Float32 puts the centre of this box, 177/2560 in both, a little before the organ's."""
    box, organ = (np.repeat([low, high], 2) / 1280 for low, high in ((18, 159), (47, 130)))
    assert earned(box=tuple(box), organ_box=tuple(organ), answer=15)["geometry"] == 1  # right-top, as top is below


def test_no_box_trick_beats_the_true_box():
    """The tricks that earn up to 8,101 from a published GIoU reward, where the true box earns 2."""
    true = (0.45, 0.45, 0.55, 0.55)
    honest = [(0, 0, 1, 1), (0, 0, 0.01, 0.01), (-9, -9, 9, 9), (-90, -90, 110, 110), (0.45, 0.45, 0.55, 0.56)]
    malformed = [
        (1, 1, 0, 0),
        (9, 9, -9, -9),
        (9, 9, 0, 0),
        (0.55, 0.55, 0.45, 0.45),
        (0.55, 0.45, 0.45, 0.55),
        (0.5, 0.5, 0.5, 0.5),
        (0.45, 0.5, 0.55, 0.5),
        (1e38, 1e38, -1e38, -1e38),
        (-1e38, -1e38, 1e38, 1e38),
        (math.nan,) * 4,
        (0.45, 0.45, 0.55, math.inf),
    ]
    think_box = (true, (0.0,) * 4, (0.0,) * 4, (0.0,) * 4)
    batch = [PERFECT._replace(box=box, gold_box=true, think_box=think_box) for box in (true, *honest, *malformed)]
    for name, term in every_term(stack(batch)).items():
        best, sly, broken = term[0], term[1 : 1 + len(honest)], term[1 + len(honest) : len(batch)]
        if name in ("iou", "iou_squared", "giou", "joint_soft", "harmonic", "think_box"):
            assert best == 1 and np.all(sly < 1) and not np.any(broken), name
        elif name in ("iou_threshold", "joint", "triple", "concord"):
            assert best == 1 and np.all(sly <= 1) and np.all(broken <= 0), name


def test_the_whole_frame_gets_its_honest_overlap():
    assert earned(box=(0, 0, 1, 1), gold_box=(0.25, 0.25, 0.75, 0.75))["iou"] == pytest.approx(0.25)


def test_geometry_agrees_with_every_real_location_answer():
    if not LABELS.is_file():
        pytest.skip(f"the EndoVis-18 labels are not here: {LABELS}")
    organs, batch = {}, []
    for line in LABELS.read_text().splitlines():
        frame, question, answer, corners = line.split("|")
        box = tuple((int(corner) - 1) / (1280, 1024)[i % 2] for i, corner in enumerate(corners.split(",")))
        kind, _ = vocabulary.question_kind(question)
        if kind == vocabulary.ORGAN:
            organs[frame] = box
        elif kind == vocabulary.LOCATION:
            index = vocabulary.class_index(answer)
            batch.append(PERFECT._replace(answer=index, gold_answer=index, box=box, organ_box=organs[frame]))
    assert len(batch) == 3727
    agree = [every_term(stack(batch[start : start + ROWS])) for start in range(0, len(batch), ROWS)]
    assert sum(float(terms["geometry"].sum()) for terms in agree) == len(batch)
    assert sum(float(terms["geometry_in_image"].sum()) for terms in agree) < len(batch) / 2  # the naive rule is wrong


def test_likelihood_pays_the_surer_of_the_right_answers():
    judged = stack([PERFECT, PERFECT, PERFECT, PERFECT._replace(answer=3), PERFECT._replace(valid=False)])
    length, logp = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.float32)
    length[:5] = 2, 2, 1, 1, 0
    logp[:5] = np.log((0.81, 0.04, 0.9, 0.9, 0.9))  # per token: 0.9, 0.2, 0.9, ...
    paid = jax.jit(rewards.likelihood)(judged, logp, length)
    np.testing.assert_array_equal(paid[:5], (0.5, 0, 0.5, 0, 0))
    logp[:5] = math.nan, -math.inf, math.inf, 1e38, math.nan
    paid = jax.jit(rewards.likelihood)(judged, logp, length)
    assert set(np.asarray(paid).tolist()) <= {0.0, 0.5} and not np.any(paid[3:])


def test_bfloat16_boxes_are_judged_in_float32():
    judged = stack([PERFECT._replace(box=(x / 8, 0.5, 1.0, 0.875)) for x in range(7)])
    short = judged._replace(box=jnp.asarray(judged.box, jnp.bfloat16))  # eighths are exact in bfloat16
    for term, same in zip(rewards.score(judged, options.Reward()), rewards.score(short, options.Reward()), strict=True):
        np.testing.assert_array_equal(term, same)


def test_leading_axes_are_free():
    judged = stack(random_rows(2))
    folded = rewards.Judged(*(array.reshape(4, -1, *array.shape[1:]) for array in judged))
    for term, wide in zip(
        rewards.score(judged, options.Reward()), rewards.score(folded, options.Reward()), strict=True
    ):
        np.testing.assert_array_equal(wide.reshape(-1), term)


def test_score_is_the_same_without_jit():
    judged, config = stack(random_rows(1)), options.Reward()
    for term, plain in zip(rewards.score(judged, config), rewards.score.__wrapped__(judged, config), strict=True):
        np.testing.assert_allclose(term, plain, atol=1e-6)


def test_nothing_is_promoted_in_silence():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(every_term.__wrapped__, stack([PERFECT]))
        jax.eval_shape(lambda judged: rewards.score.__wrapped__(judged, options.Reward()), stack([PERFECT]))


@pytest.mark.parametrize(
    "keys",
    [
        {"coherence_form": "agree_raw"},
        {"coherence_form": "likelihood"},
        {"iou_form": "legacy"},
        {"tau": 0.0},
        {"iou_weight": -1.0},
        {"format_weight": math.nan},
        {"concord_lambda": 1.5},
        {"weight": 1.0},
    ],
)
def test_a_config_mistake_is_refused(keys):
    with pytest.raises(pydantic.ValidationError):
        options.Reward(**keys)
