"""Convolutions that skip what is known to be zero, and batch norms multiplied into convolutions."""

import torch
from torch import nn


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution, padded by zeros, that skips the zeros on maps of 1 x 1 and 2 x 2. There 8/9 and 5/9 of a
    convolution's products are with padding. What is left is one matrix product over the whole map. The same parameters
    and function as nn.Conv2d."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "SmallMapConv2d":
        """The same convolution, sharing its parameters."""
        bias = conv.bias is not None
        new = cls(conv.in_channels, conv.out_channels, 3, conv.stride, 1, bias=bias, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, m, m) -> (N, C', ceil(m / stride), ceil(m / stride))."""
        n, _, height, width = x.shape
        if height != width or width > 2:
            return super().forward(x)
        # the part of the kernel that lies on the map, for every place of the output
        places = range(0, width, self.stride[0])
        parts = [self.weight[:, :, 1 - i : 1 - i + width, 1 - j : 1 - j + width] for i in places for j in places]
        kernel = torch.stack(parts).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)
        y = x.permute(0, 2, 3, 1).flatten(1) @ kernel.T  # channels_last: both are views
        y = y.view(n, len(places), len(places), self.out_channels)
        y = y if self.bias is None else y + self.bias
        return y.permute(0, 3, 1, 2)


def skip_padding(network: nn.Module) -> nn.Module:
    """Make the plain 3 x 3 convolutions of a network SmallMapConv2d, in place; others stay."""
    for name, module in list(network.named_modules()):
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.groups == 1
        if (
            plain
            and (module.kernel_size, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1))
            and module.stride in ((1, 1), (2, 2))
        ):
            network.set_submodule(name, SmallMapConv2d.of(module))
    return network


def fold_batchnorms(network: nn.Module) -> nn.Module:
    """A network in eval mode with every batch norm multiplied into the convolution before it, if torch.fx can trace it.
    The same function in fewer passes over memory."""
    from torch.fx.experimental.optimization import fuse

    small = [module for module in network.modules() if type(module) is SmallMapConv2d]
    for module in small:
        module.__class__ = nn.Conv2d  # fuse knows convolutions by their exact class
    try:
        network = fuse(network, inplace=True)
    except Exception:  # fx raises whatever a network does with what is no tensor
        pass
    return skip_padding(network) if small else network
