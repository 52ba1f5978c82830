"""Loads the backbone from a checkpoint's files, and checks all names, shapes and dtypes."""

from __future__ import annotations

import re

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import TORCH_DTYPES, Checkpoint, TensorInfo
from moebox.offload.experts import Progress
from moebox.runtime.model import precision
from moebox.runtime.model.base import Processor
from moebox.runtime.model.compute import CPU
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.mlp import joined

_NOT_RUN = re.compile(r"\.rotary_emb\.inv_freq$|^(vision_tower|mm_projector)\.")
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)"
    r"\.(gate|up|down)_proj\.weight_(packed|scale|shape)$"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose routed experts are not INT4.

    Raises:
        CheckpointError: with the command that quantizes it.
    """
    config = checkpoint.config
    if not config.moe_layers:
        raise CheckpointError(f"{checkpoint.folder}: has no layer with routed experts")
    name = config.expert_name(config.moe_layers[0], 0)
    if f"{name}.gate_proj.weight_packed" in checkpoint.tensors:
        return
    if f"{name}.gate_proj.weight" in checkpoint.tensors:
        dtype = checkpoint.tensors[f"{name}.gate_proj.weight"].dtype
        raise CheckpointError(
            f"{checkpoint.folder}: the experts are {dtype}, not quantized to INT4",
            f"Run: moebox quantize {checkpoint.folder} {checkpoint.folder.name}-int4",
        )
    raise CheckpointError(f"{checkpoint.folder}: {name}.gate_proj.weight_packed: no such tensor")


def check_names(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with tensors that the model does not have.

    Tensors of a multi-token-prediction layer and of a vision tower, and old rotary buffers, are allowed and
    not loaded.

    Raises:
        CheckpointError: names the tensor and its file.
    """
    config = checkpoint.config
    known = config.backbone_shapes()
    for name, info in checkpoint.tensors.items():
        plain = name.removeprefix(config.prefix)
        layer = _LAYER.match(plain)
        beyond = layer is not None and int(layer.group(1)) >= config.num_hidden_layers
        if name in known or beyond or _NOT_RUN.search(plain) or _is_expert(config, plain):
            continue
        raise CheckpointError(
            f"{info.file}: {name}: the model has no such tensor",
            "The config.json and the shards are of different models, or the format is not supported.",
        )


def _is_expert(config: ModelConfig, plain: str) -> bool:
    match = _EXPERT.match(plain)
    return (
        match is not None
        and int(match.group(1)) in config.moe_layers
        and int(match.group(2)) < config.n_routed_experts
    )


def load_backbone(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    backbone: str = "bf16",
    progress: Progress | None = None,
    processor: Processor = CPU,
) -> KimiK2:
    """Build the model and load everything but the routed experts into the memory of its processor.

    `KimiK2.connect` has to follow before the first pass.

    Args:
        checkpoint: a quantized checkpoint.
        dtype: matrices are kept and multiplied in `torch.bfloat16` or `torch.float32`.
        backbone: "bf16", or "int8" or "nf4" for the matrices that `precision.is_quantized` names.
        progress: called with ("backbone", bytes done, bytes in all).
        processor: computes the model; int8 and nf4 need the CPU.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the config implies.
    """
    with init_empty_weights():  # the weights, 23 GB for K2, are replaced below
        model = KimiK2(checkpoint.config, dtype, processor)
    shapes = checkpoint.config.backbone_shapes()
    sources = {
        parameter: [backbone_info(checkpoint, source, shapes) for source in model.sources(parameter)]
        for parameter, _ in model.named_parameters()
    }
    done, total = 0, sum(info.nbytes for infos in sources.values() for info in infos)
    for parameter, infos in sources.items():
        module_name, _, attribute = parameter.rpartition(".")
        wanted = torch.float32 if precision.keeps_fp32(module_name) else dtype
        weight = joined([_read(info).to(wanted) for info in infos])
        if precision.is_quantized(module_name, weight.shape, backbone):
            replace(model, module_name, _quantized_linear(weight, backbone))
        else:
            weight = weight.to(processor.device)
            setattr(model.get_submodule(module_name), attribute, nn.Parameter(weight, requires_grad=False))
        done += sum(info.nbytes for info in infos)
        if progress is not None:
            progress("backbone", done, total)
    return model.eval()


def _read(info: TensorInfo) -> Tensor:
    """The tensor in memory of its own: a mapped file's pages would count for the process a second time."""
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    target = tensor.reshape(-1).view(torch.uint8).numpy()
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset)
            done = 0
            while done < info.nbytes and (count := file.readinto(target[done:].data)):
                done += count
    except OSError as error:
        raise CheckpointError(f"{info.file}: {info.name}: cannot be read: {error.strerror}") from None
    if done < info.nbytes:
        raise CheckpointError(
            f"{info.file}: {info.name}: the file ends at byte {info.offset + done}, its header said more",
            "The file was changed while it was read; fetch it again.",
        )
    return tensor


def _quantized_linear(weight: Tensor, backbone: str) -> nn.Module:
    from moebox.runtime.model.quantized_linear import quantize_linear  # imports bitsandbytes

    return quantize_linear(weight, backbone)


def replace(model: nn.Module, module_name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `module_name`."""
    parent, _, name = module_name.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def backbone_info(checkpoint: Checkpoint, source: str, shapes: dict[str, tuple[int, ...]]) -> TensorInfo:
    """A tensor's place in the checkpoint, with its shape and dtype checked.

    Args:
        checkpoint: has the tensor.
        source: the tensor's name, without the checkpoint's prefix.
        shapes: full name -> shape that the config implies.

    Raises:
        CheckpointError: the tensor is missing, or has another shape or dtype.
    """
    info = checkpoint.info(f"{checkpoint.config.prefix}{source}")
    shape = shapes[info.name]
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {info.name}: shape {list(info.shape)}, the config implies {list(shape)}"
        )
    allowed = ("BF16", "F32") if source.endswith("e_score_correction_bias") else ("BF16",)
    if info.dtype not in allowed:
        raise CheckpointError(
            f"{info.file}: {info.name}: dtype {info.dtype}, must be {' or '.join(allowed)}",
            f"moebox quantize {checkpoint.folder} {checkpoint.folder.name}-int4 converts it.",
        )
    return info


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, with the scales of quantized ones."""
    return sum(precision.parameter_bytes(parameter) for parameter in model.parameters())
