"""Trains the bundled demo models on the Python standard library, with JAX and optax alone.

    python scripts/train_demo_model.py --preset main --work WORK/main --minutes 70
    python scripts/train_demo_model.py --preset draft --work WORK/draft --minutes 10 --teacher jaxinfer/assets/demo
    python scripts/train_demo_model.py --preset main --work WORK/main --export-only

The learning rate is constant after its warm-up and then falls linearly to zero (warmup-stable-decay). The decay begins
when `--minutes` require it, or when a file WORK/decay appears, and a run may be exported at any time. Its record holds
the steps that it took; `--steps N --decay-steps M` repeats it. A killed run continues from its last checkpoint.

Everything inside the model is feature-major ([D, T] rather than [T, D]): with weights [out, in] the forward product and
both gradients are then row-major products, which XLA's CPU backend runs two to three times faster than transposed ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import demo_data
import demo_export
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

Params = dict[str, jax.Array]
TOKENS_PER_STEP = 4096
WARMUP_STEPS = 40
DECAY_FRACTION = 0.4
STABLE_LENGTH, DECAY_LENGTH = 512, demo_data.WINDOW
CHECKPOINT_SECONDS = 120.0
ATTENTION_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shape and optimiser of one bundled model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    muon_rate: float
    adam_rate: float
    weight_decay: float
    assets: str
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


PRESETS = {
    "main": Preset(256, 5, 4, 2, 64, 768, 0.02, 0.004, 0.03, "jaxinfer/assets/demo"),
    "draft": Preset(128, 2, 4, 2, 32, 384, 0.03, 0.006, 0.01, "jaxinfer/assets/demo-draft"),
}


def parameter_shapes(preset: Preset) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes; matrices are [out, in] and the output projection is the embedding."""
    width, query, kv = preset.hidden_size, preset.num_heads * preset.head_dim, preset.num_kv_heads * preset.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (demo_data.VOCAB_SIZE, width),
        "model.norm.weight": (width,),
    }
    for layer in range(preset.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (query, width),
            prefix + "self_attn.k_proj.weight": (kv, width),
            prefix + "self_attn.v_proj.weight": (kv, width),
            prefix + "self_attn.o_proj.weight": (width, query),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "mlp.gate_proj.weight": (preset.ffn_size, width),
            prefix + "mlp.up_proj.weight": (preset.ffn_size, width),
            prefix + "mlp.down_proj.weight": (width, preset.ffn_size),
        }
    return shapes


def init_params(preset: Preset, seed: int) -> Params:
    """Norms start at one, what writes into the residual stream at zero, the rest at a normal distribution."""
    params = {}
    for index, (name, shape) in enumerate(parameter_shapes(preset).items()):
        if len(shape) == 1:
            params[name] = jnp.ones(shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            params[name] = jnp.zeros(shape)
        else:
            scale = 0.02 if "embed" in name else shape[1] ** -0.5
            params[name] = scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape)
    return params


def cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x in `dtype`; without the barrier XLA may undo the conversion and compute the product in float32."""
    return x if x.dtype == dtype else jax.lax.optimization_barrier(x.astype(dtype))


def row_major_dot(left: jax.Array, right: jax.Array, contract_right: int, dtype: jnp.dtype) -> jax.Array:
    """Contracts axis 1 of `left` with the given axis of `right`; computed in `dtype`, returned in float32."""
    dims = (((1,), (contract_right,)), ((), ()))
    return jax.lax.dot_general(cast(left, dtype), cast(right, dtype), dims, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(weight: jax.Array, transposed: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """weight [out, in], its transpose [in, out], x [in, T] -> float32 [out, T]; the products are computed in `dtype`.

    The transpose is an argument of its own because XLA would fold one made here into a slow transposed product.
    """
    return row_major_dot(weight, x, 0, dtype)


def linear_forward(weight, transposed, x, dtype):
    x = cast(x, dtype)
    return row_major_dot(weight, x, 0, dtype), (transposed, x)


def linear_backward(dtype, saved, grad):
    transposed, x = saved
    grad = cast(grad, dtype)
    return row_major_dot(grad, x, 1, dtype), jnp.zeros_like(transposed), row_major_dot(transposed, grad, 0, dtype)


linear.defvjp(linear_forward, linear_backward)


def fuse(params: Params, preset: Preset) -> Params:
    """Joins what reads the same input (q, k and v; gate and up): one wide product runs faster than several on CPU."""
    embedding = params["model.embed_tokens.weight"]
    fused = {"embed": embedding, "columns": embedding.T, "norm": params["model.norm.weight"]}
    for layer in range(preset.num_layers):
        prefix = f"model.layers.{layer}."
        fused |= {
            f"{layer}.norm1": params[prefix + "input_layernorm.weight"],
            f"{layer}.qkv": jnp.concatenate([params[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"]),
            f"{layer}.o": params[prefix + "self_attn.o_proj.weight"],
            f"{layer}.norm2": params[prefix + "post_attention_layernorm.weight"],
            f"{layer}.gate_up": jnp.concatenate([params[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up")]),
            f"{layer}.down": params[prefix + "mlp.down_proj.weight"],
        }
    return fused


def transpose_matrices(fused: Params, dtype: jnp.dtype) -> Params:
    return {name: array.T.astype(dtype) for name, array in fused.items() if array.ndim == 2}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + eps) * scale[:, None]


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding in the half-split layout; x [heads, H, T]."""
    half, length = x.shape[1] // 2, x.shape[2]
    angle = jnp.arange(length)[None] * theta ** (-jnp.arange(half) / half)[:, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[:, :half], x[:, half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention of query [N, H, T] to key and value [K, H, T] -> [N, H, T], N a multiple of K.

    Blocks of queries see only the keys up to their own end, which saves most of what the mask would discard.
    """
    kv_heads, head_dim, length = key.shape
    groups = query.reshape(kv_heads, -1, head_dim, length) * head_dim**-0.5
    outputs = []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        visible = jnp.arange(end)[:, None] <= jnp.arange(start, end)[None]
        block = []
        for group in range(groups.shape[1]):
            scores = jnp.einsum("nhs,nht->nst", key[:, :, :end], groups[:, group, :, start:end])
            scores = jnp.where(visible, scores, -1e30)
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))
            block.append(jnp.einsum("nhs,nst->nht", value[:, :, :end], weights) / weights.sum(1, keepdims=True))
        outputs.append(jnp.stack(block, axis=1))
    return jnp.concatenate(outputs, axis=3).reshape(query.shape)


def forward(fused: Params, transposed: Params, tokens: jax.Array, preset: Preset, dtype: jnp.dtype) -> jax.Array:
    """tokens int32 [T] -> logits float32 [V, T]: the Llama forward pass of one sequence.

    `fused` is fuse(params), `transposed` is transpose_matrices(fused); only the gradient reads the latter.
    """
    eps, length, query = preset.norm_eps, tokens.shape[0], preset.num_heads

    def project(name, x):
        return linear(fused[name], transposed[name], x, dtype)

    x = fused["columns"][:, tokens]  # a transposed gather of rows would make XLA keep x, and what follows, token-major
    for layer in range(preset.num_layers):
        h = project(f"{layer}.qkv", rms_norm(x, fused[f"{layer}.norm1"], eps)).reshape(-1, preset.head_dim, length)
        q, k, v = jnp.split(h, [query, query + preset.num_kv_heads])
        q, k = rotate(q, preset.rope_theta), rotate(k, preset.rope_theta)
        x += project(f"{layer}.o", attention(q, k, v).reshape(-1, length))
        gate, up = jnp.split(project(f"{layer}.gate_up", rms_norm(x, fused[f"{layer}.norm2"], eps)), 2)
        x += project(f"{layer}.down", jax.nn.silu(gate) * up)
    return project("embed", rms_norm(x, fused["norm"], eps))


def scale_by_orthogonalised_momentum(dtype: jnp.dtype, beta: float = 0.95) -> optax.GradientTransformation:
    """Muon (Jordan, 2024): Nesterov momentum, then five Newton-Schulz steps that bring all singular values near one."""

    def orthogonalise(matrix):
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        wide = wide / (jnp.linalg.norm(wide) + 1e-8)
        for _ in range(5):
            gram = row_major_dot(wide, wide, 1, dtype)
            polynomial = -4.775 * gram + 2.0315 * row_major_dot(gram, gram, 0, dtype)
            wide = 3.4445 * wide + row_major_dot(polynomial, wide, 0, dtype)
        wide = wide if matrix.shape[0] <= matrix.shape[1] else wide.T
        return wide * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state, updates)
        return jax.tree.map(lambda m, g: orthogonalise(beta * m + (1 - beta) * g), momentum, updates), momentum

    return optax.GradientTransformation(init, update)


def make_optimizer(preset: Preset, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the embedding and the norms, at rates that the caller scales by the schedule."""
    muon = optax.chain(
        scale_by_orthogonalised_momentum(dtype),
        optax.add_decayed_weights(preset.weight_decay),
        optax.scale(-preset.muon_rate),
    )
    adam = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95), optax.scale(-preset.adam_rate))

    def label(params: Params) -> dict[str, str]:
        return {name: "muon" if "_proj" in name else "adam" for name in params}

    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform({"muon": muon, "adam": adam}, label))


def learning_rate_scale(step: int, decay_start: int | None, decay_steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup if decay_start is None else warmup * max(0.0, 1.0 - (step - decay_start) / decay_steps)


def make_train_step(preset: Preset, optimizer, dtype, teacher: tuple[Params, Preset] | None):
    """Returns step(params, state, tokens int32 [sequences, T + 1], rate) -> (params, state, mean loss in nats)."""

    if teacher is not None:
        teacher_fused = fuse(*teacher)
        teacher_transposed = transpose_matrices(teacher_fused, dtype)

    def loss_of(fused, transposed, tokens):
        inputs, targets = tokens[:-1], tokens[1:]
        log_probs = jax.nn.log_softmax(forward(fused, transposed, inputs, preset, dtype), axis=0)
        hard = -jnp.take_along_axis(log_probs, targets[None], axis=0).mean()
        if teacher is None:
            return hard, hard
        target = jax.nn.softmax(forward(teacher_fused, teacher_transposed, inputs, teacher[1], dtype), axis=0)
        return 0.5 * hard - 0.5 * (target * log_probs).sum(0).mean(), hard

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, rate):
        fused, unfuse_gradient = jax.vjp(partial(fuse, preset=preset), params)
        transposed = transpose_matrices(fused, dtype)

        def accumulate(total, sequence):
            grads, hard = jax.grad(loss_of, has_aux=True)(fused, transposed, sequence)
            return jax.tree.map(jnp.add, total, (grads, hard)), None

        zero = (jax.tree.map(jnp.zeros_like, fused), jnp.zeros(()))
        (grads, loss), _ = jax.lax.scan(accumulate, zero, tokens)
        (grads,) = unfuse_gradient(jax.tree.map(lambda g: g / tokens.shape[0], grads))
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, loss / tokens.shape[0]

    return step


def slabs(texts: list[str], tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Yields int32 [TOKENS_PER_STEP // WINDOW, WINDOW + 1] for ever; windows that do not fill a slab join the next."""
    pending = np.zeros((0, demo_data.WINDOW + 1), np.int32)
    rows = TOKENS_PER_STEP // demo_data.WINDOW
    for epoch in demo_data.windows(texts, tokenizer, seed):
        pending = np.concatenate([pending, epoch])
        while len(pending) >= rows:
            slab, pending = pending[:rows], pending[rows:]
            yield slab


def reshape_slab(slab: np.ndarray, length: int) -> np.ndarray:
    """Cuts windows of WINDOW tokens into windows of `length`: [rows, WINDOW + 1] -> [more rows, length + 1]."""
    starts = range(0, demo_data.WINDOW, length)
    return np.concatenate([slab[:, start : start + length + 1] for start in starts])


def save_checkpoint(path: Path, tree, progress: dict) -> None:
    arrays = {str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, allow_pickle=False, progress=np.asarray(json.dumps(progress)), **arrays)
    os.replace(temporary, path)


def load_checkpoint(path: Path, tree):
    """Returns (tree, progress); `tree` gives the structure."""
    with np.load(path) as data:
        progress = json.loads(str(data["progress"]))
        leaves = [jnp.asarray(data[str(index)]) for index in range(len(jax.tree.leaves(tree)))]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), progress


def train(args: argparse.Namespace, preset: Preset, tokenizer: Tokenizer, texts: list[str]) -> tuple[Params, dict]:
    """Runs or continues a run until its schedule ends; returns the parameters and what the record says of it."""
    dtype = jnp.dtype(args.compute_dtype)
    teacher = (demo_export.load_params(args.teacher), PRESETS["main"]) if args.teacher else None
    optimizer = make_optimizer(preset, dtype)
    params = init_params(preset, args.seed)
    state = optimizer.init(params)
    progress = {"step": 0, "seconds": 0.0, "decay_start": None, "decay_steps": args.decay_steps or 0}
    if args.steps:
        progress["decay_steps"] = args.decay_steps or round(args.steps * DECAY_FRACTION)
        progress["decay_start"] = args.steps - progress["decay_steps"]
    checkpoint = args.work / "checkpoint.npz"
    if checkpoint.exists():
        (params, state), progress = load_checkpoint(checkpoint, (params, state))
        print(f"continuing at step {progress['step']}", flush=True)
    if args.export_only:
        return params, progress
    step_fn = make_train_step(preset, optimizer, dtype, teacher)
    stream = slabs(texts, tokenizer, args.seed)
    for _ in range(progress["step"]):
        next(stream)
    began, saved = time.monotonic() - progress["seconds"], time.monotonic()
    losses = []
    while True:
        step, start, span = progress["step"], progress["decay_start"], progress["decay_steps"]
        progress["seconds"] = time.monotonic() - began
        stable_seconds = (1 - DECAY_FRACTION) * 60 * args.minutes
        if start is None and (progress["seconds"] >= stable_seconds or (args.work / "decay").exists()):
            start = progress["decay_start"] = step
            span = progress["decay_steps"] = max(1, round(step * DECAY_FRACTION / (1 - DECAY_FRACTION)))
        done = start is not None and step >= start + span
        if done or time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, (params, state), progress)
            saved = time.monotonic()
        if done:
            return params, progress
        # The last steps train at the full context length, the others at half of it, which costs less.
        length = STABLE_LENGTH if start is None or step < start else DECAY_LENGTH
        rate = learning_rate_scale(step, start, span)
        params, state, loss = step_fn(params, state, jnp.asarray(reshape_slab(next(stream), length)), rate)
        losses.append(float(loss))
        progress["step"] = step + 1
        if (step + 1) % 10 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1} loss {np.mean(losses[-10:]):.4f} rate {rate:.3f} seconds {seconds:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="main")
    parser.add_argument("--work", type=Path, required=True, help="directory of checkpoints; a run continues from it")
    parser.add_argument("--minutes", type=float, default=70.0, help="wall time, where --steps is not given")
    parser.add_argument("--steps", type=int, help="number of steps, for an exact repetition")
    parser.add_argument("--decay-steps", type=int, help=f"with --steps; default {DECAY_FRACTION} of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"], default="float32", help="of the products")
    parser.add_argument("--teacher", type=Path, help="exported checkpoint whose predictions are half of the target")
    parser.add_argument("--out", type=Path, help="where to export; default: the bundled model's directory")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint of --work and stop")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    training, held_out = demo_data.read_corpus()
    tokenizer = demo_data.train_tokenizer(list(training.values()))
    preset = PRESETS[args.preset]
    params, progress = train(args, preset, tokenizer, list(training.values()))
    command = (
        f"scripts/train_demo_model.py --preset {args.preset} --work WORK/{args.preset} --seed {args.seed} "
        f"--steps {progress['step']} --decay-steps {progress['decay_steps']} --compute-dtype {args.compute_dtype}"
    )
    run = {
        "steps": progress["step"],
        "decay_steps": progress["decay_steps"],
        "tokens_per_step": TOKENS_PER_STEP,
        "tokens_seen": progress["step"] * TOKENS_PER_STEP,
        "minutes": round(progress["seconds"] / 60, 1),
        "seed": args.seed,
        "command": command + (" --teacher jaxinfer/assets/demo" if args.teacher else ""),
    }
    out = args.out or Path(__file__).resolve().parents[1] / preset.assets
    demo_export.export(out, params, preset, tokenizer, run, training, held_out)


if __name__ == "__main__":
    main()
