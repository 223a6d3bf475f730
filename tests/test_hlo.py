"""The text of compiled programs is read right, and no program of ours ever holds a stack of layers whole."""

import dataclasses

import jax
import pytest
import randomised
from jax.sharding import NamedSharding, PartitionSpec
from toy import quick_compile  # noqa: F401

from surgery_r1_jax import hf, hlo, model, options, programs, sft, sharding
from surgery_r1_jax.batch import Shape

LOOPS = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %shard = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%weights), kind=kLoop, calls=%sliced
  %start = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[64,16]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%shard), dimensions={0}
  %done = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%start)
  %sums = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%x, %y), to_apply=%add
}

%sliced (w: bf16[36,8,16]) -> bf16[8,16] {
  ROOT %one = bf16[8,16]{1,0} dynamic-slice(%w, %i)
}

%condition (carry: (s32[], bf16[4,16])) -> pred[] {
  %n = u32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (carry: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %inner = (s32[], bf16[4,16]) while(%c), body=%body, backend_config={"known_trip_count":{"n":"36"}}
  %cut = f32[2,4]{1,0} reduce-scatter(%z), dimensions={0}, to_apply=%add
}

ENTRY %main.7 (p: bf16[36,8,16]) -> bf16[4,16] {
  %loop = (s32[], bf16[4,16]) while(%init), body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %five = (s32[], bf16[4,16]) while(%init), condition=%condition, body=%body
  ROOT %moved = f32[3,3]{1,0} collective-permute(%loop), source_target_pairs={{0,1}}
}
"""


def test_collectives_count_as_often_as_their_loop_is_run():
    assert hlo.collectives(LOOPS) == {
        "all-gather": (77, 77 * 64 * 16 * 2),  # 2 x 36, and 5 by the condition
        "all-reduce": (77, 77 * 8 * 4),
        "reduce-scatter": (2, 2 * 8 * 4),
        "collective-permute": (1, 9 * 4),
    }


STACK = {"q": hlo.Stack((36, 7), (64, 4, 16), (8, 4, 16))}


@pytest.mark.parametrize("dims", ["36,64,4,16", "36,64,64", "36,4,64,16", "4,9,1,64,4,16", "7,4,16,64"])
def test_a_whole_stack_is_known_in_any_order_and_in_parts(dims):
    found = hlo.whole_stacks(f"{LOOPS}  %x = f32[{dims}]{{0}} all-reduce(%y)", STACK)
    assert found == {"q": tuple(int(n) for n in dims.split(",") if n != "1")}


@pytest.mark.parametrize("dims", ["36,8,4,16", "64,4,16", "1,64,4,16", "36,32,2,64", "6,64,64", "72,32,64"])
def test_a_shard_a_layer_and_other_arrays_are_none(dims):
    assert hlo.whole_stacks(f"{LOOPS}  %x = f32[{dims}]{{0}} all-gather(%y)", STACK) == {}


def test_a_stack_spread_over_two_axes_may_not_be_gathered_along_one():
    stack = {"up": hlo.Stack((4,), (64, 128), (16, 64))}
    for dims, whole in (("4,64,64", True), ("4,16,128", True), ("4,64,128", True), ("4,16,64", False)):
        assert bool(hlo.whole_stacks(f"f32[{dims}]", stack)) == whole


def unlike(config, **tower):
    """The configuration with no two extents alike, so that a shape tells what an array is."""
    text = dict(hidden_size=88, intermediate_size=152, num_hidden_layers=5, head_dim=20, rope_axes=(0, 1) * 5)
    tower |= dict(hidden_size=56, intermediate_size=104, out_hidden_size=88)
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, **text), vision=dataclasses.replace(config.vision, **tower)
    )


@pytest.fixture(scope="module")
def job():
    """SFT of a tiny model on eight devices."""
    config = unlike(randomised.config(), depth=10, fullatt_block_indexes=(4, 9))
    settings = options.SFT(model="-", data=options.Data(root="-", frames=4), compute=options.Compute(remat=True))
    extents = Shape(windows=0, prefix=0, lanes=3, lane_tokens=10, scored=12)
    batch = programs.blank_batch(config, (84, 56), 5, extents, 4)
    return programs.Job(settings, config, sharding.make_mesh((1, 4, 2)), batch)


def test_no_program_of_grpo_holds_a_stack_whole(job):
    settings = options.GRPO(
        model="-",
        data=job.settings.data,
        compute=job.settings.compute,
        samples=3,
        sampler=options.Sampler(max_tokens=7),
        evaluation=options.Evaluation(max_tokens=7),
    )
    job = job._replace(settings=settings)
    stacks, listed = programs.stacks(job), programs.of(job) | {"evaluation": programs.evaluation(job)}
    assert list(listed) == ["rollout", "reference", "update", "evaluation"] and len(stacks) == 12
    for name, program in listed.items():
        text = program.lower().compile().as_text()
        assert hlo.whole_stacks(text, stacks) == {}, name
        assert hlo.collectives(text)["all-gather"].count > 20, name


@pytest.mark.parametrize("kind", ["adapters", "qwen3_vl"])
def test_nor_does_one_of_adapters_or_of_qwen3_vl(job, tmp_path, kind):
    if kind == "adapters":
        job = job._replace(settings=job.settings.model_copy(update={"lora": options.Lora(rank=6, base="bfloat16")}))
    else:
        randomised.configuration(kind, tied=False).save_pretrained(tmp_path)
        config = unlike(hf.read_config(tmp_path), depth=9, deep_layers=(2, 5), fullatt_block_indexes=tuple(range(9)))
        extents = Shape(windows=0, prefix=0, lanes=3, lane_tokens=10, scored=12)
        job = job._replace(architecture=config, batch=programs.blank_batch(config, (96, 64), 5, extents, 4))
    (update,) = programs.of(job).values()
    text, stacks = update.lower().compile().as_text(), programs.stacks(job)
    assert len(stacks) == {"adapters": 26, "qwen3_vl": 13}[kind]
    assert hlo.whole_stacks(text, stacks) == {}
    assert hlo.collectives(text)["all-gather"].count > 20


def test_no_step_holds_a_stack_whole_and_one_that_does_is_found(job):
    (update,) = programs.of(job).values()
    text, stacks = update.lower().compile().as_text(), programs.stacks(job)
    assert sum(stack.whole != stack.own for stack in stacks.values()) == len(stacks) == 12
    assert hlo.whole_stacks(text, stacks) == {}
    assert hlo.collectives(text)["all-reduce"].count > 20

    everywhere = NamedSharding(job.mesh, PartitionSpec())
    graph, _ = model.build(job.architecture, job.settings.compute)
    (train, _, _), tx = programs.state_of(job)

    def gathering(state, batch):
        whole = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, everywhere), state.params)
        return sft.train_step(graph, tx, state._replace(params=whole), {}, batch, None, job.settings)

    places = NamedSharding(job.mesh, sharding.FRAMES)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places), job.batch)
    found = hlo.whole_stacks(jax.jit(gathering).lower(train, batch).compile().as_text(), stacks)
    assert {"decoder.blocks.mlp.up.kernel", "decoder.blocks.q.kernel", "tower.blocks.mlp.down.kernel"} <= set(found)
