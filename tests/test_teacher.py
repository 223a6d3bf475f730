"""A teacher on the loopback that answers truthfully from the prompt, and one that misbehaves in every way we know."""

import base64
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, PngImagePlugin

from surgery_r1_jax import build, records, synth, teacher, tracecheck
from surgery_r1_jax.errors import InputError

CANARY, PATIENT = "sk-canary-7f3a9c", "patient-4711"
QUICK = dict(timeout_s=10, pause_s=0.01)


def truthful(prompt):
    """Reasoning made of nothing but the prompt's own list of labels."""
    known, _, asked = prompt.partition("\n\n")
    said = []
    for line in known.splitlines()[1:]:
        what, _, box = line.removeprefix("- ").partition(", box ")
        name, *more = what.split(", ")
        said.append(
            f"Its tissue is pale: the {name} {box}."
            if more == ["the organ"]
            else f"I see the {name}: {', '.join(more)}."
        )
    wanted = [line.partition(": ")[2] for line in asked.splitlines()[1:]]
    return " ".join([*said, f"So the answer is {' in '.join(wanted)}."])


def reply_of(text, finish="stop"):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


class Server(ThreadingHTTPServer):
    """`behave(server, prompt, times)` gives (status, headers, body), or None to say nothing and hang up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.asked, self.bodies, self.keys = threading.Lock(), Counter(), [], set()
        self.busy = self.most_busy = 0
        self.behave = lambda server, prompt, times: (200, {}, reply_of(truthful(prompt)))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        """Clients that left are expected."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][1]["content"][1]["text"]
        with self.server.lock:
            times = self.server.asked[prompt]
            self.server.asked[prompt] += 1
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.busy += 1
            self.server.most_busy = max(self.server.busy, self.server.most_busy)
        try:
            said = self.server.behave(self.server, prompt, times)
        finally:
            with self.server.lock:
                self.server.busy -= 1
        if said is None:
            return
        status, headers, data = said
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in data if isinstance(data, list) else [data]:
            self.wfile.write(piece)
            time.sleep(0.4 * isinstance(data, list))

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv(teacher.KEY, raising=False)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    synth.write(root, frames=3, seed=1, size=(112, 84), max_tools=2, sequences=("seq_2",))
    return root


def make(server, source, folder, *, kinds=("vqa_cot", "vqla_cot"), **options):
    ask = teacher.Teacher(server.url, "large", folder / "cache.jsonl", **QUICK | options)
    stats = build.run(source, folder / "out", kinds=dict.fromkeys(kinds, 1.0), ask=ask)
    return stats, [json.loads(line) for line in (folder / "out" / "records.jsonl").read_text().splitlines()]


def test_the_teacher_s_reasoning_is_in_every_record(server, source, tmp_path):
    stats, rows = make(server, source, tmp_path)
    assert stats["reasoning"] == {"teacher": len(rows)} and stats["refused"] == {}
    assert all("pale" in row["reasoning"] for row in rows)
    assert set(server.asked.values()) == {1} and server.keys == {None}


def test_the_teacher_sees_the_frame_its_labels_and_the_question(server, source, tmp_path):
    frame = records.read(source)[0]
    frame.image.rename(tmp_path / "bare.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", PATIENT)
    Image.open(tmp_path / "bare.png").save(frame.image, pnginfo=info)
    teacher.write(
        teacher.Teacher(server.url, "large", tmp_path / "cache.jsonl", **QUICK),
        [teacher.Question(frame, frame.records[0], 2)],
    )
    (body,) = server.bodies
    (picture, words) = body["messages"][1]["content"]
    assert body["model"] == "large" and body["messages"][0]["content"] == teacher.INSTRUCTION
    assert frame.records[0].question in words["text"]
    for record in frame.records:
        assert record.answer in words["text"]
    sent = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(sent)).size == (frame.width, frame.height)
    assert PATIENT.encode() in frame.image.read_bytes() and PATIENT.encode() not in sent


def test_a_server_that_misbehaves_is_asked_again_until_it_answers(server, source, tmp_path):
    whole = reply_of("The answer.")
    faults = [
        lambda: (429, {"Retry-After": "0"}, b"slow down"),
        lambda: (503, {}, b""),
        lambda: time.sleep(3) or None,  # longer than the client waits
        lambda: (200, {}, [b" "] * 10),  # a byte now and then
        lambda: None,
        lambda: (200, {}, whole[: len(whole) // 2]),
        lambda: (200, {"Content-Length": str(len(whole) + 9)}, whole),
        lambda: (200, {}, reply_of("The kidney is being", "length")),
        lambda: (200, {}, reply_of(None)),
        lambda: (200, {}, b'{"choices": []}'),
        lambda: (200, {}, b"[" * 100_000),
        lambda: (200, {"Content-Encoding": "gzip"}, b"no gzip"),
    ]
    order = {}

    def behave(server, prompt, times):
        with server.lock:
            first = order.setdefault(prompt, len(order))
        if times < 2:
            return faults[(2 * first + times) % len(faults)]()
        return 200, {}, reply_of(truthful(prompt))

    server.behave = behave
    stats, rows = make(server, source, tmp_path, jobs=4, timeout_s=1.5)
    assert 2 * len(order) >= len(faults)
    assert stats["reasoning"] == {"teacher": len(rows)}
    assert set(server.asked.values()) <= {3, 4}  # a fourth where this machine was too busy to answer in time


def test_what_the_labels_do_not_bear_out_is_counted_by_reason_and_written_instead(server, source, tmp_path):
    def behave(server, prompt, times):
        text = truthful(prompt)
        if "[" in text.partition("So the answer")[2]:
            text = text[:-3] + "9]."  # the box at the end is another
        elif "kidney" in prompt.partition("Question")[2]:
            text = text.replace("pale", "not pale")
        return 200, {}, reply_of(text)

    server.behave = behave
    stats, rows = make(server, source, tmp_path)
    assert stats["refused"].keys() == {
        f"teacher: {reason}" for reason in (tracecheck.Reason.BOX, tracecheck.Reason.NOT_READABLE)
    }
    assert stats["reasoning"]["written"] == sum(stats["refused"].values())
    assert stats["reasoning"].keys() == {"teacher", "written"}
    frames = {frame.id: frame for frame in records.read(source)}
    for row in rows:
        name, index, _ = row["id"].rsplit("/", 2)
        want = {"answer": 0, "both": 2}[row["want"]]
        record = frames[name].records[int(index)]
        assert tracecheck.check(row["reasoning"], frames[name], record, want=want) == "ok"


def test_a_question_that_is_never_answered_gets_written_reasoning(server, source, tmp_path):
    server.behave = lambda server, prompt, times: (
        (500, {}, b"") if "kidney" in prompt.partition("Question")[2] else (200, {}, reply_of(truthful(prompt)))
    )
    stats, rows = make(server, source, tmp_path, attempts=2)
    assert stats["reasoning"]["written"] == 6  # three frames, two kinds
    assert {times for prompt, times in server.asked.items()} == {1, 2}
    server.behave = lambda server, prompt, times: (200, {}, reply_of(truthful(prompt)))
    server.asked.clear()
    (tmp_path / "out").rename(tmp_path / "before")
    stats, _ = make(server, source, tmp_path)
    assert stats["reasoning"] == {"teacher": len(rows)}
    assert server.asked.total() == 6  # what was answered before is not asked again


def test_a_second_record_of_a_kind_gets_another_text(server, source, tmp_path):
    def behave(server, prompt, times):
        return 200, {}, reply_of(f"{('First', 'Then')[times]} look. {truthful(prompt)}")

    server.behave = behave
    ask = teacher.Teacher(server.url, "large", tmp_path / "cache.jsonl", **QUICK)
    stats = build.run(source, tmp_path / "out", kinds={"vqa_cot": 2}, ask=ask)
    assert stats["reasoning"] == {"teacher": stats["records"]}
    assert set(server.asked.values()) == {2}
    rows = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    said = {row["id"]: row["reasoning"] for row in rows}
    assert all(said[name] != said[f"{name}/1"] for name in said if name.endswith("_cot"))


def test_requests_go_out_together_but_no_more_than_allowed(server, source, tmp_path):
    def behave(server, prompt, times):
        time.sleep(0.05)
        return 200, {}, reply_of(truthful(prompt))

    server.behave = behave
    make(server, source, tmp_path, jobs=3)
    assert server.most_busy == 3


def test_a_killed_run_asks_nothing_twice(server, source, tmp_path):
    """The server kills the program before it answers the fifth question; only that one is asked again."""
    running = []

    def behave(server, prompt, times):
        if len(server.asked) == 5 and times == 0:
            while not running:
                time.sleep(0.01)
            running[0].send_signal(signal.SIGKILL)
            return None
        return 200, {}, reply_of(truthful(prompt))

    server.behave = behave
    words = f"data build {source} {tmp_path}/out --kinds vqa_cot --teacher {server.url} --teacher-model large"
    command = [sys.executable, "-m", "surgery_r1_jax.cli", *words.split(), "--teacher-jobs", "1"]
    running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    assert running[0].wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = tmp_path / "out.teacher.jsonl"
    assert len(kept.read_text().splitlines()) == 4
    with kept.open("a") as file:
        file.write('{"key": "half a li')
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["reasoning"] == {"teacher": stats["records"]}
    assert sorted(server.asked.values()) == [1] * (stats["records"] - 1) + [2]


def test_the_key_is_in_the_request_and_nowhere_else(server, source, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv(teacher.KEY, CANARY)
    caplog.set_level(logging.DEBUG)
    make(server, source, tmp_path)
    assert server.keys == {f"Bearer {CANARY}"}
    server.behave = lambda server, prompt, times: (401, {}, f"no such key: {CANARY}".encode())
    with pytest.raises(InputError) as refusal:
        make(server, source, tmp_path / "again")
    server.behave = lambda server, prompt, times: (302, {"Location": server.url + "/elsewhere"}, b"")
    with pytest.raises(InputError, match="status 302"):
        make(server, source, tmp_path / "third")
    shown = "".join((str(refusal.value), repr(refusal.getrepr(style="long")), caplog.text, *capfd.readouterr()))
    shown += repr(teacher.Teacher(server.url, "large", tmp_path / "c"))
    assert "401" in shown and "POST" in caplog.text  # the log was on
    assert CANARY not in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_that_no_repetition_mends_ends_at_once(server, source, tmp_path, status):
    server.behave = lambda server, prompt, times: (status, {}, b"")
    with pytest.raises(InputError, match=f"refuses with status {status}"):
        make(server, source, tmp_path, jobs=1)
    assert server.asked.total() == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_not_there_ends_the_run(source, tmp_path):
    ask = teacher.Teacher("http://127.0.0.1:9/v1", "m", tmp_path / "c", attempts=2, most_failures=3, **QUICK)
    with pytest.raises(InputError, match="3 questions in a row unanswered"):
        build.run(source, tmp_path / "out", ask=ask)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://h/v1", "http://", "https://user:secret@h/v1", "http://h/v1?key=secret", "http://[", ""],
)
def test_an_address_that_is_none_or_holds_a_key_is_refused(tmp_path, url):
    with pytest.raises(InputError, match="must be like http://localhost:8000/v1") as refusal:
        teacher.Teacher(url, "m", tmp_path / "c")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("key", [f"{CANARY}\n", f"{CANARY} x", f"{CANARY}\u00e9", f"{CANARY}\0"[:-1] + "\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(tmp_path, monkeypatch, key):
    monkeypatch.setenv(teacher.KEY, key)
    with pytest.raises(InputError, match=teacher.KEY) as refusal:
        teacher.Teacher("http://h/v1", "m", tmp_path / "c")
    assert CANARY not in str(refusal.value)


def test_a_list_of_labels_has_nothing_to_look_at(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("seq_2/frame000|What organ is being operated?|kidney|7,9,1186,438\n")
    ask = teacher.Teacher("http://h/v1", "m", tmp_path / "c")
    with pytest.raises(InputError, match="no frames for a teacher"):
        build.run(path, tmp_path / "out", ask=ask)
    assert os.listdir(tmp_path) == ["labels.txt"]
