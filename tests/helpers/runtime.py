"""References for the runtime: an independent unpacker, and transformers' DeepseekV3 with the same weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moebox.quantize.synth.write import synth

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def make_checkpoint(folder: Path, seed: int = 0, **overrides) -> Path:
    """A tiny random INT4 checkpoint in the native layout; `overrides` are keys of its config.json."""
    return synth(folder, "tiny", format="int4", seed=seed, config_overrides=overrides).folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """compressed-tensors pack-quantized, 4 bits, group 32 -> fp32 [out, in]."""
    nibbles = (packed[:, :, None] >> torch.arange(0, 32, 4)) & 15
    return (nibbles.flatten(1) - 8).float() * scale.float().repeat_interleave(32, dim=1)


def reference_model(folder: Path) -> DeepseekV3ForCausalLM:
    """transformers' model in fp32 with eager attention, experts dequantized to fp32."""
    raw = json.loads((folder / "config.json").read_text())
    raw = raw.get("text_config", raw) | {"model_type": "deepseek_v3"}
    raw.pop("quantization_config", None)
    config = DeepseekV3Config(**raw, attn_implementation="eager")
    config.torch_dtype = config.dtype = torch.float32
    model = DeepseekV3ForCausalLM(config).float().eval()
    model.load_state_dict(_fuse(load_tensors(folder), config), strict=True)
    return model


def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """fp32 [T, vocab] from `reference_model`."""
    with torch.inference_mode():
        return reference_model(folder)(torch.tensor([token_ids])).logits[0]


def _fuse(tensors: dict[str, torch.Tensor], config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    """The state dict of transformers 5, which has a layer's experts as two 3-D parameters, gate before up."""
    state = {
        name.removeprefix("language_model."): tensor.float()
        for name, tensor in tensors.items()
        if ".mlp.experts." not in name and "vision_tower" not in name and "mm_projector" not in name
    }
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts"
        key = next(name for name in tensors if f"{stem}.0." in name).split(stem)[0] + stem
        experts = [
            [
                dequantize(
                    tensors[f"{key}.{e}.{part}.weight_packed"], tensors[f"{key}.{e}.{part}.weight_scale"]
                )
                for part in PROJECTIONS
            ]
            for e in range(config.n_routed_experts)
        ]
        state[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
        state[f"{stem}.down_proj"] = torch.stack([down for _, _, down in experts])
    return {
        name: tensor for name, tensor in state.items() if f"layers.{config.num_hidden_layers}." not in name
    }


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None, new_name: str | None = None) -> None:
    """Replace, rename or (None) remove one tensor of a checkpoint, and update the index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    if tensor is not None:
        tensors[new_name or name] = tensor.contiguous()
        index["weight_map"][new_name or name] = file.name
    save_file(tensors, file, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
