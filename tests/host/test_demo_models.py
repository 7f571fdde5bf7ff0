"""The demo models are ordinary models of the host, and the trained ones do what their captions say."""

from __future__ import annotations

import copy

import comfy.lora
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from latentmotion.bench.toy import Bench, captions
from latentmotion.demo import config, oracle, world
from latentmotion.demo.captions import sentences
from latentmotion.demo.text import encode
from latentmotion.host import demo_models
from latentmotion.motion_modules.animatediff.checkpoint import read_motion_module
from latentmotion.motion_modules.files import read_weights
from latentmotion.nodes.demo import LoadDemoModels
from latentmotion.training.checkpoint import load_weights


@pytest.fixture(scope="module")
def bench() -> Bench:
    with torch.inference_mode():
        return Bench.open(config.WEIGHTS)


def test_the_node_gives_what_a_checkpoint_loader_gives():
    model, clip, vae = LoadDemoModels.execute().args
    assert type(model).__name__ == "ModelPatcher"
    assert model.model.latent_format.scale_factor == config.SCALE_FACTOR
    assert isinstance(clip, comfy.sd.CLIP) and isinstance(vae, comfy.sd.VAE)


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in config.WEIGHTS.rglob("*.safetensors")) < 25e6


def test_the_autoencoder_gives_pictures_back(bench: Bench):
    """All but a few: the decoder was trained on latents that are off as sampled ones are, which costs it sharpness."""
    rng = np.random.default_rng(11)
    every = [w for split in ("train", "test", "heldout") for w in sentences(split, True) + sentences(split, False)]
    words = [every[i] for i in rng.integers(len(every), size=100)]
    scene = world.join([world.still(w, rng, mark=bool(rng.integers(2))) for w in words])
    readings = oracle.read(bench.vae.decode(bench.vae.encode(world.draw(scene))))
    right = [r.shows(w) and r.mark == m for r, w, m in zip(readings, words, scene.mark, strict=True)]
    assert np.mean(right) >= 0.97


def test_latents_have_the_scale_of_sd15(bench: Bench):
    rng = np.random.default_rng(12)
    words = sentences("train", True)
    scene = world.join([world.still(words[rng.integers(len(words))], rng) for _ in range(64)])
    latents = bench.vae.encode(world.draw(scene)) * config.SCALE_FACTOR
    assert 0.7 < latents.std().item() < 1.3
    assert abs(latents.mean().item()) < 0.3


def test_words_outside_the_captions_share_one_vector(bench: Bench):
    weight = bench.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    strangers = [bench.clip.tokenize(text)["l"][0][1][0] for text in ("banana", "masterpiece")]
    assert torch.equal(weight[strangers[0]], weight[strangers[1]])
    known = bench.clip.tokenize("red")["l"][0][1][0]
    assert not torch.equal(weight[known], weight[strangers[0]])


def test_training_and_the_host_encode_captions_alike(bench: Bench):
    text = "a red circle moves right over a blue ground"
    expected = bench.clip.encode_from_tokens(bench.clip.tokenize(text))
    tokens = torch.tensor([[token for token, _ in bench.clip.tokenize(text)["l"][0]]])
    encoder = copy.deepcopy(bench.clip.cond_stage_model.clip_l.transformer).float()
    assert torch.allclose(encode(encoder, tokens), expected, atol=0.02)  # the host computes in float16


def test_pictures_show_their_captions(bench: Bench):
    asked = captions("test", False, 6) + captions("test", True, 6)
    right = [bench.sample(bench.unet, words, 900 + i, 1)[0].shows(words) for i, words in enumerate(asked)]
    assert np.mean(right) >= 0.75, right


def test_a_clip_moves_as_its_caption_says(bench: Bench):
    video = bench.video()
    asked = captions("test", True, 4)
    ways = [oracle.path(bench.sample(video, words, 900 + i, world.FRAMES))[0] for i, words in enumerate(asked)]
    assert sum(way == words.direction for way, words in zip(ways, asked, strict=True)) >= 3, ways


def test_the_host_takes_every_tensor_of_the_adapter(bench: Bench):
    lora = comfy.utils.load_torch_file(str(config.WEIGHTS / config.ADAPTER_FILE), safe_load=True)
    keys = comfy.lora.model_lora_keys_unet(bench.unet.model, {})
    patches = comfy.lora.load_lora(lora, keys)
    assert 2 * len(patches) == len(lora)
    assert len(patches) == len(demo_models.adapter_layers())


def test_the_motion_module_is_of_the_published_layout():
    path = config.WEIGHTS / config.MOTION_FILE
    spec = read_motion_module(read_weights(path), path.name).spec
    assert set(spec.slots) == set(demo_models.motion_spec().slots)
    assert spec.positions == config.MOTION_POSITIONS


@pytest.mark.parametrize("load", [demo_models.load_unet, demo_models.load_clip, demo_models.load_vae])
def test_a_missing_file_says_how_to_make_it(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="comes with the pack: get it again"):
        load(tmp_path)


def test_a_file_of_another_build_is_refused(tmp_path):
    from latentmotion.training.checkpoint import save_weights

    weights = load_weights(config.WEIGHTS / config.UNET_FILE)
    weights.pop("out.2.bias")
    save_weights(tmp_path / config.UNET_FILE, weights, {})
    with pytest.raises(ValueError, match="out.2.bias"):
        demo_models.load_unet(tmp_path)
