"""Files of temporal VAEs, in every layout they are published in, become VAEs of the host that decode as they should."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import comfy.sd
import pytest
import torch
from helpers_vae import TINY, clip, random_weights
from latentmotion.bench.vaes import svd_network
from latentmotion.host import temporal_vae
from latentmotion.host.vae import EXACT, ClipDecoder, DecodeSettings
from latentmotion.motion_modules.errors import CheckpointError
from latentmotion.motion_modules.temporal_vae.checkpoint import (
    SVD_WIDTHS,
    Kind,
    TemporalVaeFile,
    Widths,
    layout,
    read_temporal_vae,
)
from safetensors.torch import save_file
from tiny_host import randomize
from torch import Tensor, nn
from torch.nn import functional

FRAMES = 5


def sizes(blocks: int) -> dict[str, object]:
    return {"block_out_channels": (32, 32, 32, 32), "layers_per_block": blocks,
            "down_block_types": ("DownEncoderBlock2D",) * 4}  # fmt: skip


def diffusers_vidrd() -> tuple[nn.Module, dict[str, Tensor]]:
    """diffusers' image autoencoder, and its file with the layers of Reuse and Diffuse in it."""
    library = pytest.importorskip("diffusers")
    vae = randomize(library.AutoencoderKL(**sizes(1), up_block_types=("UpDecoderBlock2D",) * 4)).eval()
    weights = dict(vae.state_dict())
    for key, tensor in random_weights(Kind.VIDRD, TINY).items():
        if ".temp_convs." in key:
            weights[re.sub(r"\.up\.(\d)", lambda m: f".up_blocks.{3 - int(m[1])}", key)] = tensor
    return vae, weights


def vidrd_reference(vae: nn.Module, weights: dict[str, Tensor], z: Tensor) -> Tensor:
    """The decoder of the release, its temporal layers written out: (f, 4, h, w) -> (f, 3, H, W)."""
    decoder = vae.decoder
    h = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)))
    for i, block in enumerate(decoder.up_blocks):
        for j, resnet in enumerate(block.resnets):
            h = resnet(h, None)
            branch = h.transpose(0, 1)[None]
            for k in (0, 4, 8):
                name = f"decoder.up_blocks.{i}.temp_convs.{j}.convs."
                norm, conv = ((weights[f"{name}{n}.weight"], weights[f"{name}{n}.bias"]) for n in (k, k + 3))
                branch = functional.silu(functional.group_norm(branch, 32, *norm, eps=1e-5))
                branch = functional.conv3d(branch, *conv, padding=(1, 0, 0))
            h = h + branch[0].transpose(0, 1)
        for layer in block.upsamplers or ():
            h = layer(h)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))


def pixels(y: Tensor) -> Tensor:
    return ((y + 1) / 2).clamp(0, 1).movedim(1, -1)


def test_reuse_and_diffuse_from_file(base_directory: Path, pack_nodes: dict, run_node: Callable[..., tuple]) -> None:
    network, weights = diffusers_vidrd()
    path = base_directory / "models" / "vae" / "vidrd.bin"
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path)
    (vae,) = run_node("LatentMotionLoadTemporalVAE", vae_name="vidrd.bin")
    assert isinstance(vae, comfy.sd.VAE)
    z = clip(FRAMES)
    expected = pixels(vidrd_reference(network, weights, z))
    torch.testing.assert_close(torch.cat(list(ClipDecoder(vae).frames(z))), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), expected, rtol=1e-5, atol=1e-5)
    picture = torch.rand(2, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    encoded = network.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mean
    torch.testing.assert_close(vae.encode(picture), encoded, rtol=1e-4, atol=1e-4)
    again = read_temporal_vae({f"first_stage_model.{key}": value for key, value in vae.get_sd().items()}, "saved")
    assert again.weights.keys() == vae.get_sd().keys()


def test_diffusers_svd_decodes_and_encodes_as_in_diffusers() -> None:
    """The renamed file in the host's class; widths the host's loader does not build, so the class is made here."""
    library = pytest.importorskip("diffusers")
    network = randomize(library.AutoencoderKLTemporalDecoder(**sizes(2))).eval()
    file = read_temporal_vae(network.state_dict(), "vae.safetensors")
    assert file.kind is Kind.SVD and file.widths == Widths(32, (1, 1, 1, 1), 2, 4, None)
    ours = svd_network(file.widths)
    ours.load_state_dict(file.weights)
    z = clip(FRAMES)
    expected = network.decode(z, num_frames=FRAMES).sample
    torch.testing.assert_close(ours.decode(z), expected, rtol=1e-4, atol=1e-4)
    picture = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.encode(picture), network.encode(picture).latent_dist.mean, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="other widths"):
        temporal_vae.build(file)


def test_layouts_are_those_of_the_networks() -> None:
    with torch.device("meta"):
        host = svd_network(SVD_WIDTHS).state_dict()
    assert dict(layout(Kind.SVD, SVD_WIDTHS)) == {key: tuple(tensor.shape) for key, tensor in host.items()}
    library = pytest.importorskip("diffusers")
    with torch.device("meta"):
        published = library.AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4
        )
    assert len(published.state_dict()) == len(host) + 2


def test_full_width_svd_decodes_exactly() -> None:
    """The published widths through the host's own loader; frames as small as they come."""
    file = TemporalVaeFile(Kind.SVD, SVD_WIDTHS, random_weights(Kind.SVD, SVD_WIDTHS))
    vae, z = temporal_vae.build(file), clip(3, height=2, width=2)
    expected = pixels(vae.first_stage_model.decode(z))
    found = torch.cat(list(ClipDecoder(vae, DecodeSettings(EXACT, 2)).frames(z)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda w: {k: v for k, v in w.items() if ".temp_convs." not in k}, "VAE for images"),
    (lambda w: {"a": torch.zeros(1)}, "not a VAE with a temporal decoder"),
    (lambda w: {k: v for k, v in w.items() if k != "decoder.conv_in.bias"}, "lacks 1 tensors"),
    (lambda w: {k: v for k, v in w.items() if "decoder.up_blocks.0" not in k}, "file is damaged"),
    (lambda w: w | {"decoder.more.weight": torch.zeros(2)}, "has unknown 1 tensors"),
    (lambda w: w | {"decoder.conv_in.bias": torch.zeros(3)}, "shape"),
    (lambda w: w | {"decoder.conv_in.bias": torch.full((32,), torch.nan)}, "NaN"),
    (lambda w: {k: v for k, v in w.items() if k != "decoder.conv_out.weight"}, "not whole"),
])  # fmt: skip
def test_other_and_damaged_files(change: Callable[[dict], dict], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_temporal_vae(change(diffusers_vidrd()[1]), "some.safetensors")
    assert "some.safetensors" in str(caught.value)


def test_missing_file_is_told_with_those_that_fit(base_directory: Path, pack_nodes: dict[str, type]) -> None:
    folder = base_directory / "models" / "vae"
    folder.mkdir(exist_ok=True)
    save_file({"decoder.mid.block_1.mix_factor": torch.zeros(1)}, folder / "svd_like.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, folder / "image_like.safetensors")
    message = pack_nodes["LatentMotionLoadTemporalVAE"].validate_inputs(vae_name="gone.safetensors")
    assert "svd_like.safetensors" in message and "image_like" not in message
