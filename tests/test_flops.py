"""FLOPs are told right: against a count by hand, and against XLA's own count of the programs that are run."""

import functools
import itertools

import jax
import numpy as np
import pytest
import randomised
from flax import nnx
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import families, flops, lora, model, optim, options, sampling, scoring

# One image of 4 x 6 patches in windows of 4 x 4: of 16 and 8 patches. 14 tokens of prefix, 6 of them image; two
# branches of 7 and 5 tokens, all but the first of each scored.
FRAME = randomised.frame(1, grids=((4, 6),), lengths=(7, 5))


@pytest.fixture(scope="module")
def batch(config):
    """With padding everywhere: of prefix, lanes and windows."""
    return randomised.batch(config, [FRAME], P=20, T=9, windows=5)


def by_hand(config):
    """Multiply-adds of one forward pass on `batch`, as factors: part -> number."""
    assert (config.vision.depth, config.vision.fullatt_block_indexes, config.text.num_hidden_layers) == (4, (1, 3), 2)
    return {
        "pixels": 24 * (3 * 2 * 14 * 14) * 32,
        "tower": 4 * 24 * (32 * 96 + 32 * 32 + 3 * 32 * 64),  # queries, keys and values; their output; gated MLP
        "windows": 2 * 2 * (16**2 + 8**2) * 32,  # layers, scores and sums, pairs, width
        "images": 2 * 2 * 24**2 * 32,
        "merger": 6 * (128 * 128 + 128 * 64),
        "decoder": 2 * (14 + 7 + 5) * (64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128),
        "attention": 2 * 2 * (14 * 14 + 7 * (14 + 7) + 5 * (14 + 5)) * 4 * 16,
        "head": (6 + 4) * 64 * 1024,
    }


def total(config, batch, **learning):
    cost = flops.of_model(config, **learning)
    return tuple(flops.count(each, flops.of_batch(batch)) for each in cost)


def test_forward_and_training_equal_a_count_by_hand(config, batch):
    hand = by_hand(config)
    forward, training = total(config, batch)
    assert forward == 2 * sum(hand.values())
    assert training == 3 * forward - 2 * hand["pixels"]  # nobody asks for the gradient of pixels


def test_parts_that_do_not_learn_have_no_backward_pass_of_their_own(config, batch):
    hand = by_hand(config)
    seeing = 2 * sum(hand[part] for part in ("pixels", "tower", "windows", "images"))
    forward, training = total(config, batch, rates=options.Rates(tower=0))
    assert training == 3 * forward - 2 * seeing
    forward, training = total(config, batch, rates=options.Rates(tower=0, merger=0))
    assert training == 3 * forward - 2 * (seeing + 2 * hand["merger"])
    forward, training = total(
        config, batch, rates=options.Rates(decoder=0)
    )  # frozen, but the tower's gradient comes by
    assert training == 3 * forward - 2 * (hand["pixels"] + hand["decoder"] + hand["head"])


def test_adapters_spare_the_gradients_of_the_frozen_matrices(config, batch):
    adapted = options.Lora(rank=4, targets=("q_proj",))
    hand, low = by_hand(config), 2 * 26 * (64 * 4 + 4 * 4 * 16)
    forward, training = total(config, batch, adapted=adapted)
    assert forward == 2 * (sum(hand.values()) + low)
    seeing = sum(hand[part] for part in ("pixels", "tower", "windows", "images", "merger"))
    behind = hand["decoder"] + hand["head"]  # once forward and once for their inputs
    assert training == 2 * (seeing + 2 * behind + 3 * (hand["attention"] + low))


def test_of_experts_only_those_count_that_a_token_goes_through():
    config = architecture("qwen3_vl_moe", small=True)
    D, F, attention = 64, 48, 64 * (6 + 2 + 2) * 16 + 6 * 16 * 64
    found = flops.of_model(config).forward.tokens
    assert found == 2 * 4 * (attention + D * 5 + 2 * 3 * D * F)  # 2 experts of 5, and a router
    assert found != 2 * 4 * (attention + D * 5 + 5 * 3 * D * F)


def test_deepstack_merges_once_for_the_end_and_once_for_each_layer_that_it_takes():
    assert flops.of_model(architecture("qwen3_vl", small=True)).forward.units == (1 + 2) * 2 * (128 * 128 + 128 * 64)


def test_neither_padding_nor_packing_changes_the_work(config, batch):
    tight = randomised.batch(config, [FRAME])
    packed = randomised.batch(config, [FRAME], lanes=[[[0, 1]]])
    assert flops.of_batch(batch) == flops.of_batch(tight) == flops.of_batch(packed)


def test_repeated_rows_do_the_prefix_again_for_every_branch(config):
    shared = flops.of_batch(randomised.batch(config, [FRAME]))
    alone = [FRAME._replace(branches=[branch]) for branch in FRAME.branches]
    flat = flops.of_batch(randomised.batch(config, alone))
    assert (flat.tokens, flat.patches, flat.units) == (shared.tokens + 14, 2 * shared.patches, 2 * shared.units)
    assert (flat.pairs, flat.scored) == (shared.pairs + 14**2, shared.scored)


def test_images_of_a_frame_do_not_look_at_each_other(config):
    work = flops.of_batch(randomised.batch(config, [randomised.frame(1, grids=((4, 6), (2, 4)))]))
    assert (work.patches, work.image_pairs, work.window_pairs) == (32, 24**2 + 8**2, 16**2 + 8**2 + 8**2)


def test_a_rollout_runs_questions_once_and_scores_what_the_update_is_given(config):
    frames = [randomised.frame(n, grids=((4, 6),), lengths=lengths) for n, lengths in enumerate([(7, 5), (6,)])]
    prompts, samples = randomised.batch(config, frames), 2
    length_BJ = np.array([[3, 4, 1, 2], [2, 4, 0, 0]])  # the last two lanes are padding
    drawing, scoring = flops.of_rollout(prompts, length_BJ)
    assert drawing.tokens == 2 * 14 + (7 + 5 + 6) + 16
    own = (
        3 * (14 + 7 + 3) + 4 * (14 + 7 + 4) + 1 * (14 + 5 + 1) + 2 * (14 + 5 + 2) + 2 * (14 + 6 + 2) + 4 * (14 + 6 + 4)
    )
    assert drawing.pairs == 2 * 14**2 + 7 * 21 + 5 * 19 + 6 * 20 + own
    assert drawing.scored == scoring.scored == 16
    mask_BJT = np.arange(4) < length_BJ[..., None]
    drawn = sampling.Rollout(mask_BJT.astype(np.int32), mask_BJT * 0.0, mask_BJT, mask_BJT[..., 0])
    laid_out = jax.tree.map(np.asarray, sampling.branches(prompts, drawn, samples))
    empty_BJ1 = (length_BJ == 0)[..., None]  # lanes without a completion are no work, question or not
    segment_BJT = np.where(empty_BJ1, 0, laid_out.branch_segment_BJT)
    assert scoring == flops.of_batch(laid_out._replace(branch_segment_BJT=segment_BJT))


# XLA counts the body of a loop once, so each loop of these models runs once: a layer a stack. It also counts what we
# leave out (norms, softmax, rotary angles), which is little where matrices are wide. Of experts it multiplies with all.
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]


def architecture(family, small=False):
    """The family as the tests know it, or one layer of it, wide."""
    whole = randomised.configuration(family, tied=True)
    if not small:
        text, tower = whole.text_config, whole.vision_config
        text.update(dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, head_dim=64))
        text.update(dict(num_attention_heads=8, num_key_value_heads=2))
        text.rope_parameters = text.rope_parameters | dict(mrope_section=[16, 8, 8])
        tower.update(dict(depth=1, num_heads=4, hidden_size=256, intermediate_size=512, out_hidden_size=512))
        match family:
            case "qwen2_vl":
                tower.update(dict(embed_dim=256, hidden_size=512))
            case "qwen2_5_vl":
                tower.update(dict(depth=2, fullatt_block_indexes=[1]))
            case "qwen3_vl_moe":
                text.update(dict(num_experts=1, num_experts_per_tok=1, moe_intermediate_size=1024))
        if family.startswith("qwen3"):
            tower.deepstack_visual_indexes = [0]
    return families.FAMILIES[family].architecture(whole)


@functools.cache
def lowered(family, training, adapted=options.Lora(), rates=options.Rates(), remat=False):
    """Loss or gradients of a batch as XLA is given them, and our count of their FLOPs."""
    config = architecture(family)
    frame = randomised.frame(1, grids=((8, 8),), lengths=(16, 16), patch=config.vision.patch_size)
    batch = randomised.batch(config, [frame])
    graph, abstract = lora.build(config, options.Compute(remat=remat), adapted)
    params, frozen = lora.split(nnx.to_pure_dict(abstract))

    def loss(params, frozen, batch):
        net = model.bind(graph, model.joined(frozen, optim.freeze(params, options.Optimizer(rates=rates))))
        given = batch.score_target_BL, batch.score_weight_BL
        return scoring.cross_entropy(net.scored(batch), net.unembed_VD, *given).nll

    program = jax.jit(jax.grad(loss) if training else loss).lower(params, frozen, batch)
    return program, total(config, batch, adapted=adapted, rates=rates)[training]


def ratio(*what, compiled=False, **more):
    """XLA's count over ours."""
    program, ours = lowered(*what, **more)
    return (program.compile() if compiled else program).cost_analysis()["flops"] / ours


def mostly_slow(quick, cases):
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


QUICK = [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl_moe", True)]


@pytest.mark.parametrize(("family", "training"), mostly_slow(QUICK, itertools.product(FAMILIES, (False, True))))
def test_xla_counts_the_same_within_one_and_a_half_percent(family, training):
    assert 1 <= ratio(family, training) < 1.015


@pytest.mark.parametrize(("family",), mostly_slow([("qwen2_5_vl",)], [(family,) for family in FAMILIES]))
def test_what_the_compiler_makes_of_a_training_step_is_within_three_percent(family):
    assert abs(ratio(family, True, compiled=True) - 1) < 0.03


LEARNING = {
    "adapters": dict(adapted=options.Lora(rank=16)),
    "adapters in all": dict(adapted=options.Lora(rank=16, targets=model.PARTS)),
    "frozen tower": dict(rates=options.Rates(tower=0)),
    "frozen decoder": dict(rates=options.Rates(decoder=0)),
}


@pytest.mark.parametrize(("what",), mostly_slow([("adapters",)], [(what,) for what in LEARNING]))
def test_xla_spares_the_same_of_the_backward_pass(what):
    assert 1 <= ratio("qwen2_vl", True, **LEARNING[what]) < 1.015


@pytest.mark.slow
def test_control_what_is_computed_again_would_be_seen():
    assert ratio("qwen2_vl", True, remat=True) > 1.1


def test_control_a_tower_left_out_would_be_seen():
    program, ours = lowered("qwen2_vl", False)
    without = ours - 64 * flops.of_model(architecture("qwen2_vl")).forward.patches
    assert program.cost_analysis()["flops"] / without > 1.1


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_are_found_by_the_names_that_devices_have(kind, teraflops):
    assert flops.peak(kind) == teraflops * 1e12


def test_a_device_whose_peak_is_not_known_has_none():
    assert flops.peak("cpu") is None and flops.peak("TPU v99") is None and flops.peak("NVIDIA GeForce RTX 4090") is None
