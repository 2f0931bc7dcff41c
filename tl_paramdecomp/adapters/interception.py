"""Running a host with functions at its weight sites: one engine for every host.

1. As a forward pass begins, note which columns of the rows it computes (`passes.RowTracker`).
2. Where a site's input passes, keep it until the site's output fires.
3. Where its output passes, hand both to the site's function and return what it gives.
4. As a pass that ran from embedding to logits ends, see that every site fired.

Only torch hooks and instance attributes are used, all removed on leaving; a TransformerLens user's `reset_hooks()` does
not reach them. Inputs are read after every other hook, outputs are replaced before every other hook, so that what a
user edits upstream counts and what a user reads downstream is the patched value.
"""

import contextlib
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters.boundary import Hook, busy
from tl_paramdecomp.adapters.computed import is_computed
from tl_paramdecomp.adapters.convolution import patch_span
from tl_paramdecomp.adapters.norms import NormWiring, read_norm_bias
from tl_paramdecomp.adapters.passes import RowTracker, first_argument
from tl_paramdecomp.adapters.wiring import Wiring, find_module, put_columns, read_bias, take_columns
from tl_paramdecomp.errors import ShapeError, SiteNotFiredError, UnsupportedSiteError
from tl_paramdecomp.sites import SiteCall, SiteFn, Span

OnError = Callable[[str, Exception], None]  # told the site and what went wrong there


@dataclass
class Interception:
    """One context in which functions stand at weight sites of a module tree."""

    root: nn.Module
    wirings: Mapping[str, Wiring | NormWiring]
    fns: Mapping[str, SiteFn]
    on_error: OnError | None = None
    tracker: RowTracker = field(default_factory=RowTracker)
    idle: bool = False  # leave every site alone for now

    def __post_init__(self) -> None:
        self._x: dict[str, Any] = {}
        self._last: list[tuple[nn.Module, int]] = []
        self._biases: dict[str, Tensor | None] = {}

    # --- setting up -------------------------------------------------------------------------------------------------
    def install(self, stack: contextlib.ExitStack, call_hook: Callable[..., contextlib.AbstractContextManager]) -> None:
        """Put every function at its site; `call_hook(module, fn)` intercepts one module's own call."""
        calls: dict[str, list[str]] = defaultdict(list)
        for name in self.fns:
            wiring = self.wirings[name]
            if wiring.y.point == "call":
                calls[wiring.y.path].append(name)
            else:
                self._install_taps(stack, name, wiring)
        for path, names in calls.items():
            stack.enter_context(call_hook(find_module(self.root, path), functools.partial(self._call, names)))

    def _install_taps(self, stack: contextlib.ExitStack, name: str, wiring: Wiring | NormWiring) -> None:
        x_module, y_module = find_module(self.root, wiring.x.path), find_module(self.root, wiring.y.path)
        read = wiring.x.read or first_argument

        def replaced(y: Any) -> Any:
            return self._patched(name, self._take_x(name), y)

        if wiring.x.point == "output":
            kept = x_module.register_forward_hook(Hook(lambda module, args, out: self._x.update({name: out})))
            self._last.append((x_module, kept.id))
        else:
            keep = Hook(lambda module, args, kwargs: self._x.update({name: read(args, kwargs)}))
            kept = x_module.register_forward_pre_hook(keep, with_kwargs=True)
        if wiring.y.point == "input":
            replace = Hook(lambda module, args: (replaced(args[0]), *args[1:]))
            put = y_module.register_forward_pre_hook(replace)
        else:
            put = y_module.register_forward_hook(Hook(lambda module, args, out: replaced(out)), prepend=True)
        stack.callback(kept.remove)
        stack.callback(put.remove)

    def begin(self, start: int, tokens: Tensor | None) -> None:
        """A pass begins: forget the last one, and move to the end of the queue where inputs are read."""
        if self.tracker.thread not in (None, threading.get_ident()):
            raise busy(self.root)
        self._x.clear()
        self.tracker.begin(start, tokens)
        for module, hook_id in self._last:
            hooks: Any = module._forward_hooks  # torch keeps an OrderedDict and declares a dict
            if hook_id in hooks:
                hooks.move_to_end(hook_id)

    # --- at the sites -----------------------------------------------------------------------------------------------
    def _call(self, names: list[str], x: Any, y: Any) -> Any:
        """A module that is itself one site, or holds several fused side by side."""
        for name in names:
            y = self._patched(name, x, y)
        return y

    def _take_x(self, name: str) -> Any:
        if name not in self._x:
            raise SiteNotFiredError(
                f"{name} gave an output, but its input never passed {self.wirings[name].x.path!r}. "
                f"The host took another path, perhaps because of a flag such as use_split_qkv_input."
            )
        return self._x.pop(name)

    def _patched(self, name: str, x: Any, y: Any) -> Any:
        self.tracker.fired.add(name)
        if self.idle:
            return y
        try:
            return self._replaced(name, x, y)
        except Exception as error:
            if self.on_error is None:
                raise
            self.on_error(name, error)
            return y

    def _replaced(self, name: str, x: Any, y: Any) -> Tensor:
        wiring = self.wirings[name]
        for tensor, way in ((x, "receives"), (y, "gives")):
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise UnsupportedSiteError(f"{name} {way} a {kind}, not a tensor: it is no plain linear map.")
        if isinstance(wiring, NormWiring):
            return self.fns[name](SiteCall(wiring.normalised(x), y, read_norm_bias(self.root, wiring), Span()))
        rows = matching_rows(x, y, wiring)
        folded = None if wiring.patches else self.tracker.fold_rows(rows.x, rows.y, wiring.site.kind)
        if folded is not None:
            rows = rows._replace(x=rows.x.unflatten(0, folded), y=rows.y.unflatten(0, folded))
        span = patch_span(rows.y) if wiring.patches else self.tracker.span(rows.y, name)
        new = self.fns[name](SiteCall(rows.x, rows.y, self._bias(name, wiring), span))
        if new is rows.y:
            return y
        if new.ndim != rows.y.ndim:
            raise ShapeError(
                f"The masks of {name} have {new.ndim - 1} axes of rows, but its output is {list(rows.y.shape)}; "
                "give masks that broadcast to it."
            )
        if rows.padding is not None:
            new = torch.where(rows.padding.unsqueeze(-1), rows.y, new)
        return host_output(new if folded is None else new.flatten(0, 1), y, wiring)

    def _bias(self, name: str, wiring: Wiring) -> Tensor | None:
        """The bias that this call adds; one that is a parameter is looked up once."""
        if name in self._biases:
            return self._biases[name]
        bias = read_bias(self.root, wiring)
        if wiring.bias is None or not is_computed(find_module(self.root, wiring.owner), wiring.bias):
            self._biases[name] = bias
        return bias

    def check_fired(self, exempt: Collection[str] = ()) -> None:
        """See that every site fired in a pass that ran from embedding to logits (else SiteNotFiredError)."""
        missing = [name for name in self.fns if not self.idle and name not in self.tracker.fired and name not in exempt]
        if missing:
            raise SiteNotFiredError(
                f"The forward pass reached the logits without passing {', '.join(missing)}: what was patched there had no "
                "effect. The host may have taken a fused path (a flag, a compiled or replaced module), or the patch was "
                "removed meanwhile; switch the flag off or patch other sites."
            )


# --- one call ---------------------------------------------------------------------------------------------------------
class MatchedRows(NamedTuple):
    """x and y of one call with heads flattened and fused neighbours cut away."""

    x: Tensor
    y: Tensor
    padding: Tensor | None = None  # true where the host looked no row up (padded positions of TransformerLens' W_pos)


def matching_rows(x: Tensor, y: Tensor, wiring: Wiring) -> MatchedRows:
    """x [..., d_in] and y [..., d_out] of one call, whatever shapes the host passes; patches of a convolution.

    ShapeError where the host's tensors do not fit the site, or its heads read different inputs.
    """
    site = wiring.site
    if wiring.patches is not None:
        return MatchedRows(*wiring.patches.match(x, y, site.name))
    flat_y = take_columns(y, wiring.columns)
    if flat_y.shape[-1] != site.d_out and flat_y.ndim >= 3 and flat_y.shape[-2] * flat_y.shape[-1] == site.d_out:
        flat_y = flat_y.flatten(-2)
    padding = None
    if site.kind == "embedding":
        if x.dtype.is_floating_point:
            raise ShapeError(f"{site.name} looks rows up, but its input is {x.dtype} {list(x.shape)}, not indices.")
        if bool((x < 0).any()):
            padding, x = x < 0, x.clamp(min=0)
    elif x.ndim == flat_y.ndim + 1 and x.shape[-2] * x.shape[-1] == site.d_in:
        x = x.flatten(-2)
    elif x.ndim == flat_y.ndim + 1 and x.shape[-1] == site.d_in:
        if not bool((x == x[..., :1, :]).all()):
            raise ShapeError(
                f"The heads of {site.name} read different inputs (use_split_qkv_input or use_attn_in, and an edit at one "
                "head); one weight for all heads has no single input then. Call set_use_split_qkv_input(False) and "
                "set_use_attn_in(False)."
            )
        x = x[..., 0, :]
    if flat_y.shape[-1] != site.d_out or (site.kind == "linear" and x.shape[-1] != site.d_in):
        raise ShapeError(
            f"{site.name} maps {site.d_in} to {site.d_out}, but the host passes {list(x.shape)} in and {list(y.shape)} out. "
            "A flag that regroups heads does this; call set_ungroup_grouped_query_attention(False)."
        )
    return MatchedRows(x, flat_y, padding)


def host_output(new: Tensor, y: Tensor, wiring: Wiring) -> Tensor:
    """The host's own output with one site's part replaced, in the host's shape."""
    if wiring.patches is not None:
        return wiring.patches.image(new, y)
    if wiring.columns is None:
        return new if new.shape[-1] == y.shape[-1] else new.unflatten(-1, y.shape[-2:])
    whole = y.expand(*new.shape[:-1], y.shape[-1]).clone()
    put_columns(whole, wiring.columns, new)
    return whole


@contextlib.contextmanager
def torch_call_hook(module: nn.Module, fn: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Intercept one module's call by a torch forward hook that runs before all others."""
    hook = Hook(lambda module, args, kwargs, y: fn(first_argument(args, kwargs), y))
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
