"""A run that is stopped or killed and resumed is, bit for bit, the run that never was; and what a run folder keeps."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import faults
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import (
    checkpoint,
    cli,
    config,
    errors,
    evaluate,
    examples,
    grpo,
    log,
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
STEPS = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return toy.write_start(tmp_path_factory.mktemp("resume"), frames=10)


def sft_settings(place, **changes):
    settings = dict(
        model=str(place / "start"),
        data=options.Data(root=str(place / "data"), frames=4, questions=2),
        optimizer=options.Optimizer(learning_rate=1e-2),
        schedule=options.Schedule(steps=STEPS, eval_every=3, save_every=100, log_every=1),
        evaluation=options.Evaluation(frames=4, questions=3, limit=1, max_tokens=4),
        compute=options.Compute(mesh=(2, 2, 2)),
    )
    return options.SFT(**(settings | changes))


def grpo_settings(place, **changes):
    settings = dict(samples=2, minibatches=2, sampler=options.Sampler(max_tokens=4))
    settings |= sft_settings(place).model_dump(include={"model", "data", "optimizer", "schedule", "evaluation"})
    return options.GRPO(**(settings | dict(compute=options.Compute(mesh=(1, 1, 1))) | changes))


def interrupt_step(patch, call, how):
    """Of a run that begins after this, optimiser step number `call` is interrupted."""
    keep_layout = run.keep_layout
    patch.setattr(run, "keep_layout", lambda *arguments: faults.interrupted(keep_layout(*arguments), call, how))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(Exception):
    pass


def kill():
    raise Killed


def whole(out, step):
    """Every byte that a checkpoint holds: parameters, moments and counters, meta."""
    folder = out / "checkpoints" / str(step)
    leaves = jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore((folder / "state").absolute()))
    found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return found | {"meta": (folder / "meta" / "metadata").read_bytes()}


def lines(out):
    """What the run logged, not a number of it taken for equal that is not one."""
    return [json.dumps(row) for row in toy.logged(out)]


def assert_alike(out, other):
    """Two runs logged the same but for rounding: a compiler adds up otherwise in another program."""
    for ours, theirs in zip(toy.logged(out), toy.logged(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), name


@pytest.fixture(scope="module")
def sft_run(place):
    """An uninterrupted run."""
    sft.train(sft_settings(place), place / "sft")
    return place / "sft"


def test_sft_stopped_by_sigterm_then_killed_equals_the_uninterrupted_run(place, sft_run, tmp_path, monkeypatch):
    settings = sft_settings(place)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 2, terminate)
        with pytest.raises(errors.Preempted, match=f"after step 2 of {STEPS}"):
            sft.train(settings, tmp_path)
    assert saves.Checkpoints(tmp_path).latest() == 2
    with monkeypatch.context() as patch:
        # Step 3 is done, evaluated and logged, but not saved.
        interrupt_step(patch, 2, kill)
        with pytest.raises(Killed):
            sft.train(settings, tmp_path, resume=True)
    assert saves.Checkpoints(tmp_path).latest() == 2 and len(lines(tmp_path)) == 4
    sft.train(settings, tmp_path, resume=True)
    assert whole(tmp_path, STEPS) == whole(sft_run, STEPS)
    assert lines(tmp_path) == lines(sft_run)
    assert [row["loss"] for row in log.read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "train"]


@pytest.mark.parametrize(("evaluation", "step"), [(1, 3), (2, STEPS)])
def test_sigterm_during_an_evaluation_saves_at_once_and_is_made_up_for(
    place, sft_run, tmp_path, monkeypatch, evaluation, step
):
    settings, dev = sft_settings(place), "dev"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "predict", faults.interrupted(evaluate.predict, evaluation, terminate))
        with pytest.raises(errors.Preempted, match=f"after step {step} of {STEPS}"):
            sft.train(settings, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert saves.Checkpoints(tmp_path).latest() == step
    assert step not in [row["step"] for row in toy.logged(tmp_path) if row["split"] == dev]
    with monkeypatch.context() as patch:  # told again as it makes up for it, and then killed just before that is logged
        patch.setattr(evaluate, "predict", faults.interrupted(evaluate.predict, 1, terminate))
        with pytest.raises(errors.Preempted, match=f"after step {step} of {STEPS}"):
            sft.train(settings, tmp_path, resume=True)
        patch.setattr(milestones, "flat", lambda scores: kill())
        with pytest.raises(Killed):
            sft.train(settings, tmp_path, resume=True)
    assert not milestones.evaluated(tmp_path, step, dev)
    scores = sft.train(settings, tmp_path, resume=True)
    assert scores["joint_rate"] == toy.logged(sft_run)[-1]["joint_rate"]
    assert lines(tmp_path) == lines(sft_run) and whole(tmp_path, STEPS) == whole(sft_run, STEPS)
    assert saves.steps(tmp_path / "best") == saves.steps(sft_run / "best")


def test_a_run_without_its_last_evaluation_is_not_done(sft_run, tmp_path, capsys):
    out = shutil.copytree(sft_run, tmp_path / "run")
    words = ["sft", "--config", str(out / "config.yaml"), "--out", str(out), "--resume", "auto"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{out}: all of its {STEPS} steps are done\n"
    whole_log = lines(out)
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:-1]))
    assert cli.main(words) == 0
    assert lines(out) == whole_log


def test_a_stop_before_the_first_step_is_one_line_and_leaves_what_was_there(place, sft_run, tmp_path):
    out = shutil.copytree(sft_run, tmp_path / "run")
    words = ["sft", "--config", str(out / "config.yaml"), "--out", str(out), "--resume", "auto"]
    words += [f"--schedule.steps={STEPS + 1}"]
    code = f"""
import os, signal, sys
import faults
from surgery_r1_jax import cli
faults.arm("start", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
sys.exit(cli.main({words!r}))
"""
    tests = Path(__file__).parent
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent)))}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "stopped: no step was under way; what was saved is whole, go on with --resume auto\n"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_grpo_stopped_by_sigterm_then_killed_equals_the_uninterrupted_run(place, tmp_path, monkeypatch, uneven_rewards):
    settings, plain, broken = grpo_settings(place), tmp_path / "plain", tmp_path / "broken"
    grpo.train(settings, plain)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 3, terminate)  # two updates a step
        with pytest.raises(errors.Preempted, match=f"after step 2 of {STEPS}"):
            grpo.train(settings, broken)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "roll_out", faults.interrupted(grpo.roll_out, 2, kill))
        with pytest.raises(Killed):
            grpo.train(settings, broken, resume=True)
    grpo.train(settings, broken, resume=True)
    assert whole(broken, STEPS) == whole(plain, STEPS)
    assert lines(broken) == lines(plain)
    assert (broken / "completions.jsonl").read_bytes() == (plain / "completions.jsonl").read_bytes()
    rows = [row for row in log.read_metrics(plain / "metrics.jsonl") if row["split"] == "train"]
    assert any(row["frac_reward_zero_std"] < 1 for row in rows) and rows[-1]["kl"] > 0

    # Nor does it matter where moments and the reference are kept.
    kept = grpo_settings(place, compute=options.Compute(mesh=(1, 1, 1), offload=True))
    grpo.train(kept, tmp_path / "kept")
    assert_alike(tmp_path / "kept", plain)

    # The reference is the start; another one is another objective.
    toy.write_model(tmp_path / "other", seed=1)
    with pytest.raises(errors.InputError, match="not the reference model"):
        grpo.train(grpo_settings(place, model=str(tmp_path / "other")), broken, resume=True)


@pytest.mark.parametrize("file", ["vqla/label/frame000_QA.txt", "left_frames/frame000.png"])
def test_changed_data_is_refused_with_both_fingerprints(place, sft_run, tmp_path, file):
    shutil.copytree(place / "data", tmp_path / "data")
    changed = tmp_path / "data" / "seq_2" / file
    if changed.suffix == ".txt":
        changed.write_text(changed.read_text().replace("kidney|1", "kidney|2", 1))
    else:
        shutil.copy(place / "data" / "seq_2" / "left_frames" / "frame001.png", changed)
    data = sft_settings(place).data.model_copy(update=dict(root=str(tmp_path / "data")))
    with pytest.raises(errors.InputError) as refusal:
        sft.train(sft_settings(place, data=data), sft_run, resume=True)
    old, new = re.search(r"fingerprint (\w{12}), now (\w{12})", str(refusal.value)).groups()
    meta = json.loads((sft_run / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    assert old == meta["data"][:12] != new


def test_a_run_folder_is_not_trained_over_and_nothing_is_resumed_from_nothing(place, sft_run, tmp_path):
    with pytest.raises(errors.InputError, match="add --resume, or choose another --out"):
        sft.train(sft_settings(place), sft_run)
    with pytest.raises(errors.InputError, match="no checkpoint to resume from"):
        sft.train(sft_settings(place), tmp_path, resume=True)


def test_a_run_is_taken_up_at_its_last_checkpoint_and_without_one_begun_anew(sft_run, tmp_path):
    before = lines(sft_run)
    assert run.take_up(sft_run) == STEPS and lines(sft_run) == before
    assert run.take_up(tmp_path / "nothing") is None and not (tmp_path / "nothing").exists()
    with log.RunLog(tmp_path, total_steps=9) as killed:
        killed.metrics(1, {"loss": 1.0})
        killed.table(1, [{"completion": "lost"}])
    assert run.take_up(tmp_path) is None
    with log.RunLog(tmp_path, total_steps=9):  # as of a new run
        assert not (tmp_path / "metrics.jsonl").read_bytes() + (tmp_path / "completions.jsonl").read_bytes()


def test_the_two_last_checkpoints_and_the_best_parameters_are_kept(place, tmp_path, monkeypatch):
    rates = iter([0.1, 0.3, 0.2, 0.3, 0.0])
    monkeypatch.setattr(evaluate, "score", lambda *_: {"joint_rate": next(rates)})
    schedule = options.Schedule(steps=STEPS, eval_every=1, save_every=1, log_every=1)
    sft.train(sft_settings(place, schedule=schedule), tmp_path)
    assert steps(tmp_path / "checkpoints") == [4, 5]
    assert steps(tmp_path / "best") == [2]
    assert saves.Best(tmp_path).rate == 0.3
    best, last = (checkpoint.load_model(tmp_path, which=which).params for which in ("best", "last"))
    state = ocp.StandardCheckpointer().restore((tmp_path / "checkpoints" / "5" / "state").absolute())
    assert sums.digest(last) == sums.digest(state["params"]) != sums.digest(best)


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
    schedule = options.Schedule(steps=STEPS, save_every=3, log_every=1)
    with pytest.raises(errors.NumericError) as ended:
        sft.train(sft_settings(place, schedule=schedule), tmp_path)
    frames = [", ".join(dict.fromkeys(batch)) for batch in seen]
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    bad = "loss or gradient of step {} was not finite, of frames {}"
    assert said == [f"{bad.format(step, frames[step - 1])}; it was left out" for step in (2, 3)]
    assert str(ended.value).startswith(f"{bad.format(4, frames[3])}; that was 3 times in a row and nothing of it was")
    assert str(ended.value).endswith("then go on from step 3 with --resume")
    state = ocp.StandardCheckpointer().restore((tmp_path / "checkpoints" / "3" / "state").absolute())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert int(state["step"]) == 3 and int(state["skipped"]) == int(state["skipped_in_a_row"]) == 2


def steps(folder):
    return sorted(int(entry.name) for entry in folder.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc, which Linux has")
def test_a_run_leaves_no_thread_and_no_open_file_behind(place, tmp_path):
    def held():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    sft.train(sft_settings(place), tmp_path / "first")
    before = held()
    sft.train(sft_settings(place), tmp_path / "second")
    assert held() == before


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


def begin(place, folder, mesh):
    """The target of a restore, and a state, as `sft.train` makes them."""
    settings = sft_settings(place, compute=options.Compute(mesh=mesh))
    setup = run.prepare(folder, settings, resume=False)
    tx = optim.transformation(settings.optimizer, STEPS, setup.params)
    mesh = setup.runner.mesh
    abstract = run.abstract_state(setup.params, tx, mesh)
    return mesh, abstract, run.start_state(setup.params, tx, mesh)


def test_a_run_with_its_moments_in_the_hosts_memory_resumes_and_equals_others(place, sft_run, tmp_path, monkeypatch):
    settings = sft_settings(place, compute=options.Compute(mesh=(2, 2, 2), offload=True))
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    sft.train(settings, plain)
    assert_alike(plain, sft_run)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 2, terminate)
        with pytest.raises(errors.Preempted, match=f"after step 2 of {STEPS}"):
            sft.train(settings, broken)
    keep_layout, kinds = run.keep_layout, set()

    def watched(step, state):
        kinds.update(leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
        return keep_layout(step, state)

    monkeypatch.setattr(run, "keep_layout", watched)
    sft.train(settings, broken, resume=True)
    assert kinds == {sharding.HOST}
    assert lines(broken) == lines(plain) and whole(broken, STEPS) == whole(plain, STEPS)


def test_weights_that_a_checkpoint_replaces_are_let_go_before_it_is_read(place, sft_run, tmp_path, monkeypatch):
    out, restore = shutil.copytree(sft_run, tmp_path / "run"), saves.Checkpoints.restore
    settings = sft_settings(place)
    setup = run.prepare(out, settings, resume=True)

    def restored(self, wanted):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(setup.params))
        return restore(self, wanted)

    monkeypatch.setattr(saves.Checkpoints, "restore", restored)
    tx = optim.transformation(settings.optimizer, STEPS, setup.params)
    meta = json.loads((out / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    _, reached = run.begin(out, setup, tx, meta["data"], resume=True)
    assert reached.step == int(reached.state.step) == STEPS


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
    settings = sft_settings(
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
