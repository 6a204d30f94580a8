"""Whatever a client sends, the answer is a 4xx that says what is wrong with it."""

from __future__ import annotations

import io
import json
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.settings import Settings
from tests.server.bundles import (
    publish_greys,
    publish_halves,
    publish_images,
    publish_moods,
    publish_sums,
    publish_texts,
    publish_vectors,
)
from tests.server.chains import publish_letters
from tests.server.conftest import SENTIMENTS, VECTORS, Live, message_of, running
from tests.server.test_files import digits_zip

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a model of each kind, and small limits."""
    settings = Settings(
        home=tmp_path_factory.mktemp("home"),
        port=0,
        worker=False,
        max_upload_bytes=16 * MEBIBYTE,
        max_body_bytes=12 * MEBIBYTE,
    )
    for publish in (publish_vectors, publish_images, publish_texts, publish_moods, publish_sums):
        publish(settings.repository)
    publish_greys(settings.repository)
    publish_halves(settings.repository)
    publish_letters(settings.repository)
    with running(settings) as server:
        yield server


def png_bomb(side: int = 30_000) -> bytes:
    """A PNG of some hundred kilobytes that says it has `side` × `side` pixels, all of them there and black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    line = b"\0" * (side // 8 + 1)
    pixels = b"".join(compressor.compress(line) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    whole = io.BytesIO(digits_zip())
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return whole.getvalue()


def zipped_link() -> bytes:
    link = zipfile.ZipInfo("class-0/link.png")
    link.external_attr = 0o120777 << 16
    return zipped((link, b"/etc/passwd"))


def tarred(change: Callable[[tarfile.TarFile], None]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive, zipfile.ZipFile(io.BytesIO(digits_zip())) as images:
        for name in images.namelist():
            info = tarfile.TarInfo(name)
            info.size = len(images.read(name))
            archive.addfile(info, io.BytesIO(images.read(name)))
        change(archive)
    return whole.getvalue()


def tarred_link() -> bytes:
    link = tarfile.TarInfo("class-0/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return tarred(lambda archive: archive.addfile(link))


def tarred_escape() -> bytes:
    return tarred(lambda archive: archive.addfile(tarfile.TarInfo("../class-0/escape.png")))


def only_problem(images: bytes) -> bytes:
    """An archive with one image in each of two classes, both broken in the same way."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", images)
        archive.writestr("b/1.png", images)
    return whole.getvalue()


@pytest.mark.parametrize(
    ("filename", "content", "words"),
    [
        ("empty.csv", lambda: b"", ["empty.csv", "empty"]),
        ("names.csv", lambda: b"text,label\n", ["names.csv", "no rows"]),
        ("noise.zip", lambda: b"PK\x03\x04" + bytes(1000), ["noise.zip", "damaged"]),
        ("truncated.zip", lambda: digits_zip()[:-200], ["truncated.zip", "cut off"]),
        ("binary.csv", lambda: bytes(range(256)) * 10, ["binary.csv"]),
        ("escape.zip", lambda: zipped(("../class-0/x.png", b"x")), ["../class-0/x.png"]),
        ("absolute.zip", lambda: zipped(("/etc/x.png", b"x")), ["/etc/x.png"]),
        ("link.zip", zipped_link, ["class-0/link.png", "link"]),
        ("link.tar", tarred_link, ["class-0/link.png", "link"]),
        ("escape.tar", tarred_escape, ["../class-0/escape.png"]),
        ("bomb.zip", lambda: zipped(("class-0/zeros.png", bytes(200 * MEBIBYTE))), ["class-0/zeros.png"]),
        ("pixels.zip", lambda: only_problem(png_bomb()), ["a/1.png", "pixels"]),
        ("texts.zip", lambda: only_problem(b"not an image"), ["a/1.png", "not an image"]),
        ("data.exe", lambda: b"MZ\x90\x00" * 100, ["data.exe"]),
    ],
)
def test_a_file_that_cannot_be_used(live: Live, filename: str, content: Callable[[], bytes], words: list[str]) -> None:
    message = message_of(live.upload(filename, content()), 400)
    for word in words:
        assert word in message
    assert [path for path in (live.settings.home / "files").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("content", "recipe", "words"),
    [
        (b"text,label\na day,good\nb day,good\n", {}, ["only one class", "good"]),
        (b"text,label\na day,good\nb day,good\nc day,bad\n", {}, ["'bad'", "single item"]),
        (SENTIMENTS, {"data": {"label_column": "mood"}}, ["'mood'", "'text', 'label'"]),
        (SENTIMENTS, {"data": {"text_column": "body"}}, ["'body'", "'text', 'label'"]),
        (SENTIMENTS, {"model": "seq2seq"}, ["'translation'", "'text', 'label'"]),
        (b"text,translation\na day,un giorno\n", {}, ["'label'", "'text', 'translation'"]),
        (b"a,b,label\n1,2,x\n3,4,y\n5,6,x\n7,8,y\n", {"model": "seq2seq"}, ["'translation'", "'a', 'b', 'label'"]),
    ],
)
def test_a_file_that_teaches_nothing(live: Live, content: bytes, recipe: dict[str, Any], words: list[str]) -> None:
    recipe = {"model": "minilm-l6-v2", "training_file": live.file_id("days.csv", content), **recipe}
    message = message_of(live.client.post("/v1/fine_tuning/jobs", json=recipe), 400)
    live.client.delete(f"/v1/files/{recipe['training_file']}")
    for word in words:
        assert word in message


JSON = "application/json"
IMAGE = "/v1/classify?model=shades"
VECTOR = "/v1/classify?model=points"


CHAT = b'{"model": "letters", "messages": [{"role": "user", "content": "a"}], "response_format": %b}'
NESTED = b'{"type": "array", "items": ' * 2000 + b"{}" + b"}" * 2000

# Path, content type, body, status, and what the message must say.
BODIES = [
    ("/v1/classify", JSON, b"", 400, "empty"),
    ("/v1/classify", JSON, b'{"model": "days", "inp', 400, "not valid JSON"),
    ("/v1/classify", JSON, b"[1, 2]", 400, "Expected `object`"),
    ("/v1/classify", JSON, b"[" * 100_000, 400, "Expected `object`"),
    ("/v1/classify", JSON, b'{"model": "days", "input": ' + b"[" * 100_000, 400, "JSON"),
    ("/v1/classify", JSON, b"\xff\xfe", 400, "JSON"),
    ("/v1/classify", JSON, b'{"model": "days"}', 400, "`input`"),
    ("/v1/classify", JSON, b'{"input": "a day"}', 400, "`model`"),
    ("/v1/classify", JSON, b'{"model": 1, "input": "a day"}', 400, "$.model"),
    ("/v1/classify", JSON, b'{"model": "days", "input": {"text": "a"}}', 400, "a string or a list of strings"),
    ("/v1/classify", JSON, b'{"model": "days", "input": null}', 400, "a string or a list of strings"),
    ("/v1/classify", JSON, b'{"model": "days", "input": []}', 400, "empty list"),
    ("/v1/classify", JSON, b'{"model": "days", "input": ["a day", " "]}', 400, "text 1 is empty"),
    ("/v1/classify", JSON, b'{"model": "days", "input": [99999]}', 400, "token ids run from 0"),
    ("/v1/classify", JSON, b'{"model": "days", "input": "a", "top_k": 0}', 400, "top_k"),
    ("/v1/classify", JSON, b'{"model": "years", "input": "a"}', 404, "'years'"),
    ("/v1/classify", JSON, b'{"model": "days:7", "input": "a"}', 404, "'7'"),
    ("/v1/classify", JSON, b'{"model": "points", "input": [1, NaN]}', 400, "JSON"),
    ("/v1/classify", JSON, b'{"model": "points", "input": [1, 1e999]}', 400, "input"),
    ("/v1/classify", JSON, b'{"model": "points", "input": [1, 2, 3]}', 400, "2"),
    ("/v1/classify", JSON, b'{"model": "points", "input": [[1, 2], [3]]}', 400, "2"),
    ("/v1/classify", JSON, b'{"model": "points", "input": null}', 400, "a list of numbers"),
    ("/v1/classify", JSON, b'{"model": "points", "input": "1, 2"}', 400, "a list of numbers"),
    ("/v1/classify", JSON, b'{"model": "shades", "input": "a cat"}', 400, "data:image/png;base64"),
    ("/v1/classify", JSON, b'{"model": "shades", "input": "data:image/png;base64,%%%"}', 400, "base64"),
    ("/v1/classify", JSON, b'{"model": "shades", "input": "data:image/png;base64,AAAA"}', 400, "not an image"),
    (VECTOR, "application/octet-stream", struct.pack("<2f", 1, float("nan")), 400, "number 1 of the vector is nan"),
    (VECTOR, "application/octet-stream", struct.pack("<2f", 1, float("inf")), 400, "number 1 of the vector is inf"),
    (VECTOR, "application/octet-stream", bytes(7), 400, "8 bytes"),
    (VECTOR, "application/octet-stream", b"", 400, "empty"),
    (IMAGE, "image/png", b"", 400, "empty"),
    (IMAGE, "image/png", b"no image", 400, "not an image"),
    (IMAGE, "image/png", png_bomb(), 400, "pixels"),
    (IMAGE, "text/plain", b"a cat", 415, "image/*"),
    (IMAGE + "&top_k=many", "image/png", b"x", 400, "'many'"),
    ("/v1/classify", "image/png", b"x", 400, "?model="),
    ("/v1/classify?model=days", "text/plain", b"\xff\xff", 400, "UTF-8"),
    ("/v1/classify?model=days", "image/png", b"x", 415, "text"),
    ("/v1/classify", "multipart/form-data", b"x", 400, "boundary"),
    ("/v1/classify", "multipart/form-data; boundary=b", b"x", 400, "multipart"),
    ("/v1/classify", JSON, b'{"model": "moods", "input": [1, 2], "threshold": 1.5}', 400, "threshold"),
    ("/v1/classify", JSON, b'{"model": "sums", "input": [1, 2]}', 400, "/v1/predict"),
    ("/v1/classify?model=moods&threshold=high", "application/octet-stream", bytes(8), 400, "'high'"),
    ("/v1/predict", JSON, b"", 400, "empty"),
    ("/v1/predict", JSON, b'{"model": "sums", ', 400, "not valid JSON"),
    ("/v1/predict", JSON, b'{"model": "points", "input": [1, 2]}', 400, "ask it at /v1/classify"),
    ("/v1/predict", JSON, b'{"model": "years", "input": [1, 2]}', 404, "'years'"),
    ("/v1/predict", JSON, b'{"model": "sums", "input": [1, 2, 3]}', 400, "2"),
    ("/v1/predict", JSON, b'{"model": "sums", "input": "1, 2"}', 400, "a list of numbers"),
    ("/v1/predict", JSON, b'{"model": "sums", "input": [1, 2], "top_k": 0}', 400, "top_k"),
    ("/v1/predict?model=sums", "application/octet-stream", struct.pack("<2f", 1, float("nan")), 400, "is nan"),
    ("/v1/predict?model=sums", "application/octet-stream", bytes(7), 400, "8 bytes"),
    ("/v1/predict", "image/png", b"x", 400, "?model="),
    ("/v1/predict", JSON, b'{"model": "halves", "input": [1, 2, 3]}', 400, "takes 2"),
    ("/v1/predict", JSON, b'{"model": "greys", "input": [1, 2]}', 400, "a string"),
    ("/v1/predict?model=greys", "image/png", b"x", 400, "not an image"),
    ("/v1/classify?model=greys", "image/png", b"x", 400, "/v1/predict"),
    ("/v1/predict", "multipart/form-data; boundary=b", b"x", 400, "multipart"),
    ("/v1/embeddings", JSON, b'{"model": "days", "input": "a", "encoding_format": "hex"}', 400, "hex"),
    ("/v1/embeddings", JSON, b'{"model": "days", "input": "a", "dimensions": 7}', 400, "dimensions"),
    ("/v1/embeddings", JSON, b'{"model": "years", "input": "a"}', 404, "'years'"),
    ("/v1/embeddings", JSON, b"", 400, "empty"),
    ("/v1/completions", JSON, b"", 400, "empty"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": "a\\ud800"}', 400, "JSON"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": ' + b"[" * 100_000, 400, "$.prompt"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": [1e999]}', 400, "prompt"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": [true]}', 400, "prompt"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": [99999999999999999999]}', 400, "token ids"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": "a", "seed": 1.5}', 400, "seed"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": "a", "temperature": NaN}', 400, "JSON"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": "a", "logit_bias": {"\xd9\xa1": 1}}', 400, "logit_bias"),
    ("/v1/completions", JSON, b'{"model": "letters", "prompt": "a", "max_tokens": 99999999999999999999}', 400, "cont"),
    ("/v1/chat/completions", JSON, b"", 400, "empty"),
    ("/v1/chat/completions", JSON, b'{"model": "letters", "mess', 400, "not valid JSON"),
    ("/v1/chat/completions", JSON, b'{"model": "letters", "messages": {}}', 400, "messages"),
    ("/v1/chat/completions", JSON, b'{"model": "letters", "messages": ["a"]}', 400, "messages"),
    ("/v1/chat/completions", JSON, CHAT % b'{"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}', 400,
     "schema"),
    ("/v1/chat/completions", JSON, CHAT % (b'{"type": "json_schema", "json_schema": {"schema": ' + NESTED + b"}}"), 400,
     ""),
    ("/v1/chat/completions", JSON, CHAT % b'{"type": "regex", "pattern": "(((a{1000}){1000}){1000}){1000}"}', 400,
     "regular expression"),
    ("/v1/chat/completions", JSON, CHAT % b'{"type": "regex", "pattern": "(a)\\\\1"}', 400, "regular expression"),
    ("/v1/tokenize", JSON, b"", 400, "empty"),
    ("/v1/tokenize", JSON, b'{"model": "points", "prompt": "x"}', 400, "reads no texts"),
    ("/v1/detokenize", JSON, b'{"model": "letters", "tokens": [99999999999999999999]}', 400, "token ids"),
    ("/v1/fine_tuning/jobs", JSON, b"", 400, "empty"),
    ("/v1/fine_tuning/jobs", JSON, b'{"model": "mlp", ', 400, "not valid JSON"),
    ("/v1/fine_tuning/jobs", JSON, b"[]", 400, "Expected `object`"),
    ("/v1/fine_tuning/jobs", JSON, b"[" * 100_000, 400, "nested too deeply"),
    ("/v1/fine_tuning/jobs", JSON, b'{"model": "mlp", "training_file": "f", "seed": NaN}', 400, "not valid JSON"),
    ("/v1/fine_tuning/jobs", JSON, b'{"model": "mlp"}', 400, "`training_file`"),
    ("/v1/files", "multipart/form-data", b"x", 400, "boundary"),
    ("/v1/files", "multipart/form-data; boundary=b", b"--b--\r\n", 400, "no file"),
    ("/v1/files", "multipart/form-data; boundary=b", b"nonsense", 400, "multipart"),
    ("/v1/files", JSON, b"{}", 400, "multipart/form-data"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "kind", "body", "status", "words"), BODIES)
def test_a_body_that_is_wrong(live: Live, path: str, kind: str, body: bytes, status: int, words: str) -> None:
    assert words in message_of(live.client.post(path, content=body, headers={"content-type": kind}), status)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/classify",
        "/v1/predict",
        "/v1/embeddings",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/tokenize",
        "/v1/fine_tuning/jobs",
    ],
)
def test_a_body_beyond_the_limit(live: Live, path: str) -> None:
    body = json.dumps({"model": "days", "input": "a day " * (3 * MEBIBYTE)}).encode()
    answer = live.client.post(path, content=body, headers={"content-type": JSON})
    assert message_of(answer, 413)


def test_ten_megabytes_of_a_prompt(live: Live) -> None:
    content = "a good day " * MEBIBYTE
    asked = [
        ("/v1/completions", {"prompt": content}),
        ("/v1/tokenize", {"prompt": content}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}),
    ]
    for path, body in asked:
        answer = live.client.post(path, content=json.dumps({"model": "letters", **body}))
        assert "characters" in message_of(answer, 413)


def test_ten_megabytes_of_text(live: Live) -> None:
    body = json.dumps({"model": "days", "input": "a good day " * MEBIBYTE})
    assert "characters" in message_of(live.client.post("/v1/classify", content=body), 413)


def test_a_file_without_a_purpose_and_with_a_wrong_one(live: Live) -> None:
    answer = live.client.post("/v1/files", files={"file": ("days.csv", SENTIMENTS)})
    assert "purpose" in message_of(answer, 400)
    assert "'assistants'" in message_of(live.upload("days.csv", SENTIMENTS, purpose="assistants"), 400)


def test_two_files_at_once(live: Live) -> None:
    files = [("file", ("a.csv", SENTIMENTS)), ("file", ("b.csv", VECTORS))]
    answer = live.client.post("/v1/files", files=files, data={"purpose": "fine-tune"})
    assert "one at a time" in message_of(answer, 400)


def test_a_field_that_is_no_field(live: Live) -> None:
    data = {"purpose": "x" * 100_000}
    answer = live.client.post("/v1/files", files={"file": ("a.csv", SENTIMENTS)}, data=data)
    assert "purpose" in message_of(answer, 413)


def test_a_place_and_a_method_that_are_not_there(live: Live) -> None:
    assert "/v1/nothing" in message_of(live.client.get("/v1/nothing"), 404)
    assert "PUT" in message_of(live.client.put("/v1/files"), 405)
    assert "use POST" in message_of(live.client.get("/v1/classify"), 405)


@pytest.mark.parametrize("query", ["limit=0", "limit=many", "limit=1e9", "order=random", "after=file-none"])
def test_a_page_that_cannot_be(live: Live, query: str) -> None:
    assert query.partition("=")[0] in message_of(live.client.get(f"/v1/files?{query}"), 400)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/chat/completions", "/v1/fine_tuning/jobs"])
def test_a_client_that_goes_in_the_middle_of_its_body(live: Live, path: str) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(live.address).port or 0)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"model":')
    assert live.client.get("/health/ready").json()["status"] == "ready"


def test_the_request_id_is_the_clients_or_a_new_one(live: Live) -> None:
    assert live.client.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    strange = live.client.get("/health/live", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert strange != "a b\tc"
    assert live.client.get("/health/live").headers["x-request-id"] != strange
