"""Folders on a bucket: fetched whole, put whole, checked; and a whole run on one. An emulator here is the bucket."""

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from bucket import served
from toy import few_devices, quick_compile  # noqa: F401

from surgery_r1_jax import checkpoint, cli, errors, files, handlers, log, milestones, options, places, records, run, sft

needs_bucket = pytest.mark.skipif(
    not (importlib.util.find_spec("gcsfs") and importlib.util.find_spec("gcp_storage_emulator")),
    reason="gcsfs or gcp-storage-emulator is not installed",
)


@pytest.fixture(scope="module")
def bucket():
    with served() as url:
        yield url


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(folder, target):
    places.put_folder(Path(folder), places.place(target))


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_path_on_a_disk_is_itself(tmp_path):
    for text in ("runs/x", "/a/b", "x:y", "~/x", "gs", "s3/x", str(tmp_path)):
        assert places.place(text) == Path(text) == places.fetched(text) and not places.remote(text)
    with pytest.raises(errors.InputError, match="gs://BUCKET/FOLDER"):
        places.place("ftp://host/folder")
    with pytest.raises(errors.InputError, match="gs://BUCKET/FOLDER"):
        places.place(Path("gs://bucket/x"))  # which has lost a slash


def test_a_bucket_needs_its_package(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for scheme, package, extra in (("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")):
        words = f"sft --config configs/sft_tiny.yaml --out {scheme}://bucket/run"
        assert cli.main(words.split()) == 2
        assert f"needs {package}; pip install 'surgery-r1-jax[{extra}]'" in capsys.readouterr().err


def test_checkpoints_are_not_written_to_s3(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(errors.InputError, match="s3://bucket/run: checkpoints are written to gs:// and to disks only"):
        sft.train(options.SFT.model_construct(schedule=None), "s3://bucket/run")


def test_a_command_that_works_on_a_disk_says_so(capsys):
    assert cli.main(["demo", "--out", "gs://bucket/demo"]) == 2
    assert "expected a path on this machine, given 'gs://bucket/demo'" in capsys.readouterr().err


@needs_bucket
def test_a_folder_is_fetched_whole_once_and_follows_the_bucket(bucket, tmp_path, monkeypatch):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_bytes(b"one")
    (tmp_path / "a" / "deep" / "two.bin").write_bytes(bytes(range(256)) * 100)
    put(tmp_path / "a", f"{bucket}/kept/a")
    copy = places.fetched(f"{bucket}/kept/a")
    assert tree(copy) == tree(tmp_path / "a")
    assert places.fetched(f"{bucket}/kept/a/one.txt").read_bytes() == b"one"

    got, get = [], places._get
    monkeypatch.setattr(places, "_get", lambda path, copy, some: got.extend(some) or get(path, copy, some))
    assert places.fetched(f"{bucket}/kept/a/") == copy and not got
    (places.place(bucket) / "kept/a/one.txt").write_text("uno")  # of the same length
    (places.place(bucket) / "kept/a/deep/two.bin").unlink()
    assert tree(places.fetched(f"{bucket}/kept/a")) == {"one.txt": b"uno"}
    assert [each.name for each in got] == ["one.txt"]
    (copy / "one.txt").write_bytes(b"")  # lost from the copy
    assert tree(places.fetched(f"{bucket}/kept/a")) == {"one.txt": b"uno"}


@needs_bucket
def test_what_comes_with_another_sum_is_refused_and_leaves_nothing(bucket, tmp_path, monkeypatch):
    (places.place(bucket) / "sum/a/x.bin").write_bytes(b"right")
    system = places._system(places.place(bucket))
    monkeypatch.setattr(system, "get", lambda names, parts: [Path(part).write_bytes(b"wrong") for part in parts])
    with pytest.raises(errors.InputError, match=r"gs://bucket/sum/a/x.bin: came with another size or sum"):
        places.fetched(f"{bucket}/sum/a")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@needs_bucket
@pytest.mark.parametrize("name", ["no/such", "no/such/x.txt"])
def test_what_is_not_there_is_told_in_one_line(bucket, name):
    with pytest.raises(errors.InputError, match=f"gs://bucket/{name}: no such file or folder on the bucket"):
        places.fetched(f"{bucket}/{name}")
    with pytest.raises(errors.InputError, match=f"gs://another/{name}: no such file or folder on the bucket"):
        places.fetched(f"gs://another/{name}")


@needs_bucket
def test_a_bucket_that_refuses_is_told_in_one_line(bucket, monkeypatch, capsys):
    def refuses(path):
        raise PermissionError("Anonymous caller does not have storage.objects.list access\nto the bucket")

    monkeypatch.setattr(places._system(places.place(bucket)), "exists", refuses)
    monkeypatch.setattr(handlers, "start_devices", lambda: None)
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = f"sft --config configs/sft_tiny.yaml --resume auto --out {bucket}/private"
    assert cli.main(words.split()) == 2
    told = (
        f"{bucket}/private: cannot be reached (Anonymous caller does not have storage.objects.list access to the "
        "bucket); check the path, the network and your rights to the bucket"
    )
    assert capsys.readouterr().err == f"error: {told}\n"
    with pytest.raises(errors.InputError) as refusal, files.new_folder(f"{bucket}/private"):
        pass
    assert str(refusal.value) == told


@needs_bucket
def test_an_object_that_would_lead_out_of_the_copy_is_refused(bucket, monkeypatch):
    system = places._system(places.place(bucket))
    names = {"bucket/evil/../../x": {"size": 1, "md5Hash": "x"}}
    monkeypatch.setattr(system, "find", lambda base, detail: names)
    with pytest.raises(errors.InputError, match=r"holds '\.\./\.\./x', which leads out of it"):
        places.fetched(f"{bucket}/evil")


@needs_bucket
def test_a_new_folder_is_put_with_its_mark_last_or_not_at_all(bucket, tmp_path, monkeypatch):
    target, order, put_one = places.place(f"{bucket}/new/model"), [], places.put
    monkeypatch.setattr(places, "put", lambda file, place: order.append(place.name) or put_one(file, place))

    def fill():
        with files.new_folder(target) as part:
            for name in ("config.json", "a.safetensors", "tokenizer.json"):
                (part / name).write_text(name)

    def broken(file, place):
        if place.name == "tokenizer.json":
            raise OSError("the network is gone")
        put_one(file, place)

    with monkeypatch.context() as patch:
        patch.setattr(places, "put", broken)
        with pytest.raises(OSError, match="network"):
            fill()
    assert not target.exists()
    fill()
    assert order == ["a.safetensors", "tokenizer.json", "config.json"]
    with pytest.raises(errors.InputError, match="already exists and is not an empty folder"):
        fill()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@needs_bucket
def test_the_log_on_a_bucket_is_kept_before_each_save_and_mended_on_a_resume(bucket):
    out = places.place(f"{bucket}/log/run")
    with contextlib.suppress(KeyboardInterrupt), log.RunLog(out, total_steps=9) as journal:
        for step in (1, 2, 3, 4):
            journal.metrics(step, {"loss": 1.0 / step})
            if step == 3:
                journal.keep()
                assert [row["step"] for row in log.read_metrics(places.fetched(out / "metrics.jsonl"))] == [1, 2, 3]
        raise KeyboardInterrupt
    assert len(log.read_metrics(places.fetched(out / "metrics.jsonl"))) == 4
    with pytest.raises(errors.InputError, match=r"gs://bucket/log/run/metrics.jsonl: this run exists already"):
        log.RunLog(out, total_steps=9).__enter__()
    with log.RunLog(out, total_steps=9, resume_step=2) as journal:
        journal.metrics(3, {"loss": 0.5})
    rows = log.read_metrics(places.fetched(out / "metrics.jsonl"))
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    sessions = log.read_metrics(places.fetched(out / "sessions.jsonl"))
    assert [row["step"] for row in sessions] == [0, 2] and sessions[1]["down_s"] < 60


@needs_bucket
def test_a_bucket_out_of_reach_gets_the_log_later_and_ends_no_run(bucket, monkeypatch, capsys):
    out = places.place(f"{bucket}/far/run")
    system, kept = places._system(out), lambda: len(log.read_metrics(places.fetched(out / "metrics.jsonl")))

    def far(*_):
        raise ConnectionResetError("the network is down")

    with pytest.raises(errors.StorageError, match="cannot be reached"), log.RunLog(out, total_steps=9) as journal:
        journal.metrics(1, {"loss": 1.0})
        journal.metrics(2, {"loss": 0.5})
        with monkeypatch.context() as patch:
            patch.setattr(system, "put_file", far)
            with journal.saving(2):
                pass
        told = " ".join(capsys.readouterr().err.split())
        assert "the log follows later: gs://bucket/far/run/" in told
        assert "cannot be reached (the network is down); try again later" in told
        journal.keep()
        assert kept() == 2
        monkeypatch.setattr(system, "put_file", far)
        journal.metrics(3, {"loss": 0.2})
    assert errors.StorageError.exit_status == 1 != errors.InputError.exit_status  # engines start it again
    with pytest.raises(errors.Preempted), log.RunLog(out, total_steps=9, resume_step=2) as journal:
        raise errors.Preempted  # what ends a run is told, and not the log's trouble
    assert "the end of the log is lost" in capsys.readouterr().err
    assert kept() == 2


@needs_bucket
def test_a_run_on_a_bucket_is_the_run_on_a_disk(bucket, tmp_path):
    toy.write_start(tmp_path, frames=6)
    put(tmp_path / "data", f"{bucket}/data")
    put(tmp_path / "start", f"{bucket}/start")
    assert [f.id for f in records.read(f"{bucket}/data")] == [f.id for f in records.read(tmp_path / "data")]
    assert checkpoint.import_folder(f"{bucket}/start", f"{bucket}/imported") == places.place(f"{bucket}/imported")

    def settings(root, model, steps):
        return options.SFT(
            model=f"{root}/{model}",
            data=options.Data(root=f"{root}/data", frames=2, questions=2),
            optimizer=options.Optimizer(schedule="constant"),
            schedule=options.Schedule(steps=steps, eval_every=1, save_every=100, log_every=1),
            evaluation=options.Evaluation(frames=2, questions=2, limit=1, max_tokens=4),
        )

    there, disk = f"{bucket}/runs/sft", tmp_path / "run"
    assert run.take_up(places.place(there)) is None
    sft.train(settings(bucket, "imported", 1), there)
    assert run.take_up(places.place(there)) == 1
    with pytest.raises(errors.InputError, match="gs://bucket/runs/sft: this run exists already"):
        sft.train(settings(bucket, "imported", 1), there)
    shutil.rmtree(tmp_path / "cache")  # the machine of the first session is gone
    sft.train(settings(bucket, "imported", 2), there, resume=True)
    assert milestones.evaluated(places.place(there), 2, "dev")  # so that it is known to be done
    sft.train(settings(tmp_path, "start", 2), disk)

    ours, theirs = (log.read_metrics(places.fetched(f"{out}/metrics.jsonl")) for out in (there, disk))
    losses = [[(row["step"], row["loss"]) for row in rows if row["split"] == "train"] for rows in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    checkpoint.export(there, f"{bucket}/exported", which="last")
    checkpoint.export(disk, tmp_path / "exported", which="last")
    ours, theirs = tree(places.fetched(f"{bucket}/exported")), tree(tmp_path / "exported")
    assert ours.keys() == theirs.keys() and ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["model.safetensors"] != (tmp_path / "start" / "model.safetensors").read_bytes()
    words = f"evaluate --checkpoint {there} --data {bucket}/data --split dev --out {there}/dev.json --max-completion 4"
    assert cli.main([*words.split(), "--no-blank"]) == 0
    scores = json.loads(places.fetched(f"{there}/dev.json").read_text())
    assert scores["n"] == sum(len(f.records) for f in records.split(records.read(tmp_path / "data"), "dev"))
    assert scores["checkpoint"] == there
    assert cli.main(["report", f"{there}/dev.json", "--out", f"{there}/report.html"]) == 0
    assert "<html" in places.place(f"{there}/report.html").read_text()[:500]


@needs_bucket
def test_data_sets_are_made_on_a_bucket(bucket, tmp_path, capsys):
    toy.write_start(tmp_path, frames=4)
    put(tmp_path / "data", f"{bucket}/raw")
    put(tmp_path / "start", f"{bucket}/raw_start")
    words = ["data", "build", f"{bucket}/raw", f"{bucket}/built", "--kinds", "vqla_cot,vqa_direct"]
    assert (
        cli.main(words) == 0 == cli.main(["data", "build", str(tmp_path / "data"), str(tmp_path / "built"), *words[4:]])
    )
    ours, theirs = tree(places.fetched(f"{bucket}/built")), tree(tmp_path / "built")
    assert ours == theirs and "records.jsonl" in ours
    assert cli.main(words) == 2
    assert "gs://bucket/built: already exists and is not an empty folder" in capsys.readouterr().err
    how = ["--model", f"{bucket}/raw_start"]
    assert cli.main(["data", "export", f"{bucket}/built", f"{bucket}/for_trl", *how]) == 0
    assert cli.main(["data", "export", str(tmp_path / "built"), str(tmp_path / "for_trl"), *how]) == 0
    assert tree(places.fetched(f"{bucket}/for_trl")) == tree(tmp_path / "for_trl")


@needs_bucket
def test_what_is_only_looked_at_may_lie_on_a_bucket(bucket, tmp_path, capsys):
    seen = toy.write_start(tmp_path / "seen", frames=4)
    put(seen, f"{bucket}/seen")
    (tmp_path / "sft.yaml").write_text("data: {frames: 2, questions: 2}\n")
    image = next((seen / "data").rglob("*.png"))
    commands = [
        "data check {root}/data --model {root}/start",
        f"doctor --config {tmp_path}/sft.yaml --model={{root}}/start --data.root={{root}}/data",
        "doctor --checkpoint {root}/start",
        f"ask --checkpoint {{root}}/start --image {image} Where?",
    ]
    for words in commands:
        said = []
        for root in (f"{bucket}/seen", str(seen)):
            assert cli.main(words.format(root=root).split()) == 0, capsys.readouterr().err
            said.append(capsys.readouterr().out.replace(root, "ROOT"))
        assert said[0] == said[1] != "", words


@needs_bucket
def test_a_trace_is_put_on_a_bucket(bucket):
    with run.traced(places.place(f"{bucket}/traced/profile")):
        jax.numpy.arange(3.0).block_until_ready()
    (trace,) = places.fetched(f"{bucket}/traced/profile").rglob("*.xplane.pb")
    assert trace.stat().st_size


@needs_bucket
def test_adapters_lie_on_a_bucket_and_so_does_their_base(bucket, tmp_path):
    toy.write_start(tmp_path, frames=4)
    put(tmp_path / "start", f"{bucket}/base")
    settings = options.SFT(
        model=f"{bucket}/base",
        lora=options.Lora(rank=2),
        data=options.Data(root=str(tmp_path / "data"), frames=2, questions=2),
        optimizer=options.Optimizer(schedule="constant", learning_rate=0.01),
        schedule=options.Schedule(steps=1, save_every=100, log_every=1),
        evaluation=options.Evaluation(frames=2, questions=2, limit=1, max_tokens=4),
    )
    there = f"{bucket}/runs/adapters"
    sft.train(settings, there)
    later = settings.model_copy(update={"schedule": settings.schedule.model_copy(update={"steps": 2})})
    sft.train(later, there, resume=True)
    sft.train(later.model_copy(update={"model": str(tmp_path / "start")}), tmp_path / "run")
    wanted = checkpoint.load_model(tmp_path / "run", which="last").params
    checkpoint.export(there, f"{bucket}/adapter", which="last")
    checkpoint.export(there, f"{bucket}/merged", which="last", merge=True)
    for name in ("runs/adapters", "adapter", "merged"):
        found = checkpoint.load_model(f"{bucket}/{name}", which="last").params
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    put(tmp_path / "data", f"{bucket}/base")  # something else than a model
    (places.place(bucket) / "base/config.json").unlink()
    with pytest.raises(errors.InputError, match=r"bucket/base: no config\.json: this is a data set"):
        checkpoint.load_model(f"{bucket}/adapter")


@needs_bucket
def test_several_processes_write_their_parts_to_a_bucket(bucket, tmp_path):
    toy.write_start(tmp_path, frames=4)
    put(tmp_path / "data", f"{bucket}/shared/data")
    put(tmp_path / "start", f"{bucket}/shared/start")
    (tmp_path / "sft.yaml").write_text(
        f"model: {bucket}/shared/start\n"
        f"data: {{root: {bucket}/shared/data, frames: 2, questions: 2}}\n"
        "schedule: {steps: 2, save_every: 1, log_every: 1}\n"
        "evaluation: {frames: 2, questions: 2, limit: 1, max_tokens: 4}\n"
    )
    words = ["sft", "--config", str(tmp_path / "sft.yaml"), "--resume", "auto", "--out"]
    found = {}
    for count, out in ((2, f"{bucket}/shared/run"), (1, str(tmp_path / "run"))):
        codes = [process.wait(300) for process in toy.start_group(tmp_path, count, [*words, out])]
        assert codes == [0] * count, (tmp_path / "printed0").read_text()[-2000:]
        rows = log.read_metrics(places.fetched(f"{out}/metrics.jsonl"))
        found[count] = [row["loss"] for row in rows if row["split"] == "train"]
        leaves = jax.tree.leaves(checkpoint.load_model(out, which="last").params)
        found[count] += [float(jax.numpy.linalg.norm(leaf)) for leaf in leaves]
    np.testing.assert_allclose(found[2], found[1], rtol=1e-4)  # float32 sums in another order, twice
