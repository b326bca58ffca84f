"""`model.save_pretrained(directory)` for models that have no such method of their own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from modelopt.torch.opt import save


class SavePretrained:
    """A callable that writes history and tensors of one model; `modelopt.torch.opt.restore` reads them back.

    It is an attribute of the instance, so no class is touched, and a deep copy of the model refers to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owner = [model]  # in a list, so that the model does not become a submodule of anything

    def __call__(self, save_directory: str | Path, overwrite: bool = False) -> None:
        """Write `modelopt.json` and `model.safetensors` into a directory. Raises CheckpointError."""
        save(self.owner[0], save_directory, overwrite)


def attach_save_pretrained(model: nn.Module) -> None:
    """Give the model a `save_pretrained`, unless it has one."""
    if not hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model)
