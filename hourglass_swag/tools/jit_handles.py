"""Cost of one operation from the shapes of its operands: the rules of the Hourglass repository's counting tool.

Every handle has the signature ``handle(inputs_shapes, outputs_shapes, **kwargs) -> Counter``: the shapes of the tensors
that enter and leave the operation (a list of sizes each; an operand that is not a tensor is an empty list), and further
facts by keyword (``name`` of the counter key, ``equation`` of an einsum). The result maps the tool's key to operations.
A multiply-accumulate is one. The names are those of the published tool, whose handles received traced values in place
of shapes.

Source: the convention ``swag`` of ``common.measure.flops``; the two agree, see ``tests/test_flop_count.py``.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch

Shape = Sequence[int]


def addmm_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """addmm(bias, a, b): rows x in x out; the bias is not counted."""
    _, first, second = inputs_shapes[:3]
    return Counter(addmm=_product(first, second, "addmm"))


def bmm_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """bmm(a, b): batch x n x k x m."""
    first, second = inputs_shapes[:2]
    return Counter(bmm=_product(first, second, "bmm"))


def matmul_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """matmul(a, b): elements of the first times the last dimension of the second (1 if that is a vector)."""
    first, second = inputs_shapes[:2]
    return Counter(matmul=_product(first, second, "matmul"))


def linear_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """linear(x, weight, bias): rows x out x (in + 1); rows x out x in if there is no bias."""
    features, (out_features, in_features) = inputs_shapes[0], inputs_shapes[1]
    if features[-1] != in_features:
        raise ValueError(f"linear: the input has {features[-1]} features, the weight expects {in_features}")
    has_bias = len(inputs_shapes) > 2 and len(inputs_shapes[2]) > 0
    return Counter(linear=math.prod(features[:-1]) * out_features * (in_features + has_bias))


def conv_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape]) -> Counter[str]:
    """Convolution(x, weight, ...): output elements x input channels per group x kernel area, without the bias."""
    return Counter(conv=math.prod(outputs_shapes[0]) * math.prod(inputs_shapes[1][1:]))


def einsum_flop_jit(
    inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = (), *, equation: str
) -> Counter[str]:
    """einsum: the product of all distinct dimensions; a pure permutation of one operand costs nothing.

    Raises:
        ValueError: if the equation does not fit the shapes, or holds an ellipsis.
    """
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or [len(term) for term in terms] != [len(shape) for shape in inputs_shapes]:
        raise ValueError(f"einsum: cannot count {equation!r} for operands of shape {[list(s) for s in inputs_shapes]}")
    sizes = dict(
        pair for term, shape in zip(terms, inputs_shapes, strict=True) for pair in zip(term, shape, strict=True)
    )
    output = equation.replace(" ", "").partition("->")[2]
    if len(terms) == 1 and sorted(output) == sorted(terms[0]):
        return Counter(einsum=0)
    return Counter(einsum=math.prod(sizes.values()))


def batchnorm_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """Batch and layer normalisation: four operations per element."""
    return Counter(batchnorm=4 * math.prod(inputs_shapes[0]))


def softmax_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """Softmax: five operations per element."""
    return Counter(softmax=5 * math.prod(inputs_shapes[0]))


def rsqrt_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """Reciprocal square root: two operations per element."""
    return Counter(rsqrt=2 * math.prod(inputs_shapes[0]))


def dropout_flop_jit(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()) -> Counter[str]:
    """Dropout: one operation per element, in evaluation and at rate zero too."""
    return Counter(dropout=math.prod(inputs_shapes[0]))


def basic_binary_op_flop_jit(
    inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = (), *, name: str
) -> Counter[str]:
    """Element-wise operation under the key ``name``: elements of the broadcast of its operands."""
    return Counter({name: math.prod(torch.broadcast_shapes(*(tuple(shape) for shape in inputs_shapes)))})


def scaled_dot_product_attention_flop(
    inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape] = ()
) -> Counter[str]:
    """Fused attention(q, k, v[, additive mask]) as its plain form: bmm twice, softmax, division of the query.

    The published tool met attention only in this plain form; recent torch executes it as one operation.
    """
    query, key, value = inputs_shapes[:3]
    scores = [*query[:-1], key[-2]]
    counts = Counter(bmm=_product(query, [key[-1], key[-2]], "attention") + _product(scores, value, "attention"))
    counts += softmax_flop_jit([scores])
    counts["aten::div"] = math.prod(query)
    if len(inputs_shapes) > 3 and inputs_shapes[3]:
        counts += basic_binary_op_flop_jit([scores, inputs_shapes[3]], name="aten::add")
    return counts


def merge_wavg_flop(inputs_shapes: Sequence[Shape], outputs_shapes: Sequence[Shape]) -> Counter[str]:
    """Fused merge_wavg(tokens, ...) -> rows as its plain form: tokens times their sizes, rows divided by theirs."""
    return Counter({"aten::mul": math.prod(inputs_shapes[0]), "aten::div": math.prod(outputs_shapes[0])})


def _product(first: Shape, second: Shape, operation: str) -> int:
    """Multiply-accumulates of first @ second: elements of the first times the columns of the second."""
    inner = second[-2] if len(second) > 1 else second[-1]
    if first[-1] != inner:
        raise ValueError(f"{operation}: shapes {list(first)} and {list(second)} cannot be multiplied")
    return math.prod(first) * (second[-1] if len(second) > 1 else 1)
