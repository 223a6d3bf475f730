"""What a run folder keeps, and how it is read back: the last and the best, on other meshes, of older formats."""

import gc
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import (
    checkpoint,
    config,
    errors,
    evaluate,
    examples,
    milestones,
    optim,
    options,
    run,
    saves,
    sft,
    sharding,
    sums,
)

pytestmark = pytest.mark.survival


def steps(folder):
    return sorted(int(entry.name) for entry in folder.iterdir())


def test_the_two_last_checkpoints_and_the_best_parameters_are_kept(place, tmp_path, monkeypatch):
    rates = iter([0.1, 0.3, 0.2, 0.3, 0.0])
    monkeypatch.setattr(evaluate, "score", lambda *_: {"joint_rate": next(rates)})
    schedule = options.Schedule(steps=toy.STEPS, eval_every=1, save_every=1, log_every=1)
    sft.train(toy.sft_settings(place, schedule=schedule), tmp_path)
    assert steps(tmp_path / "checkpoints") == [4, 5]
    assert steps(tmp_path / "best") == [2]
    assert saves.Best(tmp_path).rate == 0.3
    best, last = (checkpoint.load_model(tmp_path, which=which).params for which in ("best", "last"))
    state = ocp.StandardCheckpointer().restore((tmp_path / "checkpoints" / "5" / "state").absolute())
    assert sums.digest(last) == sums.digest(state["params"]) != sums.digest(best)


def test_best_follows_the_rate_not_the_step_and_survives_a_run_that_repeats_steps(tmp_path):
    params = {"x": jax.numpy.arange(3.0)}
    best = saves.Best(tmp_path)
    assert best.rate == -1
    best.save(10, params, 0.4)
    best.close()
    again = saves.Best(tmp_path)  # resumed from before step 10
    assert again.rate == 0.4
    again.save(7, params, 0.5)
    again.close()
    assert steps(tmp_path / "best") == [7] and saves.Best(tmp_path).rate == 0.5
    other = saves.Best(tmp_path)  # begun anew, and not to the last bit the same: step 7 again, and better
    other.save(7, {"x": params["x"] + 1}, 0.6)
    other.close()
    assert steps(tmp_path / "best") == [7] and saves.Best(tmp_path).rate == 0.6
    assert saves.params(tmp_path, "best", params)["x"].tolist() == [1, 2, 3]


def test_three_bad_batches_in_a_row_end_the_run_and_leave_a_sound_checkpoint(place, tmp_path, monkeypatch, capsys):
    put_batch, training, seen, ids = sharding.put_batch, examples.Encoder.training, [], {}

    def noted(encoder, frame, *rest):
        example = training(encoder, frame, *rest)
        ids[example.patches_BWSC.tobytes()] = frame.id
        return example

    def spoilt(batch, mesh):
        seen.append([ids[patches.tobytes()] for patches in batch.patches_BWSC])
        if len(seen) > 1:
            batch = batch._replace(patches_BWSC=np.full_like(batch.patches_BWSC, np.inf))
        return put_batch(batch, mesh)

    monkeypatch.setattr(examples.Encoder, "training", noted)
    monkeypatch.setattr(sharding, "put_batch", spoilt)
    schedule = options.Schedule(steps=toy.STEPS, save_every=3, log_every=1)
    with pytest.raises(errors.NumericError) as ended:
        sft.train(toy.sft_settings(place, schedule=schedule), tmp_path)
    frames = [", ".join(dict.fromkeys(batch)) for batch in seen]
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    bad = "loss or gradient of step {} was not finite, of frames {}"
    assert said == [f"{bad.format(step, frames[step - 1])}; it was left out" for step in (2, 3)]
    assert str(ended.value).startswith(f"{bad.format(4, frames[3])}; that was 3 times in a row and nothing of it was")
    assert str(ended.value).endswith("then go on from step 3 with --resume")
    state = ocp.StandardCheckpointer().restore((tmp_path / "checkpoints" / "3" / "state").absolute())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert int(state["step"]) == 3 and int(state["skipped"]) == int(state["skipped_in_a_row"]) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc, which Linux has")
def test_a_run_leaves_no_thread_and_no_open_file_behind(place, tmp_path):
    def held():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    sft.train(toy.sft_settings(place), tmp_path / "first")
    before = held()
    sft.train(toy.sft_settings(place), tmp_path / "second")
    assert held() == before


def begin(place, folder, mesh):
    """The target of a restore, and a state, as `sft.train` makes them."""
    settings = toy.sft_settings(place, compute=options.Compute(mesh=mesh))
    setup = run.prepare(folder, settings, resume=False)
    tx = optim.transformation(settings.optimizer, toy.STEPS, setup.params)
    mesh = setup.runner.mesh
    abstract = run.abstract_state(setup.params, tx, mesh)
    return mesh, abstract, run.start_state(setup.params, tx, mesh)


@pytest.mark.parametrize(("source", "target"), [((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 1, 1)), ((1, 4, 2), (2, 1, 4))])
def test_a_checkpoint_restores_onto_another_mesh_with_equal_bytes(place, tmp_path, source, target):
    _, _, state = begin(place, tmp_path, source)
    rng = np.random.default_rng(0)
    noise = lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)  # noqa: E731
    state = jax.tree.map(noise, state)
    saves.Checkpoints(tmp_path).save(7, state, {})
    mesh, abstract, _ = begin(place, tmp_path, target)
    restored = saves.Checkpoints(tmp_path).restore(abstract)
    there = restored.state
    assert restored.step == 7
    kernel = there.params["decoder"]["blocks"]["q"]["kernel"]
    assert kernel.sharding == abstract.params["decoder"]["blocks"]["q"]["kernel"].sharding
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(there), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    loaded = checkpoint.load_model(tmp_path, mesh, which="last")
    assert sums.digest(loaded.params) == sums.digest(state.params)


# Written on two CPU devices, and stays as it is; the logs are left out. tests/toy.py made the start and the data:
#     sizes = tiny.Sizes(hidden=4, layers=1, heads=1, kv_heads=1, mlp=8, tower_width=4, tower_depth=1, tower_heads=1,
#                        tower_mlp=8, fullatt=(0,), size=(56, 56), mrope_section=(0, 1, 1), tie=True)
#     toy.write_data(Path("data"), frames=4)
#     toy.write_model(Path("start"), sizes=sizes)
# and its config.yaml the run: surgery-r1 sft --config config.yaml --out run_format_2
def test_a_run_folder_of_each_format_that_was_released_is_read_and_gone_on_from(tmp_path):
    out = shutil.copytree(Path(__file__).parent / f"run_format_{saves.FORMAT}", tmp_path / "run")
    best, last = (sums.digest(checkpoint.load_model(out, which=which).params)[:16] for which in ("best", "last"))
    assert (best, last) == ("2892dd506633f269", "f1871949602ae67b")
    settings = config.load(options.SFT, out / "config.yaml")
    changes = dict(model=str(out), compute=settings.compute.model_copy(update={"mesh": (1, 1, 1)}))
    setup = run.prepare(out, settings.model_copy(update=changes), resume=True)
    tx = optim.transformation(settings.optimizer, settings.schedule.steps, setup.params)
    meta = json.loads((out / "checkpoints" / "3" / "meta" / "metadata").read_text())
    _, reached = run.begin(out, setup, tx, meta["data"], resume=True)
    assert reached.step == int(reached.state.step) == 3
    assert sums.digest(reached.state._asdict())[:16] == "a70b5c580a16c9d7"


@pytest.fixture(scope="module")
def undisturbed(place):
    """A run on eight devices with a checkpoint half way, its settings, and its batches."""
    settings = toy.sft_settings(
        place,
        data=options.Data(root=str(place / "data"), frames=8, questions=2),
        schedule=options.Schedule(steps=4, save_every=2, log_every=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        batches = watch_batches(patch)
        sft.train(settings, place / "undisturbed")
    return place / "undisturbed", settings, batches


def watch_batches(patch):
    """The batches of a run that begins after this, as they are put on devices; nothing is evaluated."""
    put_batch, seen = sharding.put_batch, []
    patch.setattr(sharding, "put_batch", lambda batch, mesh: (seen.append(batch), put_batch(batch, mesh))[1])
    patch.setattr(milestones.Dev, "score", lambda *_: {})
    return seen


@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 4, 2), (1, 8, 1)], ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_run_goes_on_on_another_mesh_with_the_same_batches_and_loss(undisturbed, tmp_path, monkeypatch, mesh):
    source, settings, batches = undisturbed
    out = shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "4")
    seen = watch_batches(monkeypatch)
    # That the state is the saved one bit for bit is seen to by its sums.
    sft.train(settings.model_copy(update={"compute": options.Compute(mesh=mesh)}), out, resume=True)
    for ours, theirs in zip(seen[:2], batches[2:4], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, theirs = ({row["step"]: row["loss"] for row in toy.logged(folder)} for folder in (out, source))
    assert len(theirs) == 4 and ours == pytest.approx(theirs, rel=1e-6)
