"""Our Qwen-VL models against transformers': logits, gradients, greedy tokens, and the folder on its way back.

Everything is float32 with every parameter random, two images of different sizes whose grids do not divide by the
window, and `mm_token_type_ids` passed (without them transformers silently falls back to 1-D positions). The
negative controls break our model on purpose: each must leave the bound, or the bound proves nothing.
"""

import dataclasses
import functools
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import randomised
from randomised import IMAGE, PAD, STOP

from surgery_r1_jax import experts, families, grid, hf, model, options, sampling, scoring, vision_qwen3, weights

torch = pytest.importorskip("torch", reason="parity with transformers needs a CPU build of PyTorch")

LOGITS = 1e-4  # absolute, on logits of order 1 to 10
GRADIENT = 1e-4  # relative to the largest entry of the leaf
MARGIN = 5e-4  # least gap between the two likeliest tokens for greedy decoding to be a fair comparison


def torch_inputs(row, patches, grids):
    row = np.asarray(row)
    return dict(
        input_ids=torch.tensor(row)[None],
        attention_mask=torch.ones(1, row.size, dtype=torch.long),
        pixel_values=torch.tensor(patches),
        image_grid_thw=torch.tensor([[1, h, w] for h, w in grids]),
        mm_token_type_ids=torch.tensor((row == IMAGE).astype(np.int64))[None],
    )


def torch_rows(oracle, frames, *, left):
    """The oracle's logits at every branch of every frame, each a flat row of its own in one padded batch."""
    rows = [f.flat(i) for f in frames for i in range(len(f.branches))]
    frames = [f for f in frames for _ in f.branches]
    length = max(map(len, rows))
    pads = [(length - len(r), 0) if left else (0, length - len(r)) for r in rows]
    ids = np.stack([np.pad(r, p, constant_values=PAD) for r, p in zip(rows, pads, strict=True)])
    mask = np.stack([np.pad(np.ones(len(r), np.int64), p) for r, p in zip(rows, pads, strict=True)])
    with torch.no_grad():
        out = oracle(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(np.concatenate([f.patches for f in frames])),
            image_grid_thw=torch.tensor([[1, *g] for f in frames for g in f.grids]),
            mm_token_type_ids=torch.tensor((ids == IMAGE).astype(np.int64)),
        ).logits.numpy()
    return [
        out[i, p[0] + f.prefix.size : p[0] + len(r)] for i, (f, r, p) in enumerate(zip(frames, rows, pads, strict=True))
    ]


def largest_gap(config, params, frames, want, **options):
    """Between our branches, which share their frame's prefix, and the oracle's flat rows."""
    ours = randomised.logits(config, params, randomised.batch(config, frames, **options))
    places = [(b, j) for b, f in enumerate(frames) for j in range(len(f.branches))]
    return max(np.abs(ours[b, j, : len(w)] - w).max() for (b, j), w in zip(places, want, strict=True))


class Oracle(NamedTuple):
    """A transformers model, the folder it was saved to, and frames to show it."""

    folder: object
    reference: object
    config: model.Config
    params: dict
    frames: list


@pytest.fixture(scope="module", params=[(name, tied) for name in families.FAMILIES for tied in (False, True)], ids=str)
def each(request, oracle):
    """Every family, with a head of its own and with a tied one."""
    return prepared(oracle, *request.param)


def prepared(oracle, family, tied=False):
    folder, reference = oracle(tied, family)
    config = hf.read_config(folder)
    assert (config.family, config.tie_word_embeddings) == (family, tied)
    return Oracle(folder, reference, config, hf.read_params(folder, config), frames_for(config))


def frames_for(config):
    patch = config.vision.patch_size
    return [
        randomised.frame(1, patch=patch),
        randomised.frame(2, grids=((6, 8),), lengths=(11, 7), patch=patch),
        randomised.frame(3, grids=((4, 18), (14, 6)), patch=patch),
    ]


@pytest.mark.parametrize("left", [False, True])
def test_logits_equal_transformers_under_either_padding(each, left):
    want = torch_rows(each.reference, each.frames, left=left)
    assert largest_gap(each.config, each.params, each.frames, want, left=left, P=150) < LOGITS


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_gradient_leaf_equals_transformers(oracle, family):
    """The heads take turns: what they are tied to is checked by the logits."""
    _, reference, config, params, frames = prepared(oracle, family, tied=family != "qwen2_vl")
    batch = randomised.batch(config, frames)
    graph, _ = model.build(config)

    def loss(params):
        net = model.bind(graph, params)
        return scoring.cross_entropy(
            net.scored(batch), net.unembed_VD, batch.score_target_BL, batch.score_weight_BL
        ).nll

    gradients = jax.jit(jax.grad(loss))(params)

    reference.zero_grad()
    for f in frames:
        for i, branch in enumerate(f.branches):
            out = reference(**torch_inputs(f.flat(i), f.patches, f.grids)).logits[0, f.prefix.size : -1]
            torch.nn.functional.cross_entropy(out, torch.tensor(branch[1:]), reduction="sum").backward()
    reference_gradients = {}
    for name, parameter in reference.named_parameters():
        gradient = parameter.grad.numpy()
        reference_gradients[weights.plain(name)] = gradient.swapaxes(1, 2) if ".experts." in name else gradient

    ours = {weights.plain(name): value for name, value in hf.file_tensors(functools.partial(hf.at, gradients), config)}
    assert set(ours) == set(reference_gradients)
    for name, want in reference_gradients.items():
        scale = np.abs(want).max()
        assert scale > 0, name
        if name.endswith("k_proj.bias") or (name.endswith("qkv.bias")):
            # A bias on all keys shifts every score of a query alike: its true gradient is nearly nought, so it is
            # held against the gradient of its layer's queries.
            scale = max(scale, np.abs(reference_gradients.get(name.replace("k_proj", "q_proj"), want)).max())
        assert np.abs(ours[name] - want).max() <= GRADIENT * scale, name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_greedy_tokens_through_the_cache_equal_transformers(oracle, family):
    """32 tokens with at least eight distinct ones and a clear winner at every step."""
    _, reference, config, params, _ = prepared(oracle, family)
    f = randomised.frame(randomised.SEEDS[family][1], lengths=(6, 9), patch=config.vision.patch_size)
    continuations = []
    for i in range(len(f.branches)):
        row, chosen, margins = f.flat(i), [], []
        for _ in range(32):
            with torch.no_grad():
                last = reference(**torch_inputs(row, f.patches, f.grids)).logits[0, -1]
            last[STOP] = -1e9  # keep going: a stop would end the comparison early
            last[IMAGE] = -1e9
            best = torch.topk(last, 2)
            margins.append(float(best.values[0] - best.values[1]))
            chosen.append(int(best.indices[0]))
            row = np.append(row, chosen[-1])
        assert min(margins) > MARGIN, "the oracle is undecided here: choose another seed"
        assert len(set(chosen)) >= 8
        continuations.append(chosen)

    # Lanes for rollout: each question right-aligned.
    prompts = randomised.batch(config, [f], T=12)
    shift = [12 - len(b) for b in f.branches]
    prompts = prompts._replace(
        **{
            name: np.stack([[np.roll(lane, s) for lane, s in zip(getattr(prompts, name)[0], shift, strict=True)]])
            for name in ("branch_ids_BJT", "branch_pos_BJT", "branch_segment_BJT")
        }
    )
    allowed = np.ones(config.text.vocab_size, bool)
    allowed[[STOP, IMAGE]] = False
    graph, _ = model.build(config)
    settings = options.Sampler(max_tokens=32, temperature=0.0)
    vocabulary = sampling.Vocabulary(jnp.asarray(allowed), STOP, PAD)
    out = jax.jit(
        lambda params, prompts: sampling.rollout(
            model.bind(graph, params),
            prompts,
            jax.random.key(0),
            jnp.zeros(1, jnp.int32),
            vocabulary,
            settings,
        )
    )(params, prompts)
    assert out.tokens_BJT[0].tolist() == continuations
    assert out.mask_BJT.all() and not out.stopped_BJ.any()


def test_an_exported_folder_loads_in_transformers_with_equal_logits(each, tmp_path):
    import safetensors.numpy

    folder, reference, config, params, frames = each
    out = hf.write_folder(tmp_path / "out", params, config, folder, max_shard_bytes=300_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded, info = type(reference).from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = torch_inputs(frames[0].flat(0), frames[0].patches, frames[0].grids)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, reference(**inputs).logits)

    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = {k: v for file in out.glob("*.safetensors") for k, v in safetensors.numpy.load_file(file).items()}
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    again = hf.read_params(out, hf.read_config(out))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_experts_are_read_as_transformers_saves_them_too(oracle, tmp_path):
    folder, _, config, params, _ = prepared(oracle, "qwen3_vl_moe")
    other = shutil.copytree(folder, tmp_path / "other")
    randomised.swap_experts(other / "model.safetensors")
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, hf.read_params(other, config), params)


@pytest.fixture
def one(oracle):
    return control(oracle, "qwen2_5_vl")


def control(oracle, family):
    """A model, one frame, and what transformers makes of it."""
    _, reference, config, params, frames = prepared(oracle, family)
    return config, params, frames[:1], torch_rows(reference, frames[:1], left=False)


def test_control_one_dimensional_positions_break_the_bound(one, monkeypatch):
    config, params, frames, want = one
    flat = lambda ids, *_: (np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids))), len(ids))  # noqa: E731
    monkeypatch.setattr(grid, "rope_positions", flat)
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_attention_without_windows_breaks_the_bound(one, monkeypatch):
    config, params, frames, want = one
    from surgery_r1_jax import vision

    run = vision.Block.__call__
    monkeypatch.setattr(vision.Block, "__call__", lambda self, *a, full, **how: run(self, *a, full=True, **how))
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_windows_as_a_band_break_the_bound(one, monkeypatch):
    """As many units in a window, but the next ones in raster order instead of a square."""
    config, params, frames, want = one
    square = grid.arrange

    def band(grids, *, side, merge, windows):
        columns = square(grids, side=1, merge=merge)  # a unit a window, in raster order
        room = windows * side**2 - len(columns.source_WS)
        arrays = (
            np.pad(a, ((0, room), *[(0, 0)] * (a.ndim - 1)), constant_values=e)
            for a, e in ((columns.source_WS, -1), (columns.hw_WS2, 0), (columns.image_WS, 0))
        )
        return grid.Layout(*(a.reshape(windows, -1, *a.shape[2:]) for a in arrays), columns.unit_of_token)

    monkeypatch.setattr(grid, "arrange", band)
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_shuffled_patches_break_the_bound(one):
    config, params, frames, want = one
    f = frames[0]
    shuffled = f._replace(patches=np.roll(f.patches, 1, axis=0))
    assert largest_gap(config, params, [shuffled], want) > 10 * LOGITS


def test_control_branch_positions_from_the_padded_length_break_the_bound(one):
    config, params, frames, want = one
    assert largest_gap(config, params, frames, want, P=150) < LOGITS
    assert largest_gap(config, params, frames, want, P=150, next_pos_from_length=True) > 10 * LOGITS


def test_control_swapped_norms_break_the_bound(one):
    config, params, frames, want = one
    blocks = params["decoder"]["blocks"]
    swapped = blocks | {"norm1": blocks["norm2"], "norm2": blocks["norm1"]}
    params = params | {"decoder": params["decoder"] | {"blocks": swapped}}
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


@pytest.fixture
def deep(oracle):
    return control(oracle, "qwen3_vl")


def test_control_no_deepstack_breaks_the_bound(deep, monkeypatch):
    config, params, frames, want = deep
    run = vision_qwen3.Tower.__call__
    monkeypatch.setattr(vision_qwen3.Tower, "__call__", lambda *a: run(*a)._replace(deep_XBMD=None))
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_positions_in_sections_instead_of_interleaved_break_the_bound(deep):
    config, params, frames, want = deep
    axes = dataclasses.replace(config.text, rope_axes=tuple(sorted(config.text.rope_axes)))
    assert largest_gap(dataclasses.replace(config, text=axes), params, frames, want) > 10 * LOGITS


def test_control_nearest_instead_of_interpolated_places_break_the_bound(deep, monkeypatch):
    config, params, frames, want = deep

    def nearest(table_XE, hw, size):
        side = int(len(table_XE) ** 0.5)
        at = jnp.round(hw * (side - 1) / jnp.maximum(size - 1, 1)).astype(int)
        return table_XE[at[..., 0] * side + at[..., 1]]

    monkeypatch.setattr(vision_qwen3, "stretched", nearest)
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_a_router_without_renormalisation_breaks_the_bound(oracle, monkeypatch):
    config, params, frames, want = control(oracle, "qwen3_vl_moe")

    def raw(self, rows):
        return jax.lax.top_k(jax.nn.softmax(self.router(rows)), self.mixture.used)

    monkeypatch.setattr(experts.Experts, "chosen", raw)
    assert largest_gap(config, params, frames, want) > 10 * LOGITS


def test_control_queries_and_keys_without_norms_break_the_bound(deep):
    config, params, frames, want = deep
    plain = dataclasses.replace(config.text, qk_norm=False)
    blocks = {k: v for k, v in params["decoder"]["blocks"].items() if k not in ("q_norm", "k_norm")}
    bare = params | {"decoder": params["decoder"] | {"blocks": blocks}}
    assert largest_gap(dataclasses.replace(config, text=plain), bare, frames, want) > 10 * LOGITS
