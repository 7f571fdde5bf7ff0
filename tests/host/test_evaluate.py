"""Evaluate Video on small random CLIP models of the host's own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import isnan
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import pytest
import tiny_host
import torch
from comfy_api.latest import InputImpl, Types
from latentmotion.host.evaluate import evaluate, text_embedding
from latentmotion.host.video import StreamedVideo
from latentmotion.media.clip import Clip, clip_of_images
from latentmotion.motion_modules.errors import ModelMismatchError
from torch import Tensor

NODE = "LatentMotionEvaluate"
WIDTH = 24
TEXT = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407,
        "vocab_size": 49408}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
          "num_channels": 3, "image_size": 16, "hidden_act": "quick_gelu", "projection_dim": WIDTH,
          "model_type": "clip_vision_model"}  # fmt: skip


class Tower(comfy.sd1_clip.SDClipModel):
    """As the host has it in SD1.x: its own pooled output leaves the projection out."""

    def __init__(self, device: str = "cpu", dtype: object = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, textmodel_json_config=dict(TEXT), return_projected_pooled=False,
                         model_options=model_options or {})  # fmt: skip


class TextModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: str = "cpu", dtype: object = None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Tower)


@pytest.fixture(scope="module")
def clip() -> comfy.sd.CLIP:
    with torch.inference_mode(False):
        found = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, TextModel))
        tiny_host.randomize(found.cond_stage_model, 1)
    return found


@pytest.fixture
def vision(tmp_path: Path) -> comfy.clip_vision.ClipVisionModel:
    (tmp_path / "vision.json").write_text(json.dumps(VISION), encoding="utf-8")
    with torch.inference_mode(False):
        found = comfy.clip_vision.ClipVisionModel(str(tmp_path / "vision.json"))
        tiny_host.randomize(found.model, 2)
    return found


def pictures(frames: int = 20) -> Tensor:
    return torch.rand(frames, 24, 32, 3, generator=torch.Generator().manual_seed(0))


def expected(clip: comfy.sd.CLIP, vision: comfy.clip_vision.ClipVisionModel, frames: Tensor, text: str) -> list[float]:
    """Both figures from one call of each encoder, over all pairs written out."""
    cosine = torch.nn.functional.cosine_similarity
    images = vision.encode_image(frames)["image_embeds"].double()
    tower = clip.cond_stage_model.clip_l
    clip.load_model()
    tokens = [[token for token, _ in clip.tokenize(text)["l"][0]]]
    pooled = tower(tokens)[1][0].double()
    words = tower.transformer.text_projection.weight.double() @ pooled
    pairs = [float(cosine(a, b, dim=0)) for a, b in combinations(images, 2)]
    return [100 * sum(pairs) / len(pairs), 100 * float(cosine(images, words[None]).mean())]


@pytest.mark.parametrize("kind", ["images", "streamed", "components"])
def test_figures_are_those_of_the_definition(
    kind: str, clip: comfy.sd.CLIP, vision: comfy.clip_vision.ClipVisionModel, run_node: Callable
) -> None:
    frames, text = pictures(), "a red (circle:1.4) moves right"
    film = {"images": lambda: frames, "streamed": lambda: StreamedVideo(clip_of_images(frames, Fraction(8))),
            "components": lambda: InputImpl.VideoFromComponents(
                Types.VideoComponents(images=frames, frame_rate=Fraction(8)))}[kind]()  # fmt: skip
    found = run_node(NODE, clip_vision=vision, video=film, text=text, crop="center", clip=clip)
    assert found == pytest.approx(expected(clip, vision, frames, text), abs=1e-3)
    squeezed, _ = run_node(NODE, clip_vision=vision, video=film, text=text, crop="none", clip=clip)
    assert squeezed != pytest.approx(found[0], abs=1e-3)


def test_the_clip_is_as_it_was(clip: comfy.sd.CLIP) -> None:
    before = clip.encode_from_tokens(clip.tokenize("a circle"), return_pooled=True)[1]
    projected = text_embedding(clip, "a circle", WIDTH)
    after = clip.encode_from_tokens(clip.tokenize("a circle"), return_pooled=True)[1]
    assert torch.equal(before, after) and not torch.allclose(projected, before[0], atol=1e-3)


def test_a_long_video_is_never_in_memory(vision: comfy.clip_vision.ClipVisionModel) -> None:
    alive: list[int] = []

    def chunks() -> object:
        for number in range(5):
            alive.append(number)
            yield pictures(3) + number * 0.1

    made = evaluate(vision, StreamedVideo(Clip(15, 24, 32, Fraction(8), chunks)), "", "center")
    whole = torch.cat([pictures(3) + number * 0.1 for number in range(5)])
    assert alive == list(range(5)) and made.frames == 15
    assert made.consistency == pytest.approx(evaluate(vision, whole, "", "center").consistency, abs=1e-3)
    assert isnan(made.faithfulness) and "connect clip and write a text" in made.report


def test_the_node_tells_its_figures(
    clip: comfy.sd.CLIP, vision: comfy.clip_vision.ClipVisionModel, pack_nodes: dict[str, type]
) -> None:
    node = pack_nodes[NODE].PREPARE_CLASS_CLONE(None)
    given = node.execute(clip_vision=vision, video=pictures(), text="a circle", crop="center", clip=clip)
    lines = given.ui.as_dict()["text"][0].split("\n")
    assert lines[:3] == ["20 frames, cosines x 100", f"frame consistency: {given.result[0]:.2f}",
                         f"textual faithfulness: {given.result[1]:.2f}"]  # fmt: skip
    assert (len(lines) == 4) == (given.result[1] < 5.0)
    single = evaluate(vision, pictures(1), " ", "center", clip)
    assert isnan(single.consistency) and "needs two frames" in single.report and isnan(single.faithfulness)


def test_cancel_answers_within_a_few_frames(vision: comfy.clip_vision.ClipVisionModel) -> None:
    made: list[int] = []

    def chunks() -> object:
        for number in range(5):
            made.append(number)
            if number == 1:
                comfy.model_management.interrupt_current_processing()
            yield pictures(3)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        evaluate(vision, StreamedVideo(Clip(15, 24, 32, Fraction(8), chunks)), "", "center")
    assert made == [0, 1]


def test_models_that_do_not_go_together_are_refused(
    clip: comfy.sd.CLIP, vision: comfy.clip_vision.ClipVisionModel, run_node: Callable
) -> None:
    inputs = {"clip_vision": vision, "video": pictures(2), "text": "a circle", "crop": "center", "clip": clip}
    projection = clip.cond_stage_model.clip_l.transformer.text_projection
    kept = projection.weight.clone()
    for broken in (torch.zeros_like(kept), torch.eye(WIDTH), kept * 1e30, kept * float("nan")):
        projection.weight.copy_(broken)
        with pytest.raises(ModelMismatchError, match="no text projection .* clip_l.safetensors"):
            run_node(NODE, **inputs)
    projection.weight.copy_(kept)
    for width in (WIDTH + 8, 7):
        with pytest.raises(ModelMismatchError, match=f"vectors of 24, and the CLIP_VISION has vectors of {width}"):
            text_embedding(clip, "a circle", width)
    with pytest.raises(ValueError, match="crop is 'other'"):
        run_node(NODE, **inputs | {"crop": "other"})
    vision.model.visual_projection = torch.nn.Identity()
    with pytest.raises(ModelMismatchError, match="cannot tell how well frames show a text"):
        run_node(NODE, **inputs)
    tokens = vision.model.vision_model
    tokens.forward = lambda *args, **kw: tuple(x if i < 2 else torch.ones(2, 5, 32) for i, x in
                                               enumerate(type(tokens).forward(tokens, *args, **kw)))  # fmt: skip
    with pytest.raises(ModelMismatchError, match="no single vector per picture"):
        run_node(NODE, **inputs | {"clip": None})
