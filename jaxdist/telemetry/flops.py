"""Floating-point operations of a function, counted from its jaxpr, and what share of the hardware they use.

One multiply-add is two operations. Only matrix products and convolutions count, as in the model FLOPs of
PaLM (Chowdhery et al. 2022, appendix B); attention counts in full, mask or no mask. A training step is taken
as three forward passes (the backward pass does two products for each one), recomputation not counted.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


@dataclass(frozen=True)
class Flops:
    """Operations over all devices. `uncounted` names what the jaxpr does not tell; empty when exact."""

    matmul: int = 0
    convolution: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.matmul + self.convolution

    def __add__(self, other: "Flops") -> "Flops":
        uncounted = tuple(dict.fromkeys(self.uncounted + other.uncounted))
        return Flops(self.matmul + other.matmul, self.convolution + other.convolution, uncounted)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.matmul * times, self.convolution * times, self.uncounted)


def count_flops(fn: Callable[..., Any], *abstract_args: Any) -> Flops:
    """Matrix-product and convolution operations of `fn(*abstract_args)`, arrays or `ShapeDtypeStruct`s.

    Nothing is compiled or run. A while loop of unknown length counts once and a kernel whose inside cannot be
    seen not at all; both are named in `uncounted`.
    """
    return _of_jaxpr(jax.make_jaxpr(fn)(*abstract_args).jaxpr)


def counted(flops: int, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, jitted, whose operations count as `flops` each time it runs, whatever its jaxpr shows: for padding that
    is no part of the model, and loops of a length that only the data know."""

    def named(*arguments: Any) -> Any:
        return fn(*arguments)

    named.__name__ = named.__qualname__ = f"{_NAMED}{flops}"
    return jax.jit(named)


_NAMED = "counted_as_"


def training_flops(forward: Flops) -> Flops:
    """Model FLOPs of a training step: 3 x forward."""
    return forward * 3


def _of_jaxpr(jaxpr: Jaxpr) -> Flops:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), Flops())


def _of_equation(equation: JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name in _COUNTED:
        return _COUNTED[name](equation)
    if str(params.get("name", "")).startswith(_NAMED):
        return Flops(matmul=int(params["name"].removeprefix(_NAMED)))
    if name.startswith(("dot_product_attention", "ffi_call", "custom_call")):
        return Flops(uncounted=(f"kernel {params.get('target_name', name)}",))
    inner = [_of_jaxpr(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner, key=lambda flops: flops.total)
    flops = sum(inner, Flops()) * _runs(name, params)
    if name == "while" and flops.total:
        flops += Flops(uncounted=("while loop of unknown length",))
    return flops


def _runs(name: str, params: dict[str, Any]) -> int:
    """How often, over all devices, the jaxprs within an equation run."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # inside, shapes are those of one device along the axes that become manual
        manual = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _dot_general(equation: JaxprEqn) -> Flops:
    """2 x batch x M x N x K: the output has batch x M x N elements, each a sum of K products."""
    (contracting, _), _ = equation.params["dimension_numbers"]
    k = math.prod(_shape(equation.invars[0])[axis] for axis in contracting)
    return Flops(matmul=2 * math.prod(_shape(equation.outvars[0])) * k)


def _ragged_dot(equation: JaxprEqn) -> Flops:
    """2 x M x N x K: each row of the left side, [M, K], meets one matrix of the right side, [group, K, N]."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    lhs, rhs = _shape(equation.invars[0]), _shape(equation.invars[1])
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    summed_or_shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    n = math.prod(size for axis, size in enumerate(rhs) if axis not in summed_or_shared)
    return Flops(matmul=2 * math.prod(lhs) * n)


def _convolution(equation: JaxprEqn) -> Flops:
    """2 x outputs x (kernel positions x input features of one group).

    Where the input is dilated (a transposed convolution), only one in prod(dilation) positions is not zero.
    """
    kernel = _shape(equation.invars[1])
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    products = math.prod(kernel) // out_features
    dilation = math.prod(equation.params["lhs_dilation"])
    return Flops(convolution=2 * math.prod(_shape(equation.outvars[0])) * products // dilation)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


_COUNTED: dict[str, Callable[[JaxprEqn], Flops]] = {
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


def mfu(model_flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation, a fraction of what `devices` of `peak` FLOP/s could do."""
    return model_flops / (seconds * devices * peak)


def mfu_formula(
    model_flops: float, seconds: float, devices: int, peak: float | None, *, device_kind: str, dtype: str
) -> str:
    """The utilisation with every number that went into it, in one line."""
    done = f"{model_flops:.4g} FLOPs a step (3 x forward)"
    if peak is None:
        rate = model_flops / seconds
        return (
            f"MFU unknown: unknown device {device_kind!r} has no {dtype} peak in the table; "
            f"{done} / {seconds:.4g} s = {rate:.4g} FLOP/s on {devices} devices"
        )
    return (
        f"MFU = {done} / ({seconds:.4g} s x {devices} devices x {peak:.4g} {dtype} FLOP/s of {device_kind}) "
        f"= {mfu(model_flops, seconds, devices, peak):.2%}"
    )
