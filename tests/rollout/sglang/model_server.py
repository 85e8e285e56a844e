"""The scripted server with a model behind it: it loads folders, samples and scores as they say.

    python -m tests.rollout.sglang.model_server --model-path DIR --host 127.0.0.1 --port 30000

Takes the arguments that codjax gives to SGLang, of which it reads these; so `server.local.command`
can name it. One token costs a whole forward pass: for tiny models and short texts.
"""

import argparse
import asyncio
import functools
import pathlib
import signal

import codjax_kernels
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codjax import models
from tests.rollout.sglang.fake_server import FakeServer

LENGTH = 64  # texts are padded to it


class ModelServer(FakeServer):
    """A `FakeServer` whose tokens and log-probs are those of the weights loaded last.

    Attributes:
        token_s: pause after each token, for a test that acts while answers are under way.
        is_deaf: says that it took weights, and did not.
    """

    def __init__(self, folder, *, port=0, token_s=0.0, context_length=48):
        model = load(folder)
        self.graphdef, self.params = nnx.split(model)
        self.rng = np.random.default_rng(0)
        self.token_s, self.is_deaf = token_s, False
        size = model.config.vocab_size
        super().__init__(vocab_size=size, weight_version="default", port=port)
        self.context_length = context_length
        self.distribution([0])  # compiled before the first request

    def distribution(self, ids):
        """Log-probs of the next token after each: `[n V]`."""
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(log_softmax(self.graphdef, self.params, tokens))[: len(ids)]

    def script_of(self, ids, sampling):
        """Samples at temperature 1, or greedily at 0; new weights are felt at the next token."""
        ids = list(ids)
        while True:
            logprobs = self.distribution(ids)[-1]
            weights = np.exp(logprobs.astype(np.float64))
            if sampling["temperature"] == 0:
                weights = logprobs == logprobs.max()
            token = int(self.rng.choice(len(weights), p=weights / weights.sum()))
            yield token, float(logprobs[token])
            ids.append(token)

    def scored(self, ids):
        """As the real one, whose first token has no log-prob."""
        logprobs = self.distribution(ids)
        return [None, *(float(logprobs[i, token]) for i, token in enumerate(ids[1:]))]

    async def rest(self):
        await asyncio.sleep(self.token_s)

    async def _from_disk(self, request):
        if not self.is_deaf:
            self.params = nnx.split(load((await request.json())["model_path"]))[1]
        return await super()._from_disk(request)


def load(folder):
    return models.from_pretrained(pathlib.Path(folder), dtype="float32", param_dtype="float32")


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    index = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], (1, LENGTH))
    attend = functools.partial(codjax_kernels.forest_attention, implementation="xla")
    hidden = model(tokens, index, jnp.full((1, LENGTH), LENGTH, jnp.int32), attend=attend)
    logits = jnp.matmul(hidden[0], model.unembedding.T, precision="highest")
    return jax.nn.log_softmax(logits.astype(jnp.float32))


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-s", type=float, default=0.0)
    arguments, _ = parser.parse_known_args()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    made = ModelServer(arguments.model_path, port=arguments.port, token_s=arguments.token_s)
    async with made:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
