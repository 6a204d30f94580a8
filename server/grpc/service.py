"""inference.GRPCInferenceService and grpc.health.v1.Health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import msgspec
from google.protobuf import json_format
from litestar.datastructures import State

from server import descriptions
from server.access import Access, Caller
from server.errors import ApiError
from server.exchange import no_room, ran
from server.grpc import health_pb2, inference_pb2, messages
from server.grpc.status import failure
from server.inference import check_alone, check_rows, check_takes_tensors, priority, results, seconds
from server.metrics import Metrics
from server.request_head import session_of
from server.request_log import GIVEN_ID
from server.rows import on_thread
from server.runtime.batcher import QueueFull, Ticket
from server.runtime.model import Model
from server.runtime.repository import Repository
from server.settings import Settings
from server.traces import Answered, Origin, Traces

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
# Requests of one stream that are computed at the same time.
MOST_IN_FLIGHT = 64

Context = Any  # grpc.aio.ServicerContext


@dataclass
class Traced:
    """What is to be told of a request that is traced. start: on time.perf_counter's clock."""

    origin: Origin
    start: float
    model: Model | None = None
    ticket: Ticket | None = None


class Call(NamedTuple):
    """What a request comes with. headers: gRPC's metadata. left: seconds until the client's deadline; None where it set
    none. traced: None where it is not to be."""

    headers: list[tuple[bytes, bytes]]
    caller: Caller | None
    left: float | None
    traced: Traced | None

    def session(self) -> str | None:
        """The id of the session that a request is of, where it says so."""
        return session_of(self.headers)


Unary = Callable[[Any, Call], Awaitable[Any]]


class Service:
    """The calls of both services, on what one application serves."""

    def __init__(self, state: State) -> None:
        self.repository: Repository = state.repository
        self.metrics: Metrics = state.metrics
        self.settings: Settings = state.settings
        self.access: Access = state.access
        self.traces: Traces | None = state.traces
        self.stopping: asyncio.Event = state.stopping

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        sent = inference_pb2
        unary: dict[str, tuple[Any, Unary]] = {
            "ServerLive": (sent.ServerLiveRequest, self.server_live),
            "ServerReady": (sent.ServerReadyRequest, self.server_ready),
            "ModelReady": (sent.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (sent.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": (sent.ModelMetadataRequest, self.model_metadata),
            "ModelInfer": (sent.ModelInferRequest, self.model_infer),
            "ModelConfig": (sent.ModelConfigRequest, self.model_config),
            "ModelStatistics": (sent.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": (sent.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (sent.RepositoryModelLoadRequest, self.load),
            "RepositoryModelUnload": (sent.RepositoryModelUnloadRequest, self.unload),
        }
        inference = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(f"/{INFERENCE}/{name}", answer), kind.FromString, _serialized
            )
            for name, (kind, answer) in unary.items()
        }
        inference["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer, sent.ModelInferRequest.FromString, _serialized
        )
        checked = health_pb2.HealthCheckRequest.FromString
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(
                self._answering(f"/{HEALTH}/Check", self.check), checked, _serialized
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch, checked, _serialized),
        }
        return [
            grpc.method_handlers_generic_handler(INFERENCE, inference),
            grpc.method_handlers_generic_handler(HEALTH, health),
        ]

    def _answering(self, path: str, answer: Unary) -> Callable[[Any, Context], Awaitable[Any]]:
        """`answer` to those who may ask, counted, and what goes wrong in it turned into gRPC's status."""
        method = path.rpartition("/")[2]

        async def answered(request: Any, context: Context) -> Any:
            call = None
            try:
                call = self._admitted(context, path)
                found = await answer(request, call)
            except Exception as error:
                what = failure(error, method)
                self._ended(path, request, call, what.code)
                await context.abort(*what)
            self._ended(path, request, call, grpc.StatusCode.OK)
            return found

        return answered

    def _admitted(self, context: Context, path: str) -> Call:
        """Raises ApiError 401, 403, 429."""
        metadata = context.invocation_metadata() or ()
        headers = [(key.encode(), value.encode() if isinstance(value, str) else value) for key, value in metadata]
        caller = self.access.admit(headers, "POST", path, address(context.peer())) if self.access.on else None
        traced = None
        if self.traces is not None and path.endswith("Infer") and (origin := self.traces.origin(headers)):
            traced = Traced(origin, time.perf_counter())
        return Call(headers, caller, context.time_remaining(), traced)

    def _ended(self, path: str, request: Any, call: Call | None, code: grpc.StatusCode) -> None:
        """Count a request, and trace it."""
        name = getattr(request, "model_name", "") or getattr(request, "name", "")
        name = name.partition("@")[0]
        method = path.rpartition("/")[2]
        self.metrics.grpc_requests[method, name if name in self.repository.models else "", code.name] += 1
        if call is not None and call.traced is not None and self.traces is not None:
            of, model = call.traced, call.traced.model
            answered = Answered(
                of.origin,
                "",
                path.strip("/"),
                code.value[0],
                of.start,
                time.perf_counter(),
                request.id if GIVEN_ID.fullmatch(request.id.encode()) else "",
                call.caller.id if call.caller else None,
                model.name if model else None,
                model.version if model else None,
                model.provider if model else None,
                [] if of.ticket is None else [ran(of.ticket)],
                rpc=True,
            )
            exemplar = self.traces.add(answered)
            if model is not None and code is grpc.StatusCode.OK:
                self.metrics.point_at(answered, exemplar)
                model.request_seconds.point_at(answered.end - answered.start, exemplar)

    async def server_live(self, request: Any, call: Call) -> Any:
        return inference_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, call: Call) -> Any:
        return inference_pb2.ServerReadyResponse(ready=not self.stopping.is_set())

    async def model_ready(self, request: Any, call: Call) -> Any:
        ready = descriptions.is_ready(self.repository, request.name, request.version)
        return inference_pb2.ModelReadyResponse(ready=ready and not self.stopping.is_set())

    async def server_metadata(self, request: Any, call: Call) -> Any:
        found = descriptions.ServerMetadata(descriptions.EXTENSIONS)
        return _message(found, inference_pb2.ServerMetadataResponse)

    async def model_metadata(self, request: Any, call: Call) -> Any:
        model = await descriptions.find(self.repository, request.name, request.version)
        found = descriptions.model_metadata(model, self.repository)
        return _message(found, inference_pb2.ModelMetadataResponse)

    async def model_config(self, request: Any, call: Call) -> Any:
        model = await descriptions.find(self.repository, request.name, request.version)
        found = _message(descriptions.model_config(model), inference_pb2.ModelConfig)
        return inference_pb2.ModelConfigResponse(config=found)

    async def model_statistics(self, request: Any, call: Call) -> Any:
        await self.metrics.gathered()
        found = descriptions.statistics(self.repository, self.metrics, request.name, request.version)
        return _message(found, inference_pb2.ModelStatisticsResponse)

    async def repository_index(self, request: Any, call: Call) -> Any:
        found = {"models": msgspec.to_builtins(descriptions.index(self.repository, request.ready))}
        return json_format.ParseDict(found, inference_pb2.RepositoryIndexResponse())

    async def load(self, request: Any, call: Call) -> Any:
        descriptions.check_load(request.parameters)
        await self.repository.load(request.model_name)
        return inference_pb2.RepositoryModelLoadResponse()

    async def unload(self, request: Any, call: Call) -> Any:
        await self.repository.unload(request.model_name)
        return inference_pb2.RepositoryModelUnloadResponse()

    async def model_infer(self, request: Any, call: Call) -> Any:
        start = time.perf_counter()
        async with asyncio.timeout(self.settings.request_seconds if call.left is None else call.left):
            model = await descriptions.find(self.repository, request.model_name, request.model_version, call.session)
        model.requests += 1
        if call.traced is not None:
            call.traced.model = model
        try:
            answer = await self._infer(model, request, call, start)
        except QueueFull as error:
            model.failed_seconds.observe(time.perf_counter() - start)
            raise no_room(model, error) from error
        except Exception:
            model.failed_seconds.observe(time.perf_counter() - start)
            raise
        finally:
            model.requests -= 1
        model.request_seconds.observe(time.perf_counter() - start)
        return answer

    async def _infer(self, model: Model, request: Any, call: Call, start: float) -> Any:
        check_takes_tensors(model)
        parameters: Mapping[str, Any] = request.parameters
        level, wait = 0, model.timeout if call.left is None else min(model.timeout, call.left)
        if parameters:
            if "sequence_id" in parameters:
                check_alone(messages.value_of(parameters["sequence_id"]))
            level = priority(messages.parameter(parameters, "priority", int, 0))
            wait = min(wait, seconds(messages.parameter(parameters, "timeout", int, 0)) or wait)
        model.admit(start + wait - time.perf_counter(), level)
        wanted = messages.wanted(request, model)
        names = tuple(dict.fromkeys(one.name for one in wanted))
        if messages.takes_long(request):
            block = await on_thread(messages.block, request, model)
        else:
            block = messages.block(request, model)
        check_rows(len(block), model.queue_limit)
        model.decode_seconds.observe(time.perf_counter() - start)
        if call.caller is not None and model.texts is not None:
            call.caller.spend(sum(map(len, block)))
        ticket = model.submit(block, names, deadline=start + wait, priority=level)
        if call.traced is not None:
            call.traced.ticket = ticket
        arrays = await ticket.future  # where the client cancels, so is this, and the request leaves the queue
        received = time.perf_counter()
        answer = messages.response(model, request.id, results(model, wanted, names, arrays))
        model.encode_seconds.observe(time.perf_counter() - received)
        return answer

    async def model_stream_infer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Requests of a stream are computed beside each other, and answered in their order, each as soon as it can be.
        What goes wrong with one is said in its answer, and the stream goes on. It ends early when the server stops."""
        open_answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(MOST_IN_FLIGHT)

        async def read() -> None:
            try:
                async for request in requests:
                    await open_answers.put(asyncio.create_task(self._streamed(request, context)))
            finally:
                await open_answers.put(None)

        reading = asyncio.create_task(read())
        stopping = asyncio.create_task(self.stopping.wait())
        stopping.add_done_callback(lambda _: reading.cancel())
        task = None
        try:
            while (task := await open_answers.get()) is not None:
                yield await task
        except ApiError as error:
            await context.abort(*failure(error, "ModelStreamInfer"))
        finally:
            stopping.cancel()
            reading.cancel()
            while task is not None:
                task.cancel()
                task = None if open_answers.empty() else open_answers.get_nowait()

    async def _streamed(self, request: Any, context: Context) -> Any:
        """Raises ApiError 401 and 403, which hold for all that would follow."""
        path, call = f"/{INFERENCE}/ModelStreamInfer", None
        try:
            call = self._admitted(context, path)
            answer = await self.model_infer(request, call)
        except Exception as error:
            what = failure(error, "ModelStreamInfer")
            self._ended(path, request, call, what.code)
            if isinstance(error, ApiError) and error.status in (401, 403):
                raise
            return inference_pb2.ModelStreamInferResponse(
                error_message=what.message, infer_response=inference_pb2.ModelInferResponse(id=request.id)
            )
        self._ended(path, request, call, grpc.StatusCode.OK)
        return inference_pb2.ModelStreamInferResponse(infer_response=answer)

    async def check(self, request: Any, call: Call) -> Any:
        if request.service not in ("", INFERENCE, HEALTH):
            raise ApiError(404, f"there is no service {request.service!r} here")
        return self._health()

    async def watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The status now, and once more when the server is about to stop."""
        if request.service not in ("", INFERENCE, HEALTH):
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            return
        if not self.stopping.is_set():
            yield self._health()
            await self.stopping.wait()
        yield self._health()

    def _health(self) -> Any:
        states = health_pb2.HealthCheckResponse
        return states(status=states.NOT_SERVING if self.stopping.is_set() else states.SERVING)


def address(peer: str) -> tuple[str, int] | None:
    """Of "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"; None of other sockets."""
    family, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    return (host.strip("[]"), int(port)) if family in ("ipv4", "ipv6") and port.isdigit() else None


def _message(found: Any, kind: Any) -> Any:
    """A Struct of `server.descriptions` as the message of the same fields."""
    return json_format.ParseDict(msgspec.to_builtins(found), kind())


def _serialized(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content
