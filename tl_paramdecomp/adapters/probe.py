"""Trying a host out: is each site the one linear map it is taken for?

1. Run over a few tokens and compare x W + b with y at every site.
2. Run again with every weight replaced by NaN and every site giving x W + b of its true weight: logits that stay finite
   show that no weight is used past its site, so that a patch there is the same as an edited weight.

Families whose wiring the tests hold exact are not probed. Any other architecture is, once, when it is first seen; what
does not come out exactly is refused with the reason.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_paramdecomp.adapters.computed import peeked
from tl_paramdecomp.adapters.swapping import swapped_parameter
from tl_paramdecomp.adapters.wiring import Wiring, find_module, read_parameter
from tl_paramdecomp.errors import SiteNotFiredError, TLParamDecompError
from tl_paramdecomp.sites import SiteCall

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference relative to the largest output, by dtype: rounding of one matrix product."""
NOT_CALLED = "a forward pass over tokens does not call it"
USED_ELSEWHERE = "the model also uses its weight without calling it, or does not use what it returns"
Groups = Mapping[tuple[str, str], list[str]]  # sites by the parameter they live in: its module and its name there


def probe(adapter: "ModelAdapter") -> tuple[dict[str, Wiring], dict[str, str]]:
    """The wirings of an adapter that are exact, in the order in which they fire, and the reason for each other one."""
    if not adapter.wirings:
        return {}, {}
    fired: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        fired[name] = _in_words(error)

    def compare(name: str, call: SiteCall) -> Tensor:
        """A site's function that notes what is wrong with its call."""
        again = f"it is called more than once in a forward pass, on inputs of its own each time ({list(call.x.shape)})"
        fired[name] = again if name in fired else _difference(adapter.weight(name), call)
        return call.y

    comparing = {name: functools.partial(compare, name) for name in adapter.wirings}
    try:
        with torch.no_grad(), adapter.intercept(comparing, failed):
            clean = _run(adapter)
    except SiteNotFiredError:
        clean = _run(adapter)
    except Exception as error:
        return {}, dict.fromkeys(adapter.wirings, f"a forward pass over tokens alone fails ({_in_words(error)})")
    reasons = {name: fired.get(name, NOT_CALLED) for name in adapter.wirings}
    reasons |= _used_elsewhere(adapter, [name for name in fired if not fired[name]], clean)
    exact = {name: adapter.wirings[name] for name in fired if not reasons[name]}
    return exact, {name: reason for name, reason in reasons.items() if reason}


@torch.no_grad()
def _run(adapter: "ModelAdapter") -> Tensor:
    return adapter.forward(torch.arange(3, device=adapter.device).unsqueeze(0))


def _difference(weight: Tensor, call: SiteCall) -> str:
    expected = _product(weight, call)
    if expected.shape != call.y.shape:
        return f"it gives {list(call.y.shape)} where x W has {list(expected.shape)}"
    error = (expected - call.y).abs().max().item() / max(call.y.abs().max().item(), 1e-12)
    if error <= TOLERANCE.get(call.y.dtype, 2e-4):
        return ""
    return f"x W + b differs from its output by {error:.1e} of the largest entry: something else happens inside"


def _product(weight: Tensor, call: SiteCall) -> Tensor:
    product = call.x.to(weight.dtype) @ weight if call.x.is_floating_point() else weight[call.x]
    return (product if call.bias is None else product + call.bias).to(call.y.dtype)


def _used_elsewhere(adapter: "ModelAdapter", names: list[str], clean: Tensor) -> dict[str, str]:
    """Sites whose weight reaches the logits by another way than their output, each with the reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        groups.setdefault((adapter.wirings[name].owner, adapter.wirings[name].weight), []).append(name)
    sizes = {name: adapter.wirings[name].site.d_in * adapter.wirings[name].site.d_out for name in names}
    stored = {key: read_parameter(adapter.root, adapter.wirings[group[0]]).numel() for key, group in groups.items()}
    whole = {key: group for key, group in groups.items() if sum(map(sizes.__getitem__, group)) == stored[key]}
    if not whole or _stands_alone(adapter, whole, clean):
        return {}
    used = [group for key, group in whole.items() if not _stands_alone(adapter, {key: group}, clean)]
    return {name: USED_ELSEWHERE for group in used for name in group}


@torch.no_grad()
def _stands_alone(adapter: "ModelAdapter", groups: Groups, clean: Tensor) -> bool:
    """Whether logits stay finite while the weights of these sites are NaN."""
    weights = {name: adapter.weight(name).detach() for group in groups.values() for name in group}
    with contextlib.ExitStack() as stack:
        stack.enter_context(adapter.intercept({n: functools.partial(_product, w) for n, w in weights.items()}))
        for owner, attribute in groups:
            module = find_module(adapter.root, owner)
            old = peeked(module, attribute)
            nothing = torch.full((), torch.nan, dtype=old.dtype, device=old.device).expand(old.shape)
            stack.enter_context(swapped_parameter(module, attribute, nothing))
        try:
            return torch.equal(_run(adapter).isfinite(), clean.isfinite())
        except Exception:  # code that branches on values may fail on NaN, which shows that it reads the weight
            return False


def _in_words(error: Exception) -> str:
    text = str(error).splitlines()[0][:160] if str(error) else ""
    return text if isinstance(error, TLParamDecompError) else f"{type(error).__name__}: {text}"
