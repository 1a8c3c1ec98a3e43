"""A sharded model inside one's own `jit`: run this file, or its cells one by one.

Without an accelerator the CPU pretends to be four devices. With accelerators, choose `mesh` for those that are there.
"""

# %% What is needed
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import load_model
from jaxinfer.config import default_model
from jaxinfer.tokenizer import Tokenizer

jax.config.update("jax_num_cpu_devices", 4)  # before the first array; no other platform minds

# %% A checkpoint, straight onto a mesh: sequences will be split over `data`, heads and vocabulary over `tensor`
model = load_model(default_model(), mesh=jax.make_mesh((2, 2), ("data", "tensor")))
tokenizer = Tokenizer(model.directory)

# Parameters are nested dicts of arrays; `model.shardings` has the same structure.
for name in ("q", "o"):
    weight = model.params["layers"]["0"]["attention"][name]["weight"]
    print(f"{name}: {weight.shape} {weight.dtype}, of which a device has {weight.sharding.shard_shape(weight.shape)}")

# %% Prompts, padded on the right
prompts = ["def mean(values):", "import os\n", "class Stack:", "# Sort a list\n"]
NEW_TOKENS, MAX_LEN = 24, 64
encoded = [tokenizer.encode(prompt) for prompt in prompts]
lengths = np.array([len(ids) for ids in encoded], np.int32)
tokens = np.zeros((len(prompts), lengths.max()), np.int32)
for row, ids in enumerate(encoded):
    tokens[row, : len(ids)] = ids
tokens, lengths = jax.device_put((tokens, lengths), model.sequence_sharding)

# %% A cache: a pytree of pages, laid out on the mesh. `eval_shape` tells what one would take before there is one.
abstract = jax.eval_shape(lambda: model.make_cache(1024, 1024))
num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
print(f"a cache for 1024 sequences of 1024 tokens would take {num_bytes / 2**30:.1f} GiB")
cache = model.make_cache(len(prompts), MAX_LEN)


# %% Greedy decoding in one program. The shardings are optional, since all arguments lie right already; the cache is
# donated, so that it is extended in place.
def take_likeliest(params, cache, tokens, lengths):
    def step(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1)
        return model.decode(params, cache, token), token

    carry, chosen = jax.lax.scan(step, model.prefill(params, cache, tokens, lengths), length=NEW_TOKENS)
    return chosen.T, carry[1]


per_sequence = model.sequence_sharding
greedy = jax.jit(
    take_likeliest,
    in_shardings=(model.shardings, model.cache_shardings(cache), per_sequence, per_sequence),
    out_shardings=(per_sequence, model.cache_shardings(cache)),
    donate_argnums=1,
)
chosen, cache = greedy(model.params, cache, tokens, lengths)
for prompt, ids in zip(prompts, np.asarray(chosen), strict=True):
    print("---\n" + prompt + tokenizer.decode(ids.tolist()))


# %% Sampling of one's own: min-p, until every sequence has ended or NEW_TOKENS are drawn. A sequence
# that is given no token stays as it is, so those that have ended wait for the others.
EOS = tokenizer.eos_token_id


def sample(params, cache, tokens, lengths, key, temperature, min_p):
    logits, cache = model.prefill(params, cache, tokens, lengths)
    running = jnp.ones(lengths.shape, bool)
    output = jnp.full((*lengths.shape, NEW_TOKENS), EOS)

    def is_running(state):
        return (state[0] < NEW_TOKENS) & state[1].any()

    def step(state):
        count, running, logits, cache, output = state
        logits = logits / temperature
        probabilities = jax.nn.softmax(logits, axis=-1)
        likely = probabilities >= min_p * probabilities.max(axis=-1, keepdims=True)
        token = jax.random.categorical(jax.random.fold_in(key, count), jnp.where(likely, logits, -jnp.inf))
        token = jnp.where(running, token, EOS)
        running &= token != EOS
        logits, cache = model.prefill(params, cache, token[:, None], running.astype(jnp.int32))
        return count + 1, running, logits, cache, output.at[:, count].set(token)

    *_, cache, output = jax.lax.while_loop(is_running, step, (0, running, logits, cache, output))
    return output, cache


cache = model.make_cache(len(prompts), MAX_LEN)
sampled, cache = jax.jit(sample, donate_argnums=1)(model.params, cache, tokens, lengths, jax.random.key(0), 0.8, 0.1)
for prompt, ids in zip(prompts, np.asarray(sampled), strict=True):
    print("---\n" + prompt + tokenizer.decode(ids.tolist()))


# %% Training: `forward` needs no cache and has gradients. Parameters are arguments: the same programs serve new ones,
# which out_shardings lays out as the old ones are.
def loss(params, tokens):
    logits = model.forward(params, tokens)[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


@partial(jax.jit, out_shardings=(None, model.shardings))
def train(params, tokens):
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    return value, jax.tree.map(lambda weight, slope: weight - 0.1 * slope, params, gradient)


params = model.params
for _ in range(2):
    value, params = train(params, chosen)
    print(f"loss {value:.3f}")
chosen, cache = greedy(params, model.make_cache(len(prompts), MAX_LEN), tokens, lengths)
print(prompts[0] + tokenizer.decode(np.asarray(chosen)[0].tolist()))
