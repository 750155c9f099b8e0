# SPDX-License-Identifier: Apache-2.0
"""Generated messages without the Python half of protobuf, which each start of a shim and, tenfold,
each boot of a guest would pay for.

Importing any `*_pb2` module pulls in protobuf's pure-Python implementation, its text format,
`re`, `typing`, `calendar` …: 15 to 45 ms on a developer's machine, several times that in an
emulated guest, and none of it is used when the C implementation (upb) does the work. `install`
puts small stand-ins for the modules that generated code and upb import in front of the real ones.

For processes that are all ours, the agent and the shim: what needs the real modules (json_format,
text_format) can't be imported afterwards, and well-known types have their fields but no extra
methods. Without upb nothing is changed and protobuf works as always.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

_PACKAGE = "google.protobuf"


def install() -> bool:
    """Make generated code use upb alone. False: protobuf is loaded already, or has no upb."""
    if f"{_PACKAGE}.descriptor_pool" in sys.modules:
        return False
    try:
        import google.protobuf.internal as internal
        from google import protobuf

        with _plain_tuples():
            from google._upb import _message
        from google.protobuf.internal import enum_type_wrapper
        from google.protobuf.message import Message
    except ImportError:
        return False

    def build_descriptors(file: Any, module: dict[str, Any]) -> None:
        for name, message in file.message_types_by_name.items():
            module[f"_{name.upper()}"] = message

    def build_class(message: Any, module: str, prefix: str) -> Any:
        content = {
            name: build_class(nested, module, f"{prefix}{message.name}.")
            for name, nested in message.nested_types_by_name.items()
        }
        content |= {
            "DESCRIPTOR": message,
            "__module__": module,
            "__qualname__": f"{prefix}{message.name}",
        }
        return _message.MessageMeta(message.name, (Message,), content)

    def build_messages(file: Any, module_name: str, module: dict[str, Any]) -> None:
        for name, enum in file.enum_types_by_name.items():
            module[name] = enum_type_wrapper.EnumTypeWrapper(enum)
            for value in enum.values:
                module[value.name] = value.number
        for name, service in file.services_by_name.items():
            module[f"_{name.upper()}"] = service
        for name, message in file.message_types_by_name.items():
            module[name] = build_class(message, module_name, "")

    # upb asks here for what it adds to well-known types (Any.Pack, Duration.ToTimedelta …).
    _stand_in(internal, "well_known_types", WKTBASES={})
    _stand_in(protobuf, "descriptor", _USE_C_DESCRIPTORS=True)
    _stand_in(protobuf, "descriptor_pool", Default=lambda: _message.default_pool)
    _stand_in(protobuf, "symbol_database", Default=lambda: None)
    _stand_in(
        protobuf,
        "runtime_version",
        ValidateProtobufRuntimeVersion=lambda *_: None,
        Domain=_Domain,
    )
    _stand_in(
        internal,
        "builder",
        BuildMessageAndEnumDescriptors=build_descriptors,
        BuildTopDescriptorsAndMessages=build_messages,
    )
    return True


class _Domain:
    PUBLIC = None


class _plain_tuples:
    """For a while collections has nothing but named tuples, and those have no names.

    upb makes one for unknown fields, which nobody here looks at.  `namedtuple` compiles source: where
    nothing else does, half of what it costs an emulated guest is Python's parser and compiler.
    """

    def __enter__(self) -> None:
        self._active = "collections" not in sys.modules
        if self._active:
            import _collections_abc

            module = type(sys)("collections")
            module.__dict__.update(abc=_collections_abc, namedtuple=_plain_tuple, __path__=[])
            sys.modules |= {"collections": module, "collections.abc": _collections_abc}

    def __exit__(self, *_: object) -> None:
        if self._active:
            del sys.modules["collections"], sys.modules["collections.abc"]


def _plain_tuple(name: str, fields: list[str]) -> type:
    return type(name, (tuple,), {})


def _stand_in(parent: ModuleType, name: str, **content: object) -> None:
    module = type(sys)(f"{parent.__name__}.{name}")
    module.__dict__.update(content)
    sys.modules[module.__name__] = module
    setattr(parent, name, module)
