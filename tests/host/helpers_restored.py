"""The one check that tests of every feature share: the host's networks, and ours, are what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from latentmotion.host.motion import MotionModule
from latentmotion.host.unet import JointNorm, MotionSlot
from torch import Tensor, nn

WEIGHT_FUNCTIONS = ("weight_function", "bias_function")  # where the host puts patches of layers it loads in part
Watch = Callable[[ModelPatcher | MotionModule], ModelPatcher | MotionModule]  # the fixture `watched`


class Rest:
    """What a model is while nothing runs: its layers, what hangs on them, and a copy of every tensor."""

    def __init__(self, model: ModelPatcher | MotionModule) -> None:
        self.patcher = model.patcher if isinstance(model, MotionModule) else model
        self.network: nn.Module = self.patcher.model
        self.layers = self._layers()
        self.attached = _attached(self.layers)
        self.tensors = {name: tensor.detach().clone() for name, tensor in _tensors(self.network).items()}

    def _layers(self) -> dict[str, nn.Module]:
        """Every layer by name; what a MODEL replaces for as long as it is loaded is taken from the host's backup."""
        layers = dict(self.network.named_modules(remove_duplicate=False))
        backup = self.patcher.object_patches_backup
        return {name: backup.get(name, layer) for name, layer in layers.items()}

    def assert_same_layers(self) -> None:
        """The very objects, under their names and in their order; no layer of ours, no method replaced, no hook."""
        layers = self._layers()
        ours = [name for name, layer in layers.items() if isinstance(layer, (MotionSlot, JointNorm))]
        assert not ours, f"layers of the pack are left in the network: {ours[:5]}"
        forwards = [name for name, layer in layers.items() if "forward" in vars(layer)]
        assert not forwards, f"layers have a forward of their own: {forwards[:5]}"
        assert list(layers) == list(self.layers), "layers came, went or changed places"
        replaced = [name for name, layer in layers.items() if layer is not self.layers[name]]
        assert not replaced, f"layers are other objects than before: {replaced[:5]}"
        attached = _attached(layers)
        changed = [key for key in attached.keys() | self.attached if attached.get(key) != self.attached.get(key)]
        assert not changed, f"methods or hooks of layers changed: {changed[:5]}"

    def assert_same_tensors(self) -> None:
        """Bit for bit, of the same type, with no patch to come; true once the host has unloaded the model."""
        assert not self.patcher.object_patches_backup and not self.patcher.backup, "the host did not unload the model"
        waiting = [name for name, layer in self.layers.items() for kind in WEIGHT_FUNCTIONS if getattr(layer, kind, ())]
        assert not waiting, f"layers whose weights the host still patches as it uses them: {waiting[:5]}"
        after = _tensors(self.network)
        assert after.keys() == self.tensors.keys(), f"changed keys: {sorted(after.keys() ^ self.tensors.keys())[:5]}"
        changed = [name for name, tensor in after.items() if not _same_bits(tensor, self.tensors[name])]
        assert not changed, f"{len(changed)} tensors changed: {changed[:5]}"


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those that no state dict holds."""
    return dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)))


def _attached(layers: dict[str, nn.Module]) -> dict[tuple[str, str], Any]:
    """What acts when a single layer is called, by layer and attribute: methods of its own, and hooks."""
    found = {}
    for layer, module in layers.items():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                found[layer, name] = list(value.values())
            elif callable(value) and not isinstance(value, torch.device):
                found[layer, name] = value
    return found


def assert_restored(rests: Iterable[Rest]) -> None:
    """Layers are what they were as soon as a run ends, and tensors, too, once the host has unloaded its models."""
    rests = list(rests)
    for rest in rests:
        rest.assert_same_layers()
    comfy.model_management.unload_all_models()
    for rest in rests:
        rest.assert_same_layers()
        rest.assert_same_tensors()


@contextmanager
def restored(*models: ModelPatcher | MotionModule) -> Iterator[None]:
    """Whatever is done with these models meanwhile, they end as they were, bit for bit."""
    rests = [Rest(model) for model in models]
    yield
    assert_restored(rests)
