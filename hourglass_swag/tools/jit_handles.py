"""Cost of one operation from the shapes of its operands: the published names of the rules of ``common.measure.flops``.

Every handle has the signature ``handle(inputs_shapes, outputs_shapes, **kwargs) -> Counter``: the shapes of the tensors
that enter and leave the operation (a list of sizes each; an operand that is not a tensor is an empty list), and further
facts by keyword (``name`` of the counter key, ``equation`` of an einsum). The result maps the tool's key to operations
under the convention ``swag``. The published handles received traced values in place of shapes.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from common.measure.flops import CONVENTIONS, RULES

Shape = Sequence[int]


def _handle(key: str, operation: str) -> Callable[..., Counter[str]]:
    """The handle of an operation of torch that has a rule."""

    def handle(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
        operands = [torch.empty(shape, device="meta") if shape else None for shape in inputs_shapes]
        first, second = operands[-2:] if operation == "addmm" else (*operands, None)[:2]
        if operation == "linear" and first is not None and second is not None and first.shape[-1] != second.shape[1]:
            raise ValueError(f"{key}: the input has {first.shape[-1]} features, the weight expects {second.shape[1]}")
        if operation in ("addmm", "bmm", "mm") and first is not None and second is not None:
            inner = second.shape[-2] if second.dim() > 1 else second.shape[0]
            if first.shape[-1] != inner:
                raise ValueError(f"{key}: shapes {list(first.shape)} and {list(second.shape)} cannot be multiplied")
        results = [torch.empty(shape, device="meta") for shape in outputs_shapes]
        if operation == "linear":
            results = [torch.empty(*first.shape[:-1], second.shape[0], device="meta")]  # pyright: ignore[reportOptionalMemberAccess]
        counts = RULES[operation](operands, results[0] if results else None)
        return Counter({key: CONVENTIONS["swag"].total(counts)})

    return handle


addmm_flop_jit = _handle("addmm", "addmm")
bmm_flop_jit = _handle("bmm", "bmm")
matmul_flop_jit = _handle("matmul", "mm")
linear_flop_jit = _handle("linear", "linear")
conv_flop_jit = _handle("conv", "convolution")
batchnorm_flop_jit = _handle("batchnorm", "layer_norm")
softmax_flop_jit = _handle("softmax", "softmax")
rsqrt_flop_jit = _handle("rsqrt", "rsqrt")
dropout_flop_jit = _handle("dropout", "dropout")


def basic_binary_op_flop_jit(
    inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = (), *, name: str
) -> Counter[str]:
    """Element-wise operation under the key ``name``: elements of the broadcast of its operands."""
    return Counter({name: math.prod(torch.broadcast_shapes(*(tuple(shape) for shape in inputs_shapes)))})


def einsum_flop_jit(
    inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = (), *, equation: str
) -> Counter[str]:
    """einsum: the product of all distinct dimensions; a pure permutation of one operand costs nothing.

    Raises:
        ValueError: if the equation does not fit the shapes, or holds an ellipsis.
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "." in equation or [len(term) for term in terms] != [len(shape) for shape in inputs_shapes]:
        raise ValueError(f"einsum: cannot count {equation!r} for operands of shape {[list(s) for s in inputs_shapes]}")
    if len(terms) == 1 and sorted(output) == sorted(terms[0]):
        return Counter(einsum=0)
    sizes = {
        letter: size
        for term, shape in zip(terms, inputs_shapes, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return Counter(einsum=math.prod(sizes.values()))
