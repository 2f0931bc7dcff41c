"""Which sites of a model are patched at present, and whether two patches of one site have a common meaning."""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tl_paramdecomp.adapters.boundary import one_thread
from tl_paramdecomp.adapters.identity import SUFFIX, behind, is_identity
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.subnetworks import Part
from tl_paramdecomp.errors import PatchConflictError

_ACTIVE: "weakref.WeakKeyDictionary[Any, list[dict[str, Claim]]]" = weakref.WeakKeyDictionary()
"""By the torch module that holds the weights, so that an nnsight model and the module it wraps share their claims."""
_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Claim:
    """What one context does to one site."""

    components: Components | Part
    touched: frozenset[int] | None = None
    """Components that it is about; None: all."""
    additive: bool = False
    """It only adds to the output: the delta mask stays 1."""
    in_weights: bool = False
    """The site holds other weights meanwhile."""

    def joins(self, other: "Claim") -> bool:
        """Whether both can hold at once: corrections add up, unless they are to the same component."""
        if not (self.additive and other.additive):
            return False
        if self.components is not other.components:
            return True
        every = frozenset(range(self.components.n_components))
        mine, others = (every if claim.touched is None else claim.touched for claim in (self, other))
        return not mine & others


@contextlib.contextmanager
def claimed(root: Any, claims: Mapping[str, Claim]) -> Iterator[None]:
    """Note what happens to which sites of a model, or raise PatchConflictError: another thread uses it, or two patches of one
    site have no common meaning."""
    own = dict(claims)
    with one_thread(root):
        with _LOCK:
            stack = _ACTIVE.setdefault(root, [])
            for other in stack:
                _refuse_conflicts(own, other)
            stack.append(own)
        try:
            yield
        finally:
            with _LOCK:
                stack[:] = [other for other in stack if other is not own]


def _refuse_conflicts(own: Mapping[str, Claim], other: Mapping[str, Claim]) -> None:
    for name, claim in own.items():
        if name in other and not claim.joins(other[name]):
            raise PatchConflictError(
                f"{name} is already patched on this model. Patches of one site combine when each leaves the delta "
                "mask at 1 and they change different components; these do not. Leave the other context first, or "
                "put both into one set of masks."
            )
        partner = behind(name) if is_identity(name) else f"{name}{SUFFIX}"
        if partner in other and not (claim.in_weights or other[partner].in_weights):
            raise PatchConflictError(
                f"{behind(name)} and the identity before it are patched by two contexts, neither of which knows the "
                "input that the other leaves. Leave the other context first, or put both into one set of masks."
            )


def edited_sites(root: Any) -> frozenset[str]:
    """Sites of a model whose weights are edited at present."""
    return frozenset(name for claims in _ACTIVE.get(root, ()) for name, claim in claims.items() if claim.in_weights)


def is_patched(root: Any) -> bool:
    """Whether any context is open on a model."""
    return bool(_ACTIVE.get(root))
