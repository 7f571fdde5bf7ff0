"""Whole-network parity, per variant: the pack inside the host against float64 modules hung into the host's UNet.

Channel widths are those of SD1.5 and SDXL; one call is on 64 x 32 px (8 x 4 latents), a sample of four guided steps
on 32 x 32 px, and SDXL's transformers are one block deep instead of two and ten, so that a float32 copy and a
computation in float64 stay small.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import comfy.model_management
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
from reference_unet import (
    CFG,
    SD15_FORMS,
    SD15_PLACES,
    SDXL_FORMS,
    SDXL_PLACES,
    TIMES,
    Conditions,
    Family,
    Form,
    family,
    reference_calls,
    reference_samples,
)
from torch import Tensor

EXACT = 1e-5
FRAMES = 4
MIDDLE = 500
CALL_SIZE, SAMPLE_SIZE = (8, 4), (4, 4)  # latent pixels


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
        found = comfy.sample.sample(model, noise, len(TIMES), CFG, "euler", "normal", tiny_host.conditioning(model, 1),
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
