"""Small random host models, conditioning and sampling for the host tests. Import only where a host is loaded.

A model here is what the host's own loader returns (a ModelPatcher round a BaseModel of the SD1.5 or SDXL class), with
every slot of the real layout but few channels, and seeded random weights in every tensor, so that no layer is a no-op.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from comfy.cldm.cldm import ControlNet

SDXL_POOLED = 1280
UNET_COMMON = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


def sd15_config(model_channels: int = 32, context_dim: int = 32, **changes: Any) -> dict[str, Any]:
    """UNet configuration with SD1.5's twelve input, one middle and twelve output slots; 320, 768: SD1.5 itself."""
    return UNET_COMMON | {
        "adm_in_channels": None,
        "model_channels": model_channels,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_linear_in_transformer": False,
        "context_dim": context_dim,
    } | changes


def sdxl_config(model_channels: int = 32, context_dim: int = 32, **changes: Any) -> dict[str, Any]:
    """UNet configuration with SDXL's nine input, one middle and nine output slots (transformers 1 and 2 deep)."""
    return UNET_COMMON | {
        "num_classes": "sequential",
        "adm_in_channels": SDXL_POOLED + 6 * 256,
        "model_channels": model_channels,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "use_linear_in_transformer": True,
        "context_dim": context_dim,
    } | changes


def randomize(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter from a seeded generator: matrices keep the variance of their input, norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                value = noise * (parameter[0].numel() ** -0.5)
            else:
                value = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value)
    return network


def _patcher(
    config_class: type, unet_config: dict[str, Any], seed: int, dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> comfy.model_patcher.ModelPatcher:
    config = config_class(unet_config)
    config.set_inference_dtype(dtype, compute_dtype)
    with torch.inference_mode(False):  # ordinary tensors, as a loader outside the executor would make
        model = config.get_model({}, "", device=None)
        randomize(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def sd15(
    seed: int = 0, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None, **config: Any
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the host's SD15 class; `compute_dtype` is the manual cast for weights kept in fp8 or fp16."""
    return _patcher(comfy.supported_models.SD15, sd15_config(**config), seed, dtype, compute_dtype)


def sdxl(
    seed: int = 0, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None, **config: Any
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of the host's SDXL class."""
    return _patcher(comfy.supported_models.SDXL, sdxl_config(**config), seed, dtype, compute_dtype)


def controlnet(seed: int = 0, strength: float = 1.0, **config: Any) -> comfy.controlnet.ControlNet:
    """A CONTROL_NET for `sd15(**config)`: the host's class with random weights (no zero convolution is zero)."""
    unet = sd15_config(**config)
    with torch.inference_mode(False):
        network = ControlNet(
            **{key: value for key, value in unet.items() if key not in ("out_channels", "transformer_depth_output")},
            hint_channels=3,
            num_heads=8,
            dtype=torch.float32,
            operations=comfy.ops.disable_weight_init,
        )
        randomize(network, seed)
    device = comfy.model_management.get_torch_device()
    control = comfy.controlnet.ControlNet(network.eval(), load_device=device)
    control.strength = strength
    return control


def conditioning(model: comfy.model_patcher.ModelPatcher, seed: int = 0, tokens: int = 77, batch: int = 1) -> list:
    """Random CONDITIONING that fits `model`: cross attention (batch, tokens, context), pooled text of SDXL's width."""
    generator = torch.Generator().manual_seed(seed)
    width = model.model.model_config.unet_config["context_dim"]
    text = torch.randn(batch, tokens, width, generator=generator)
    return [[text, {"pooled_output": torch.randn(batch, SDXL_POOLED, generator=generator)}]]


def latent(frames: int = 4, height: int = 8, width: int = 8, channels: int = 4, videos: int = 1) -> torch.Tensor:
    """An empty latent batch, (videos * frames, channels, height, width)."""
    return torch.zeros(videos * frames, channels, height, width)


def sample(
    model: comfy.model_patcher.ModelPatcher,
    frames: int = 4,
    *,
    steps: int = 2,
    seed: int = 0,
    cfg: float = 2.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    size: int = 8,
    positive: list | None = None,
    negative: list | None = None,
    start: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Run the host's KSampler from an empty latent (or `start`): (frames, 4, size, size).

    `options` go to `comfy.sample.sample`: denoise, disable_noise, start_step, last_step, noise_mask, callback.
    """
    begin = latent(frames, size, size) if start is None else start
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(begin, seed),
        steps,
        cfg,
        sampler,
        scheduler,
        conditioning(model, 1) if positive is None else positive,
        conditioning(model, 2) if negative is None else negative,
        begin,
        seed=seed,
        disable_pbar=True,
        **options,
    )


def denoise_once(
    model: comfy.model_patcher.ModelPatcher,
    x: torch.Tensor,
    timestep: float = 500.0,
    context: torch.Tensor | None = None,
) -> torch.Tensor:
    """One bare call of the host's network on latents x (frames, 4, h, w), with the patcher's own options applied."""
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    text = conditioning(model, 1)[0][0] if context is None else context
    options = model.model_options["transformer_options"] | {
        "cond_or_uncond": [0],
        "sigmas": torch.tensor([1.0]),
        "wrappers": model.wrappers,
        "callbacks": model.callbacks,
    }
    adm = model.model.adm_channels
    extra = {"y": torch.zeros(x.shape[0], adm)} if adm else {}
    network = model.model.diffusion_model
    times = torch.full((x.shape[0],), timestep)
    return network(x, times, context=text.expand(x.shape[0], -1, -1), transformer_options=options, **extra)


def weights(model: comfy.model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model, for `assert_same_weights` later."""
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def assert_same_weights(model: comfy.model_patcher.ModelPatcher, before: dict[str, torch.Tensor]) -> None:
    """Fail unless the model has exactly the tensors it had, bit for bit (call after unloading or unpatching)."""
    after = model.model.state_dict()
    assert after.keys() == before.keys(), f"changed keys: {sorted(after.keys() ^ before.keys())[:5]}"
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert not changed, f"{len(changed)} tensors of the host model changed: {changed[:5]}"


def modules_of(model: comfy.model_patcher.ModelPatcher) -> list[tuple[str, str]]:
    """(dotted name, class name) of every module in the host's network, to see whether anything is still injected."""
    return [(name, type(module).__qualname__) for name, module in model.model.named_modules()]


def _is_watched(name: str) -> bool:
    rooms = ("comfy", "comfy_extras", "comfy_execution", "nodes", "execution", "latent_preview", "folder_paths")
    return name.split(".")[0] in rooms or name == "torch.nn.functional" or name.startswith("torch.nn.modules")


def global_functions() -> dict[str, object]:
    """Every function, class and method of the host and of torch.nn, by dotted name."""
    found: dict[str, object] = {}
    callables = (types.FunctionType, types.BuiltinFunctionType, type, classmethod, staticmethod, property)
    for module_name, module in list(sys.modules.items()):
        if module is None or not _is_watched(module_name):
            continue
        for name, value in list(vars(module).items()):
            if not isinstance(value, callables):
                continue
            found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                methods = {key: item for key, item in list(vars(value).items()) if isinstance(item, callables)}
                found |= {f"{module_name}.{name}.{key}": item for key, item in methods.items()}
    return found


def changed_functions(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names whose object is no longer the same one."""
    return [name for name, value in before.items() if after.get(name) is not value]


def register_core_nodes() -> dict[str, type]:
    """Register the host's own nodes and extras; the host's table of node id -> class."""
    import nodes
    from server import PromptServer

    async def register() -> None:
        if getattr(PromptServer, "instance", None) is None:
            PromptServer(asyncio.get_running_loop())  # some extras add routes while they are imported
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)

    asyncio.run(register())
    return nodes.NODE_CLASS_MAPPINGS


def register_pack_nodes(table: dict[str, type]) -> dict[str, type]:
    """Add the pack's nodes to the host's table, as its loader of custom nodes does; returns the pack's own only."""

    async def nodes_of_the_pack() -> list[type]:
        extension = await sys.modules["latentmotion"].comfy_entrypoint()
        return await extension.get_node_list()

    own = {node.GET_SCHEMA().node_id: node for node in asyncio.run(nodes_of_the_pack())}
    for node_id, node in own.items():
        table[node_id] = node
        node.RELATIVE_PYTHON_MODULE = "custom_nodes.ComfyUI-LatentMotion"
    return own


def call_node(node: type, **inputs: Any) -> tuple:
    """Call one node class as the executor does (a locked clone for V3 nodes); its outputs as a tuple."""
    if hasattr(node, "GET_SCHEMA"):
        node.VALIDATE_CLASS()
        result = getattr(node.PREPARE_CLASS_CLONE(None), node.FUNCTION)(**inputs)
        result = asyncio.run(result) if inspect.iscoroutine(result) else result
        return tuple(result.result or ())
    result = getattr(node(), node.FUNCTION)(**inputs)
    return tuple(result["result"] if isinstance(result, dict) else result)


class _Server:
    """What PromptExecutor needs of a server: it keeps the messages instead of sending them."""

    client_id = "test"
    last_node_id = None

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.on_message: Callable[[str, Any], None] | None = None

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        self.messages.append((event, data))
        if self.on_message is not None:
            self.on_message(event, data)


class Graphs:
    """Run API-format graphs through the host's validation and executor, one after another, with its cache."""

    def __init__(self) -> None:
        import execution

        self.server = _Server()
        caches = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.executor = execution.PromptExecutor(self.server, execution.CacheType.CLASSIC, caches)

    def run(self, prompt: dict[str, dict], on_message: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        """{"success", "messages", "outputs"}; `outputs` is what /history would show, `on_message` sees every event.

        Raises: ValueError with the host's own message where the graph does not validate.
        """
        import execution

        self.server.messages.clear()
        self.server.on_message = on_message
        prompt_id = str(uuid.uuid4())
        with torch.inference_mode(False):  # the executor enters inference mode by itself
            valid = asyncio.run(execution.validate_prompt(prompt_id, prompt, None))
            if not valid[0]:
                raise ValueError(f"{valid[1]} {valid[3]}")
            self.executor.execute(prompt, prompt_id, {"client_id": "test"}, valid[2])
        outputs = getattr(self.executor, "history_result", {}).get("outputs", {})
        return {"success": self.executor.success, "messages": list(self.server.messages), "outputs": outputs}
