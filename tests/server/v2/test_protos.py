"""The modules of gRPC's messages are those of the .proto files, and have the public specification's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from server.grpc import inference_pb2

ROOT = Path(__file__).parents[3]


def test_the_modules_are_what_the_proto_files_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    from deploy.protos import PROTOS, generate

    generate(tmp_path)
    for proto in PROTOS:
        module = proto.replace(".proto", "_pb2.py")
        made, kept = (lines((folder / module).read_text()) for folder in (tmp_path, ROOT))
        assert made == kept, f"{module} is old: make protos"


def lines(module: str) -> list[str]:
    """Without those that name the version of the generator."""
    start = module.index("DESCRIPTOR = ")
    return module[start:].splitlines()


def described(message: Any) -> dict[str, tuple[int, int, bool, str]]:
    return {
        field.name: (
            field.number,
            field.type,
            field.is_repeated,
            field.message_type.full_name if field.message_type else "",
        )
        for field in message.fields
    }


def test_fields_have_the_names_numbers_and_types_of_triton_s() -> None:
    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    compared = 0
    stack = [(message, theirs[name]) for name, message in inference_pb2.DESCRIPTOR.message_types_by_name.items()]
    while stack:
        ours, other = stack.pop()
        other_fields = described(other)
        for name, field in described(ours).items():
            assert other_fields[name] == field, f"{ours.full_name}.{name}"
            compared += 1
        stack += [(nested, other.nested_types_by_name[nested.name]) for nested in ours.nested_types]
    assert compared > 100
    for name, enum in inference_pb2.DESCRIPTOR.enum_types_by_name.items():
        values = {value.name: value.number for value in enum.values}
        assert values == {
            value.name: value.number for value in model_config_pb2.DESCRIPTOR.enum_types_by_name[name].values
        }
    calls = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        assert calls[method.name].input_type.full_name == method.input_type.full_name
        assert calls[method.name].output_type.full_name == method.output_type.full_name
