"""Train the demo models from nothing: `scripts/run.py train-demo`.

Stages run in order, each leaves its file in the output folder, and a stage whose file is there is not run again;
an interrupted stage goes on where it was. Run it with OMP_NUM_THREADS=1 on a busy machine: two threads that wait
for each other were ten times slower than one.

Measured, bfloat16: on a core of a Sapphire Rapids CPU autoencoder 0.47 s a step, decoder 0.75 s, image stages 0.46 s,
adapter 0.36 s; on one of a Zen 4 EPYC motion stages and zooms 0.92 s (with two threads 0.55 s), of whole clips 1.7 s:
five hours of a core in all. `--rehearse 2` goes through all in minutes; no full run has. The committed weights came
from stages run one by one (bench/RESULTS.md).
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..host import demo_models
from ..motion_modules.animatediff.lora import published_key
from ..motion_modules.animatediff.network import MotionModel, sinusoid
from ..training.attention import over_frames
from ..training.checkpoint import load_weights, save_weights
from ..training.loop import Recipe, fit
from ..training.lora import LowRankSet, attention_layers, published_pairs
from ..training.precision import fast_dtype, planar_norms
from . import autoencoder, config, control, decoder, image, motion
from .captions import DIRECTIONS, sentences
from .latents import OPENING, Order, Samples, obtain
from .text import Vocabulary, stress
from .world import FRAMES

CACHE = Path.home() / ".cache" / "latentmotion" / "train"
REHEARSED = 24  # samples of a kind


@dataclass
class Workshop:
    """Where a training run reads, writes and computes. rehearsal: so many steps of every stage, 0 all of them."""

    out: Path
    state: Path
    device: torch.device
    dtype: torch.dtype
    rehearsal: int = 0

    @property
    def encoder(self) -> Path:
        """The autoencoder of the first stage: its encoder is final, its decoder is finished by the second."""
        return self.state / "autoencoder.safetensors"

    def fit(self, parameters: dict[str, nn.Parameter], loss_of: Callable, recipe: Recipe) -> dict[str, torch.Tensor]:
        if self.rehearsal:
            recipe = replace(recipe, steps=self.rehearsal, warmup=0)
        return fit(parameters, loss_of, recipe, self.state / f"{recipe.name}.pt", Progress(recipe.name))

    def samples(self, order: Order) -> Samples:
        """Drawn and encoded samples, from the cache where this autoencoder has encoded them before."""
        stamp = hashlib.sha256(self.encoder.read_bytes()).hexdigest()
        if self.rehearsal:
            order = replace(order, count=REHEARSED)
        return obtain(order, Encoding(self, self.encoder), self.state / "latents", stamp)

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
        left = pace * (total - step) / 60
        print(f"{self.name}: {step}/{total}  loss {mean:.4f}  {pace:.2f} s/step  {left:.1f} min left", flush=True)
        self.last, self.losses = now, []


def train_autoencoder(shop: Workshop) -> None:
    vae = demo_models.build_vae()
    autoencoder.initialise(vae, torch.Generator().manual_seed(autoencoder.RECIPE.seed))
    shop.place(vae)
    with planar_norms(vae):
        loss_of = autoencoder.loss_for(vae, shop.device, shop.dtype)
        weights = shop.fit(dict(vae.named_parameters()), loss_of, autoencoder.RECIPE)
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
    """Text encoder and UNet from nothing: first the looks, then what the captions say."""
    generator = torch.Generator().manual_seed(image.RECIPE.seed)
    vocabulary = make_vocabulary()
    encoder, unet = demo_models.build_text_encoder(), demo_models.build_unet()
    vocabulary.shrink(encoder)
    autoencoder.initialise(encoder, generator)
    image.initialise_unet(unet, generator)
    nn.init.eye_(encoder.text_projection.weight)
    _fit_image(shop, Studio(unet, encoder, vocabulary), image.RECIPE, shop.state / "image")


def finish_image(shop: Workshop) -> None:
    """The outlines."""
    _fit_image(shop, Studio.read(shop.state / "image"), image.FINISH, shop.state / "finish")


def polish_image(shop: Workshop) -> None:
    """One shape and no second one."""
    _fit_image(shop, Studio.read(shop.state / "finish"), image.POLISH, shop.state / "polish")


def compose_image(shop: Workshop) -> None:
    """Where a shape that is to move stands: without this the words for directions mean nothing to the image model,
    and no motion module can read them from it."""
    studio = Studio.read(shop.state / "polish")
    stress(studio.encoder, studio.vocabulary, DIRECTIONS, image.STRESS)
    _fit_image(shop, studio, image.COMPOSE, shop.state / "compose", image.OPENINGS)


def settle_image(shop: Workshop) -> None:
    """Then the shapes again, which suffered from it."""
    _fit_image(shop, Studio.read(shop.state / "compose"), image.SETTLE, shop.out, image.OPENINGS)


def _fit_image(shop: Workshop, studio: Studio, recipe: Recipe, folder: Path, pictures: Order = image.PICTURES) -> None:
    encoder, unet, vocabulary = studio.encoder, studio.unet, studio.vocabulary
    shop.place(encoder), shop.place(unet)
    unet.dtype = shop.dtype
    encoder.text_projection.requires_grad_(False)  # the host wants it; the demo's UNet reads the hidden states
    networks = nn.ModuleDict({"unet": unet, "encoder": encoder})
    parameters = {name: p for name, p in networks.named_parameters() if p.requires_grad}
    samples = shop.samples(pictures)
    with planar_norms(unet):
        weights = shop.fit(parameters, image.loss_for(unet, encoder, vocabulary, samples, recipe, shop.device), recipe)
    weights["encoder.text_projection.weight"] = torch.eye(config.TEXT_WIDTH)
    kept = asdict(recipe) | {"tokens": vocabulary.tokens}
    save_weights(folder / config.CLIP_FILE, _part(weights, "encoder."), kept)
    save_weights(folder / config.UNET_FILE, _part(weights, "unet."), kept)


def make_vocabulary() -> Vocabulary:
    """Every caption of the world and the empty one: the held-out combinations are new sentences of known words."""
    splits = [(split, moving) for split in ("train", "test", "heldout") for moving in (False, True)]
    texts = {words.text for split, moving in splits for words in sentences(split, moving)}
    return Vocabulary(["", *sorted(texts)], demo_models.tokenizer())


@dataclass
class Studio:
    """The finished image model, frozen, for the stages that build on it."""

    unet: nn.Module
    encoder: nn.Module
    vocabulary: Vocabulary

    @classmethod
    def read(cls, folder: Path, adapter: Path | None = None) -> Studio:
        """Read the image model; with the domain adapter `adapter` merged into it for what is learned from clips."""
        vocabulary = make_vocabulary()
        encoder, unet = demo_models.build_text_encoder(), demo_models.build_unet()
        vocabulary.shrink(encoder)
        encoder.load_state_dict(load_weights(folder / config.CLIP_FILE))
        weights = load_weights(folder / config.UNET_FILE)
        if adapter:
            changes = load_weights(adapter)
            for published, layer in demo_models.adapter_layers().items():
                key = published_key(published)
                weights[f"{layer}.weight"] += changes[f"{key}.up.weight"] @ changes[f"{key}.down.weight"]
        unet.load_state_dict(weights)
        return cls(unet, encoder, vocabulary)

    def freeze(self, shop: Workshop) -> Studio:
        for network in (self.encoder, self.unet):
            shop.place(network).requires_grad_(False)
        self.unet.dtype = shop.dtype
        return self

    def loss(self, shop: Workshop, samples: Samples, recipe: Recipe, schedule: str, place: motion.Place) -> Callable:
        parts = (self.unet, self.encoder, self.vocabulary)
        return motion.clip_loss(*parts, samples, recipe, shop.device, schedule, place)

    @contextmanager
    def moving(self, module: MotionModel) -> Iterator[motion.Place]:
        """With a motion module in its place."""
        with (
            planar_norms(self.unet),
            planar_norms(module),
            demo_models.motion_in_place(self.unet, module, FRAMES, over_frames) as place,
        ):
            yield place


def train_adapter(shop: Workshop) -> None:
    """Low-rank changes to the image model's attentions that learn how single frames of the clips look.

    First frames, which are composed as the stills are: of later ones it would learn that the direction says nothing
    about the place, and the motion module, trained with it in place, would never see the direction.
    """
    studio, recipe = Studio.read(shop.out).freeze(shop), motion.ADAPTER
    layers = demo_models.adapter_layers()
    adapter = LowRankSet(studio.unet, list(layers.values()), config.ADAPTER_RANK)
    samples = motion.single_frames(shop.samples(motion.CLIPS), OPENING)
    with planar_norms(studio.unet), adapter.on(studio.unet):
        loss_of = studio.loss(shop, samples, recipe, "scaled_linear", lambda _: {})
        weights = shop.fit(dict(adapter.named_parameters()), loss_of, recipe)
    names = {layer: name for name, layer in layers.items()}
    save_weights(shop.out / config.ADAPTER_FILE, published_pairs(adapter, 1.0, weights, names), asdict(recipe))


def train_motion(shop: Workshop) -> None:
    """A motion module, over the image model with its adapter, on clips."""
    module = MotionModel(demo_models.motion_spec())
    motion.initialise_motion(module, torch.Generator().manual_seed(motion.MOTION.seed))
    _fit_motion(shop, module, motion.MOTION, shop.state / "motion")


def relate_motion(shop: Workshop) -> None:
    """Then what neighbours have in common, which frames from anywhere in a clip do not show."""
    _fit_motion(shop, read_motion(shop.state / "motion"), motion.NEIGHBOURS, shop.state / "neighbours")


def settle_motion(shop: Workshop) -> None:
    """Then that shapes do not tremble."""
    _fit_motion(shop, read_motion(shop.state / "neighbours"), motion.SETTLE, shop.out)


def _fit_motion(shop: Workshop, module: MotionModel, recipe: Recipe, folder: Path) -> None:
    studio = Studio.read(shop.out, shop.out / config.ADAPTER_FILE).freeze(shop)
    shop.place(module)
    with studio.moving(module) as place:
        loss_of = studio.loss(shop, shop.samples(motion.CLIPS), recipe, "linear", place)
        weights = shop.fit(dict(module.named_parameters()), loss_of, recipe)
    save_weights(folder / config.MOTION_FILE, weights | _tables(module), asdict(recipe))


def read_motion(folder: Path) -> MotionModel:
    module = MotionModel(demo_models.motion_spec())
    weights = load_weights(folder / config.MOTION_FILE)
    module.load_state_dict({key: tensor for key, tensor in weights.items() if "pos_encoder" not in key})
    return module


def _tables(module: MotionModel) -> dict[str, torch.Tensor]:
    """The position tables published files carry: one of `MOTION_POSITIONS` rows for every attention."""
    positions = torch.arange(config.MOTION_POSITIONS)
    tables = {}
    for name, width in module.spec.slots:
        for i in range(module.spec.attentions):
            key = f"{name}.temporal_transformer.transformer_blocks.0.attention_blocks.{i}.pos_encoder.pe"
            tables[key] = sinusoid(positions, width)[None]
    return tables


def _train_zoom(recipes: tuple[Recipe, ...], order: Order, file: str, shop: Workshop) -> None:
    """A MotionLoRA: the motion module stays, low-rank changes to its attentions learn the camera, run by run."""
    studio = Studio.read(shop.out, shop.out / config.ADAPTER_FILE).freeze(shop)
    module = read_motion(shop.out)
    shop.place(module).requires_grad_(False)
    layers = attention_layers(module, ())
    changes = LowRankSet(module, layers, config.MOTION_LORA_RANK)
    samples = shop.samples(order)
    with changes.on(module), studio.moving(module) as place:
        for recipe in recipes:
            path = (shop.out if recipe is recipes[-1] else shop.state / recipe.name) / file
            if not path.is_file():
                loss_of = studio.loss(shop, samples, recipe, "linear", place)
                weights = shop.fit(dict(changes.named_parameters()), loss_of, recipe)
                scale = motion.MORE[order.name] if recipe is recipes[-1] else 1.0
                save_weights(path, published_pairs(changes, scale, weights), asdict(recipe))
            changes.take(layers, load_weights(path))


def train_control(shop: Workshop) -> None:
    """A ControlNet for edges, on the finished image model."""
    studio, recipe = Studio.read(shop.out).freeze(shop), control.RECIPE
    network = demo_models.build_controlnet(load_weights(shop.out / config.UNET_FILE))
    control.initialise_control(network, torch.Generator().manual_seed(recipe.seed))
    shop.place(network).dtype = shop.dtype
    with planar_norms(studio.unet), planar_norms(network):
        parts = (studio.unet, studio.encoder, studio.vocabulary)
        loss_of = control.loss_for(network, *parts, shop.samples(image.PICTURES), shop.device, shop.dtype)
        weights = shop.fit(dict(network.named_parameters()), loss_of, recipe)
    save_weights(shop.out / config.CONTROL_FILE, weights, asdict(recipe))


train_zoom_in = partial(_train_zoom, motion.ZOOM_IN, motion.ZOOM_IN_CLIPS, config.ZOOM_IN_FILE)
train_zoom_out = partial(_train_zoom, motion.ZOOM_OUT, motion.ZOOM_OUT_CLIPS, config.ZOOM_OUT_FILE)


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


STAGES: dict[str, tuple[Callable[[Workshop], Path], Callable[[Workshop], None]]] = {
    "autoencoder": (lambda shop: shop.encoder, train_autoencoder),
    "decoder": (lambda shop: shop.out / config.VAE_FILE, train_decoder),
    "image": (lambda shop: shop.state / "image" / config.UNET_FILE, train_image),
    "image_finish": (lambda shop: shop.state / "finish" / config.UNET_FILE, finish_image),
    "image_polish": (lambda shop: shop.state / "polish" / config.UNET_FILE, polish_image),
    "image_compose": (lambda shop: shop.state / "compose" / config.UNET_FILE, compose_image),
    "image_settle": (lambda shop: shop.out / config.UNET_FILE, settle_image),
    "adapter": (lambda shop: shop.out / config.ADAPTER_FILE, train_adapter),
    "motion": (lambda shop: shop.state / "motion" / config.MOTION_FILE, train_motion),
    "motion_neighbours": (lambda shop: shop.state / "neighbours" / config.MOTION_FILE, relate_motion),
    "motion_settle": (lambda shop: shop.out / config.MOTION_FILE, settle_motion),
    "zoom_in": (lambda shop: shop.out / config.ZOOM_IN_FILE, train_zoom_in),
    "zoom_out": (lambda shop: shop.out / config.ZOOM_OUT_FILE, train_zoom_out),
    "control": (lambda shop: shop.out / config.CONTROL_FILE, train_control),
}
"""Name of each stage, the file it leaves, and what it does."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="train-demo", description="Train the demo models from nothing.")
    parser.add_argument("--out", type=Path, help="folder for the finished files")
    rehearse = "so many steps of every stage, on a few samples and in a folder apart"
    parser.add_argument("--rehearse", type=int, default=0, metavar="STEPS", help=rehearse)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="only these, in order")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or CACHE / ("rehearsal" if arguments.rehearse else "out")
    state = (out if arguments.rehearse else CACHE) / "state"
    shop = Workshop(out, state, device, fast_dtype(device), arguments.rehearse)
    for name, (file, train) in STAGES.items():
        if name in arguments.stages and file(shop).is_file():
            print(f"{name}: done already, {file(shop)}")
        elif name in arguments.stages:
            train(shop)
    return 0
