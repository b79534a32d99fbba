"""The micro-batches of a step: a pure function of the step's number, so that any thread may load any step."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sheepop.data.dataset import IGNORE_INDEX, Tokens, document_ids, read_windows
from sheepop.data.packing import read_packed
from sheepop.training.state import Run
from sheepop.training.step import MicroBatch
from sheepop.utils.seeds import derive_seed


def batch_loader(run: Run) -> Callable[[int], list[MicroBatch]]:
    """Return the function that loads this process's micro-batches of a step.

    Every process gets equally many, because the exchange of gradients needs all of them; where micro-batches are
    missing, at the end of an epoch or when they do not divide evenly, an empty one stands in, without a target.
    For compiled code, which is made for one shape, short ones are filled up with sequences without a target.
    """
    data, device, world = run.config.data, run.model.device, run.world
    tokens = run.corpus.split("train").tokens
    noise, seed = run.config.training.token_noise, run.config.seed
    # Places of the last window behind the end of the text.
    spare = (run.sampler.num_windows - 1) * data.stride + data.max_length - (len(tokens) - 1)
    least_rows = run.config.training.batch_size if run.config.training.compile == "on" else 0

    def read(windows: NDArray[np.int64], shift: int) -> tuple[NDArray[np.int64], ...]:
        if run.packing is not None:
            return read_packed(tokens, run.packing, windows)  # inputs, targets, documents: (B, T) each
        inputs, targets = read_windows(tokens, windows * data.stride - shift, data.max_length)  # (B, T) each
        targets[windows == 0, : min(shift, spare)] = IGNORE_INDEX  # the last window has them
        if data.document_mask:
            return inputs, targets, document_ids(inputs, run.tokenizer.end_of_text_id)
        return inputs, targets

    def load(step: int) -> list[MicroBatch]:
        shift = run.sampler.shift_of(step, data.stride) if data.shift_windows else 0
        shares = [run.sampler.micro_batches(step, rank=rank, world_size=world.size) for rank in (0, world.rank)]
        loaded = []
        for position in range(len(shares[0])):  # the first process's share is never smaller
            is_empty = position >= len(shares[1])
            index = position * world.size + world.rank
            inputs, targets, *documents = read(shares[0][0][:1] if is_empty else shares[1][position], shift)
            if noise:
                inputs = replace_some(inputs, noise, tokens, seed=derive_seed(seed, "token_noise", step, index))
            if is_empty:
                targets = np.full_like(targets, IGNORE_INDEX)
            if len(inputs) < least_rows:
                missing = ((0, least_rows - len(inputs)), (0, 0))
                inputs, *documents = (np.pad(array, missing) for array in (inputs, *documents))
                targets = np.pad(targets, missing, constant_values=IGNORE_INDEX)
            loaded.append(
                MicroBatch(
                    index=index,
                    token_ids=to_device(inputs, device),
                    targets=to_device(targets, device),
                    num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
                    document_ids=to_device(documents[0], device) if documents else None,
                )
            )
        return loaded

    return load


def to_device(array: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; to a GPU through pinned memory, so that computing does not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def replace_some(inputs: NDArray[np.int64], share: float, tokens: Tokens, *, seed: int) -> NDArray[np.int64]:
    """Return a copy of `inputs` (B, T) in which about a share of the ids are others, drawn from the text `tokens`.

    A model that cannot trust each token of its context must rest on several shorter ones, which is what smoothing does
    in a model that counts (Xie et al. 2017, unigram noising).
    """
    random = np.random.default_rng(seed)
    chosen = random.random(inputs.shape) < share
    noisy = inputs.copy()
    noisy[chosen] = tokens.take(random.integers(len(tokens), size=int(chosen.sum())), mode="clip")
    return noisy
