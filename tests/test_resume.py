"""A run that is stopped or killed and resumed is, bit for bit, the run that never was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import faults
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import (
    cli,
    errors,
    evaluate,
    grpo,
    log,
    milestones,
    optim,
    options,
    run,
    saves,
    sft,
    sharding,
)

pytestmark = pytest.mark.survival
STEPS = toy.STEPS


def grpo_settings(place, **changes):
    settings = dict(samples=2, minibatches=2, sampler=options.Sampler(max_tokens=4))
    settings |= toy.sft_settings(place).model_dump(include={"model", "data", "optimizer", "schedule", "evaluation"})
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
    sft.train(toy.sft_settings(place), place / "sft")
    return place / "sft"


def test_sft_stopped_by_sigterm_then_killed_equals_the_uninterrupted_run(place, sft_run, tmp_path, monkeypatch):
    settings = toy.sft_settings(place)
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
    settings, dev = toy.sft_settings(place), "dev"
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
    data = toy.sft_settings(place).data.model_copy(update=dict(root=str(tmp_path / "data")))
    with pytest.raises(errors.InputError) as refusal:
        sft.train(toy.sft_settings(place, data=data), sft_run, resume=True)
    old, new = re.search(r"fingerprint (\w{12}), now (\w{12})", str(refusal.value)).groups()
    meta = json.loads((sft_run / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    assert old == meta["data"][:12] != new


def test_a_run_folder_is_not_trained_over_and_nothing_is_resumed_from_nothing(place, sft_run, tmp_path):
    with pytest.raises(errors.InputError, match="add --resume, or choose another --out"):
        sft.train(toy.sft_settings(place), sft_run)
    with pytest.raises(errors.InputError, match="no checkpoint to resume from"):
        sft.train(toy.sft_settings(place), tmp_path, resume=True)


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


def test_a_run_with_its_moments_in_the_hosts_memory_resumes_and_equals_others(place, sft_run, tmp_path, monkeypatch):
    settings = toy.sft_settings(place, compute=options.Compute(mesh=(2, 2, 2), offload=True))
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
    settings = toy.sft_settings(place)
    setup = run.prepare(out, settings, resume=True)

    def restored(self, wanted):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(setup.params))
        return restore(self, wanted)

    monkeypatch.setattr(saves.Checkpoints, "restore", restored)
    tx = optim.transformation(settings.optimizer, STEPS, setup.params)
    meta = json.loads((out / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())
    _, reached = run.begin(out, setup, tx, meta["data"], resume=True)
    assert reached.step == int(reached.state.step) == STEPS
