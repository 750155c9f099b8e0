# SPDX-License-Identifier: Apache-2.0
"""The wire is Kata's: every name and number of our descriptors equals the table beside this file.

guest_agent_api.json holds Kata 4.1.0's: services {method: [request, reply]}, messages
{field: [number, type]} with types as `repeated grpc.Mount`, enums {name: number}.  Fields of our
own have numbers from OWN_FIELDS on, which an agent or runtime of Kata's skips.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from agent.api import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2

TABLE = json.loads((Path(__file__).parent / "guest_agent_api.json").read_text())
FILES = [module.DESCRIPTOR for module in (agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2)]

OWN_FIELDS = 1000

_SCALARS = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def type_of(field: FieldDescriptor) -> str:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = (kind.fields_by_name[name] for name in ("key", "value"))
        return f"map<{type_of(key)},{type_of(value)}>"
    if kind is not None:
        name = kind.full_name
    elif field.enum_type is not None:
        name = field.enum_type.full_name
    else:
        name = _SCALARS[field.type]
    if field.is_repeated:
        return f"repeated {name}"
    inside = field.containing_oneof
    if inside is not None and inside.name == f"_{field.name}":  # proto3 optional
        return f"optional {name}"
    return name


def all_messages(descriptors: list[Descriptor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for descriptor in descriptors:
        if descriptor.GetOptions().map_entry:
            continue
        found[descriptor.full_name] = {
            field.name: [field.number, type_of(field)]
            for field in descriptor.fields
            if field.number < OWN_FIELDS
        }
        found |= all_messages(list(descriptor.nested_types))
    return found


def test_services() -> None:
    ours = {
        service.full_name: {
            method.name: [method.input_type.full_name, method.output_type.full_name]
            for method in service.methods
        }
        for file in FILES
        for service in file.services_by_name.values()
    }
    assert ours == TABLE["services"]


OURS = {
    name: fields
    for file in FILES
    for name, fields in all_messages(list(file.message_types_by_name.values())).items()
}


def test_message_names() -> None:
    assert set(OURS) == set(TABLE["messages"])


@pytest.mark.parametrize("name", TABLE["messages"])
def test_message(name: str) -> None:
    assert OURS[name] == TABLE["messages"][name]


def test_enums() -> None:
    ours = {}
    for file in FILES:
        enums = list(file.enum_types_by_name.values())
        for message in file.message_types_by_name.values():
            enums += message.enum_types
        ours |= {enum.full_name: dict(_numbers(enum)) for enum in enums}
    assert ours == TABLE["enums"]


def _numbers(enum: Any) -> list[tuple[str, int]]:
    return [(value.name, value.number) for value in enum.values]
