"""Every component of a site ablated on its own, the obvious way: one mask for each row of a batch, full forward passes."""

import torch

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.patching.hooks import patched


def ablation_effects(model, decomposition, tokens, metric, rows_at_once=128):
    """By site, metric of the model minus metric with each component ablated, for one row of tokens."""
    adapter, found = adapt(model), {}
    with torch.no_grad():
        base = metric(adapter.forward(tokens))
        for name, components in decomposition.items():
            effects = []
            for some in torch.arange(components.n_components).split(rows_at_once):
                m = torch.ones(len(some), 1, components.n_components, dtype=components.V.dtype)
                m[torch.arange(len(some)), 0, some] = 0.0
                with patched(model, decomposition, decomposition.masks().with_values(name, m)):
                    effects.append(base - metric(adapter.forward(tokens.expand(len(some), -1))))
            found[name] = torch.cat(effects)
    return found
