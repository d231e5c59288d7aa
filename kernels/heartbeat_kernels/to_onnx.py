"""hb operations as nodes of the domain "hb" in an ONNX graph: the flavour TensorRT plugins take.

    program = torch.onnx.export(module, …, dynamo=True, custom_translation_table=translations())

A node's type is the operation's name, its attributes say what TensorRT looks for: plugin_namespace,
and aot, which asks for the kernel compiled ahead of time (aot.py) rather than a Python callback.
Without the table the exporter refuses hb operations: export with backend="reference" then.
"""

from collections.abc import Callable
from typing import Any

import onnx.defs
import torch
from onnx.defs import OpSchema
from onnxscript import values

import heartbeat_kernels.library  # noqa: F401 - registers the operations

DOMAIN, VERSION = "hb", 1
TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
# Inputs ("?": may be absent) and attributes of each operation, in the order of its arguments.
NODES = {
    "temporal_attention": (("q", "k", "v"), ("heads",)),
    "temporal_block": (
        ("x", "norm_weight", "norm_bias", "position?", "w_qkv", "w_out", "b_out"),
        ("heads", "eps"),
    ),
    "dual_cross_attention": (
        ("q", "k", "v", "q_image?", "k_image?", "v_image?"),
        ("heads", "image_scale"),
    ),
}
KINDS = {
    "heads": OpSchema.AttrType.INT,
    "eps": OpSchema.AttrType.FLOAT,
    "image_scale": OpSchema.AttrType.FLOAT,
    "aot": OpSchema.AttrType.INT,
    "plugin_namespace": OpSchema.AttrType.STRING,
}


def translations() -> dict[Any, Callable[..., Any]]:
    """A custom_translation_table of torch.onnx.export for every operation of NODES."""
    for name in NODES:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(schema(name))
    return {getattr(torch.ops.hb, name).default: _translation(name) for name in NODES}


def schema(name: str) -> OpSchema:
    """The ONNX operator: its inputs, one output of their type, its attributes."""
    inputs, attributes = NODES[name]
    optional = {True: OpSchema.FormalParameterOption.Optional}
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(
                i.rstrip("?"),
                "T",
                param_option=optional.get(i.endswith("?"), OpSchema.FormalParameterOption.Single),
            )
            for i in inputs
        ],
        outputs=[OpSchema.FormalParameter("out", "T")],
        type_constraints=[("T", TYPES, "")],
        attributes=[
            OpSchema.Attribute(a, KINDS[a], "", required=False)
            for a in (*attributes, "aot", "plugin_namespace")
        ],
    )


def _translation(name: str) -> Callable[..., Any]:
    """What the exporter calls with an operation's arguments: writes one node."""
    inputs, attributes = NODES[name]
    node = getattr(values.Opset(DOMAIN, VERSION), name)

    def translate(*arguments: Any) -> Any:
        tensors = arguments[: len(inputs)]
        numbers = dict(zip(attributes, arguments[len(inputs) :], strict=True))
        while tensors[-1] is None:
            tensors = tensors[:-1]
        return node(*tensors, **numbers, aot=1, plugin_namespace=DOMAIN)

    return translate
