"""How well a model calls tools, with the true history up to each turn (teacher forcing).

Greedy decoding writes the true call if and only if each of its tokens is the likeliest one after the true
tokens before it. So one forward pass over a dialogue scores all its calls.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from dialogues import ANSWER, CALL
from model import Documents, Model
from stream import MAX_DOCUMENT, Batch
from torch import Tensor


def to_device(batch: Batch, device: str) -> tuple[Tensor, Tensor, Documents]:
    """ids int64 [T], kinds int64 [T] and the documents, on the device."""
    types = (np.int64, np.int64, np.int32)
    ids, kinds, starts = (torch.from_numpy(part.astype(kind)).to(device, non_blocking=True)
                          for part, kind in zip(batch, types, strict=True))  # fmt: skip
    return ids, kinds, Documents.of(starts, MAX_DOCUMENT, len(ids))


@torch.no_grad()
def score(model: Model, batches: list[Batch], marks: dict[str, int], device: str) -> dict[str, float]:
    """Dev loss (nats per token that the assistant writes) and the rates of right calls.

    Args:
        marks: control token name -> id.
    """
    model.eval()
    totals: Counter[str] = Counter()
    for batch in batches:
        ids, kinds, documents = to_device(batch, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(ids, documents)[:-1].float()
        losses = F.cross_entropy(logits, ids[1:], reduction="none")
        said = (kinds[1:] == ANSWER) | (kinds[1:] == CALL)
        totals["loss"] += losses[said].sum().item()
        totals["tokens"] += said.sum().item()
        best = torch.cat([ids[:1], logits.argmax(-1)]).cpu().numpy()
        _count_calls(totals, batch[0], batch[1], best, marks)
    model.train()
    calls, turns = totals["calls"], totals["turns"]
    rates = {
        name: totals[name] / calls for name in ("called", "right_name", "exact_arguments", "exact_given_name")
    }
    return {"loss": totals["loss"] / totals["tokens"], **rates, "calls": calls,
            "false_calls": totals["false_calls"] / max(turns, 1), "turns": turns}  # fmt: skip


def _count_calls(
    totals: Counter[str], ids: np.ndarray, kinds: np.ndarray, best: np.ndarray, marks: dict
) -> None:
    right = ids == best
    begins = np.flatnonzero(ids == marks["<|tool_calls_section_begin|>"])
    for begin in begins:
        end = begin + int(np.argmax(ids[begin:] == marks["<|tool_calls_section_end|>"])) + 1
        middle = begin + int(np.argmax(ids[begin:] == marks["<|tool_call_argument_begin|>"])) + 1
        name = right[begin:middle].all()
        totals["calls"] += 1
        totals["called"] += right[begin]
        totals["right_name"] += name
        totals["exact_arguments"] += name and right[middle:end].all()
        totals["exact_given_name"] += right[middle:end].all()
    firsts = np.flatnonzero((kinds[1:] == ANSWER) & (ids[:-1] == marks["</think>"])) + 1
    totals["turns"] += len(firsts)
    totals["false_calls"] += int((best[firsts] == marks["<|tool_calls_section_begin|>"]).sum())


def control_marks(folder: Path) -> dict[str, int]:
    """Control token name -> id of a model folder."""
    from tokenizer import load

    return load(folder)._special_tokens
