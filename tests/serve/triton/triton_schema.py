"""The messages of Triton's model_config.proto that accel writes, made at run time.

Names, types and labels are those of the published schema, which decide what protobuf's text format accepts:
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto. The package `tritonclient`
has them as well, but needs older versions of protobuf and ml_dtypes than onnx was tested with.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Field = descriptor_pb2.FieldDescriptorProto
TENSOR = {"name": Field.TYPE_STRING, "data_type": "DataType", "dims": [Field.TYPE_INT64]}
MESSAGES: dict[str, dict[str, Any]] = {  # message -> field -> type; in a list: repeated
    "ModelInput": TENSOR | {"optional": Field.TYPE_BOOL},
    "ModelOutput": TENSOR,
    "ModelInstanceGroup": {"name": Field.TYPE_STRING, "count": Field.TYPE_INT32, "kind": "Kind"},
    "ModelTransactionPolicy": {"decoupled": Field.TYPE_BOOL},
    "ModelParameter": {"string_value": Field.TYPE_STRING},
    "ModelConfig": {
        "name": Field.TYPE_STRING,
        "backend": Field.TYPE_STRING,
        "max_batch_size": Field.TYPE_INT32,
        "input": ["ModelInput"],
        "output": ["ModelOutput"],
        "instance_group": ["ModelInstanceGroup"],
        "parameters": ["ModelConfig.ParametersEntry"],
        "model_transaction_policy": "ModelTransactionPolicy",
    },
}
TYPES = "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
ENUMS = {  # numbered from 0
    "DataType": [f"TYPE_{name}" for name in TYPES.split()],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    """Return the schema as a description of a file."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for enum, names in ENUMS.items():
        added = file.enum_type.add(name=enum)
        for number, name in enumerate(names):
            added.value.add(name=name, number=number)
    for message, fields in MESSAGES.items():
        _add_fields(file.message_type.add(name=message), fields)
    entry = file.message_type[-1].nested_type.add(name="ParametersEntry")  # of the map `parameters`
    entry.options.map_entry = True
    _add_fields(entry, {"key": Field.TYPE_STRING, "value": "ModelParameter"})
    return file


def _add_fields(description: descriptor_pb2.DescriptorProto, fields: dict[str, Any]) -> None:
    """Add fields to the description of a message; their types as in `MESSAGES`."""
    for number, (name, type_) in enumerate(fields.items(), start=1):
        repeated = isinstance(type_, list)
        field = description.field.add(
            name=name, number=number, label=Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
        )
        single = type_[0] if repeated else type_
        if isinstance(single, str):
            field.type = Field.TYPE_ENUM if single in ENUMS else Field.TYPE_MESSAGE
            field.type_name = f".inference.{single}"
        else:
            field.type = single


_FILE = descriptor_pool.DescriptorPool().AddSerializedFile(_file().SerializeToString())
ModelConfig: Any = message_factory.GetMessageClass(_FILE.message_types_by_name["ModelConfig"])
DataType = _FILE.enum_types_by_name["DataType"].values_by_name
Kind = _FILE.enum_types_by_name["Kind"].values_by_name


def data_type_name(number: int) -> str:
    """Return Triton's name of a data type."""
    return ENUMS["DataType"][number]
