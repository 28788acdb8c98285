"""OPT models and a T4, as the official code of FlexGen counts them."""

from refimpl.inference.system_level.design.offload_cost import GB, Hardware, Task

T4 = Hardware(device=16 * GB, cpu=208 * GB, disk=1500 * GB)


def opt(layers, width, heads, prompt=512, new=32):
    """An OPT model in 16 bit: weights of 8 h^2 + 4 h * 4 h bytes a layer, as the official code counts them."""
    return Task(
        layers=layers, weights=24 * width**2, entry=4 * width, feature=2 * width, parameters=12 * width**2, attended=width,
        heads=heads, inner=16 * width, itemsize=2, resident=2 * 50272 * width, prompt=prompt, new=new,
    )  # fmt: skip


OPT_30B, OPT_175B = opt(48, 7168, 56), opt(96, 12288, 96)
SHARES = (0.2, 0.5, 0.3, 0.1, 0.7, 0.2, 0.0, 0.6, 0.4)
