"""The table of vision families (transformers, timm) and of torch's own stacks: random weights, tiny sizes.

Sites and streams are counted from the models' sources. Where the trunk changes shape (a strided block, a projection on
the shortcut, patch merging) a stream ends; a stream of one site is left alone (`min_sites` = 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers as hf
from torch import Tensor, nn

import streams_vision as by_hand
from family import Family
from streams_vision import Sites

IMAGE = 32


def lively(model: nn.Module) -> nn.Module:
    """Draws weights that hide nothing: no branch that starts at zero (LayerScale, the last norm of a ResNet block), no
    norm that is the identity, no statistics of 0 and 1."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                gain = 1.5 if p.dim() == 2 else 1.0
                p.normal_(0, gain / math.sqrt(p[0].numel()) if p.shape[0] > 1 else 0.5)
            else:
                p.add_(0.3 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: lively(timm.create_model(name, pretrained=False, num_classes=7, **options))


def image(size: int = IMAGE) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, 3, size, size),)


def pixels(size: int = IMAGE) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def sequence(*lengths: int) -> Callable[[], tuple[Tensor, ...]]:
    """Batch-first sequences of width 16."""
    return lambda: tuple(torch.randn(2, length, 16) for length in lengths)


def chain(pattern: str, layers: int, sites: int = 1) -> tuple[str, ...]:
    """A stream of `layers` layers with `sites` sites each; `pattern` holds the layer's number as `*`."""
    return tuple(f"{pattern.replace('*', str(i))}.mhc_{k}" for i in range(layers) for k in range(sites))


def row(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]],
    hand: Callable[[nn.Module, Sites], nn.Module],
    *streams: tuple[str, ...],
    channel_dim: int = -1,
) -> Family:
    return Family(
        name=name,
        build=build,
        inputs=inputs,
        sites=sum(len(stream) for stream in streams),
        streams=streams,
        oracle=lambda model, params: hand(model, Sites(params, streams, channel_dim)),
    )


# transformers

ENCODER = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=IMAGE, patch_size=8
)


def hf_beit() -> nn.Module:
    options = ENCODER | dict(use_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.1)
    return lively(hf.BeitModel(hf.BeitConfig(**options)))


def hf_dinov2() -> nn.Module:
    return lively(hf.Dinov2Model(hf.Dinov2Config(**ENCODER, mlp_ratio=2, drop_path_rate=0.1)))


def hf_clip() -> nn.Module:
    vision = ENCODER | dict(num_hidden_layers=2)
    text = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    text |= dict(max_position_embeddings=12, bos_token_id=0, eos_token_id=49, pad_token_id=1)
    return lively(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def hf_clip_inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, 49, (3, 7))
    ids[:, -1] = 49
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


def hf_swin() -> nn.Module:
    options = dict(image_size=IMAGE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return lively(hf.SwinModel(hf.SwinConfig(**options, mlp_ratio=2, drop_path_rate=0.1)))


def hf_convnext() -> nn.Module:
    options = dict(num_stages=2, hidden_sizes=[16, 24], depths=[2, 3], drop_path_rate=0.1)
    return lively(hf.ConvNextModel(hf.ConvNextConfig(**options, patch_size=4)))


def hf_segformer() -> nn.Module:
    options = dict(num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[16, 24], patch_sizes=[7, 3])
    options |= dict(strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.1)
    return lively(hf.SegformerModel(hf.SegformerConfig(**options)))


def hf_poolformer() -> nn.Module:
    options = dict(num_encoder_blocks=2, depths=[2, 2], hidden_sizes=[16, 24], patch_sizes=[7, 3], strides=[4, 2])
    options |= dict(padding=[2, 1], mlp_ratio=2.0)
    return lively(hf.PoolFormerModel(hf.PoolFormerConfig(**options)))


def hf_resnet() -> nn.Module:
    options = dict(embedding_size=16, hidden_sizes=[16, 24], depths=[2, 3], layer_type="basic")
    return lively(hf.ResNetModel(hf.ResNetConfig(**options)))


def hf_yolos() -> nn.Module:
    options = ENCODER | dict(image_size=[IMAGE, IMAGE], num_detection_tokens=4, use_mid_position_embeddings=True)
    return lively(hf.YolosModel(hf.YolosConfig(**options)))


TRANSFORMERS = [
    row(
        "hf ViT",
        lambda: lively(hf.ViTModel(hf.ViTConfig(**ENCODER))),
        pixels(),
        by_hand.hf_vit,
        chain("layers.*", 3, 2),
    ),
    row(
        "hf DeiT",
        lambda: lively(hf.DeiTModel(hf.DeiTConfig(**ENCODER))),
        pixels(),
        by_hand.hf_vit,
        chain("layers.*", 3, 2),
    ),
    row("hf BEiT", hf_beit, pixels(), by_hand.hf_beit, chain("layers.*", 3, 2)),
    row("hf DINOv2", hf_dinov2, pixels(), by_hand.hf_dinov2, chain("encoder.layer.*", 3, 2)),
    row(
        "hf CLIP",
        hf_clip,
        hf_clip_inputs,
        by_hand.hf_clip,
        chain("vision_model.encoder.layers.*", 2, 2),
        chain("text_model.encoder.layers.*", 2, 2),
    ),
    row(
        "hf Swin",
        hf_swin,
        pixels(),
        by_hand.hf_swin,
        chain("encoder.layers.0.blocks.*", 2, 2),
        chain("encoder.layers.1.blocks.*", 2, 2),
    ),
    row(
        "hf ConvNeXt",
        hf_convnext,
        pixels(),
        by_hand.hf_convnext,
        chain("encoder.stages.0.layers.*", 2),
        chain("encoder.stages.1.layers.*", 3),
        channel_dim=1,
    ),
    row(
        "hf SegFormer",
        hf_segformer,
        pixels(),
        by_hand.hf_segformer,
        chain("stages.0.blocks.*", 2, 2),
        chain("stages.1.blocks.*", 2, 2),
    ),
    row(
        "hf PoolFormer",
        hf_poolformer,
        pixels(),
        by_hand.hf_poolformer,
        chain("encoder.block.0.*", 2, 2),
        chain("encoder.block.1.*", 2, 2),
        channel_dim=1,
    ),
    row(
        "hf ResNet",
        hf_resnet,
        pixels(),
        by_hand.hf_resnet,
        ("encoder.stages.0.layers.0.mhc_0", "encoder.stages.0.layers.1.mhc_0"),
        ("encoder.stages.1.layers.1.mhc_0", "encoder.stages.1.layers.2.mhc_0"),
        channel_dim=1,
    ),
    row(
        "hf YOLOS",
        hf_yolos,
        pixels(),
        by_hand.hf_yolos,
        tuple(f"encoder.layer.{i}.{site}" for i in range(3) for site in ("mhc_0", "output.mhc_0")),
    ),
]

# timm


def timm_mixer() -> nn.Module:
    options = dict(num_classes=7, img_size=IMAGE, patch_size=8, embed_dim=32, num_blocks=3, drop_path_rate=0.1)
    return lively(timm.models.mlp_mixer.MlpMixer(**options))


def timm_inverted(name: str, **options: Any) -> Callable[[], nn.Module]:
    """mobilenetv3 and efficientnet, whose gates leave so little of a branch that the streams would hardly matter."""

    def build() -> nn.Module:
        model = timm_model(name, **options)()
        with torch.no_grad():
            for block in model.modules():
                if getattr(block, "has_skip", False):
                    block.bn3.weight.mul_(4)
        return model

    return build


VIT = dict(img_size=IMAGE, patch_size=8, embed_dim=32, depth=3, num_heads=2)

TIMM = [
    row(
        "timm vit",
        timm_model("vit_tiny_patch16_224", **VIT, init_values=0.5, drop_path_rate=0.1),
        image(),
        by_hand.timm_vit,
        chain("blocks.*", 3, 2),
    ),
    row(
        "timm deit",
        timm_model("deit_tiny_distilled_patch16_224", **VIT),
        image(),
        by_hand.timm_vit,
        chain("blocks.*", 3, 2),
    ),
    row(
        "timm mixer",
        timm_mixer,
        image(),
        by_hand.timm_mixer,
        chain("blocks.*", 3, 2),
    ),
    row(
        "timm swin",
        timm_model(
            "swin_tiny_patch4_window7_224",
            img_size=IMAGE,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 2),
        ),
        image(),
        by_hand.timm_swin,
        chain("layers.0.blocks.*", 2, 2),
        chain("layers.1.blocks.*", 2, 2),
    ),
    # The stages of one block are streams of one site.
    row(
        "timm convnext",
        timm_model("test_convnext", drop_path_rate=0.1),
        image(),
        by_hand.timm_convnext,
        chain("stages.1.blocks.*", 2),
        chain("stages.2.blocks.*", 4),
        chain("stages.3.blocks.*", 2),
        channel_dim=1,
    ),
    # layer2 to layer4 begin with a projection on the shortcut, and one block is left after it.
    row(
        "timm resnet18",
        timm_model("resnet18", channels=(64, 16, 24, 32)),
        image(),
        by_hand.timm_resnet,
        ("layer1.0.mhc_0", "layer1.1.mhc_0"),
        channel_dim=1,
    ),
    row(
        "timm resnet, (2, 3, 4, 1)",
        timm_model("resnet18", layers=(2, 3, 4, 1), channels=(64, 16, 24, 32)),
        image(),
        by_hand.timm_resnet,
        ("layer1.0.mhc_0", "layer1.1.mhc_0"),
        ("layer2.1.mhc_0", "layer2.2.mhc_0"),
        ("layer3.1.mhc_0", "layer3.2.mhc_0", "layer3.3.mhc_0"),
        channel_dim=1,
    ),
    # Bottlenecks: layer1 begins with a projection too, from 64 to 4 * 8 channels.
    row(
        "timm resnet50",
        timm_model("resnet50", layers=(3, 1, 3, 1), channels=(8, 8, 12, 8)),
        image(),
        by_hand.timm_resnet,
        ("layer1.1.mhc_0", "layer1.2.mhc_0"),
        ("layer3.1.mhc_0", "layer3.2.mhc_0"),
        channel_dim=1,
    ),
    row(
        "timm resnetv2",
        timm_model("resnetv2_50", layers=(3, 1, 3, 1), channels=(32, 32, 48, 32)),
        image(),
        by_hand.timm_resnetv2,
        ("stages.0.blocks.1.mhc_0", "stages.0.blocks.2.mhc_0"),
        ("stages.2.blocks.1.mhc_0", "stages.2.blocks.2.mhc_0"),
        channel_dim=1,
    ),
    row(
        "timm nfnet",
        timm_model("nf_resnet26", depths=(3, 1, 3, 1), channels=(32, 32, 48, 32)),
        image(),
        by_hand.timm_nfnet,
        ("stages.0.1.mhc_0", "stages.0.2.mhc_0"),
        ("stages.2.1.mhc_0", "stages.2.2.mhc_0"),
        channel_dim=1,
    ),
    row(
        "timm regnet",
        timm_model("regnety_002"),
        image(64),
        by_hand.timm_regnet,
        tuple(f"s3.b{b}.mhc_0" for b in range(2, 5)),
        tuple(f"s4.b{b}.mhc_0" for b in range(2, 8)),
        channel_dim=1,
    ),
    # At half the width stages 2 and 3 have equal channels, so that one stream runs through both.
    row(
        "timm mobilenetv3",
        timm_inverted("mobilenetv3_small_050"),
        image(),
        by_hand.timm_inverted,
        ("blocks.2.1.mhc_0", "blocks.2.2.mhc_0", "blocks.3.0.mhc_0", "blocks.3.1.mhc_0"),
        ("blocks.4.1.mhc_0", "blocks.4.2.mhc_0"),
        channel_dim=1,
    ),
    # blocks.1.1 and blocks.2.1 are skips alone; 3 to 5 have their first block without one.
    row(
        "timm efficientnet",
        timm_inverted("efficientnet_b0", drop_path_rate=0.1),
        image(64),
        by_hand.timm_inverted,
        ("blocks.3.1.mhc_0", "blocks.3.2.mhc_0"),
        ("blocks.4.1.mhc_0", "blocks.4.2.mhc_0"),
        ("blocks.5.1.mhc_0", "blocks.5.2.mhc_0", "blocks.5.3.mhc_0"),
        channel_dim=1,
    ),
]

# torch


def encoder(norm_first: bool, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=True, **options)
        return lively(nn.TransformerEncoder(layer, 3, nn.LayerNorm(16), enable_nested_tensor=not norm_first))

    return build


def decoder(norm_first: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerDecoderLayer(16, 2, 32, norm_first=norm_first, batch_first=True)
        return lively(nn.TransformerDecoder(layer, 2, nn.LayerNorm(16)))

    return build


def transformer() -> nn.Module:
    """Sequence first, as it is by default."""
    return lively(nn.Transformer(16, 2, 2, 2, 32))


TORCH = [
    row(
        f"torch encoder, norm {order}",
        encoder(norm_first),
        sequence(5),
        by_hand.torch_encoder,
        chain("layers.*", 3, 2),
    )
    for norm_first, order in ((True, "first"), (False, "last"))
]
TORCH += [
    row(
        f"torch decoder, norm {order}",
        decoder(norm_first),
        sequence(5, 7),
        by_hand.torch_decoder,
        chain("layers.*", 2, 3),
    )
    for norm_first, order in ((True, "first"), (False, "last"))
]
TORCH += [
    row(
        "torch Transformer",
        transformer,
        lambda: (torch.randn(7, 2, 16), torch.randn(5, 2, 16)),
        by_hand.torch_transformer,
        chain("encoder.layers.*", 2, 2),
        chain("decoder.layers.*", 2, 3),
    )
]

FAMILIES = TRANSFORMERS + TIMM + TORCH
