"""Trying a host out: is each site the one linear map it is taken for?

1. Run over a few tokens and compare x W + b with y at every site.
2. Run again with every weight replaced by NaN and every site giving x W + b of its true weight: logits that stay finite
   show that no weight is used past its site, so that a patch there is the same as an edited weight.

Families whose wiring the tests hold exact are not probed. Any other architecture is, once, when it is first seen; what
does not come out exactly is refused with the reason.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tl_paramdecomp.adapters.base import ModelAdapter
from tl_paramdecomp.adapters.computed import peeked
from tl_paramdecomp.adapters.swapping import swapped_parameter
from tl_paramdecomp.adapters.wiring import Wiring, find_module, read_parameter
from tl_paramdecomp.errors import SiteNotFiredError, TLParamDecompError
from tl_paramdecomp.sites import SiteCall

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference relative to the largest output, by dtype: rounding of one matrix product."""
NOT_CALLED = "a forward pass over tokens does not call it"


def probe(adapter: ModelAdapter, run: Callable[[], Tensor]) -> tuple[dict[str, Wiring], dict[str, str]]:
    """The wirings of an adapter that are exact, in the order in which they fire, and the reason for each other one.

    Args:
        adapter: The adapter, with all its candidate wirings.
        run: One forward pass of the host over a few tokens, to its logits.
    """
    if not adapter.wirings:
        return {}, {}
    fired: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        fired[name] = _in_words(error)

    comparing = {name: functools.partial(_compare, adapter, fired, name) for name in adapter.wirings}
    try:
        with torch.no_grad(), adapter.intercept(comparing, failed):
            clean = run()
    except SiteNotFiredError:
        with torch.no_grad():
            clean = run()
    except Exception as error:
        return {}, dict.fromkeys(adapter.wirings, f"a forward pass over tokens alone fails ({_in_words(error)})")
    reasons = {name: fired.get(name, NOT_CALLED) for name in adapter.wirings}
    exact = {name: adapter.wirings[name] for name in fired if not fired[name]}
    reasons |= _used_elsewhere(adapter, exact, run, clean)
    return {name: w for name, w in exact.items() if not reasons[name]}, {
        n: reason for n, reason in reasons.items() if reason
    }


def _compare(adapter: ModelAdapter, fired: dict[str, str], name: str, call: SiteCall) -> Tensor:
    """A site's function that notes what is wrong with its call."""
    again = f"it is called more than once in a forward pass, on inputs of its own each time ({list(call.x.shape)})"
    fired[name] = again if name in fired else _difference(adapter, name, call)
    return call.y


def _difference(adapter: ModelAdapter, name: str, call: SiteCall) -> str:
    expected = _product(adapter.weight(name), call)
    if expected.shape != call.y.shape:
        return f"it gives {list(call.y.shape)} where x W has {list(expected.shape)}"
    error = (expected - call.y).abs().max().item() / max(call.y.abs().max().item(), 1e-12)
    if error <= TOLERANCE.get(call.y.dtype, 2e-4):
        return ""
    return f"x W + b differs from its output by {error:.1e} of the largest entry: something else happens inside"


def _product(weight: Tensor, call: SiteCall) -> Tensor:
    product = call.x.to(weight.dtype) @ weight if call.x.is_floating_point() else weight[call.x]
    return (product if call.bias is None else product + call.bias).to(call.y.dtype)


def _used_elsewhere(
    adapter: ModelAdapter, wirings: Mapping[str, Wiring], run: Callable[[], Tensor], clean: Tensor
) -> dict[str, str]:
    """Sites whose weight reaches the logits by another way than their output."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, wiring in wirings.items():
        groups.setdefault((wiring.owner, wiring.weight), []).append(name)
    whole = {key: names for key, names in groups.items() if _covers(adapter, [wirings[name] for name in names])}
    if not whole or _stands_alone(adapter, whole, run, clean):
        return {}
    alone = {key: _stands_alone(adapter, {key: names}, run, clean) for key, names in whole.items()}
    return {
        name: "the model also uses its weight without calling it, or does not use what it returns"
        for key, names in whole.items()
        for name in names
        if not alone[key]
    }


def _covers(adapter: ModelAdapter, parts: list[Wiring]) -> bool:
    """Whether these sites are all of the one parameter they live in."""
    return sum(w.site.d_in * w.site.d_out for w in parts) == read_parameter(adapter.root, parts[0]).numel()


def _stands_alone(
    adapter: ModelAdapter, groups: Mapping[tuple[str, str], list[str]], run: Callable[[], Tensor], clean: Tensor
) -> bool:
    names = [name for group in groups.values() for name in group]
    weights = {name: adapter.weight(name).detach() for name in names}

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(adapter.intercept({name: functools.partial(_product, weights[name]) for name in names}))
        for owner, attribute in groups:
            module = find_module(adapter.root, owner)
            old = peeked(module, attribute)
            nothing = torch.full((), torch.nan, dtype=old.dtype, device=old.device).expand(old.shape)
            stack.enter_context(swapped_parameter(module, attribute, nothing))
        try:
            return torch.equal(run().isfinite(), clean.isfinite())
        except Exception:  # code that branches on values may fail on NaN, which shows that it reads the weight
            return False


def _in_words(error: Exception) -> str:
    text = str(error).splitlines()[0][:160] if str(error) else ""
    return text if isinstance(error, TLParamDecompError) else f"{type(error).__name__}: {text}"
