"""How much memory a step of the network needs: tiles are held on a device only if both fit."""

import torch
from torch import nn

from compress.config import Backbone
from compress.model import FieldLevelCompressor
from data.schema import FOM_PARAMS

# float32 weight, its gradient, AdamW's two moments and a moving average, and the copy that autocast makes in bf16.
BYTES_PER_PARAMETER = 5 * 4 + 2
# Of a batch while it is gathered: an int64 index per pixel, and the tile in float32 twice, as noise may be exchanged.
BYTES_PER_PIXEL, BYTES_PER_VALUE = 8, 2 * 4
SIDE = 128  # activations are measured at this many pixels a side, or fewer, and grow with their number
FEW = 2  # tiles; of one alone there is no variance to normalise with
COPIES = 2  # of a layer's input and output without gradients: what a block adds up at its end is there as well


def bytes_of_a_step(
    backbone: Backbone, dtype: torch.dtype, batch_size: int, nside: int, n_bins: int, *, training: bool
) -> int:
    """Memory that a batch needs beside the tiles, in bytes; in training, with gradients and optimiser.

    Then it is mostly what autograd keeps for the backward pass, measured by a forward pass of a few tiles on the CPU.
    For efficientnet_v2_s in bf16 with 128 tiles of 128, 256 and 512 pixels this gives 3.8, 13.7 and 53.6 GB, where a
    GPU peaked at 3.6, 13.4 and 52.5 GB.
    """
    side = min(nside, SIDE)
    with torch.random.fork_rng(devices=[]):
        model = FieldLevelCompressor(backbone, n_bins, n_params=len(FOM_PARAMS), dtype=dtype)
        measure = _kept_for_backward if training else _largest_layer
        per_tile = (measure(model, (2 * FEW, n_bins, side, side)) - measure(model, (FEW, n_bins, side, side))) / FEW
    per_pixel = per_tile / side**2 + BYTES_PER_PIXEL + BYTES_PER_VALUE * n_bins
    n_parameters = sum(p.numel() for p in model.parameters())
    return int(batch_size * nside**2 * per_pixel) + n_parameters * BYTES_PER_PARAMETER


def _kept_for_backward(model: FieldLevelCompressor, shape: tuple[int, ...]) -> int:
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(torch.zeros(shape))
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@torch.no_grad()
def _largest_layer(model: FieldLevelCompressor, shape: tuple[int, ...]) -> int:
    sizes = [0]

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sizes.append(COPIES * (inputs[0].nbytes + output.nbytes))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(look) for leaf in leaves]
    model.eval()(torch.zeros(shape))
    for hook in hooks:
        hook.remove()
    return max(sizes)
