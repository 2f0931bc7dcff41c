"""Parameters that several maps share: which sites those are, and how they are kept apart where only one of them is edited."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters.wiring import Wiring, find_module

TABLES = frozenset(("embed.W_E", "unembed.W_U"))  # sites that a configuration's `tie_word_embeddings` is about


def with_ties(root: nn.Module, wirings: Mapping[str, Wiring]) -> dict[str, Wiring]:
    """The wirings, those that read the very parameter of an earlier one tied to it; fused sites share theirs as parts."""
    first: dict[tuple[int, str], tuple[str, tuple[int, str]]] = {}
    found = {}
    for name, wiring in wirings.items():
        owner = find_module(root, wiring.owner)
        held, slot = owner._parameters.get(wiring.weight), (id(owner), wiring.weight)
        source, where = first.setdefault((id(held), repr(wiring.columns)), (name, slot))
        found[name] = wiring.renamed(tied_to=source) if held is not None and where != slot else wiring
    return found


def repeated(root: nn.Module, wirings: Mapping[str, Wiring], blocks: Iterable[nn.Module]) -> dict[str, str]:
    """Sites whose module stands in several blocks, each with the reason why it is no site of one of them."""
    counts = Counter(id(module) for block in blocks for module in block.modules())
    reason = "its module stands in more than one block, so that it is called more than once in a forward pass"
    return {name: reason for name, wiring in wirings.items() if counts[id(find_module(root, wiring.owner))] > 1}


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether some entry of one tensor is an entry of the other."""
    storage = a.untyped_storage()
    if a is b or storage.data_ptr() != b.untyped_storage().data_ptr() or not storage.nbytes():
        return a is b
    if a.element_size() != b.element_size():
        return True
    taken = torch.zeros(storage.nbytes() // a.element_size(), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def held_tensors(root: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter under every name that a module has for it."""
    return ((m, name, p) for m in root.modules() for name, p in m._parameters.items() if p is not None)


def keep_apart(model: Any, edited: Collection[str], written: Collection[str] = ()) -> None:
    """See that a transformers model does not tie again, when it is saved and loaded, what an edit of sites has parted.

    All that it declares as tied is parted then: one flag of the configuration is for all. `written` are the parameters' paths.
    """
    expand = getattr(model, "get_expanded_tied_weights_keys", None)  # from transformers 5
    declared: dict[str, str] = {} if expand is None else expand(all_submodels=True)
    if TABLES.isdisjoint(edited) and not {*declared, *declared.values()}.intersection(written):
        return
    held: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for target, source in declared.items():
        if target in held and held[target] is held.get(source):
            path, _, attribute = target.rpartition(".")
            own = nn.Parameter(held[target].detach().clone(), held[target].requires_grad)
            find_module(model, path)._parameters[attribute] = own
    for module in model.modules():
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}
