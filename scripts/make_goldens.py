"""Make the golden checkpoints in tests/conformance/goldens: tiny random models with Hugging Face's own logits.

    python scripts/make_goldens.py --out tests/conformance/goldens [--only NAME ...]

Needs torch and transformers, which nothing else in this project does. The committed files were made with
torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6 and, for gpt_oss_mxfp4 alone, accelerate 1.15.0
on Python 3.11, and come out byte for byte
the same with these versions.

For each variant of the golden_*.py files beside this one, a directory NAME with config.json, safetensors and
golden.npz is written:

    prompt_i   int32   [T]      token ids; i = 0 is short, i = 1 exceeds every window and rope switch-over length
    logits_i   float32 [T, V]   of every position, computed in float32 with eager attention
    greedy_i   int32   [12]     greedy continuation, every step a forward over the whole sequence without a cache
    margin_i   float32 [12]     best logit minus second best at each step of the continuation
    seed       int64            of the weights and prompts

A file is written only after these held: the directory, loaded by transformers, gives the same logits; every weight
has a gradient; switching off what the variant is about (`ablations`) moves the logits; every margin is large enough
for another implementation's rounding not to change a token; and one rounding error in every weight moves no logit
by more than MAX_ROUNDING, so that a test may ask for 1e-4.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from golden_deepseek import DEEPSEEK
from golden_experts import EXPERTS
from golden_gemma import GEMMA
from golden_variants import VARIANTS, Variant
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

CONTINUATION = 12
MIN_MARGIN = 0.02
MIN_ABLATION = 0.02
MIN_GRADIENT = 1e-6
MIN_DISTINCT = 4
MAX_ROUNDING = 4e-5
MAX_SEEDS = 200
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BUFFERS = ("layer_scalar", "e_score_correction_bias")
PACKED = ("experts.gate_up_proj", "experts.down_proj")
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MXFP4 = [*_POSITIVE, *(-number for number in _POSITIVE)]

log = logging.getLogger("make_goldens")


def build(variant: Variant, changes: dict | None = None) -> PreTrainedModel:
    """The variant's model in float32 with transformers' initial weights, `changes` made to its configuration."""
    settings = copy.deepcopy(variant.config) | copy.deepcopy(changes or {})
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, variant: Variant, seed: int) -> None:
    """Random weights that make every part count, exactly representable in the dtype they are saved in."""
    generator = torch.Generator().manual_seed(seed)
    # A tied head sees small embeddings (so that a token's own embedding does not decide the next one): make up for it.
    tied, scaled = model.config.tie_word_embeddings, model.config.model_type.startswith("gemma")
    final_norm = (8.0 if scaled else 2.0) if tied else 1.0
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith(BUFFERS)}
    for name in sorted(tensors):
        tensor = tensors[name]
        noise = torch.randn(tensor.shape, generator=generator)
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if variant.packed and name.endswith(PACKED):
            tensor.copy_(unpack(*random_packed(tensor, generator)))
            continue
        if name.endswith("layer_scalar"):
            value = 0.8 + 0.15 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "Norm" in owner:
            scale = final_norm if name in ("model.norm.weight", "transformer.ln_f.weight") else 1.0
            if variant.config["model_type"] == "gemma4_text" and name.endswith(("q_norm.weight", "k_norm.weight")):
                scale = 0.6  # Gemma 4 does not scale its scores: at 1.0 its attention would be nearly one-hot
            # Gemma 2 and 3 store the weight less one.
            value = scale * (1.0 + 0.3 * noise) - (1.0 if owner in ("Gemma2RMSNorm", "Gemma3RMSNorm") else 0.0)
        elif "Embedding" in owner:
            # Gemma multiplies embeddings by sqrt(width).
            value = 0.3 * noise / (math.sqrt(tensor.shape[-1]) if "Scaled" in owner else 1.0)
        else:
            # Queries and keys large enough for peaked attention.
            peaked = (
                "q_proj.weight",
                "k_proj.weight",
                "q_b_proj.weight",
                "qkv_proj.weight",
                "c_attn.weight",
                "lm_head.weight",
            )
            gain = 1.5 if name.endswith(peaked) else 1.0
            value = gain / math.sqrt(tensor.shape[-1]) * noise
        tensor.copy_(value.to(DTYPES[variant.dtype]))
    model.tie_weights()


def random_packed(like: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random MXFP4 blocks and scales of experts' weights [E, in, out]: [E, out, in / 32, 16] and [E, out, in / 32]."""
    shape = (like.shape[0], like.shape[2], like.shape[1] // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    # The numbers' root mean square is about 3.
    scales = 127 - round(math.log2(3 * math.sqrt(like.shape[1]))) + torch.randint(-1, 2, shape, generator=generator)
    return blocks, scales.to(torch.uint8)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Those numbers, [E, in, out]."""
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    numbers = torch.tensor(MXFP4)[halves] * 2.0 ** (scales.float() - 127)[..., None]
    return numbers.flatten(-2).transpose(1, 2)


def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `unpack` for numbers that can be packed."""
    numbers = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))
    # The least exponent at which no number is above 6.
    scales = torch.ceil(torch.log2(numbers.abs().amax(-1) / 6)) + 127
    halves = numbers / 2.0 ** (scales - 127)[..., None]
    codes = (halves[..., None] == torch.tensor(MXFP4[:8] + MXFP4[9:])).int()
    assert bool((codes.sum(-1) == 1).all())
    index = codes.argmax(-1)
    index = torch.where(index > 7, index + 1, index).to(torch.uint8).unflatten(-1, (-1, 2))
    return index[..., 0] | index[..., 1] << 4, scales.to(torch.uint8)


@torch.no_grad()
def forward(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one cacheless forward. A copy of the model runs, since dynamic rope keeps state in it."""
    return copy.deepcopy(model)(torch.tensor([ids]), use_cache=False).logits[0].float()


class PoorSeedError(Exception):
    """The reason a seed makes a poor golden."""


def continuation(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens after the prompt and the margin of each; PoorSeedError where others' rounding may change them."""
    ids, margins = list(prompt), []
    for _ in range(CONTINUATION):
        best = torch.topk(forward(model, ids)[-1], 2)
        margins.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if margins[-1] < MIN_MARGIN:
            raise PoorSeedError(f"margin {margins[-1]:.4f}")
        if ids[-1] == model.config.eos_token_id:
            raise PoorSeedError("end of sequence")
    tokens = ids[len(prompt) :]
    if len(set(tokens)) < MIN_DISTINCT:
        raise PoorSeedError(f"{len(set(tokens))} distinct tokens")
    return tokens, margins


@torch.no_grad()
def check_rounding(model: PreTrainedModel, prompt: list[int], logits: np.ndarray) -> None:
    """PoorSeedError where one float32 rounding error in every weight moves a logit by more than MAX_ROUNDING."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rounded = copy.deepcopy(model)
        for parameter in rounded.parameters():
            parameter.mul_(1 + 2.0**-24 * torch.randn(parameter.shape, generator=generator).sign())
        moved = float(np.abs(forward(rounded, prompt).numpy() - logits).max())
        if moved > MAX_ROUNDING:
            raise PoorSeedError(f"rounding moves the logits by {moved:.1e}")


def text_model(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint holds: the state dict without the copy of a tied head."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def check_sensitivity(model: PreTrainedModel, variant: Variant, prompt: list[int], logits: np.ndarray) -> None:
    """Every weight must have a gradient and every ablation must move the logits, or the golden proves nothing."""
    probe = copy.deepcopy(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (probe(torch.tensor([prompt]), use_cache=False).logits[0] * weights).sum().backward()
    for name, parameter in probe.named_parameters():
        gradient = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        if gradient < MIN_GRADIENT and not name.endswith(variant.no_gradient):
            raise ValueError(f"{variant.name}: {name} has gradient {gradient:g}; the golden would not notice it")
    for what, changes in variant.ablations.items():
        other = build(variant, changes)
        other.load_state_dict(model.state_dict(), strict=False)
        other.tie_weights()
        moved = float(np.abs(forward(other, prompt).numpy() - logits).max())
        if moved < MIN_ABLATION:
            raise ValueError(f"{variant.name}: without {what} the logits move by {moved:.2g}, less than {MIN_ABLATION}")


def save(model: PreTrainedModel, variant: Variant, directory: Path) -> None:
    """config.json and safetensors, in the form the variant asks for."""
    dtype = DTYPES[variant.dtype]
    stored = copy.deepcopy(model).to(dtype)
    stored.save_pretrained(directory, max_shard_size=variant.shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    config_path = directory / "config.json"
    if variant.rename is not None:
        tensors = {variant.rename(name): tensor for name, tensor in text_model(stored).items()}
        extra = torch.Generator().manual_seed(1)
        for name, shape in variant.ignored_tensors.items():
            tensors[name] = torch.randn(shape, generator=extra).to(dtype)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if variant.packed:
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if name.endswith(PACKED)]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(tensors.pop(name))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads(config_path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
        config_path.write_text(json.dumps(config, indent=2) + "\n")
    if variant.rewrite_config is not None:
        config = variant.rewrite_config(json.loads(config_path.read_text()))
        config_path.write_text(json.dumps(config, indent=2) + "\n")


def check_reload(directory: Path, prompts: list[list[int]], golden: dict) -> None:
    """transformers, given the directory, must compute the golden's logits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    for i, prompt in enumerate(prompts):
        difference = np.abs(forward(model, prompt).numpy() - golden[f"logits_{i}"]).max()
        if difference != 0:
            raise ValueError(f"{directory}: reloaded logits of prompt {i} differ by {difference:g}")


def try_seed(model: PreTrainedModel, variant: Variant, seed: int) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """The prompts and the golden of this seed, its weights left in the model."""
    fill(model, variant, seed)
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(3, variant.config["vocab_size"], n).tolist() for n in variant.prompt_lengths]
    golden: dict[str, np.ndarray] = {"seed": np.array(seed)}
    for i, prompt in enumerate(prompts):
        greedy, margins = continuation(model, prompt)
        golden[f"prompt_{i}"] = np.array(prompt, np.int32)
        golden[f"logits_{i}"] = forward(model, prompt).numpy()
        golden[f"greedy_{i}"] = np.array(greedy, np.int32)
        golden[f"margin_{i}"] = np.array(margins, np.float32)
        check_rounding(model, prompt, golden[f"logits_{i}"])
    return prompts, golden


def make(variant: Variant, out: Path) -> None:
    """Find a seed whose golden is good, check it and write it."""
    model = build(variant)
    reason = ""
    for seed in range(MAX_SEEDS):
        try:
            prompts, golden = try_seed(model, variant, seed)
            break
        except PoorSeedError as error:
            reason = str(error)
            log.debug("%s: seed %d: %s", variant.name, seed, reason)
    else:
        raise ValueError(f"{variant.name}: none of {MAX_SEEDS} seeds gave a good golden; last reason: {reason}")
    check_sensitivity(model, variant, prompts[-1], golden[f"logits_{len(prompts) - 1}"])

    directory = out / variant.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save(model, variant, directory)
    check_reload(directory, prompts, golden)
    np.savez_compressed(directory / "golden.npz", allow_pickle=False, **golden)
    size = sum(path.stat().st_size for path in directory.iterdir())
    spread = float(golden[f"logits_{len(prompts) - 1}"].std())
    margin = min(float(golden[f"margin_{i}"].min()) for i in range(len(prompts)))
    print(f"{variant.name:24} seed {seed:3} logits' std {spread:5.2f} least margin {margin:.3f} {size / 1024:6.1f} KiB")


def main() -> None:
    variants = [*VARIANTS, *GEMMA, *EXPERTS, *DEEPSEEK]
    names = [variant.name for variant in variants]
    parser = argparse.ArgumentParser(description="Make the golden checkpoints with torch and transformers.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write them into")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="make these only")
    parser.add_argument("--verbose", action="store_true", help="say why seeds were rejected")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.DEBUG if arguments.verbose else logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    for variant in variants:
        if arguments.only is None or variant.name in arguments.only:
            make(variant, arguments.out)


if __name__ == "__main__":
    main()
