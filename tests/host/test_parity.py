"""Whole-network parity, per variant: the pack inside the host against float64 modules hung into the host's UNet.

The reference side uses nothing of the pack: a second UNet object of the host's class on the same weights computes in
float64; forward hooks put `reference_motion`'s temporal transformers behind the layers named in the published table
and replace the GroupNorms that see all frames; the sampler is written out here. Channel widths are those of SD1.5
and SDXL; one call is on 64 x 32 px (8 x 4 latents), a sample of four guided steps on 32 x 32 px, and SDXL's
transformers are one block deep instead of two and ten, so that a float32 copy and a computation in float64 stay
small. All forms of a family go through the reference UNet in one batch, each clip by itself; forms that differ in
nothing but their file's layout share a reference.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.supported_models
import comfy.utils
import helpers_motion
import pytest
import reference_motion as reference
import tiny_host
import torch
from comfy.model_patcher import ModelPatcher
from latentmotion.host.motion import manage
from latentmotion.motion_modules.animatediff import spec as specs
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from torch import Tensor

EXACT = 1e-5
FRAMES = 4
STEPS = 4
CFG = 2.0
TIMES = (999, 666, 333, 0)  # the host's "normal" schedule of four steps
MIDDLE = 500
CALL_SIZE, SAMPLE_SIZE = (8, 4), (4, 4)  # latent pixels
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


@contextmanager
def watched(unet: torch.nn.Module) -> Iterator[dict[str, list]]:
    """Note the time, the text and the pooled text of every call."""
    seen: dict[str, list] = {"time": [], "text": [], "pooled": []}

    def note(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen["time"].append(float(args[1][0]))
        for i, label in enumerate(kwargs["transformer_options"]["cond_or_uncond"]):
            first = i * args[0].shape[0] // len(kwargs["transformer_options"]["cond_or_uncond"])
            seen["text"].append((label, kwargs["context"][first].clone()))
            if kwargs.get("y") is not None:
                seen["pooled"].append((label, kwargs["y"][first].clone()))

    hook = unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


SETTINGS = {"strength": 1.0, "motion_scale": 1.0, "start_percent": 0.0, "end_percent": 1.0, "frames": 0,
            "noise_schedule": "as trained", "positions": "as trained"}


def video_model(family: Family, form: Form, run_node: Callable[..., tuple]) -> ModelPatcher:
    """Through the pack's front door: the file is identified from its tensors, the node is called as the host does."""
    with torch.inference_mode(False):
        module = manage(read_motion_module(family.payload(form), "x.ckpt"), "x.ckpt")
    (model,) = run_node("LatentMotionApplyMotionModule", model=family.model, motion_module=module,
                        group_norm=form.group_norm, **SETTINGS)
    return model


def noise_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(FRAMES, 4, *size, generator=torch.Generator().manual_seed(0))


def one_call(model: ModelPatcher, x: Tensor, conditions: Conditions) -> Tensor:
    """What the host's apply_model takes for noise in x at one time, in an ordinary call with one condition."""
    sigma = model.get_model_object("model_sampling").sigmas[MIDDLE]
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    model.pre_run()
    options = model.model_options["transformer_options"] | {"cond_or_uncond": [0], "wrappers": model.wrappers,
                                                            "sigmas": sigma[None], "callbacks": model.callbacks}
    text, y = conditions[0]
    with watched(model.model.diffusion_model) as seen:
        denoised = model.model.apply_model(
            x, sigma.expand(FRAMES), transformer_options=options, c_crossattn=text.expand(FRAMES, -1, -1),
            **({} if y is None else {"y": y.expand(FRAMES, -1)}))
    assert seen["time"] == [MIDDLE]
    return (x - denoised).double() / float(sigma)


def whole_sample(model: ModelPatcher, noise: Tensor, conditions: Conditions) -> Tensor:
    """The host's own sampling of an empty latent; it must have asked for the times and texts the reference used."""
    with watched(model.model.diffusion_model) as seen:
        found = comfy.sample.sample(model, noise, STEPS, CFG, "euler", "normal", tiny_host.conditioning(model, 1),
                                    tiny_host.conditioning(model, 2), torch.zeros_like(noise), seed=1,
                                    disable_pbar=True)
    assert sorted(set(seen["time"]), reverse=True) == list(TIMES)
    assert all(torch.equal(text, conditions[label][0][0]) for label, text in seen["text"])
    assert all(torch.equal(y, conditions[label][1][0]) for label, y in seen["pooled"])
    assert {label for label, _ in seen["text"]} == {0, 1}
    return found


def set_up(config_class: type, unet_config: dict, places: Mapping[str, tuple[str, int]],
           forms: Mapping[str, Form]) -> Iterator[Family]:
    """Build, and give the memory back before the next family is built."""
    made = family(config_class, unet_config, places, forms)
    yield made
    made.motion.clear()
    made.unet.to("meta")
    made.model.model.diffusion_model.to("meta")
    gc.collect()


class Parity:
    """The two claims, for every form of the family that the subclass builds."""

    @pytest.fixture(scope="class")
    def expected_calls(self, full: Family) -> dict[str, Tensor]:
        with torch.inference_mode():
            x = noise_of(CALL_SIZE)
            scaled = {name: x.double() / (reference.sigmas(*form.schedule)[MIDDLE] ** 2 + 1.0) ** 0.5
                      for name, form in full.distinct.items()}
            return reference_calls(full, scaled, MIDDLE, full.conditions(x)[:1])

    @pytest.fixture(scope="class")
    def expected_samples(self, full: Family) -> dict[str, Tensor]:
        with torch.inference_mode():
            noise = noise_of(SAMPLE_SIZE)
            return reference_samples(full, noise, full.conditions(noise))

    def check(self, name: str, full: Family, expected_calls: dict[str, Tensor], expected_samples: dict[str, Tensor],
              run_node: Callable[..., tuple]) -> None:
        model = video_model(full, full.forms[name], run_node)
        x, noise = noise_of(CALL_SIZE), noise_of(SAMPLE_SIZE)
        call = one_call(model, x, full.conditions(x))
        same = full.likeness(name)
        of_call = reference.relative_error(call, expected_calls[same][0])
        of_sample = reference.relative_error(whole_sample(model, noise, full.conditions(noise)),
                                             expected_samples[same])
        assert of_call < EXACT and of_sample < EXACT
        others = [error for other, error in ((other, reference.relative_error(call, result[0]))
                                             for other, result in expected_calls.items()) if other != same]
        assert min(others) > 1e-3, "forms that cannot be told apart prove nothing"


@pytest.mark.slow
class TestSD15(Parity):
    @pytest.fixture(scope="class")
    def full(self) -> Iterator[Family]:
        config = tiny_host.sd15_config(model_channels=320, context_dim=768)
        yield from set_up(comfy.supported_models.SD15, config, SD15_PLACES, SD15_FORMS)

    @pytest.mark.parametrize("name", SD15_FORMS)
    def test_equals_the_authors(self, name: str, full: Family, expected_calls: dict, expected_samples: dict,
                                run_node: Callable[..., tuple]) -> None:
        self.check(name, full, expected_calls, expected_samples, run_node)


@pytest.mark.slow
class TestSDXL(Parity):
    @pytest.fixture(scope="class")
    def full(self) -> Iterator[Family]:
        config = tiny_host.sdxl_config(
            model_channels=320, context_dim=2048, transformer_depth=[0, 0, 1, 1, 1, 1], transformer_depth_middle=1,
            transformer_depth_output=[0, 0, 0, 1, 1, 1, 1, 1, 1])
        yield from set_up(comfy.supported_models.SDXL, config, SDXL_PLACES, SDXL_FORMS)

    @pytest.mark.parametrize("name", SDXL_FORMS)
    def test_equals_the_authors(self, name: str, full: Family, expected_calls: dict, expected_samples: dict,
                                run_node: Callable[..., tuple]) -> None:
        self.check(name, full, expected_calls, expected_samples, run_node)


DIFFUSERS_NAMES = {"temporal_transformer.": "", "attention_blocks.0.": "attn1.", "attention_blocks.1.": "attn2.",
                   ".norms.0.": ".norm1.", ".norms.1.": ".norm2.", ".ff_norm.": ".norm3."}


def test_equals_diffusers_whole_network(run_node: Callable[..., tuple]) -> None:
    """diffusers' own UNetMotionModel, small: places and order of all 21 modules, by a third implementation.

    Its motion norm is over all frames for every module, as the authors' is for SDXL beta; so this variant is compared.
    """
    library = pytest.importorskip("diffusers")
    image, module = tiny_host.sd15(), helpers_motion.motion_module(variant=specs.SDXL_BETA)
    theirs = library.UNetMotionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), layers_per_block=2, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3, motion_max_seq_length=32,
        num_attention_heads=8, motion_num_attention_heads=8,
    )
    host, motion = image.model.diffusion_model.state_dict(), module.patcher.model.state_dict()
    for ours, name in DIFFUSERS_NAMES.items():
        motion = {key.replace(ours, name): tensor for key, tensor in motion.items()}
    names = comfy.utils.unet_to_diffusers(image.model.model_config.unet_config)
    renamed = motion | {name: host[key] for name, key in names.items() if key in host}
    left = theirs.load_state_dict(renamed, strict=False)
    assert all(key.endswith("pos_embed.pe") for key in left.missing_keys) and len(left.missing_keys) == 21
    assert not left.unexpected_keys
    (video,) = run_node("LatentMotionApplyMotionModule", model=image, motion_module=module, group_norm="as trained",
                        **SETTINGS)
    x, (text, _) = noise_of(CALL_SIZE), tiny_host.conditioning(image, 1)[0]
    sigma = video.get_model_object("model_sampling").sigmas[MIDDLE]
    scaled = (x / (sigma**2 + 1.0) ** 0.5).transpose(0, 1)[None]
    expected = theirs(scaled, MIDDLE, encoder_hidden_states=text.expand(FRAMES, -1, -1)).sample[0].transpose(0, 1)
    assert reference.relative_error(one_call(video, x, [(text, None)]), expected) < EXACT
