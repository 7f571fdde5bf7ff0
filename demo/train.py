"""Train the demo models from nothing: `scripts/run.py train-demo`.

Stages run in order, each leaves its file in the output folder, and a stage whose file is there is not run again;
an interrupted stage goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..host import demo_models
from ..training.checkpoint import load_weights, save_weights
from ..motion_modules.animatediff.network import MotionModel, sinusoid
from ..training.loop import Recipe, fit
from ..training.lora import LowRankSet
from ..training.precision import fast_dtype, planar_norms
from . import autoencoder, config, decoder, image, motion
from .captions import sentences
from .latents import Order, Samples, obtain
from .text import Vocabulary
from .world import FRAMES

CACHE = Path.home() / ".cache" / "latentmotion" / "train"


@dataclass
class Workshop:
    """Where a training run reads, writes and computes."""

    out: Path
    state: Path
    device: torch.device
    dtype: torch.dtype
    said: float = field(default=0.0)

    @property
    def encoder(self) -> Path:
        """The autoencoder of the first stage: its encoder is final, its decoder is finished by the second."""
        return self.state / "autoencoder.safetensors"

    def fit(self, parameters: dict[str, nn.Parameter], loss_of: Callable, recipe: Recipe) -> dict[str, torch.Tensor]:
        return fit(parameters, loss_of, recipe, self.state / f"{recipe.name}.pt", Progress(recipe.name))

    def samples(self, order: Order) -> Samples:
        """Drawn and encoded samples, from the cache where this autoencoder has encoded them before."""
        path = self.encoder
        return obtain(order, Encoding(self, path), self.state / "latents", hashlib.sha256(path.read_bytes()).hexdigest())

    def place(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, self.dtype, memory_format=torch.channels_last)


class Encoding:
    """Encodes pictures with the finished autoencoder, which is read when the first pictures come."""

    def __init__(self, shop: Workshop, path: Path) -> None:
        self.shop, self.path = shop, path
        self.vae: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Shapes: (n, h, w, 3) in [0, 1] -> (n, 4, h/8, w/8), mean 0 and deviation 1, float32 on the CPU."""
        if self.vae is None:
            print(f"encoding with {self.path.name} ...", flush=True)
            self.vae = demo_models.build_vae()
            self.vae.load_state_dict(load_weights(self.path))
            self.shop.place(self.vae)
        images = (pictures.permute(0, 3, 1, 2) * 2 - 1).to(self.shop.device, self.shop.dtype)
        with planar_norms(self.vae):
            moments = self.vae.quant_conv(self.vae.encoder(images.contiguous(memory_format=torch.channels_last)))
        return moments.chunk(2, dim=1)[0].float().cpu() * config.SCALE_FACTOR


class Progress:
    """Prints step, mean loss since the last line and the time left, every quarter of a minute."""

    def __init__(self, name: str, every_s: float = 15.0) -> None:
        self.name, self.every_s = name, every_s
        self.first: tuple[float, int] | None = None
        self.last, self.losses = time.monotonic(), []

    def __call__(self, step: int, total: int, loss: float) -> None:
        now = time.monotonic()
        self.first = self.first or (now, step)
        self.losses.append(loss)
        if now - self.last < self.every_s and step < total:
            return
        pace = (now - self.first[0]) / max(step - self.first[1], 1)
        mean = sum(self.losses) / len(self.losses)
        print(f"{self.name}: {step}/{total}  loss {mean:.4f}  {pace:.2f} s/step  {pace * (total - step) / 60:.1f} min left",
              flush=True)
        self.last, self.losses = now, []


def train_autoencoder(shop: Workshop) -> None:
    vae = demo_models.build_vae()
    autoencoder.initialise(vae, torch.Generator().manual_seed(autoencoder.RECIPE.seed))
    shop.place(vae)
    with planar_norms(vae):
        weights = shop.fit(dict(vae.named_parameters()), autoencoder.loss_for(vae, shop.device, shop.dtype), autoencoder.RECIPE)
    vae.float().load_state_dict(weights)
    autoencoder.calibrate(vae.cpu())
    save_weights(shop.encoder, vae.state_dict(), asdict(autoencoder.RECIPE), torch.float32)


def train_decoder(shop: Workshop) -> None:
    vae = demo_models.build_vae()
    vae.load_state_dict(load_weights(shop.encoder))
    shop.place(vae).requires_grad_(False)
    parameters = decoder.parameters(vae)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with planar_norms(vae):
        weights = shop.fit(parameters, decoder.loss_for(vae, shop.device, shop.dtype), decoder.RECIPE)
    recipe = asdict(decoder.RECIPE) | {"encoder": asdict(autoencoder.RECIPE)}
    save_weights(shop.out / config.VAE_FILE, load_weights(shop.encoder) | weights, recipe)


def train_image(shop: Workshop) -> None:
    generator = torch.Generator().manual_seed(image.RECIPE.seed)
    vocabulary = make_vocabulary()
    encoder = demo_models.build_text_encoder()
    vocabulary.shrink(encoder)
    autoencoder.initialise(encoder, generator)
    unet = demo_models.build_unet()
    image.initialise_unet(unet, generator)
    shop.place(encoder), shop.place(unet)
    unet.dtype = shop.dtype
    networks = nn.ModuleDict({"unet": unet, "encoder": encoder})
    parameters = {name: p for name, p in networks.named_parameters() if "text_projection" not in name}
    samples = shop.samples(image.PICTURES)
    with planar_norms(unet):
        weights = shop.fit(parameters, image.loss_for(unet, encoder, vocabulary, samples, image.RECIPE, shop.device), image.RECIPE)
    recipe = asdict(image.RECIPE) | {"tokens": vocabulary.tokens}
    weights["encoder.text_projection.weight"] = torch.eye(config.TEXT_WIDTH)
    save_weights(shop.out / config.CLIP_FILE, _part(weights, "encoder."), recipe)
    save_weights(shop.out / config.UNET_FILE, _part(weights, "unet."), recipe)


def make_vocabulary() -> Vocabulary:
    """Every caption of the world and the empty one: the held-out combinations are new sentences of known words."""
    texts = {w.text for split in ("train", "test", "heldout") for moving in (False, True) for w in sentences(split, moving)}
    return Vocabulary(["", *sorted(texts)], demo_models.tokenizer())


@dataclass
class Studio:
    """The finished image model, frozen, for the stages that build on it."""

    unet: nn.Module
    encoder: nn.Module
    vocabulary: Vocabulary
    adapter: LowRankSet

    @classmethod
    def open(cls, shop: Workshop) -> Studio:
        vocabulary = make_vocabulary()
        encoder, unet = demo_models.build_text_encoder(), demo_models.build_unet()
        vocabulary.shrink(encoder)
        encoder.load_state_dict(load_weights(shop.out / config.CLIP_FILE))
        unet.load_state_dict(load_weights(shop.out / config.UNET_FILE))
        for network in (encoder, unet):
            shop.place(network).requires_grad_(False)
        unet.dtype = shop.dtype
        layers = demo_models.adapter_layers()
        return cls(unet, encoder, vocabulary, LowRankSet(unet, list(layers.values()), config.ADAPTER_RANK))

    def loss(self, shop: Workshop, samples: Samples, recipe: Recipe, schedule: str, options: dict) -> Callable:
        return motion.clip_loss(self.unet, self.encoder, self.vocabulary, samples, recipe, shop.device, schedule, options)

    def wear_adapter(self, shop: Workshop) -> None:
        """Load the finished domain adapter and freeze it."""
        weights = load_weights(shop.out / config.ADAPTER_FILE)
        for (published, _), change in zip(demo_models.adapter_layers().items(), self.adapter.changes, strict=True):
            key = lora_key(published)
            change.down.data.copy_(weights[f"{key}.down.weight"])
            change.up.data.copy_(weights[f"{key}.up.weight"])
        self.adapter.requires_grad_(False)


def lora_key(layer: str) -> str:
    """AnimateDiff's published key of a low-rank change to an attention projection, without `.down.weight`."""
    return layer.removesuffix(".0").replace(".to_", ".processor.to_") + "_lora"


def _save_changes(path: Path, changes: LowRankSet, weights: dict, published: list[str], recipe: dict) -> None:
    pairs = {}
    for name, (_, down, up) in zip(published, changes.pairs(weights), strict=True):
        pairs[f"{lora_key(name)}.down.weight"], pairs[f"{lora_key(name)}.up.weight"] = down, up
    save_weights(path, pairs, recipe)


def train_adapter(shop: Workshop) -> None:
    studio, recipe = Studio.open(shop), motion.ADAPTER
    samples = motion.single_frames(shop.samples(motion.CLIPS))
    with planar_norms(studio.unet), studio.adapter.on(studio.unet):
        loss_of = studio.loss(shop, samples, recipe, "scaled_linear", {})
        weights = shop.fit(dict(studio.adapter.named_parameters()), loss_of, recipe)
    published = list(demo_models.adapter_layers())
    _save_changes(shop.out / config.ADAPTER_FILE, studio.adapter, weights, published, asdict(recipe))


def train_motion(shop: Workshop) -> None:
    studio, recipe = Studio.open(shop), motion.MOTION
    studio.wear_adapter(shop)
    module = MotionModel(demo_models.motion_spec())
    motion.initialise_motion(module, torch.Generator().manual_seed(recipe.seed))
    shop.place(module)
    samples = shop.samples(motion.CLIPS)
    with (
        planar_norms(studio.unet),
        planar_norms(module),
        studio.adapter.on(studio.unet),
        demo_models.motion_in_place(studio.unet, module, FRAMES, motion.attention) as options,
    ):
        weights = shop.fit(dict(module.named_parameters()), studio.loss(shop, samples, recipe, "linear", options), recipe)
    tables = {
        f"{name}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe": sinusoid(
            torch.arange(config.MOTION_POSITIONS), channels
        )[None]
        for name, channels in module.spec.slots
        for i in range(module.spec.attentions)
    }
    save_weights(shop.out / config.MOTION_FILE, weights | tables, asdict(recipe))


def train_zoom(shop: Workshop, recipe: Recipe, order: Order, file: str) -> None:
    studio = Studio.open(shop)
    studio.wear_adapter(shop)
    module = MotionModel(demo_models.motion_spec())
    module.load_state_dict({k: v for k, v in load_weights(shop.out / config.MOTION_FILE).items() if "pos_encoder" not in k})
    shop.place(module).requires_grad_(False)
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and ".to_" in name]
    changes = LowRankSet(module, layers, config.MOTION_LORA_RANK)
    samples = shop.samples(order)
    with (
        planar_norms(studio.unet),
        planar_norms(module),
        studio.adapter.on(studio.unet),
        changes.on(module),
        demo_models.motion_in_place(studio.unet, module, FRAMES, motion.attention) as options,
    ):
        weights = shop.fit(dict(changes.named_parameters()), studio.loss(shop, samples, recipe, "linear", options), recipe)
    _save_changes(shop.out / file, changes, weights, layers, asdict(recipe))


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


STAGES = {
    "autoencoder": (None, train_autoencoder),
    "decoder": (config.VAE_FILE, train_decoder),
    "image": (config.UNET_FILE, train_image),
    "adapter": (config.ADAPTER_FILE, train_adapter),
    "motion": (config.MOTION_FILE, train_motion),
    "zoom_in": (config.ZOOM_IN_FILE, lambda shop: train_zoom(shop, motion.ZOOM_IN, motion.ZOOM_IN_CLIPS, config.ZOOM_IN_FILE)),
    "zoom_out": (config.ZOOM_OUT_FILE, lambda shop: train_zoom(shop, motion.ZOOM_OUT, motion.ZOOM_OUT_CLIPS, config.ZOOM_OUT_FILE)),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="train-demo", description="Train the demo models from nothing.")
    parser.add_argument("--out", type=Path, default=CACHE / "out", help="folder for the finished files")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="only these, in order")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shop = Workshop(arguments.out, CACHE / "state", device, fast_dtype(device))
    for name, (file, train) in STAGES.items():
        if name not in arguments.stages:
            continue
        done = shop.out / file if file else shop.encoder
        if done.is_file():
            print(f"{name}: done already, {done}")
            continue
        train(shop)
    return 0
