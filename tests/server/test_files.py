from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.server.conftest import SENTIMENTS, VECTORS, Live, Start, message_of, until


def digits_zip(classes: int = 2, each: int = 3) -> bytes:
    """A zip of class folders with small PNGs, no two alike."""
    random = np.random.default_rng(0)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for label in range(classes):
            for number in range(each):
                png = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(png, "PNG")
                archive.writestr(f"class-{label}/{number}.png", png.getvalue())
    return whole.getvalue()


def stored(live: Live) -> list[Path]:
    """Everything under the server's folder of files that is not a folder itself."""
    return [path for path in (live.settings.home / "files").rglob("*") if path.is_file()]


def test_an_uploaded_file_comes_back_as_it_was(live: Live) -> None:
    uploaded = live.upload("days.csv", SENTIMENTS).json()
    assert uploaded["object"] == "file"
    assert uploaded["bytes"] == len(SENTIMENTS)
    assert uploaded["sha256"] == hashlib.sha256(SENTIMENTS).hexdigest()
    assert (uploaded["filename"], uploaded["purpose"], uploaded["status"]) == ("days.csv", "fine-tune", "processed")
    path = f"/v1/files/{uploaded['id']}"
    assert live.client.get(path).json() == uploaded
    content = live.client.get(f"{path}/content")
    assert content.content == SENTIMENTS
    assert "days.csv" in content.headers["content-disposition"]


def test_the_report_counts_the_items_of_each_class(live: Live) -> None:
    file_id = live.file_id("digits.zip", digits_zip(classes=3, each=4))
    report = live.client.get(f"/v1/files/{file_id}/report").json()
    assert report["kind"] == "images"
    assert report["classes"] == {"class-0": 4, "class-1": 4, "class-2": 4}
    assert report["problems"] == []


def test_the_report_says_where_an_item_is_broken(live: Live) -> None:
    whole = io.BytesIO(digits_zip())
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr("class-0/broken.png", b"\x89PNG\r\n\x1a\n and no more")
    file_id = live.file_id("digits.zip", whole.getvalue())
    report = live.client.get(f"/v1/files/{file_id}/report").json()
    assert [problem["place"] for problem in report["problems"]] == ["class-0/broken.png"]
    assert report["items"] == 6


def test_files_are_listed_by_page(start: Start) -> None:
    live = start()
    ids = [live.file_id(f"{number}.csv", SENTIMENTS) for number in range(3)]
    newest = live.client.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in newest["data"]] == [ids[2], ids[1]]
    assert newest["has_more"]
    rest = live.client.get("/v1/files", params={"limit": 2, "after": newest["last_id"]}).json()
    assert [file["id"] for file in rest["data"]] == [ids[0]]
    assert not rest["has_more"]
    oldest = live.client.get("/v1/files", params={"order": "asc"}).json()
    assert [file["id"] for file in oldest["data"]] == ids
    assert live.client.get("/v1/files", params={"purpose": "assistants"}).json()["data"] == []


def test_a_deleted_file_is_gone_with_its_content(live: Live) -> None:
    file_id = live.file_id("days.csv", SENTIMENTS)
    answer = live.client.delete(f"/v1/files/{file_id}")
    assert answer.json() == {"id": file_id, "object": "file", "deleted": True}
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/files/{file_id}/report"):
        assert file_id in message_of(live.client.get(path), 404)
    assert file_id in message_of(live.client.delete(f"/v1/files/{file_id}"), 404)
    assert not (live.settings.home / "files" / file_id).exists()


def test_a_file_that_a_job_waits_for_is_not_deleted(live: Live) -> None:
    file_id = live.file_id("points.csv", VECTORS)
    job = live.client.post("/v1/fine_tuning/jobs", json={"model": "mlp", "training_file": file_id}).json()
    assert job["id"] in message_of(live.client.delete(f"/v1/files/{file_id}"), 409)
    live.client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert live.client.delete(f"/v1/files/{file_id}").status_code == 200


def test_the_purpose_may_come_before_or_behind_the_file(live: Live) -> None:
    purpose = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="days.csv"\r\n\r\n' + SENTIMENTS + b"\r\n"
    for body in (purpose + file, file + purpose):
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = live.client.post("/v1/files", content=body + b"--b--\r\n", headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["bytes"] == len(SENTIMENTS)


def test_a_path_in_the_name_is_cut_off(live: Live) -> None:
    assert live.upload("../../etc/days.csv", SENTIMENTS).json()["filename"] == "days.csv"


def test_a_file_beyond_the_limit_is_refused_and_leaves_nothing(start: Start) -> None:
    live = start(max_upload_bytes=1000)
    assert "1,000 bytes" in message_of(live.upload("big.csv", SENTIMENTS * 10), 413)
    assert stored(live) == []
    assert live.upload("small.csv", SENTIMENTS).status_code == 200


def test_a_huge_announced_body_is_refused_before_it_is_sent(start: Start) -> None:
    live = start(max_upload_bytes=1000)
    with socket.create_connection(("127.0.0.1", httpx.URL(live.address).port or 0)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 1000000000000\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert stored(live) == []


def test_a_client_that_sends_on_still_reads_the_refusal(start: Start) -> None:
    live = start(max_upload_bytes=1000)
    assert "1,000 bytes" in message_of(live.upload("big.csv", SENTIMENTS * 100_000), 413)
    assert stored(live) == []


def begin_upload(address: str, announced: int, sent: bytes) -> socket.socket:
    """A connection on which an upload of `announced` bytes has begun and stopped after `sent`."""
    connection = socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0))
    head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    connection.sendall(f"{head}Content-Length: {announced}\r\n\r\n".encode())
    connection.sendall(b'--b\r\nContent-Disposition: form-data; name="file"; filename="days.csv"\r\n\r\n' + sent)
    return connection


def test_an_upload_whose_client_goes_leaves_nothing(start: Start) -> None:
    live = start()
    connection = begin_upload(live.address, 10_000_000, b"x" * 2_000_000)
    until(lambda: stored(live))
    connection.close()
    until(lambda: not stored(live))
    assert live.client.get("/v1/files").json()["data"] == []


def test_a_body_that_ends_before_its_form_does_is_refused(start: Start) -> None:
    live = start()
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="days.csv"\r\n\r\n' + SENTIMENTS
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = live.client.post("/v1/files", content=body, headers=headers)
    assert "cut off" in message_of(answer, 400)
    assert stored(live) == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "server", "--home", str(tmp_path), "--port", "0", "--no-worker"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if " ready on " in line)
        yield psutil.Process(process.pid), line.split(" ready on ")[1].split()[0]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_memory_does_not_grow_with_an_upload(served: tuple[psutil.Process, str], tmp_path: Path) -> None:
    process, address = served
    size = 300 * 2**20

    def form() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="noise.bin"\r\n\r\n'
        piece = os.urandom(2**20)
        for _ in range(size // len(piece)):
            resident.append(process.memory_info().rss)
            yield piece
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'

    resident: list[int] = []
    headers = {"content-type": "multipart/form-data; boundary=b"}
    with httpx.Client(base_url=address, timeout=120) as client:
        client.get("/v1/files")
        answer = client.post("/v1/files", content=form(), headers=headers)
    assert "noise.bin" in message_of(answer, 400)
    growth = (max(resident) - resident[0]) / 2**20
    print(f"resident memory grew by {growth:.1f} MiB while 300 MiB came in")
    assert growth < 30


@pytest.mark.slow
def test_a_server_killed_in_an_upload_shows_nothing_of_it(
    served: tuple[psutil.Process, str], tmp_path: Path, start: Start
) -> None:
    process, address = served
    with begin_upload(address, 10_000_000, b"x" * 3_000_000):
        until(lambda: any((tmp_path / "files" / ".uploading").iterdir()))
        process.kill()
        process.wait()
    live = start()
    assert live.client.get("/v1/files").json()["data"] == []
    assert stored(live) == []
