"""What every method makes: a module that knows where it came from, and can be saved and loaded."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tl_paramdecomp.sites import Fingerprint


class Saved(nn.Module):
    """Something learned of a model's weights; it holds no model."""

    info: dict[str, Any]
    """Where it came from: host, method, versions; anything JSON can hold."""
    fingerprints: dict[str, Fingerprint]
    """Of the weights it belongs to, by site."""

    def device_of(self, site: str) -> torch.device:
        """Where what belongs to a site is."""
        return next(self.parameters()).device

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write it into a folder."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Saved":
        """Read what `save` wrote."""
