"""grid.py against transformers' own geometry, and what must hold for any grids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import grid

IMAGE = 7  # token id
PATCH = 14  # pixels

sides = st.integers(1, 5)
merges = st.integers(1, 3)
images = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 13)), min_size=1, max_size=3)  # in merged units


def random_grids(seed):
    """A window side, a merge size and the patch grids of one to three images."""
    random = np.random.default_rng(seed)
    merge = int(random.choice([1, 2, 2, 2, 3]))
    return int(random.integers(1, 6)), merge, (random.integers(1, 15, (random.integers(1, 4), 2)) * merge).tolist()


def prefix_of(grids, merge, seed=0):
    """Token ids with every image between two texts of random length, at least one token each."""
    random = np.random.default_rng(seed)
    text = lambda: [1] * int(random.integers(1, 9))  # noqa: E731
    ids = text()
    for height, width in grids:
        ids += [IMAGE] * (height * width // merge**2) + text()
    return np.array(ids)


@pytest.mark.parametrize("seed", range(100))
def test_windows_and_patch_places_equal_transformers(seed):
    torch = pytest.importorskip("torch", reason="transformers' window functions need PyTorch")
    theirs = pytest.importorskip("transformers.vision_utils", reason="this transformers keeps them elsewhere")
    side, merge, grids = random_grids(seed)
    thw = torch.tensor([[1, h, w] for h, w in grids])
    order, ends = theirs.get_vision_window_index(thw, merge, side * merge * PATCH, PATCH)
    places = theirs.get_vision_position_ids(thw, merge).numpy()

    layout = grid.arrange(grids, side=side, merge=merge)
    filled = layout.source_WS >= 0
    source = layout.source_WS[filled]
    np.testing.assert_array_equal(source.reshape(-1, merge**2)[:, 0] // merge**2, order.numpy())
    np.testing.assert_array_equal(source, (order[:, None] * merge**2 + torch.arange(merge**2)).flatten().numpy())
    np.testing.assert_array_equal(filled.sum(1), np.diff(ends.numpy()))
    np.testing.assert_array_equal(layout.hw_WS2[filled], places[source])


@pytest.fixture(scope="module")
def rope_index():
    torch = pytest.importorskip("torch", reason="transformers' position function needs PyTorch")
    import transformers

    ids = dict(image_token_id=IMAGE, video_token_id=8, vision_start_token_id=9, vision_end_token_id=10)
    text = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    text |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
    tower = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    models = {}

    def positions(ids_P, grids, merge):
        if merge not in models:
            whole = transformers.Qwen2_5_VLConfig(
                text_config=text, vision_config=tower | dict(spatial_merge_size=merge), **ids
            )
            with torch.device("meta"):
                models[merge] = transformers.Qwen2_5_VLModel(whole)
        row = torch.tensor(ids_P)[None]
        thw = torch.tensor([[1, h, w] for h, w in grids])
        found, delta = models[merge].get_rope_index(row, (row == IMAGE).int(), image_grid_thw=thw)
        return found[:, 0].numpy(), len(ids_P) + int(delta)

    return positions


@pytest.mark.parametrize("seed", range(100))
def test_positions_and_the_one_after_equal_transformers(rope_index, seed):
    _, merge, grids = random_grids(seed)
    ids = prefix_of(grids, merge, seed)
    want, want_next = rope_index(ids, grids, merge)
    found, next_pos = grid.rope_positions(ids, IMAGE, grids, merge)
    np.testing.assert_array_equal(found, want)
    assert next_pos == want_next


@settings(deadline=None, max_examples=150)
@given(images, sides, merges, st.integers(0, 3))
def test_every_patch_has_one_slot_and_every_token_one_unit(units, side, merge, spare):
    grids = [(h * merge, w * merge) for h, w in units]
    windows = grid.count_windows(grids, side, merge) + spare
    layout = grid.arrange(grids, side=side, merge=merge, windows=windows)
    slots = side * side * merge * merge
    assert layout.source_WS.shape == (windows, slots) and all(field.dtype == np.int32 for field in layout)
    filled = layout.source_WS >= 0
    patches = sum(h * w for h, w in grids)
    assert sorted(layout.source_WS[filled]) == list(range(patches))
    np.testing.assert_array_equal(layout.image_WS > 0, filled)
    assert not layout.hw_WS2[~filled].any()
    assert np.all(filled[:, :-1] >= filled[:, 1:]), "patches stand at the front of their window"

    tokens = patches // merge**2
    unit = layout.unit_of_token
    assert unit.shape == (tokens,) and len(set(unit.tolist())) == tokens
    # Token t is the unit whose patches are rows t * merge^2 and the next ones of the preprocessor's order.
    np.testing.assert_array_equal(
        layout.source_WS.reshape(-1, merge**2)[unit], np.arange(patches).reshape(tokens, merge**2)
    )


@settings(deadline=None, max_examples=150)
@given(images, sides, merges)
def test_a_window_holds_neighbours_of_one_image(units, side, merge):
    grids = [(h * merge, w * merge) for h, w in units]
    layout = grid.arrange(grids, side=side, merge=merge)
    first = 0
    for number, (height, width) in enumerate(grids, start=1):
        here = layout.image_WS == number
        assert len(set(map(tuple, layout.hw_WS2[here].tolist()))) == here.sum() == height * width
        assert layout.hw_WS2[here].max(0).tolist() == [height - 1, width - 1]
        own = np.flatnonzero(here.any(1))
        assert own[0] == first and not (layout.image_WS[own] > 0)[~here[own]].any()
        cell = layout.hw_WS2[own] // (side * merge)
        assert all(len(set(map(tuple, c[f].tolist()))) == 1 for c, f in zip(cell, here[own], strict=True))
        first = own[-1] + 1
    assert first == grid.count_windows(grids, side, merge) == len(layout.image_WS)


def test_windows_that_do_not_suffice_are_refused():
    with pytest.raises(ValueError, match="9 windows do not fit in a buffer of 5"):
        grid.arrange([(10, 12)], side=2, merge=2, windows=5)
    assert grid.arrange([(10, 8)], side=2, merge=2, windows=6).source_WS.shape == (6, 16)


def test_the_next_position_follows_the_largest_and_not_the_length():
    text = np.ones(5, int)
    assert grid.rope_positions(text, IMAGE, [], 2)[1] == 5
    ids = np.array([1, 1, *[IMAGE] * 6, 1])  # 2 x 3 merged units
    positions, next_pos = grid.rope_positions(ids, IMAGE, [(4, 6)], 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert next_pos == 6 == positions.max() + 1
    # A tall image at the end: the next text starts below its last row, whatever the temporal position says.
    positions, next_pos = grid.rope_positions(ids[:-1], IMAGE, [(6, 4)], 2)
    assert next_pos == 5 == positions.max() + 1


@settings(deadline=None, max_examples=100)
@given(images, st.integers(0, 99))
def test_the_next_position_is_one_more_than_every_other(units, seed):
    grids = [(h * 2, w * 2) for h, w in units]
    ids = prefix_of(grids, 2, seed)
    for end in (len(ids), np.flatnonzero(ids == IMAGE)[-1] + 1):  # with text behind the last image and without
        positions, next_pos = grid.rope_positions(ids[:end], IMAGE, grids, 2)
        assert next_pos == positions.max() + 1 and positions.dtype == np.int32


def test_image_tokens_that_do_not_match_the_grids_are_refused():
    for count in (5, 7):
        with pytest.raises(ValueError, match=f"{count} image tokens for 6 merged units"):
            grid.rope_positions(np.array([1, *[IMAGE] * count]), IMAGE, [(4, 6)], 2)
