"""Vision families and torch's stacks with n streams, written by hand in plain PyTorch.

Every function takes a fresh copy of an original model and the `Sites` of its conversion, replaces the forwards of the
residual blocks by ones that carry n streams, and returns the copy. The block's own layers (attention, convolutions,
norms) are the original's; where the streams begin, mix and end is spelled out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oracle import Streams


class Sites:
    """The sites of one model by name.

    `sites(name, x, branch)` is one residual add `x + branch(x)`: x is the original trunk at the first site of a stream
    and n streams at the others; the result has the original shape after the last site and n streams after the others.

    Args:
        params: site name -> (phi, alpha, bias).
        streams: site names, stream by stream.
        channel_dim: the trunk's channels: -1, or 1 for NCHW, whose streams are (B, n, C, H, W).
    """

    def __init__(self, params: Mapping[str, Any], streams: tuple[tuple[str, ...], ...], channel_dim: int) -> None:
        state = {f"{site}.{field}": tensor for site, p in params.items() for field, tensor in p._asdict().items()}
        self.steps = Streams(state, math.isqrt(len(next(iter(params.values())).bias) + 1) - 1, channel_dim)
        self.names = frozenset(params)
        self.first = {stream[0] for stream in streams}
        self.last = {stream[-1] for stream in streams}

    def __call__(self, name: str, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        x = self.steps.expand(x) if name in self.first else x
        x = self.steps.site(name, x, branch)
        return self.steps.collapse(x) if name in self.last else x


def residual_blocks(layer: nn.Module, sites: Sites, name: str, *branches: Callable[..., Tensor]) -> None:
    """Gives the layer the forward `for branch in branches: x = x + branch(x, ...)`, on streams."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for k, branch in enumerate(branches):
            x = sites(f"{name}.mhc_{k}", x, lambda u, branch=branch: branch(u, *args, **kwargs))
        return x

    layer.forward = forward


# transformers


def hf_vit(model: nn.Module, sites: Sites) -> nn.Module:
    """ViT and DeiT."""
    for i, layer in enumerate(model.layers):
        residual_blocks(
            layer,
            sites,
            f"layers.{i}",
            lambda u, *args, m=layer, **kw: m.dropout(m.attention(m.layernorm_before(u), *args, **kw)[0]),
            lambda u, *args, m=layer, **kw: m.dropout(m.mlp(m.layernorm_after(u))),
        )
    return model


def hf_beit(model: nn.Module, sites: Sites) -> nn.Module:
    """LayerScale as bare parameters, relative position bias added to the mask in the layer."""

    def attend(u: Tensor, m: nn.Module, resolution: tuple[int, int], attention_mask: Tensor | None = None, **_: Any):
        bias = m.relative_position_bias(tuple(r // m.patch_size for r in resolution), False, dim_size=u.shape[1])
        mask = bias if attention_mask is None else bias + attention_mask
        return m.drop_path(m.lambda_1 * m.dropout(m.attention(m.layernorm_before(u), attention_mask=mask)[0]))

    for i, layer in enumerate(model.layers):
        residual_blocks(
            layer,
            sites,
            f"layers.{i}",
            lambda u, m=layer, **kw: attend(u, m, **kw),
            lambda u, m=layer, **kw: m.drop_path(m.lambda_2 * m.dropout(m.mlp(m.layernorm_after(u)))),
        )
    return model


def hf_dinov2(model: nn.Module, sites: Sites) -> nn.Module:
    """LayerScale as a module."""
    for i, layer in enumerate(model.encoder.layer):
        residual_blocks(
            layer,
            sites,
            f"encoder.layer.{i}",
            lambda u, mask=None, m=layer: m.drop_path(m.layer_scale1(m.attention(m.norm1(u), attention_mask=mask)[0])),
            lambda u, mask=None, m=layer: m.drop_path(m.layer_scale2(m.mlp(m.norm2(u)))),
        )
    return model


def hf_clip(model: nn.Module, sites: Sites) -> nn.Module:
    """Two towers, each a stream of its own."""
    for tower in ("vision_model", "text_model"):
        for i, layer in enumerate(getattr(model, tower).encoder.layers):
            residual_blocks(
                layer,
                sites,
                f"{tower}.encoder.layers.{i}",
                lambda u, mask, m=layer, **kw: m.self_attn(m.layer_norm1(u), attention_mask=mask, **kw)[0],
                lambda u, mask, m=layer, **kw: m.mlp(m.layer_norm2(u)),
            )
    return model


def hf_swin(model: nn.Module, sites: Sites) -> nn.Module:
    """Windows are cut and put together inside the branch; a stage is a stream, patch merging ends it."""

    def attend(u: Tensor, m: nn.Module, size: tuple[int, int]) -> Tensor:
        (batch, _, channels), (height, width) = u.shape, size
        window = min(m.window_size, height, width)
        shift = m.shift_size if min(size) > m.window_size else 0
        grid = m.layernorm_before(u).reshape(batch, height, width, channels)
        grid = torch.roll(grid, (-shift, -shift), (1, 2))
        cut = grid.reshape(batch, height // window, window, width // window, window, channels).transpose(2, 3)
        mask = m.get_attn_mask(height, width, dtype=u.dtype, device=u.device) if shift else None
        out = m.attention(cut.reshape(-1, window * window, channels), mask)[0]
        out = out.reshape(batch, height // window, width // window, window, window, channels).transpose(2, 3)
        out = torch.roll(out.reshape(batch, height, width, channels), (shift, shift), (1, 2))
        return m.drop_path(m.dropout(out.reshape(batch, height * width, channels)))

    def stream(layer: nn.Module, name: str) -> Callable[..., Any]:
        def forward(x: Tensor, size: tuple[int, int], **_: Any) -> tuple[Tensor, None]:
            x = sites(f"{name}.mhc_0", x, lambda u: attend(u, layer, size))
            x = sites(f"{name}.mhc_1", x, lambda u: layer.dropout(layer.mlp(layer.layernorm_after(u))))
            return x, None

        return forward

    for s, stage in enumerate(model.encoder.layers):
        for b, block in enumerate(stage.blocks):
            block.forward = stream(block, f"encoder.layers.{s}.blocks.{b}")
    return model


def hf_convnext(model: nn.Module, sites: Sites) -> nn.Module:
    """NCHW trunk, channels-last inside the branch."""

    def block(u: Tensor, m: nn.Module) -> Tensor:
        y = m.layernorm(m.dwconv(u).permute(0, 2, 3, 1))
        y = m.layer_scale_parameter * m.pwconv2(m.act(m.pwconv1(y)))
        return m.drop_path(y.permute(0, 3, 1, 2))

    for s, stage in enumerate(model.encoder.stages):
        for b, layer in enumerate(stage.layers):
            residual_blocks(layer, sites, f"encoder.stages.{s}.layers.{b}", lambda u, m=layer: block(u, m))
    return model


def hf_segformer(model: nn.Module, sites: Sites) -> nn.Module:
    for s, stage in enumerate(model.stages):
        for b, layer in enumerate(stage.blocks):
            residual_blocks(
                layer,
                sites,
                f"stages.{s}.blocks.{b}",
                lambda u, h, w, m=layer, **kw: m.hidden_dropout(m.attention(m.layernorm_before(u), h, w, **kw)[0]),
                lambda u, h, w, m=layer, **kw: m.mlp(m.layernorm_after(u), h, w),
            )
    return model


def hf_poolformer(model: nn.Module, sites: Sites) -> nn.Module:
    """NCHW trunk; the token mixer is `pool(x) - x`, which is no residual; a layer returns a tuple."""

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], tuple[Tensor]]:
        def forward(x: Tensor) -> tuple[Tensor]:
            scale_1, scale_2 = (scale[:, None, None] for scale in (m.layer_scale_1, m.layer_scale_2))
            x = sites(f"{name}.mhc_0", x, lambda u: scale_1 * m.pooling(m.before_norm(u)))
            return (sites(f"{name}.mhc_1", x, lambda u: scale_2 * m.output(m.after_norm(u))),)

        return forward

    for s, stage in enumerate(model.encoder.block):
        for b, layer in enumerate(stage):
            layer.forward = stream(layer, f"encoder.block.{s}.{b}")
    return model


def hf_resnet(model: nn.Module, sites: Sites, at: str = "") -> nn.Module:
    """relu after the add, as in `timm_resnet`; the shortcut passes through an nn.Identity."""

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.relu(sites(name, x, m.layer))

    for s, stage in enumerate(model.encoder.stages):
        for b, layer in enumerate(stage.layers):
            name = f"{at}encoder.stages.{s}.layers.{b}.mhc_0"
            if name in sites.names:
                layer.forward = stream(layer, name)
    return model


def hf_yolos(model: nn.Module, sites: Sites) -> nn.Module:
    """The encoder adds positions to every stream between the layers; the second add of a layer is in a child."""

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            x = sites(f"{name}.mhc_0", x, lambda u: m.attention(m.layernorm_before(u)))
            return sites(f"{name}.output.mhc_0", x, lambda u: m.output.dense(m.intermediate(m.layernorm_after(u))))

        return forward

    for i, layer in enumerate(model.encoder.layer):
        layer.forward = stream(layer, f"encoder.layer.{i}")
    positions = model.encoder.interpolation.forward
    model.encoder.interpolation.forward = lambda size: positions(size).unsqueeze(-2)
    return model


# timm


def timm_vit(model: nn.Module, sites: Sites) -> nn.Module:
    """vit and deit: LayerScale (or none) and drop-path in the branch."""
    for i, block in enumerate(model.blocks):
        residual_blocks(
            block,
            sites,
            f"blocks.{i}",
            lambda u, m=block, **kw: m.drop_path1(m.ls1(m.attn(m.norm1(u), **kw))),
            lambda u, m=block, **kw: m.drop_path2(m.ls2(m.mlp(m.norm2(u)))),
        )
    return model


def timm_mixer(model: nn.Module, sites: Sites) -> nn.Module:
    for i, block in enumerate(model.blocks):
        residual_blocks(
            block,
            sites,
            f"blocks.{i}",
            lambda u, m=block: m.mlp_tokens(m.norm1(u).transpose(1, 2)).transpose(1, 2),
            lambda u, m=block: m.mlp_channels(m.norm2(u)),
        )
    return model


def timm_swin(model: nn.Module, sites: Sites) -> nn.Module:
    """The trunk is (B, H, W, C) at the first add of a block and (B, H * W, C) at the second."""

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            batch, height, width = x.shape[:3]
            x = sites(f"{name}.mhc_0", x, lambda u: m.drop_path1(m._attn(m.norm1(u))))
            x = x.reshape(batch, height * width, *x.shape[3:])
            x = sites(f"{name}.mhc_1", x, lambda u: m.drop_path2(m.mlp(m.norm2(u))))
            return x.reshape(batch, height, width, *x.shape[2:])

        return forward

    for s, stage in enumerate(model.layers):
        for b, block in enumerate(stage.blocks):
            block.forward = stream(block, f"layers.{s}.blocks.{b}")
    return model


def timm_convnext(model: nn.Module, sites: Sites) -> nn.Module:
    def branch(u: Tensor, m: nn.Module) -> Tensor:
        y = m.mlp(m.norm(m.conv_dw(u).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return m.drop_path(y * m.gamma[:, None, None])

    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage.blocks):
            if f"stages.{s}.blocks.{b}.mhc_0" in sites.names:
                residual_blocks(block, sites, f"stages.{s}.blocks.{b}", lambda u, m=block: branch(u, m))
    return model


def timm_resnet(model: nn.Module, sites: Sites) -> nn.Module:
    """relu after the add: on each stream between sites, on the collapsed trunk after the last one."""

    def basic(u: Tensor, m: nn.Module) -> Tensor:
        return m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(u)))))

    def bottleneck(u: Tensor, m: nn.Module) -> Tensor:
        return m.bn3(m.conv3(torch.relu(m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(u))))))))

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        branch = bottleneck if hasattr(m, "conv3") else basic
        return lambda x: torch.relu(sites(name, x, lambda u: branch(u, m)))

    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for b, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{b}.mhc_0"
            # Blocks with a projection on the shortcut, and the only block after one, stay as they are.
            if name in sites.names:
                block.forward = stream(block, name)
    return model


def timm_resnetv2(model: nn.Module, sites: Sites) -> nn.Module:
    """Norm and relu before the convolutions, nothing after the add."""

    def branch(u: Tensor, m: nn.Module) -> Tensor:
        return m.conv3(m.norm3(m.conv2(m.norm2(m.conv1(m.norm1(u))))))

    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage.blocks):
            if f"stages.{s}.blocks.{b}.mhc_0" in sites.names:
                residual_blocks(block, sites, f"stages.{s}.blocks.{b}", lambda u, m=block: branch(u, m))
    return model


def timm_nfnet(model: nn.Module, sites: Sites) -> nn.Module:
    """No norms: the trunk is scaled down on its way into the branch (beta), the branch on its way out (alpha)."""

    def branch(u: Tensor, m: nn.Module) -> Tensor:
        y = m.conv1(m.act1(u.clone()) * m.beta)
        return m.conv3(m.act3(m.conv2(m.act2(y)))) * m.alpha

    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            if f"stages.{s}.{b}.mhc_0" in sites.names:
                residual_blocks(block, sites, f"stages.{s}.{b}", lambda u, m=block: branch(u, m))
    return model


def timm_regnet(model: nn.Module, sites: Sites) -> nn.Module:
    """relu after the add, squeeze and excitation in the branch, an nn.Identity on the shortcut."""

    def stream(m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.relu(sites(name, x, lambda u: m.conv3(m.se(m.conv2(m.conv1(u))))))

    for stage in ("s1", "s2", "s3", "s4"):
        for b, block in getattr(model, stage).named_children():
            if f"{stage}.{b}.mhc_0" in sites.names:
                block.forward = stream(block, f"{stage}.{b}.mhc_0")
    return model


def timm_inverted(model: nn.Module, sites: Sites) -> nn.Module:
    """mobilenetv3 and efficientnet: no activation after the add; blocks that change shape end a stream."""

    def branch(u: Tensor, m: nn.Module) -> Tensor:
        return m.drop_path(m.bn3(m.conv_pwl(m.se(m.bn2(m.conv_dw(m.bn1(m.conv_pw(u))))))))

    for s, stage in enumerate(model.blocks):
        for b, block in enumerate(stage):
            if f"blocks.{s}.{b}.mhc_0" in sites.names:
                residual_blocks(block, sites, f"blocks.{s}.{b}", lambda u, m=block: branch(u, m))
    return model


# torch's own stacks


def torch_encoder(model: nn.Module, sites: Sites, at: str = "") -> nn.Module:
    """Post-norm: each norm acts on every stream, except the last, which acts on the collapsed trunk."""

    def stream(m: nn.Module, name: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, src_mask=None, src_key_padding_mask=None, is_causal=False) -> Tensor:
            def attend(u: Tensor) -> Tensor:
                return m._sa_block(u, src_mask, src_key_padding_mask, is_causal=is_causal)

            if m.norm_first:
                x = sites(f"{name}.mhc_0", x, lambda u: attend(m.norm1(u)))
                return sites(f"{name}.mhc_1", x, lambda u: m._ff_block(m.norm2(u)))
            x = m.norm1(sites(f"{name}.mhc_0", x, attend))
            return m.norm2(sites(f"{name}.mhc_1", x, m._ff_block))

        return forward

    for i, layer in enumerate(model.layers):
        layer.forward = stream(layer, f"{at}layers.{i}")
    return model


def torch_decoder(model: nn.Module, sites: Sites, at: str = "") -> nn.Module:
    """Three sites a layer; the memory is no stream."""

    def stream(m: nn.Module, name: str) -> Callable[..., Tensor]:
        def forward(
            x: Tensor,
            memory: Tensor,
            tgt_mask=None,
            memory_mask=None,
            tgt_key_padding_mask=None,
            memory_key_padding_mask=None,
            tgt_is_causal=False,
            memory_is_causal=False,
        ) -> Tensor:
            def attend(u: Tensor) -> Tensor:
                return m._sa_block(u, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

            def look(u: Tensor) -> Tensor:
                return m._mha_block(u, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

            if m.norm_first:
                x = sites(f"{name}.mhc_0", x, lambda u: attend(m.norm1(u)))
                x = sites(f"{name}.mhc_1", x, lambda u: look(m.norm2(u)))
                return sites(f"{name}.mhc_2", x, lambda u: m._ff_block(m.norm3(u)))
            x = m.norm1(sites(f"{name}.mhc_0", x, attend))
            x = m.norm2(sites(f"{name}.mhc_1", x, look))
            return m.norm3(sites(f"{name}.mhc_2", x, m._ff_block))

        return forward

    for i, layer in enumerate(model.layers):
        layer.forward = stream(layer, f"{at}layers.{i}")
    return model


def torch_transformer(model: nn.Module, sites: Sites) -> nn.Module:
    """Encoder and decoder, a stream each."""
    torch_encoder(model.encoder, sites, "encoder.")
    torch_decoder(model.decoder, sites, "decoder.")
    return model
