"""Trying a host out: does x W + b give y at each site, in one small forward pass?

Families whose wiring is known by test are not probed. Any other architecture is, once, when it is first seen; what does
not come out exactly is refused with the reason.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tl_paramdecomp.adapters.base import ModelAdapter
from tl_paramdecomp.sites import SiteCall, SiteFn

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference relative to the largest output, by dtype: rounding of one matrix product."""


def probe(adapter: ModelAdapter, run: Callable[[], object]) -> Mapping[str, str]:
    """Sites of an adapter that are not exact, each with the reason.

    Args:
        adapter: The adapter, with all its candidate wirings.
        run: One forward pass of the host over a few tokens.
    """
    reasons = dict.fromkeys(adapter.wirings, "it does not fire in a forward pass over tokens")

    def compare(name: str) -> SiteFn:
        def check(call: SiteCall) -> Tensor:
            reasons[name] = _difference(adapter, name, call)
            return call.y

        return check

    try:
        with torch.no_grad(), adapter.intercept({name: compare(name) for name in adapter.wirings}):
            run()
    except Exception as error:
        from tl_paramdecomp.errors import SiteNotFiredError

        if not isinstance(error, SiteNotFiredError):
            why = f"a forward pass over tokens alone fails ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            return dict.fromkeys(adapter.wirings, why)
    return {name: reason for name, reason in reasons.items() if reason}


def _difference(adapter: ModelAdapter, name: str, call: SiteCall) -> str:
    weight = adapter.weight(name)
    if call.x.dtype.is_floating_point:
        expected = call.x.to(weight.dtype) @ weight
    else:
        expected = weight[call.x]
    if call.bias is not None:
        expected = expected + call.bias
    if expected.shape[-1] != call.y.shape[-1]:
        return f"it gives {list(call.y.shape)} where x W has {list(expected.shape)}"
    error = (expected - call.y).abs().max().item() / max(call.y.abs().max().item(), 1e-12)
    if error <= TOLERANCE.get(call.y.dtype, 2e-4):
        return ""
    return f"x W + b differs from its output by {error:.1e} of the largest entry: something else happens inside"
