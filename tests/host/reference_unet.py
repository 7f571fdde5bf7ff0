"""The host's UNet as a video UNet in float64, by forward hooks: the other side of the parity tests.

Nothing of the pack is used: a second UNet object of the host's class on the same weights computes in float64; hooks
put `reference_motion`'s temporal transformers behind the layers named in the published table and replace the
GroupNorms that see all frames; the sampler is written out here. All forms of a family go through in one batch, each
clip by itself; forms that differ in nothing but their file's layout share a reference.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import reference_motion as reference
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

CFG = 2.0
TIMES = (999, 666, 333, 0)  # the host's "normal" schedule of four steps
EVOLVED = "as AnimateDiff-Evolved"

# Published slot -> (block of the host's UNet, layer of the block the module stands behind).
SD15_PLACES = {
    **{f"down_blocks.{i}.motion_modules.{j}": (f"input_blocks.{3 * i + 1 + j}", 0 if i == 3 else 1)
       for i in range(4) for j in range(2)},
    "mid_block.motion_modules.0": ("middle_block", 1),
    **{f"up_blocks.{i}.motion_modules.{j}": (f"output_blocks.{3 * i + j}", 0 if i == 0 else 1)
       for i in range(4) for j in range(3)},
}
SDXL_PLACES = {
    **{f"down_blocks.{i}.motion_modules.{j}": (f"input_blocks.{3 * i + 1 + j}", 0 if i == 0 else 1)
       for i in range(3) for j in range(2)},
    **{f"up_blocks.{i}.motion_modules.{j}": (f"output_blocks.{3 * i + j}", 0 if i == 2 else 1)
       for i in range(3) for j in range(3)},
}
NORMS = {
    "resnet": (re.compile(r"(?:input_blocks|middle_block|output_blocks)\..*\.(?:in_layers|out_layers)\.0"), 1e-5),
    "out": (re.compile(r"out\.0"), 1e-5),
    "transformer": (re.compile(r"(?:input_blocks|middle_block|output_blocks)\.(?:\d+\.)?\d+\.norm"), 1e-6),
}


@dataclass(frozen=True)
class Form:
    """A published variant, in the authors' words: rows of positions, mid block, norms over all frames, schedule."""

    positions: int | None
    mid: bool
    joint: tuple[str, ...] = ()
    schedule: tuple[str, float] = ("beta", 0.012)
    layout: str = "original"
    group_norm: str = "as trained"


EVERY = ("resnet", "out", "transformer", "motion")
SD15_FORMS = {
    "v1": Form(24, False, ("resnet", "out")),
    "v1 as Evolved": Form(24, False, EVERY, group_norm=EVOLVED),
    "v2": Form(32, True),
    "v3": Form(32, False),
    "AnimateLCM": Form(None, True),
}
SDXL_FORMS = {
    "SDXL beta": Form(32, False, ("motion",), ("root", 0.020)),
    "SDXL beta as Evolved": Form(32, False, EVERY, ("root", 0.020), group_norm=EVOLVED),
    "HotshotXL": Form(24, False, ("resnet", "out"), ("root", 0.012), layout="Hotshot"),
}


def slot_widths(places: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    levels = (320, 640, 1280, 1280) if "down_blocks.3.motion_modules.0" in places else (320, 640, 1280)
    found = {}
    for slot in places:
        side, level = slot.split(".")[:2]
        found[slot] = {"down_blocks": levels, "up_blocks": levels[::-1]}.get(side, levels[-1:] * 9)[
            int(level) if level.isdigit() else 0]
    return found


def module_shapes(c: int) -> dict[str, tuple[int, ...]]:
    """The 26 tensors of one temporal transformer."""
    block = "transformer_blocks.0"
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (c,), "norm.bias": (c,)}
    for name in ("proj_in", "proj_out"):
        shapes |= {f"{name}.weight": (c, c), f"{name}.bias": (c,)}
    for i in range(2):
        shapes |= {f"{block}.attention_blocks.{i}.to_{p}.weight": (c, c) for p in "qkv"}
        shapes |= {f"{block}.attention_blocks.{i}.to_out.0.weight": (c, c),
                   f"{block}.attention_blocks.{i}.to_out.0.bias": (c,),
                   f"{block}.norms.{i}.weight": (c,), f"{block}.norms.{i}.bias": (c,)}
    return shapes | {f"{block}.ff_norm.weight": (c,), f"{block}.ff_norm.bias": (c,),
                     f"{block}.ff.net.0.proj.weight": (8 * c, c), f"{block}.ff.net.0.proj.bias": (8 * c,),
                     f"{block}.ff.net.2.weight": (c, 4 * c), f"{block}.ff.net.2.bias": (c,)}


@dataclass
class Family:
    """An image MODEL of full channel widths, the reference UNet on the same weights, and motion weights by slot."""

    model: ModelPatcher
    places: Mapping[str, tuple[str, int]]
    forms: Mapping[str, Form]
    unet: torch.nn.Module
    motion: dict[str, dict[str, Tensor]]

    def likeness(self, name: str) -> str:
        """The first form that computes just what this one computes."""
        def what(form: Form) -> tuple:
            return form.joint, form.mid, form.schedule

        return next(other for other, form in self.forms.items() if what(form) == what(self.forms[name]))

    @property
    def distinct(self) -> dict[str, Form]:
        return {name: form for name, form in self.forms.items() if self.likeness(name) == name}

    def payload(self, form: Form) -> dict[str, Tensor]:
        """The motion weights as a file of this form."""
        file = {}
        for slot, weights in self.motion.items():
            if slot.startswith("mid_block") and not form.mid:
                continue
            stem = f"{slot}.temporal_transformer."
            file |= {stem + name: tensor for name, tensor in weights.items()}
            table = reference.position_table(torch.arange(form.positions or 0), weights["norm.weight"].shape[0])[None]
            if form.positions:
                file |= {f"{stem}transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe": table for i in range(2)}
        if form.layout == "Hotshot":
            file = {name.replace("motion_modules", "temporal_attentions").replace("temporal_transformer.", "")
                    .replace("pos_encoder.pe", "pos_encoder.positional_encoding"): t for name, t in file.items()}
        return file

    def conditions(self, noise: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Text (1, tokens, width) and pooled text with sizes (1, adm) or None; positive, then negative."""
        found = []
        for seed in (1, 2):
            text, extra = tiny_host.conditioning(self.model, seed)[0]
            y = self.model.model.encode_adm(
                noise=noise, device=noise.device, height=noise.shape[2] * 8, width=noise.shape[3] * 8,
                prompt_type="positive", **extra) if self.model.model.adm_channels else None
            found.append((text, y))
        return found


class Pool:
    """Seeded normal numbers to cut weights from: drawing a billion of them would take longer than the tests."""

    def __init__(self, seed: int) -> None:
        self.numbers = torch.randn(2**25, generator=torch.Generator().manual_seed(seed))
        self.taken = 0

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape: matrices keep the variance of what they multiply, norms are near one."""
        count = torch.Size(shape).numel()
        self.taken = (self.taken + 7919) % (len(self.numbers) - count)
        cut = self.numbers[self.taken : self.taken + count].view(shape)
        if len(shape) > 1:
            return cut * torch.Size(shape[1:]).numel() ** -0.5
        return 0.1 * cut + (1.0 if name.endswith("weight") else 0.0)


class Float64(comfy.ops.manual_cast):
    """The host's layers that compute in the type of what comes in: float64 activations, float32 weights at rest."""

    class Conv2d(comfy.ops.manual_cast.Conv2d):
        """Written out as one matrix product for the whole batch; torch's own takes one per image in float64."""

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            columns = torch.nn.functional.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
            out = self.weight.to(x.dtype).flatten(1) @ columns.transpose(0, 1).flatten(1)
            out = out.unflatten(1, (n, -1)).transpose(0, 1) + self.bias.to(x.dtype)[:, None]
            return out.unflatten(2, (-1, (w - 1) // self.stride[1] + 1))


def family(config_class: type, unet_config: dict, places: Mapping[str, tuple[str, int]],
           forms: Mapping[str, Form]) -> Family:
    config, pool, device = config_class(unet_config), Pool(0), torch.device("cpu")
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        base = config.get_model({}, "", device=None)
        with torch.no_grad():
            for name, parameter in base.diffusion_model.named_parameters():
                parameter.copy_(pool.take(name, tuple(parameter.shape)))
        unet = openaimodel.UNetModel(**{**config.unet_config, "dtype": torch.float32}, device="meta",
                                     operations=Float64)
        unet.load_state_dict(base.diffusion_model.state_dict(), assign=True)
        motion = {slot: {name: pool.take(name, shape) for name, shape in module_shapes(c).items()}
                  for slot, c in slot_widths(places).items()}
    model = ModelPatcher(base, load_device=device, offload_device=device)
    return Family(model, places, forms, unet.eval().requires_grad_(False), motion)


@contextmanager
def hooked(family: Family, rows: Mapping[str, slice], frames: int) -> Iterator[None]:
    """The reference UNet as a video UNet, each form on its own rows of the batch."""
    hooks = []
    modules = dict(family.unet.named_modules())
    clips = [(family.forms[name], part) for name, part in rows.items()]

    def replaced(out: Tensor, parts: list[slice], compute: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        out = out.clone()
        for part in parts:
            out[part] = compute(source[part])
        return out

    for slot, (block, layer) in family.places.items():
        def move(_: torch.nn.Module, args: tuple, out: Tensor, slot: str = slot) -> Tensor:
            weights = {name: tensor.double() for name, tensor in family.motion[slot].items()}
            for joint in (False, True):
                parts = [part for form, part in clips if ("motion" in form.joint) == joint
                         and (form.mid or not slot.startswith("mid_block"))]
                out = replaced(out, parts, functools.partial(reference.temporal_transformer, weights=weights,
                                                             frames=frames, joint_norm=joint), out)
            return out

        hooks.append(modules[f"{block}.{layer}"].register_forward_hook(move))
    for name, module in modules.items():
        for kind, (pattern, eps) in NORMS.items():
            parts = [part for form, part in clips if kind in form.joint]
            if parts and pattern.fullmatch(name):
                assert isinstance(module, torch.nn.GroupNorm) and module.eps == eps, name

                def joint(norm: torch.nn.GroupNorm, args: tuple, out: Tensor, parts: list[slice] = parts) -> Tensor:
                    return replaced(out, parts, lambda x: reference.group_norm(x, norm.weight, norm.bias, frames,
                                                                               norm.eps), args[0])

                hooks.append(module.register_forward_hook(joint))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_attention(_: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: object, **kw: object) -> Tensor:
    """Softmax attention written out, on the host's (batch, tokens, channels)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


Conditions = list[tuple[Tensor, Tensor | None]]


def reference_calls(family: Family, x: Mapping[str, Tensor], time: float, conditions: Conditions) -> dict[str, Tensor]:
    """All forms and conditions in one call of the UNet, as clips that know nothing of each other.

    Shapes: x, per form, (f, 4, h, w) -> per form (conditions, f, 4, h, w), float64.
    """
    frames, count = next(iter(x.values())).shape[0], len(conditions)
    rows = {name: slice(i * count * frames, (i + 1) * count * frames) for i, name in enumerate(x)}
    batch = torch.cat([clip.double() for clip in x.values() for _ in conditions])
    text = torch.cat([text.double().expand(frames, -1, -1) for text, _ in conditions]).repeat(len(x), 1, 1)
    pooled = [y.double().expand(frames, -1) for _, y in conditions if y is not None]
    with hooked(family, rows, frames):
        out = family.unet(batch, torch.full((len(batch),), float(time)), context=text,
                          y=torch.cat(pooled).repeat(len(x), 1) if pooled else None,
                          transformer_options={"optimized_attention_override": exact_attention})
    return {name: out[part].unflatten(0, (count, frames)) for name, part in rows.items()}


def reference_samples(family: Family, noise: Tensor, conditions: Conditions) -> dict[str, Tensor]:
    """Four steps of Euler's method on the probability flow, guided, in float64; latents scaled back at the end."""
    levels = {name: reference.sigmas(*form.schedule) for name, form in family.distinct.items()}
    x = {name: noise.double() * (1.0 + sigma[TIMES[0]] ** 2) ** 0.5 for name, sigma in levels.items()}
    for time, following in zip(TIMES, (*TIMES[1:], None), strict=True):
        scaled = {name: clip / (levels[name][time] ** 2 + 1.0) ** 0.5 for name, clip in x.items()}
        for name, (cond, uncond) in reference_calls(family, scaled, time, conditions).items():
            step = (0.0 if following is None else levels[name][following]) - levels[name][time]
            x[name] = x[name] + (uncond + (cond - uncond) * CFG) * step
    return {name: clip / family.model.model.latent_format.scale_factor for name, clip in x.items()}
