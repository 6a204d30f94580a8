"""OpenAI's files API: POST, GET and DELETE /v1/files. Uploads are streamed to disk and inspected before they count."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import File

from finetune.data.files import FileStore, Received, TooLarge
from finetune.data.inspection import BAD_FILE
from finetune.jobs.store import FileInUse, FileRecord, JobStore, NotThere
from server.errors import ApiError
from server.upload import UploadForm

PURPOSE = "fine-tune"
LONGEST_NAME = 255
# What a form's fields and boundaries may add to the file.
FORM_BYTES = 64 * 1024


class FileObject(msgspec.Struct, kw_only=True):
    """OpenAI's file object, and the content's `sha256`. `created_at`: Unix seconds."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    status: str = "processed"
    object: str = "file"


class FileList(msgspec.Struct, kw_only=True):
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class Deleted(msgspec.Struct, kw_only=True):
    id: str
    deleted: bool = True
    object: str = "file"


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.id,
        bytes=record.bytes,
        created_at=int(record.created_at),
        filename=record.filename,
        purpose=record.purpose,
        sha256=record.sha256,
        status=record.status,
    )


def found(store: JobStore, file_id: str) -> FileRecord:
    """Raises ApiError 404."""
    try:
        return store.get_file(file_id)
    except NotThere as error:
        raise ApiError(404, str(error), param="file_id", code="file_not_found") from error


@post("/v1/files", status_code=200, request_max_body_size=None)
async def upload_file(request: Request[Any, Any, Any], state: State) -> FileObject:
    """Upload a data set: multipart/form-data with `file` and `purpose` ("fine-tune").

    Images: a zip or tar of class folders, or with a CSV, JSONL or Parquet file of paths and labels. Texts and vectors:
    CSV, JSONL or Parquet. Conversations: OpenAI's JSONL of `messages`, or prompts and completions. The file is read
    through before the answer comes; GET /v1/files/{id}/report has the result.
    """
    store: JobStore = state.store
    files: FileStore = state.files
    limit: int = state.settings.max_upload_bytes
    if (request.content_length or 0) > limit + FORM_BYTES:
        raise too_large(limit)
    form = UploadForm(request.headers.get("content-type", ""), body_of(request))
    part = await form.next_file()
    if part is None:
        raise ApiError(400, "the form has no file", param="file")
    filename = (part.filename or "").replace("\\", "/").rpartition("/")[2]
    if not filename or len(filename) > LONGEST_NAME or not filename.isprintable():
        raise ApiError(400, f"file: a name of 1 to {LONGEST_NAME} printable characters is needed", param="file")
    try:
        received = await files.receive(form.content(), limit)
    except TooLarge as error:
        raise too_large(limit) from error
    try:
        if await form.next_file() is not None:
            raise ApiError(400, "the form has several files; upload one at a time", param="file")
        purpose = form.fields.get("purpose")
        if purpose != PURPOSE:
            raise ApiError(400, f"purpose: expected {PURPOSE!r}, got {purpose!r}", param="purpose")
        report = await inspected(received, filename)
        await asyncio.to_thread(files.accept, received)
    except BaseException:
        files.refuse(received)
        raise
    try:
        record = await asyncio.to_thread(
            store.add_file,
            id=received.id,
            filename=filename,
            purpose=purpose,
            bytes=received.bytes,
            sha256=received.sha256,
            report=report,
        )
    except BaseException:
        files.delete(received.id)
        raise
    return file_object(record)


def too_large(limit: int) -> ApiError:
    message = f"file: larger than {limit:,} bytes, the largest this server takes"
    # Closing the connection spares both sides the rest of the body.
    return ApiError(413, message, param="file", code="file_too_large", headers={"connection": "close"})


async def body_of(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises ApiError 400 when the client goes before its end."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientException:
        raise
    except HTTPException as error:
        raise ApiError(400, "the upload was cut off") from error


async def inspected(received: Received, filename: str) -> str:
    """The report on a received file as JSON. Raises ApiError 400 with what is wrong with it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "finetune.data.inspection", str(received.path), filename),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, problem = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
        raise
    if process.returncode == 0:
        return output.decode()
    message = problem.decode("utf-8", "replace").strip()
    if process.returncode != BAD_FILE:
        # Whatever it was, this file did it: the server and the other files are well.
        message = f"the file could not be read through ({message.splitlines()[-1] if message else 'no reason known'})"
    named = message if message.startswith(filename) else f"{filename}: {message}"
    raise ApiError(400, named, param="file", code="invalid_file")


@get("/v1/files", sync_to_thread=True)
def list_files(
    state: State,
    purpose: FromQuery[str | None] = None,
    after: FromQuery[str | None] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 10_000,
    order: FromQuery[Literal["asc", "desc"]] = "desc",
) -> FileList:
    """Uploaded files, newest first."""
    store: JobStore = state.store
    try:
        records, more = store.list_files(purpose=purpose, after=after, limit=limit, newest_first=order == "desc")
    except NotThere as error:
        raise ApiError(400, f"after: {error}", param="after") from error
    data = [file_object(record) for record in records]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return FileList(data=data, has_more=more, first_id=first, last_id=last)


@get("/v1/files/{file_id:str}", sync_to_thread=True)
def get_file(state: State, file_id: FromPath[str]) -> FileObject:
    """One file."""
    return file_object(found(state.store, file_id))


@get("/v1/files/{file_id:str}/report", sync_to_thread=True)
def get_report(state: State, file_id: FromPath[str]) -> Response[bytes]:
    """What the inspection found: kind, columns, items of each class, broken and duplicate items with their places."""
    record = found(state.store, file_id)
    return Response((record.report or "null").encode(), media_type="application/json")


@get("/v1/files/{file_id:str}/content", sync_to_thread=True)
def get_content(state: State, file_id: FromPath[str]) -> File:
    """The bytes as they were uploaded."""
    record = found(state.store, file_id)
    files: FileStore = state.files
    return File(files.path(file_id), filename=record.filename, media_type="application/octet-stream")


@delete("/v1/files/{file_id:str}", status_code=200, sync_to_thread=True)
def delete_file(state: State, file_id: FromPath[str]) -> Deleted:
    """Remove a file. Refused with 409 while a job that is not finished needs it."""
    found(state.store, file_id)
    try:
        state.store.delete_file(file_id)
    except FileInUse as error:
        raise ApiError(409, str(error), param="file_id", code="file_in_use") from error
    except NotThere as error:
        raise ApiError(404, str(error), param="file_id", code="file_not_found") from error
    state.files.delete(file_id)
    return Deleted(id=file_id)


handlers = [upload_file, list_files, get_file, get_report, get_content, delete_file]
