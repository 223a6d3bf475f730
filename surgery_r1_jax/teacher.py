"""Reasoning written by a larger model that sees the frame and its labels, over any OpenAI-compatible endpoint.

A vLLM or SGLang server with a large Qwen-VL is such an endpoint. Requests go out `jobs` at a time, are repeated after
time-outs, refusals for load (429, 5xx) and half answers, and every answer is kept in a file at once, under a hash of
all that was asked: a run that was killed asks nothing twice. Whether the labels bear an answer out is for `tracecheck`
to say. The key, where the server wants one, is read from the environment and goes into the request's head alone.
"""

import asyncio
import base64
import functools
import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
from rich.console import Console
from rich.progress import track

from surgery_r1_jax import answer, images, traces, vocabulary
from surgery_r1_jax.errors import InputError, printable
from surgery_r1_jax.records import Frame, Record

KEY = "SURGERY_R1_TEACHER_KEY"  # the environment variable

TEMPERATURE = 0.7


class Question(NamedTuple):
    """What reasoning is wanted for."""

    frame: Frame
    record: Record
    want: int  # index into answer.WANT
    copy: int = 0  # the same may be asked again, for another text
    reference: str = "organ"  # what locations are relative to


INSTRUCTION = """You write short reasoning for training a model that answers questions about robotic surgery.
You are given a frame, all that is known of it, a question and its true answer. Write 2 to 6 plain English sentences
that lead from what can be seen to the answer, as if you did not know it. Rules:
- Name every instrument of the list once, spelled as in the list, with its place and state as in the list.
- You may say how an instrument or the tissue looks. State nothing else of states, places, boxes or numbers.
- Write boxes as [x0, y0, x1, y1] with the numbers of the list.
- Do not use "not", "above", "below", "other" or "both".
- The last sentence gives the answer, or the box, or both, as is asked for, and begins with "So the answer".
- No headings, no lists, no tags, only the sentences."""


@dataclass(frozen=True)
class Teacher:
    """Who is asked, and how.

    url: up to and with /v1. cache: the file that keeps the answers. jobs: requests at a time.
    """

    url: str
    model: str
    cache: Path
    jobs: int = 8
    timeout_s: float = 120.0
    attempts: int = 6
    pause_s: float = 1.0  # before the first repetition; each further one waits twice as long
    max_tokens: int = 400
    most_failures: int = 16  # questions in a row without an answer that end the run
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.username or parts.query)
        except ValueError:
            plain = False
        if not plain:
            raise InputError(f"the teacher's URL must be like http://localhost:8000/v1; a key belongs into {KEY}")
        if not all("!" <= char <= "~" for char in self.key):
            raise InputError(f"{KEY} holds a character that no key has; set it anew")


def write(teacher: Teacher, questions: Sequence[Question]) -> list[str | None]:
    """The teacher's reasoning for each question, None where it gave none; a progress bar on standard error.

    Raises: InputError where the server refuses or cannot be reached; what was answered is kept.
    """
    keys = [_key(teacher, question) for question in questions]
    with _Cache(teacher.cache) as cache:
        open_questions = {
            key: question for key, question in zip(keys, questions, strict=True) if key not in cache.answers
        }
        try:
            asyncio.run(_ask_all(teacher, open_questions, cache))
        except ExceptionGroup as group:  # of several refusals, one says it all
            raise group.exceptions[0] from None
        return [cache.answers.get(key) for key in keys]


def prompt(question: Question) -> str:
    """What is asked about a frame: its labels, the question, and the answer to lead to."""
    frame, record = question.frame, question.record
    organs = {other.answer: other for other in frame.records if other.kind == vocabulary.ORGAN}
    where = f" of the {', '.join(organs)}" if organs and question.reference == "organ" else ""
    lines = ["Known of this frame:"]
    lines += [f"- {name}, the organ, box {traces.pixels(organ.box, frame)}" for name, organ in organs.items()]
    for one in traces.instruments(frame):
        said = ", ".join(filter(None, (one.tool, one.state, one.place and one.place + where)))
        lines.append(f"- {said}, box {traces.pixels(one.box, frame)}")
    asked = {"answer": ("the answer",), "box": ("the box",), "both": ("the answer", "the box")}[
        answer.WANT[question.want]
    ]
    true = {"the answer": record.answer, "the box": traces.pixels(record.box, frame)}
    lines += ["", f"Question: {record.question}"]
    lines += [f"Lead to {part}: {true[part]}" for part in asked]
    return "\n".join(lines)


async def _ask_all(teacher: Teacher, questions: dict[str, Question], cache: "_Cache") -> None:
    """Ask what is not known yet, some at a time, and keep what is answered."""
    bar = Console(stderr=True)
    steps = track(questions.items(), "asking the teacher", len(questions), console=bar, disable=not bar.is_terminal)
    head = {"Authorization": f"Bearer {teacher.key}"} if teacher.key else {}
    failures = 0

    async def ask() -> None:
        nonlocal failures
        for key, question in steps:  # all askers take from the same
            try:
                cache.put(key, await _answer(client, teacher, question))
                failures = 0
            except _Failed as failed:
                failures += 1
                if failures >= teacher.most_failures:
                    raise InputError(
                        f"the teacher left {failures} questions in a row unanswered ({failed}); see to the server and "
                        "start again: what it answered is kept"
                    ) from None

    async with httpx2.AsyncClient(headers=head, timeout=teacher.timeout_s) as client, asyncio.TaskGroup() as askers:
        for _ in range(teacher.jobs):
            askers.create_task(ask())


class _Failed(Exception):
    """An attempt that may go better next time; `wait_s` is what the server wants to be given."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


async def _answer(client: httpx2.AsyncClient, teacher: Teacher, question: Question) -> str:
    """What the teacher says in the end. Raises: _Failed after the last attempt, InputError."""
    for attempt in range(teacher.attempts - 1):
        try:
            return await _attempt(client, teacher, question)
        except _Failed as failed:
            pause = teacher.pause_s * 2**attempt * random.uniform(0.5, 1.0)  # not all at once again
            await asyncio.sleep(min(max(pause, failed.wait_s), teacher.timeout_s))
    return await _attempt(client, teacher, question)


async def _attempt(client: httpx2.AsyncClient, teacher: Teacher, question: Question) -> str:
    """One request. Raises: _Failed, or InputError for what no repetition mends."""
    image = {"type": "image_url", "image_url": {"url": _data_url(question.frame.image)}}
    body = {
        "model": teacher.model,
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": [image, {"type": "text", "text": prompt(question)}]},
        ],
        "max_tokens": teacher.max_tokens,
        "temperature": TEMPERATURE,
    }
    try:
        async with asyncio.timeout(teacher.timeout_s):  # httpx's own starts anew with every byte
            reply = await client.post(f"{teacher.url.rstrip('/')}/chat/completions", json=body)
    except (TimeoutError, httpx2.TransportError, httpx2.DecodingError) as error:
        raise _Failed(type(error).__name__) from None
    status = reply.status_code
    if status in (408, 409, 425, 429) or status >= 500:
        asked = reply.headers.get("retry-after", "")
        raise _Failed(f"status {status}", float(asked) if asked.isdecimal() and len(asked) < 6 else 0.0)
    if status != 200:  # the body is not shown: some servers repeat the key in it
        raise InputError(
            f"the teacher refuses with status {status}; check its URL, the model {teacher.model!r}, the key"
        )
    return _said(reply)


def _said(reply: httpx2.Response) -> str:
    """The text of a reply in plain ASCII. Raises: _Failed where it is not whole."""
    try:
        choice = reply.json()["choices"][0]
        whole, text = choice.get("finish_reason") in ("stop", None), choice["message"]["content"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Failed("half an answer") from None
    if not whole or not isinstance(text, str) or not text.strip():
        raise _Failed("half an answer")
    text = text.rpartition("</think>")[2].translate(_PLAIN)
    return " ".join(text.split())


_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": ", "})


class _Cache:
    """Answers by the hash of what was asked, a JSON object a line; each is in the file before it is used."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, str] = {}

    def __enter__(self) -> "_Cache":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
            self.file.seek(0)
            data = self.file.read()
            if data and not data.endswith(b"\n"):  # a killed run was writing
                self.file.write(b"\n")
        except OSError as error:
            raise InputError(
                f"{printable(self.path)}: cannot be written ({error.strerror}); name another file"
            ) from None
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                self.answers[str(entry["key"])] = str(entry["text"])
            except (ValueError, LookupError, TypeError):
                continue  # the half line
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, key: str, text: str) -> None:
        self.answers[key] = text
        self.file.write(json.dumps({"key": key, "text": text}).encode() + b"\n")
        self.file.flush()


def _key(teacher: Teacher, question: Question) -> str:
    """A hash of all that decides an answer; where the server stands does not."""
    settings = (teacher.model, teacher.max_tokens, TEMPERATURE, INSTRUCTION)
    asked = json.dumps([settings, prompt(question), question.copy, _image_hash(question.frame.image)])
    return hashlib.sha256(asked.encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _image_hash(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=32)
def _data_url(image: Path) -> str:
    """The frame as the training will see it, without what else its file holds."""
    packed = io.BytesIO()
    images.load(image).save(packed, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
