"""What the two TransformerLens hosts share: hook points by name."""

import contextlib
import sys
import traceback
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tl_paramdecomp.adapters.base import ModelAdapter
from tl_paramdecomp.adapters.identity import composed
from tl_paramdecomp.adapters.interception import host_output, matching_rows
from tl_paramdecomp.errors import SiteNotFiredError, UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import SiteCall, SiteFn, Span

GENERATE = ("generate", "generate_stream")  # TransformerLens' own decoding loops
_OPEN_POINTS: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Hook points of open contexts; in a copy of a model that had them, others of the same names mean nothing."""
HookPair = tuple[str, Callable[..., Tensor | None]]


class HookRoute(NamedTuple):
    """The hook points at which a site's input can be read and its output replaced."""

    x_hook: str
    y_hook: str
    read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """From the activation at `x_hook` to what multiplies the weight."""


class LensAdapter(ModelAdapter):
    """A host whose activations have hook points."""

    def block_modules(self) -> Sequence[nn.Module]:
        return tuple(self.model.blocks)

    def pattern_taps(self) -> Mapping[int, nn.Module]:
        attentions = (block._modules.get("attn") for block in self.block_modules())
        hooks = enumerate(getattr(attention, "hook_pattern", None) for attention in attentions)
        return {i: hook for i, hook in hooks if hook is not None}

    @abstractmethod
    def hook_route(self, name: str) -> HookRoute:
        """Hook points of a site; UnsupportedSiteError where the host has none at its input or output."""

    @abstractmethod
    def hook_registries(self) -> list[dict[str, Any]]:
        """The host's own tables of hook points by name."""

    def fwd_hook_pairs(self, fns: Mapping[str, SiteFn], by_position: bool) -> list[HookPair]:
        """Plain (name, function) pairs for `run_with_hooks`; UnsupportedSiteError where a site has no hook points of its own.

        Pairs see neither a key/value cache nor the prompt: with functions `by_position`, generation is refused, and a decoding
        step rather than taken for position 0. A function at an identity before a site goes along with the site's own.
        """
        at_sites = composed(fns, self.weight).items()
        return [pair for name, fn in at_sites for pair in self._pair(name, fn, by_position)]

    def _pair(self, name: str, fn: SiteFn, by_position: bool) -> list[HookPair]:
        route, wiring = self.hook_route(name), self.wirings[name]
        kept: list[Tensor] = []
        longest = 0

        def keep_input(activation: Tensor, hook: Any) -> None:
            kept[:] = [activation]

        def patch_output(activation: Tensor, hook: Any) -> Tensor:
            nonlocal longest
            if not kept:
                raise SiteNotFiredError(f"{name} fired at {route.y_hook}, but {route.x_hook} did not fire before.")
            rows = matching_rows(route.read(kept.pop()), activation, wiring)
            length = rows.y.shape[-2]
            if by_position and (length == 1 < longest or _inside_generate()):
                raise SiteNotFiredError(
                    "Masks by position as plain hooks cannot tell where a prompt ends or a decoding step stands in its row; "
                    "generate inside tl_paramdecomp.patched(...) instead."
                )
            longest = max(longest, length)
            new = fn(SiteCall(rows.x, rows.y, self.bias(name), Span(prompt=length)))
            return activation if new is rows.y else host_output(new, activation, wiring)

        return [(route.x_hook, keep_input), (route.y_hook, patch_output)]

    @contextlib.contextmanager
    def hook_points(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """New hook points under these names, known to `run_with_cache` and `run_with_hooks`; UnsupportedModelError if taken."""
        registries = self.hook_registries()
        taken = [name for name in names if any(registry.get(name) in _OPEN_POINTS for registry in registries)]
        if taken:
            raise UnsupportedModelError(
                f"The model already has {taken[0]!r}; components of the same sites are attached once at a time."
            )
        points = {name: sys.modules["transformer_lens.hook_points"].HookPoint() for name in names}
        for name, point in points.items():
            point.name = name
        _OPEN_POINTS.update(points.values())
        try:
            for registry in registries:
                registry.update(points)
            yield points
        finally:
            _OPEN_POINTS.difference_update(points.values())
            for registry in registries:
                for name in names:
                    registry.pop(name, None)


def _inside_generate() -> bool:
    """Whether a host's decoding loop runs the present pass; plain hooks have no other way to know."""
    return any(frame.f_code.co_name in (*GENERATE, "hf_generate") for frame, _ in traceback.walk_stack(None))


def no_hook_point(name: str, why: str) -> UnsupportedSiteError:
    """The error for a site that plain hooks cannot reach."""
    return UnsupportedSiteError(f"{name} cannot be patched by plain hooks: {why}. Use tl_paramdecomp.patched(...).")
