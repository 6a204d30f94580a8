"""gRPC's messages to tensors and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.processing.inputs import BadInput
from server import tensors
from server.errors import ApiError
from server.grpc import inference_pb2
from server.inference import Result, Wanted, no_shared_memory
from server.runtime.batcher import Block
from server.runtime.model import Model

# The list of InferTensorContents that holds the elements of a datatype.
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def parameter(parameters: Mapping[str, Any], name: str, kind: type, otherwise: Any) -> Any:
    """The value of one parameter, which must be of `kind`. Raises ApiError 400."""
    if name not in parameters:
        return otherwise
    value = value_of(parameters[name])
    if type(value) is not kind:
        raise ApiError(400, f"parameter {name!r} must be of type {kind.__name__}", param=name)
    return value


def value_of(parameter: Any) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def wanted(request: Any, model: Model) -> list[Wanted]:
    """Raises ApiError, BadInput."""
    for one in request.outputs:
        if "shared_memory_region" in one.parameters:
            raise no_shared_memory()
    asked = [Wanted(one.name, parameter(one.parameters, "classification", int, None), True) for one in request.outputs]
    names = tensors.outputs_of([one.name for one in asked], model.signature)
    return asked or [Wanted(name, binary=True) for name in names]


def takes_long(request: Any) -> bool:
    """Whether its inputs are files or texts, which a thread decodes."""
    return any(one.datatype == "BYTES" for one in request.inputs)


def block(request: Any, model: Model) -> Block:
    """What the model takes. Raises ApiError, BadInput."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadInput(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    known = model.signature
    found = []
    for i, one in enumerate(request.inputs):
        if "shared_memory_region" in one.parameters:
            raise no_shared_memory()
        shape = list(one.shape)
        tensors.check(one.name, one.datatype, shape, known)
        if raw:
            found.append(tensors.from_buffer(one.name, one.datatype, shape, raw[i]))
            continue
        if one.datatype not in CONTENTS:
            raise BadInput(f"input {one.name!r}: {one.datatype} is sent in raw_input_contents")
        values = list(getattr(one.contents, CONTENTS[one.datatype]))
        found.append(tensors.from_values(one.name, one.datatype, shape, values))
    return tensors.block(found, model.manifest, known, model.texts)


def response(model: Model, identity: str, found: Sequence[Result]) -> Any:
    answer = inference_pb2.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=identity)
    for name, datatype, shape, data, _ in found:
        answer.outputs.add(name=name, datatype=datatype, shape=shape)
        answer.raw_output_contents.append(bytes(tensors.to_buffer(data)))
    return answer
