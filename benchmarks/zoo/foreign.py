"""Models of packages that know nothing of us: detectors, segmentation, medical images, language, diffusion.

All with random weights, built from their configurations; nothing is downloaded. Small variants, where there are some:
what a cut must follow is in the code, not in the width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.check import Case
from zoo.models import image, seeded


def ultralytics_cases() -> list[Case]:
    """Return YOLO detectors from v3 to 26, their heads for other tasks, and RT-DETR."""
    from ultralytics.nn import tasks

    detectors = "yolov3-tiny yolov3 yolov5n yolov6n yolov8n yolov8s yolov9t yolov9s yolov10n yolo11n yolo12n yolo26n"
    others = {
        "yolov8n-seg": tasks.SegmentationModel,
        "yolov8n-pose": tasks.PoseModel,
        "yolov8n-obb": tasks.OBBModel,
        "yolov8n-cls": tasks.ClassificationModel,
        "yolo11n-seg": tasks.SegmentationModel,
        "yolo11n-pose": tasks.PoseModel,
        "rtdetr-resnet50": tasks.RTDETRDetectionModel,
    }
    kinds: dict[str, Any] = {**dict.fromkeys(detectors.split(), tasks.DetectionModel), **others}
    return [
        Case(name, partial(seeded, kind, f"{name}.yaml", verbose=False), partial(image, 1, 3, 64, 64))
        for name, kind in kinds.items()
    ]


def smp_cases() -> list[Case]:
    """Return the architectures of segmentation-models-pytorch on two encoders, and Unet on more."""
    import segmentation_models_pytorch as smp

    archs = [
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
        "DPT",
    ]
    pairs = [(arch, encoder) for arch in archs[:-1] for encoder in ("resnet18", "mobilenet_v2")]
    encoders = [
        "vgg11_bn",
        "densenet121",
        "efficientnet-b0",
        "mit_b0",
        "mobileone_s0",
        "xception",
        "inceptionv4",
        "dpn68",
        "se_resnet50",
    ]
    pairs += [("Unet", encoder) for encoder in encoders]
    pairs += [
        ("FPN", "mit_b0"),
        ("Segformer", "mit_b0"),
        ("MAnet", "efficientnet-b0"),
        ("DPT", "tu-vit_tiny_patch16_224"),
    ]
    cases = []
    for arch, encoder in pairs:
        size = 224 if arch == "DPT" else 128 if arch == "PAN" else 96 if encoder in ("xception", "inceptionv4") else 64
        build = partial(seeded, getattr(smp, arch), encoder_name=encoder, encoder_weights=None, classes=5)
        cases.append(Case(f"{arch} {encoder}", build, partial(image, 2, 3, size, size)))
    return cases


def monai_cases() -> list[Case]:
    """Return MONAI's networks for volumes and for slices."""
    from monai.networks import nets

    volume, slice_ = partial(image, 1, 1, 64, 64, 64), partial(image, 1, 1, 64, 64)
    unet = {"in_channels": 1, "out_channels": 3, "channels": (8, 16, 32), "strides": (2, 2)}
    dyn = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    vit = {"in_channels": 1, "feature_size": 12}
    makers: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Callable[[], Tensor]]] = {
        "UNet": (nets.UNet, {"spatial_dims": 3, "num_res_units": 2, **unet}, volume),
        "UNet 2d": (nets.UNet, {"spatial_dims": 2, **unet}, slice_),
        "AttentionUnet": (nets.AttentionUnet, {"spatial_dims": 3, **unet}, volume),
        "BasicUNet": (
            nets.BasicUNet,
            {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "features": (8, 8, 16, 32, 64, 8)},
            volume,
        ),
        "BasicUNetPlusPlus": (
            nets.BasicUNetPlusPlus,
            {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "features": (8, 8, 16, 32, 64, 8)},
            slice_,
        ),
        "DynUNet": (nets.DynUNet, {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, **dyn}, volume),
        "DynUNet supervised": (
            nets.DynUNet,
            {
                "spatial_dims": 2,
                "in_channels": 1,
                "out_channels": 3,
                "deep_supervision": True,
                "deep_supr_num": 1,
                "kernel_size": [3] * 4,
                "strides": [1, 2, 2, 2],
                "upsample_kernel_size": [2] * 3,
            },
            slice_,
        ),
        "SegResNet": (nets.SegResNet, {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, volume),
        "SegResNetVAE": (
            nets.SegResNetVAE,
            {"input_image_size": (64, 64, 64), "in_channels": 1, "out_channels": 3},
            volume,
        ),
        "SegResNetDS": (
            nets.SegResNetDS,
            {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "init_filters": 8},
            volume,
        ),
        "VNet": (nets.VNet, {"in_channels": 1, "out_channels": 3}, volume),
        "UNETR": (
            nets.UNETR,
            {"out_channels": 3, "img_size": (64, 64, 64), "hidden_size": 96, "mlp_dim": 192, "num_heads": 4, **vit},
            volume,
        ),
        "SwinUNETR": (nets.SwinUNETR, {"out_channels": 3, **vit}, volume),
        "DenseNet121": (nets.DenseNet121, {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}, slice_),
        "SEResNet50": (nets.SEResNet50, {"spatial_dims": 2, "in_channels": 1, "num_classes": 3}, slice_),
        "EfficientNetBN": (
            nets.EfficientNetBN,
            {
                "model_name": "efficientnet-b0",
                "pretrained": False,
                "spatial_dims": 2,
                "in_channels": 1,
                "num_classes": 3,
            },
            slice_,
        ),
        "HighResNet": (nets.HighResNet, {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}, volume),
        "AutoEncoder": (nets.AutoEncoder, {"spatial_dims": 2, **unet, "strides": (2, 2, 2)}, slice_),
        "FlexibleUNet": (
            nets.FlexibleUNet,
            {"in_channels": 1, "out_channels": 3, "backbone": "efficientnet-b0", "spatial_dims": 2},
            slice_,
        ),
        "ViT": (
            nets.ViT,
            {
                "in_channels": 1,
                "img_size": (64, 64),
                "patch_size": (16, 16),
                "hidden_size": 96,
                "mlp_dim": 192,
                "num_layers": 3,
                "num_heads": 4,
                "classification": True,
                "spatial_dims": 2,
            },
            slice_,
        ),
    }
    return [Case(name, partial(seeded, make, **how), inputs) for name, (make, how, inputs) in makers.items()]


def transformers_cases() -> list[Case]:
    """Return models of Hugging Face transformers for images, text and sound, small ones."""
    import transformers as T

    text = {
        "vocab_size": 100,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    seen = {key: value for key, value in text.items() if key != "vocab_size"} | {"image_size": 64, "patch_size": 16}
    small = image_input(64)
    models: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
        "Bert": ("BertForSequenceClassification", text, tokens),
        "Bert eager": ("BertModel", {**text, "attn_implementation": "eager"}, tokens),
        "DistilBert": (
            "DistilBertForSequenceClassification",
            {"vocab_size": 100, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
            tokens,
        ),
        "Albert": ("AlbertModel", {**text, "embedding_size": 24}, tokens),
        "Electra": ("ElectraModel", {**text, "embedding_size": 24}, tokens),
        "GPT2": ("GPT2Model", {"vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 4}, tokens),
        "T5 encoder": (
            "T5EncoderModel",
            {"vocab_size": 100, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4},
            tokens,
        ),
        "Llama": ("LlamaModel", {**text, "num_key_value_heads": 2}, tokens),
        "Mamba": (
            "MambaModel",
            {"vocab_size": 100, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
            tokens,
        ),
        "ViT": ("ViTForImageClassification", seen, small),
        "DeiT": ("DeiTForImageClassification", seen, small),
        "BEiT": ("BeitForImageClassification", seen, small),
        "Dinov2": ("Dinov2ForImageClassification", seen, small),
        "CLIP vision": ("CLIPVisionModel", seen, small),
        "SigLIP vision": ("SiglipVisionModel", seen, small),
        "ResNet": (
            "ResNetForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16},
            small,
        ),
        "RegNet": (
            "RegNetForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "groups_width": 8},
            small,
        ),
        "ConvNext": (
            "ConvNextForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
            small,
        ),
        "ConvNextV2": (
            "ConvNextV2ForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
            small,
        ),
        "MobileNetV1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, small),
        "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, small),
        "MobileViT": ("MobileViTForImageClassification", {"image_size": 64}, small),
        "EfficientNet": ("EfficientNetForImageClassification", {}, small),
        "Bit": (
            "BitForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128], "embedding_size": 32, "num_groups": 8},
            small,
        ),
        "PoolFormer": (
            "PoolFormerForImageClassification",
            {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]},
            small,
        ),
        "Swin": (
            "SwinForImageClassification",
            {"image_size": 64, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]},
            small,
        ),
        "Segformer": ("SegformerForSemanticSegmentation", {}, small),
        "UperNet": (
            "UperNetForSemanticSegmentation",
            {
                "backbone_config": T.ResNetConfig(
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    depths=[1, 1, 1, 1],
                    hidden_sizes=[16, 32, 48, 64],
                    embedding_size=16,
                ),
                "hidden_size": 32,
                "auxiliary_in_channels": 48,
            },
            small,
        ),
        "DPT": (
            "DPTForDepthEstimation",
            {
                **seen,
                "num_hidden_layers": 4,
                "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [16, 32, 48, 64],
                "fusion_hidden_size": 32,
            },
            small,
        ),
        "GLPN": ("GLPNForDepthEstimation", {}, small),
        "YOLOS": ("YolosForObjectDetection", {**seen, "image_size": [64, 64], "num_detection_tokens": 10}, small),
        "DETR": (
            "DetrForObjectDetection",
            {**detr(T), "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
            small,
        ),
        "Conditional DETR": (
            "ConditionalDetrForObjectDetection",
            {**detr(T), "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
            small,
        ),
        "RT-DETR": ("RTDetrForObjectDetection", {"num_queries": 20, "decoder_layers": 2}, small),
        "Wav2Vec2": (
            "Wav2Vec2Model",
            {**text, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
            partial(image, 1, 4000),
        ),
        "HuBERT": (
            "HubertModel",
            {**text, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
            partial(image, 1, 4000),
        ),
        "Whisper encoder": (
            "WhisperEncoder",
            {
                "d_model": 48,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "max_source_positions": 50,
            },
            partial(image, 1, 80, 100),
        ),
        "VITS": (
            "VitsModel",
            {"vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2, "ffn_dim": 96, "flow_size": 48},
            tokens,
        ),
    }
    return [Case(name, partial(seeded, _from_config, *model), inputs) for name, (*model, inputs) in models.items()]


def _from_config(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    if name == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as kind
    else:
        kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**settings))
    return model


def detr(T: Any) -> dict[str, Any]:
    """Return DETR's settings on a small backbone of its own library."""
    backbone = T.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16, out_features=["stage4"]
    )
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10}
    return {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        **layers,
    }


def tokens() -> dict[str, Tensor]:
    """Return two sentences of nine tokens."""
    return {"input_ids": torch.arange(18).reshape(2, 9) % 37}


def image_input(size: int) -> Callable[[], dict[str, Tensor]]:
    """Return what makes two images under the name that transformers asks for."""
    return lambda: {"pixel_values": image(2, 3, size, size)}


def diffusers_cases() -> list[Case]:
    """Return autoencoders and denoisers of diffusers."""
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    auto = {"block_out_channels": (32, 64), "latent_channels": 4, "norm_num_groups": 8, **blocks}
    unet = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 32}
    plain = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    crossed = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
    }
    step = {"timestep": torch.tensor([3])}
    models: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
        "AutoencoderKL": (auto, partial(image, 1, 3, 32, 32)),
        "VQModel": (auto, partial(image, 1, 3, 32, 32)),
        "AutoencoderTiny": (
            {
                "encoder_block_out_channels": (16, 16),
                "decoder_block_out_channels": (16, 16),
                "num_encoder_blocks": (1, 2),
                "num_decoder_blocks": (2, 1),
            },
            partial(image, 1, 3, 32, 32),
        ),
        "UNet2DModel": (unet | plain, lambda: {"sample": image(1, 3, 32, 32), **step}),
        "UNet2DConditionModel": (
            unet | crossed,
            lambda: {"sample": image(1, 4, 32, 32), **step, "encoder_hidden_states": image(1, 5, 24)},
        ),
        "Transformer2DModel": (
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 32,
                "norm_num_groups": 8,
                "cross_attention_dim": 24,
            },
            lambda: {"hidden_states": image(1, 32, 8, 8), "encoder_hidden_states": image(1, 5, 24)},
        ),
    }
    single = {"AutoencoderTiny"}  # makes tensors in single precision, whatever its weights are
    return [
        Case(
            name,
            partial(seeded, getattr(diffusers, name), **how),
            inputs,
            dtype=torch.float32 if name in single else torch.float64,
        )
        for name, (how, inputs) in models.items()
    ]


PACKAGES: dict[str, Callable[[], list[Case]]] = {
    "ultralytics": ultralytics_cases,
    "smp": smp_cases,
    "monai": monai_cases,
    "transformers": transformers_cases,
    "diffusers": diffusers_cases,
}
