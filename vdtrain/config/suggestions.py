"""What a misspelt word may have meant: the settings, values, options and commands that are most like it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any

MOST, LEAST_LIKENESS, LEAST_PART = 3, 0.72, 3
# Words of other programs for ours.
OURS = {
    "activation_checkpointing": ("gradient_checkpointing", "grad_checkpointing"),
    "batch_size": ("batch", "bs", "bsz", "train_batch_size"),
    "checkpoint": ("ckpt",),
    "checkpoint.every_steps": ("save_every", "save_steps"),
    "checkpoint.keep": ("checkpoints_total_limit", "save_top_k", "save_total_limit"),
    "data": ("dataset",),
    "ema.enabled": ("use_ema",),
    "fidelity": ("strength",),
    "gpus": ("devices", "n_gpus", "nproc_per_node", "num_gpus", "num_processes"),
    "guidance_scale": ("cfg",),
    "hardware.attention": ("enable_xformers_memory_efficient_attention", "use_xformers"),
    "inputs": ("image", "images", "prompt", "prompts"),
    "learning_rate": ("lr",),
    "micro_batch_size": ("accumulate_grad_batches", "accumulation", "gradient_accumulation_steps"),
    "nnodes": ("num_machines", "num_nodes"),
    "node_rank": ("machine_rank",),
    "optimizer.gradient_clip": ("gradient_clip_val", "max_grad_norm"),
    "optimizer.schedule": ("lr_scheduler",),
    "output": ("dest", "out"),
    "output_dir": ("dir", "output"),
    "precision": ("amp", "dtype", "mixed_precision"),
    "processes": ("workers",),
    "rendezvous": ("main_process_ip", "master_addr", "rdzv_endpoint"),
    "resolution": ("image_size", "size"),
    "run_dir": ("output_dir",),
    "samples": ("num_images",),
    "solver": ("sampler", "scheduler"),
    "stage.global_batch_size": ("batch_size",),
    "stage.init_from": ("pretrained_model_name_or_path",),
    "stage.phases": ("epochs", "max_epochs", "num_train_epochs"),
    "stage.samples_scale": ("max_steps", "max_train_steps"),
    "steps": ("num_inference_steps",),
    "tracking": ("logger", "report_to", "wandb"),
    "workers": ("num_workers",),
}
FOREIGN = {foreign: own for own, words in OURS.items() for foreign in words}
VALUES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "full": "fp32", "gpu": "cuda", "half": "fp16"}


def meant(word: Any, names: Iterable[Any]) -> str:
    """The end of an error: "; did you mean NAME?" for the name most like a word, or "" if none is like it.

    If a word begins several names, all are like it.
    """
    known, text = [str(name) for name in names], str(word).lower()
    foreign = [VALUES[text]] if VALUES.get(text) in known else []
    begun = [name for name in known if len(text) >= LEAST_PART and name.startswith(text)]
    found = foreign or begun[:MOST] or difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {' or '.join(found)}?" if found and found[0] != str(word) else ""


def nearest_keys(key: str, known: Collection[str], aside: Collection[str]) -> list[str]:
    """The dotted keys most like `key`, the best first; several if they are equally like it.

    Args:
        aside: tables whose settings are named only if no other setting is as much like it.
    """
    words = [key.lower().replace("-", "_")]
    table, _, last = words[0].rpartition(".")
    while (foreign := FOREIGN.get(words[-1])) is not None and foreign not in words:
        words.append(foreign)
    for word in words[1:]:
        if word in known:
            return [word]
    for word in words:
        rated = {each: _likeness(word, each) for each in known}
        best = max(rated.values(), default=0.0)
        # The table itself is no answer.
        found = [each for each, likeness in rated.items() if likeness == best and each != table]
        found = [each for each in found if not any(f"{each}.".startswith(f"{part}.") for part in aside)] or found
        if best >= LEAST_LIKENESS and found:
            least = min(each.count(".") for each in found)
            found = [each for each in found if each.count(".") == least]
            return sorted(found, key=lambda each: -_alike(word, each))[:MOST]
    # Such as optimizer.lr and trainer.max_epochs.
    return nearest_keys(last, known, aside) if table and last in FOREIGN else []


def _likeness(word: str, key: str) -> float:
    """From 0 to 1: 1 if the key has all parts of the word, in any order."""
    own, others = _parts(word), _parts(key)
    if not own:
        return 0.0
    last = key.rpartition(".")[2]
    covered = sum(max((_part_likeness(part, other) for other in others), default=0.0) for part in own) / len(own)
    # Parts of the key that nothing in the word stands for count a little, the last name's most.
    spare = [part for part in _parts(last) if all(_part_likeness(each, part) < LEAST_LIKENESS for each in own)]
    whole = _alike(word.rpartition(".")[2], last) if "." not in word else _alike(word, key)
    return round(max(covered - 0.04 * len(spare), whole if whole >= 0.8 else 0.0), 2)


def _part_likeness(part: str, other: str) -> float:
    if part == other:
        return 1.0
    if f"{part}s" == other or f"{other}s" == part:
        return 0.99
    if min(len(part), len(other)) >= LEAST_PART and (other.startswith(part) or part.startswith(other)):
        return 0.95
    ratio = _alike(part, other)
    return ratio if ratio >= LEAST_LIKENESS else 0.0


def _alike(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[._]", key.lower()) if part]
