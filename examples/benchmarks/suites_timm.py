"""The smallest model of every architecture module of timm, and some more."""

from __future__ import annotations

from typing import NamedTuple

import timm
from suites import Case, tensor
from torch import nn


class Row(NamedTuple):
    """A module of ``timm.models`` and its smallest model, apart from those made for tests."""

    module: str
    name: str
    side: int  # few pixels, of which the last BatchNorm still sees more than one per image
    sized: bool = False  # built for one size of images


MODELS = (
    Row("beit", "beit_base_patch16_224", 64, True),
    Row("byoanet", "halonet_h1", 256),
    Row("byobnet", "mobileone_s1", 64),
    Row("cait", "cait_xxs24_224", 64, True),
    Row("coat", "coat_tiny", 64, True),
    Row("convit", "convit_tiny", 64, True),
    Row("convmixer", "convmixer_768_32", 64),
    Row("convnext", "convnext_zepto_rms", 64),
    Row("cpubone", "cpubone_nano", 64),
    Row("crossvit", "crossvit_tiny_240", 240),
    Row("csatv2", "csatv2", 64),
    Row("cspnet", "cs3darknet_focus_s", 64),
    Row("cspnext", "cspnext_tiny", 64),
    Row("davit", "davit_tiny", 64),
    Row("deepseek_vit", "deepseek_vit_412m", 56),
    Row("deit", "deit_tiny_patch16_224", 64, True),
    Row("densenet", "densenet121", 64),
    Row("dla", "dla46x_c", 64),
    Row("dpn", "dpn48b", 64),
    Row("edgenext", "edgenext_xx_small", 64),
    Row("efficientformer", "efficientformer_l1", 224),
    Row("efficientformer_v2", "efficientformerv2_s0", 64, True),
    Row("efficientnet", "mobilenetv2_035", 64),
    Row("efficientvim", "efficientvim_m1", 64),
    Row("efficientvit_mit", "efficientvit_b0", 64),
    Row("efficientvit_msra", "efficientvit_m0", 64, True),
    Row("eva", "vit_tiny_patch16_dinov3_qkvb", 64, True),
    Row("fasternet", "fasternet_t0", 64),
    Row("fastvit", "fastvit_t8", 64),
    Row("focalnet", "focalnet_tiny_srf", 64),
    Row("gcvit", "gcvit_xxtiny", 64, True),
    Row("gemma4_vit", "gemma4_vit_167m", 64),
    Row("ghostnet", "ghostnet_050", 64),
    Row("hardcorenas", "hardcorenas_b", 64),
    Row("hgnet", "hgnetv2_b0", 64),
    Row("hiera", "hiera_tiny_224", 64, True),
    Row("hieradet_sam2", "sam2_hiera_tiny", 64),
    Row("hrnet", "hrnet_w18_small", 64),
    Row("iformer", "iformer_t", 64),
    Row("inception_next", "inception_next_atto", 64),
    Row("inception_resnet_v2", "inception_resnet_v2", 96),
    Row("inception_v3", "inception_v3", 120),
    Row("inception_v4", "inception_v4", 120),
    Row("lcnetv2", "lcnetv2_small", 64),
    Row("levit", "levit_128s", 128, True),
    Row("lowformer", "lowformer_b0", 64),
    Row("mambaout", "mambaout_femto", 64),
    Row("maxxvit", "maxvit_pico_rw_256", 64, True),
    Row("metaformer", "poolformerv2_s12", 64),
    Row("mlp_mixer", "gmlp_ti16_224", 64, True),
    Row("mobilenetv3", "mobilenetv3_small_050", 64),
    Row("mobilenetv5", "mobilenetv5_base", 64),
    Row("mobilevit", "mobilevit_xxs", 64),
    Row("mvitv2", "mvitv2_tiny", 64, True),
    Row("naflexvit", "naflexvit_base_patch16_parfac_gap", 64),
    Row("nasnet", "nasnetalarge", 64),
    Row("nest", "nest_tiny", 64, True),
    Row("nextvit", "nextvit_small", 64),
    Row("nfnet", "nf_regnet_b0", 64),
    Row("pit", "pit_ti_224", 64, True),
    Row("pnasnet", "pnasnet5large", 64),
    Row("pvt_v2", "pvt_v2_b0", 64),
    Row("qwen3_vit", "qwen3_vit_88m", 64),
    Row("rdnet", "rdnet_tiny", 64),
    Row("regnet", "regnetx_002", 64),
    Row("repghost", "repghostnet_050", 64),
    Row("repvit", "repvit_m1", 128),
    Row("res2net", "res2next50", 64),
    Row("resnest", "resnest14d", 64),
    Row("resnet", "resnet10t", 64),
    Row("resnetv2", "resnetv2_18", 64),
    Row("rexnet", "rexnet_100", 64),
    Row("selecsls", "selecsls42", 64),
    Row("senet", "legacy_seresnet18", 64),
    Row("sequencer", "sequencer2d_s", 64, True),
    Row("shvit", "shvit_s1", 64),
    Row("sknet", "skresnet18", 64),
    Row("starnet", "starnet_s050", 64),
    Row("swiftformer", "swiftformer_xs", 64, True),
    Row("swin_transformer", "swin_tiny_patch4_window7_224", 64, True),
    Row("swin_transformer_v2", "swinv2_tiny_window8_256", 64, True),
    Row("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 64, True),
    Row("tiny_vit", "tiny_vit_5m_224", 64),
    Row("tnt", "tnt_s_legacy_patch16_224", 64, True),
    Row("tresnet", "tresnet_m", 64),
    Row("twins", "twins_svt_small", 64, True),
    Row("vgg", "vgg11", 64),
    Row("visformer", "visformer_tiny", 64, True),
    Row("vision_transformer", "vit_tiny_patch16_224", 64, True),
    Row("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, True),
    Row("vision_transformer_relpos", "vit_srelpos_small_patch16_224", 64, True),
    Row("vision_transformer_sam", "samvit_base_patch16_224", 64, True),
    Row("vitamin", "vitamin_small_224", 64, True),
    Row("volo", "volo_d1_224", 64, True),
    Row("vovnet", "ese_vovnet19b_slim_dw", 64),
    Row("xception", "legacy_xception", 64),
    Row("xception_aligned", "xception41p", 64),
    Row("xcit", "xcit_nano_12_p8_224", 64, True),
)

# Other networks of these modules, from other ideas: what their first one lacks.
MORE = (
    Row("byoanet", "bat_resnext26ts", 256),
    Row("byoanet", "botnet26t_256", 256, True),
    Row("byoanet", "lambda_resnet26t", 256, True),
    Row("byobnet", "gernet_s", 64),
    Row("byobnet", "regnetz_b16", 64),
    Row("byobnet", "repvgg_a0", 64),
    Row("convnext", "convnextv2_atto", 64),
    Row("efficientnet", "efficientnet_lite0", 64),
    Row("efficientnet", "mixnet_s", 64),
    Row("efficientnet", "tf_efficientnetv2_b0", 64),
    Row("efficientnet", "tinynet_e", 64),
    Row("eva", "eva02_tiny_patch14_224", 56, True),
    Row("fastvit", "fastvit_sa12", 64),
    Row("ghostnet", "ghostnetv2_100", 64),
    Row("levit", "levit_conv_128s", 128, True),
    Row("maxxvit", "coatnet_pico_rw_224", 64, True),
    Row("metaformer", "convformer_s18", 64),
    Row("mlp_mixer", "mixer_s32_224", 64, True),
    Row("mlp_mixer", "resmlp_12_224", 64, True),
    Row("mobilenetv3", "mobilenetv4_conv_small", 64),
    Row("mobilenetv3", "mobilenetv4_hybrid_medium", 64),
    Row("mobilevit", "mobilevitv2_050", 64),
    Row("resnet", "ecaresnet26t", 64),
    Row("resnet", "seresnext26d_32x4d", 64),
    Row("vision_transformer_relpos", "vit_relpos_small_patch16_224", 64, True),
)


def _case(row: Row) -> Case:
    options = {"img_size": row.side} if row.sized else {}
    config = timm.get_pretrained_cfg(row.name)
    usual = config.input_size[-1] if config is not None else row.side

    def build() -> nn.Module:
        return timm.create_model(row.name, **options)

    return Case(
        row.name,
        row.module,
        build,
        tensor(3, row.side, row.side),
        1000,
        None if row.sized else tensor(3, usual, usual),
        size=f"{row.side}x{row.side}",
    )


def suite() -> list[Case]:
    """All cases."""
    return [_case(row) for row in (*MODELS, *MORE)]
