"""What operators mean to the analysis, by name: which ones add, mix features, act per element, and by what.

One table a question; a new operator is one word here. Names are those of torch functions, Tensor methods and
`operator` functions alike (`add`, `__add__`, `torch.add` and `operator.add` are all "add").
"""

from __future__ import annotations

from typing import Any

import torch

ADD = frozenset({"add", "add_", "iadd", "radd"})

CONVOLUTIONS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())

# Operations that mix features or tokens: what makes a branch a block rather than an activation.
MIXING = CONVOLUTIONS | frozenset(
    "linear bilinear matmul rmatmul mm bmm mv baddbmm addmm einsum tensordot chain_matmul multi_dot "
    "cdist scaled_dot_product_attention multi_head_attention_forward flex_attention "
    "lstm gru rnn_tanh rnn_relu cumsum logcumsumexp cumprod "
    "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn "
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d".split()
)

# Element by element in their first tensor: lifted to the streams as they are. Names in place count too.
POINTWISE = frozenset(
    "relu relu6 gelu silu tanh sigmoid hardtanh hardswish hardsigmoid leaky_relu elu celu selu mish softplus softsign "
    "logsigmoid tanhshrink hardshrink softshrink threshold abs exp expm1 log1p sqrt square sign sin cos erf pow "
    "clamp clamp_min clamp_max clip maximum minimum masked_fill nan_to_num "
    "contiguous clone detach to float double half bfloat16 type type_as neg negative positive".split()
)
# Element by element, with a second operand that may be a tensor. Of `OFFSETS` and products either may be the trunk.
OFFSETS = ADD | {"sub", "sub_", "isub", "rsub", "subtract"}
SCALING = frozenset({"mul", "rmul", "imul", "mul_", "truediv", "div", "div_", "itruediv"})
DROPOUT = frozenset({"dropout", "dropout_"})
PERMUTING = frozenset("permute transpose swapaxes swapdims movedim moveaxis t adjoint T mT H mH".split())

# Those that a sum of states passes through unharmed: the trunk as a whole goes through, not a block.
LINEAR = (
    SCALING
    | ADD
    | DROPOUT
    | frozenset("view reshape flatten unflatten contiguous clone to float double half bfloat16 type type_as".split())
)

# Of those element by element, the ones under which a mean of states is the mean of the results.
KEEPING_MEANS = LINEAR | OFFSETS | frozenset("detach masked_fill neg negative positive where".split())

# What takes a part of its first tensor.
SLICING = frozenset("getitem select narrow unbind split chunk tensor_split split_with_sizes index_select".split())
# Functions of a tensor that leave some of its tokens out, or repeat or add some.
RESIZING = frozenset("getitem narrow select index_select repeat_interleave pad".split())

# Functions that make a tensor from sizes alone.
FACTORIES = tuple(
    "arange empty eye full linspace ones rand randint randn randperm tril_indices triu_indices zeros".split()
)

# Reads of a tensor that see its form and not its values.
FORM = frozenset(
    "shape dtype device ndim layout is_cuda requires_grad is_leaf size dim numel stride is_floating_point is_complex "
    "get_device element_size nelement __len__ is_contiguous".split()
)

# Functions that take a tensor's form and none of its values.
LIKE = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like "
    "new_zeros new_ones new_empty new_empty_strided new_full new_tensor".split()
)

# Those that see whether gradients are recorded, which a capture does not know.
GRADIENT = frozenset({"requires_grad", "is_leaf", "grad_fn"})

# What hands a tensor's memory to code that is not torch's: a graph could not follow it there.
EXITS = {
    "numpy": "numpy",
    "__array__": "numpy",
    "__array_wrap__": "numpy",
    "__dlpack__": "DLPack",
    "__cuda_array_interface__": "another library",
    "data_ptr": "a pointer",
    "untyped_storage": "its storage",
    "storage": "its storage",
    "share_memory_": "shared memory",
    "__reduce_ex__": "a pickle",
    "register_hook": "a hook of autograd",
    "register_post_accumulate_grad_hook": "a hook of autograd",
}

# Functions that draw random numbers, beside those whose names begin with "rand".
RANDOM = DROPOUT | frozenset(
    "alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d bernoulli bernoulli_ normal "
    "normal_ uniform_ exponential_ geometric_ cauchy_ log_normal_ random_ multinomial poisson rrelu".split()
)

# What averages or measures along an axis.
REDUCTIONS = frozenset({"mean", "var", "std", "norm", "vector_norm", "var_mean", "std_mean"})


def name_of(target: Any) -> str:
    """The plain name of a function, method name or operator: `"add"` for `torch.Tensor.__add__`."""
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    if name == "__get__":  # a tensor property
        name = getattr(getattr(target, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__") and name not in FORM:
        name = name[2:-2]
    name = name.split(".")[0]  # an OpOverload is called "add.Tensor"
    name = name.removeprefix("fft_")  # torch.fft.fftn calls itself "fft_fftn"
    return name[1:] if name.startswith("_") and name[1:] in MIXING else name


def is_feature(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype can be features."""
    return dtype.is_floating_point or dtype.is_complex


def is_random(target: Any) -> bool:
    """Whether a function draws random numbers."""
    name = name_of(target)
    return name in RANDOM or name.startswith("rand")


def is_mixing(target: Any) -> bool:
    """Whether a function mixes features. A custom operator is taken to."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace = str(target).split(".")[0].split("::")[0]
        if namespace not in ("aten", "prims", "torchvision"):
            return True
    return name_of(target) in MIXING


def counts_by_size(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the number of tensors that a function returns depends on a size of its input."""
    name = name_of(target)
    parts = kwargs.get("split_size", kwargs.get("split_size_or_sections", args[1] if len(args) > 1 else None))
    return name == "unbind" or (name == "split" and not isinstance(parts, (tuple, list)))


def is_inplace(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function writes its result into one of its tensors: the first, or `out`."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    bare = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    augmented = bare in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imatmul")
    if kwargs.get("inplace") is True or kwargs.get("out") is not None:
        return True
    return augmented or (bare.endswith("_") and not bare.endswith("__"))
