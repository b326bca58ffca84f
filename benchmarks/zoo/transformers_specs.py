"""Sizes and inputs of the transformers models of the zoo: data only."""

# ruff: noqa: C408, E501
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WIDTH, LAYERS, HEADS_, KV, FFN, VOCAB = 64, 2, 4, 2, 128, 256
COMMON: dict[str, Any] = dict(
    hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS_, num_key_value_heads=KV, intermediate_size=FFN,
    vocab_size=VOCAB, max_position_embeddings=128, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS_, n_positions=128, n_inner=FFN, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS_,
    max_seq_len=128, ffn_hidden_size=FFN, num_heads=HEADS_, num_layers=LAYERS, d_ff=FFN, d_kv=16, num_decoder_layers=LAYERS,
    encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS_, decoder_attention_heads=HEADS_,
    encoder_ffn_dim=FFN, decoder_ffn_dim=FFN, ffn_dim=FFN, word_embed_proj_dim=WIDTH, dim=WIDTH, hidden_dim=FFN, embedding_size=32,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, n_routed_experts=4, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, moe_num_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1,
    num_hidden_groups=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, rotary_dim=8,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_shared_experts=1, embed_dim=WIDTH, depth=LAYERS, out_hidden_size=WIDTH, mlp_dim=FFN, projection_dim=32, decoder_hidden_size=WIDTH,
    encoder_hidden_size=WIDTH, num_queries=8, sliding_window=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    shared_intermediate_size=FFN, attention_heads=HEADS_, decoder_intermediate_size=FFN, decoder_num_attention_heads=HEADS_,
    decoder_num_hidden_layers=LAYERS, num_nextn_predict_layers=0, index_topk=4, index_n_heads=2, index_head_dim=16,
    num_frames=2, num_feature_levels=3, encoder_hidden_dim=WIDTH, mamba_d_state=8, mamba_chunk_size=8, chunk_size=8, max_source_positions=64,
    max_target_positions=64, cross_attention_hidden_size=WIDTH, text_hidden_size=WIDTH, audio_hidden_size=WIDTH, vision_hidden_size=WIDTH,
    num_denoising=0, output_dim=WIDTH,
)  # fmt: skip
VISION: dict[str, Any] = dict(image_size=64, patch_size=16, num_channels=3)
HEADS: dict[str, tuple[str, ...]] = {
    "causal": ("_FOR_CAUSAL_LM",),
    "mlm": ("_FOR_MASKED_LM",),
    "s2s": ("_FOR_SEQ_TO_SEQ_CAUSAL_LM",),
    "img": ("_FOR_IMAGE_CLASSIFICATION",),
    "oth": ("_FOR_CTC", "_FOR_SPEECH_SEQ_2_SEQ", ""),
    "auto": (
        "_FOR_CAUSAL_LM", "_FOR_MASKED_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_SPEECH_SEQ_2_SEQ", "_FOR_CTC", "_FOR_IMAGE_CLASSIFICATION",
        "_FOR_OBJECT_DETECTION", "_FOR_SEMANTIC_SEGMENTATION", "_FOR_DEPTH_ESTIMATION", "_FOR_VIDEO_CLASSIFICATION",
        "_FOR_AUDIO_CLASSIFICATION", "_FOR_TIME_SERIES_PREDICTION", "_FOR_IMAGE_TO_IMAGE", "_FOR_KEYPOINT_DETECTION", "_FOR_POSE_ESTIMATION",
        "_FOR_UNIVERSAL_SEGMENTATION", "_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION", "_FOR_IMAGE_TEXT_TO_TEXT", "_FOR_PRETRAINING", "",
    ),
}  # fmt: skip
CLASSES: dict[str, str] = {
    "align": "AlignModel",
    "blip": "BlipModel",
    "dpr": "DPRQuestionEncoder",
    "patchtst": "PatchTSTForPrediction",
    "git": "GitForCausalLM",
    "patchtsmixer": "PatchTSMixerForPrediction",
    "sam_vision_model": "SamVisionModel",
    "musicgen_decoder": "MusicgenForCausalLM",
    "clvp_decoder": "ClvpForCausalLM",
    "kosmos_2_text_model": "Kosmos2TextForCausalLM",
    "timesformer": "TimesformerModel",
    "moshi_depth": "MoshiDepthDecoder",
    "fastspeech2_conformer_hifigan": "FastSpeech2ConformerHifiGan",
    "vits": "VitsModel",
    "mllama_text_model": "MllamaForCausalLM",
    "emu3_text_model": "Emu3ForCausalLM",
    "univnet": "UnivNetModel",
    "flava": "FlavaModel",
}
_MLA = dict(head_dim=8, num_key_value_heads=4)
_RESNET = dict(
    backbone_config=dict(
        model_type="resnet",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
)
_SERIES = dict(prediction_length=4, context_length=16, lags_sequence=[1, 2, 3], num_time_features=2, input_size=1)
_SWIN = dict(image_size=64, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 4], window_size=4, patch_size=4)
_CONVS = dict(
    conv_dim=(32, 32),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
    vocab_size=32,
)
FURTHER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "bailing_hybrid", "deepseek_v32", "minicpm3", "mistral4", "mistral_large4_text", "kimi_linear", "longcat_flash", "youtu", "glm_moe_dsa", "glm4_moe_lite"], _MLA),
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], dict(head_dim=16)),
    **dict.fromkeys(["autoformer", "informer", "time_series_transformer"], _SERIES),
    **dict.fromkeys(["detr", "conditional_detr", "deformable_detr", "table-transformer"], _RESNET),
    **dict.fromkeys(["donut-swin", "maskformer-swin", "swin2sr"], _SWIN),
    **dict.fromkeys(["data2vec-audio", "wavlm", "unispeech", "unispeech-sat", "wav2vec2-conformer", "sew", "sew-d"], _CONVS),
    "swin2sr": dict(_SWIN, embed_dim=24, depths=[1, 1], num_heads=[2, 2]),
    "dab-detr": dict(backbone_config=dict(_RESNET["backbone_config"], out_features=["stage4"])),
    "audio-spectrogram-transformer": dict(max_length=64, num_mel_bins=32),
    "patchtst": dict(num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, prediction_length=4),
    "patchtsmixer": dict(num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, prediction_length=4),
    "efficientnet": dict(image_size=64, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320),
    "convnextv2": dict(patch_size=4, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]), "dinov3_convnext": dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
    "bit": dict(embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], num_groups=8),
    "focalnet": dict(embed_dim=16, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], patch_size=4),
    "hiera": dict(image_size=[64, 64], embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    "hgnet_v2": dict(embedding_size=16, depths=[1, 1, 1, 1], hidden_sizes=[32, 48, 64, 96], stem_channels=[3, 16, 16],
                     stage_in_channels=[16, 32, 48, 64], stage_mid_channels=[16, 16, 24, 24], stage_out_channels=[32, 48, 64, 96],
                     stage_num_blocks=[1, 1, 1, 1]),
    "layoutlmv3": dict(has_relative_attention_bias=False, has_spatial_attention_bias=False, visual_embed=False, coordinate_size=8, shape_size=16),
    "lilt": dict(max_2d_position_embeddings=64, hidden_size=96, channel_shrink_ratio=4, head_dim=24),
    "layoutlm": dict(max_2d_position_embeddings=64), "luke": dict(entity_vocab_size=32, entity_emb_size=32), "fsmt": dict(src_vocab_size=64, tgt_vocab_size=64),
    "dpt": dict(backbone_out_indices=[0, 1, 2, 3], num_hidden_layers=4, neck_hidden_sizes=[16, 24, 32, 32], fusion_hidden_size=32, reassemble_factors=[4, 2, 1, 0.5]),
    "encodec": dict(num_filters=4, hidden_size=16, codebook_dim=16, codebook_size=16, num_lstm_layers=1),
    "dac": dict(encoder_hidden_size=8, decoder_hidden_size=64, codebook_size=16, downsampling_ratios=[2, 2, 2], upsampling_ratios=[2, 2, 2], hidden_size=64),
    "glpn": dict(hidden_sizes=[16, 24, 32, 48], num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=16), "mobilevitv2": dict(width_multiplier=0.5, image_size=64),
    "mobilenet_v1": dict(depth_multiplier=0.25), "mobilenet_v2": dict(depth_multiplier=0.35), "levit": dict(hidden_sizes=[32, 48, 64], depths=[1, 1, 1], num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8], image_size=64),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=64, laurel_rank=8, altup_num_inputs=2, layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, intermediate_size=128),
    "gemma4_text": dict(num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=64, layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=16),
    "lfm2_moe": dict(num_dense_layers=1, layer_types=["conv", "full_attention"]), "dots1": dict(first_k_dense_replace=1, n_group=1, topk_group=1),
    "dbrx": dict(ffn_config=dict(ffn_hidden_size=FFN, moe_num_experts=4, moe_top_k=2, hidden_size=WIDTH), attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)),
    "timesfm": dict(horizon_length=8, patch_length=8, freq_size=3), "timesfm2_5": dict(horizon_length=8, patch_length=8, output_quantile_len=8, context_length=64),
    "esm": dict(vocab_size=33, pad_token_id=1, mask_token_id=32), "esmc": dict(num_key_value_heads=4),
    "vits": dict(hidden_size=32, ffn_dim=32, flow_size=32, spectrogram_bins=33, upsample_initial_channel=16, wavenet_dilation_rate=1, posterior_encoder_num_wavenet_layers=2, prior_encoder_num_wavenet_layers=2, depth_separable_num_layers=1, num_attention_heads=2, duration_predictor_filter_channels=16),
    "univnet": dict(model_in_channels=16, model_hidden_channels=8, kernel_predictor_hidden_channels=16, num_mel_bins=20),
    "speecht5": dict(_CONVS), "pvt": dict(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8], image_size=64), "pvt_v2": dict(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8], image_size=64),
    "swiftformer": dict(embed_dims=[16, 24, 32, 48], depths=[1, 1, 1, 1], image_size=64), "textnet": dict(image_size=[64, 64]),
    "sam_vision_model": dict(image_size=64, output_channels=32, window_size=2, global_attn_indexes=[1], num_pos_feats=16, mlp_dim=128),
    "superpoint": dict(encoder_hidden_sizes=[16, 16, 24, 24], decoder_hidden_size=32, descriptor_decoder_dim=32),
    "decision_transformer": dict(state_dim=5, act_dim=3, max_ep_len=32),
    "vitpose": dict(backbone_config=dict(model_type="vitpose_backbone", image_size=[64, 64], hidden_size=64, num_hidden_layers=2, num_attention_heads=4, out_indices=[2])),
    "upernet": dict(backbone_config=dict(model_type="convnext", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]), hidden_size=32, auxiliary_in_channels=32, auxiliary_channels=16, head_in_index=2),
}  # fmt: skip


def _ids(tokens: int = 16) -> torch.Tensor:
    return torch.randint(3, 32, (1, tokens))


def _dual(size: int = 64) -> dict[str, Any]:
    return dict(input_ids=_ids(), pixel_values=torch.randn(1, 3, size, size), attention_mask=torch.ones(1, 16, dtype=torch.int64))


def _series(config: Any) -> dict[str, Any]:
    past, ahead = config.context_length + max(config.lags_sequence), config.prediction_length
    return dict(
        past_values=torch.randn(1, past),
        past_time_features=torch.randn(1, past, 2),
        past_observed_mask=torch.ones(1, past),
        future_values=torch.randn(1, ahead),
        future_time_features=torch.randn(1, ahead, 2),
    )


def _codec(config: Any) -> dict[str, Any]:
    return dict(input_values=torch.randn(1, 1, 640))


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(["align", "altclip", "blip", "chinese_clip", "clipseg", "groupvit", "aimv2", "bridgetower"], lambda c: _dual()),
    **dict.fromkeys(["autoformer", "informer", "time_series_transformer"], _series),
    **dict.fromkeys(["dac", "encodec", "mimi"], _codec),
    "audio-spectrogram-transformer": lambda c: dict(input_values=torch.randn(1, 64, 32)),
    "patchtst": lambda c: dict(past_values=torch.randn(1, 32, 2)), "patchtsmixer": lambda c: dict(past_values=torch.randn(1, 32, 2)),
    "timesfm": lambda c: dict(past_values=[torch.randn(64)], freq=[0]), "timesfm2_5": lambda c: dict(past_values=[torch.randn(64)]),
    "layoutlmv3": lambda c: dict(input_ids=_ids(), bbox=torch.randint(0, 10, (1, 16, 4)).sort(-1).values),
    "univnet": lambda c: dict(input_features=torch.randn(1, 12, 20), noise_sequence=torch.randn(1, 12, 16)),
    "fastspeech2_conformer_hifigan": lambda c: dict(spectrogram=torch.randn(1, 8, 80)),
    "decision_transformer": lambda c: dict(states=torch.randn(1, 4, 5), actions=torch.randn(1, 4, 3), rewards=torch.randn(1, 4, 1),
                                           returns_to_go=torch.randn(1, 4, 1), timesteps=torch.arange(4)[None], attention_mask=torch.ones(1, 4)),
    "lxmert": lambda c: dict(input_ids=_ids(), visual_feats=torch.randn(1, 6, c.visual_feat_dim), visual_pos=torch.rand(1, 6, 4)),
    "vitpose": lambda c: dict(pixel_values=torch.randn(1, 3, 64, 64), dataset_index=torch.tensor([0])),
    "speecht5": lambda c: dict(input_values=torch.randn(1, 1600), decoder_input_ids=_ids(6)),
    "sam_vision_model": lambda c: dict(pixel_values=torch.randn(1, 3, 64, 64)),
    "kosmos-2": lambda c: dict(_dual(), image_embeds=None),
}  # fmt: skip
_TEXT = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=256,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_IMAGE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=64, patch_size=16)
SPECIAL: dict[str, dict[str, Any]] = {
    "clip": dict(text_config=_TEXT, vision_config=_IMAGE, projection_dim=32), "siglip": dict(text_config=_TEXT, vision_config=_IMAGE),
    'albert': dict(embedding_size=32),
    'bamba': dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=8, attn_layer_indices=[1]),
    'cohere2': dict(layer_types=['sliding_attention', 'full_attention'], sliding_window=8),
    'convbert': dict(conv_kernel_size=3),
    'convnext': dict(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    'ctrl': dict(dff=128),
    'deberta': dict(relative_attention=True, pos_att_type=['p2c', 'c2p']),
    'deberta-v2': dict(relative_attention=True, pos_att_type=['p2c', 'c2p']),
    'deepseek_v2': dict(head_dim=8, num_key_value_heads=4),
    'deepseek_v3': dict(head_dim=8, num_key_value_heads=4),
    'electra': dict(embedding_size=32),
    'exaone4': dict(layer_types=['sliding_attention', 'full_attention'], sliding_window=8),
    'falcon_h1': dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=8),
    'falcon_mamba': dict(state_size=8, expand=2, time_step_rank=4),
    'funnel': dict(block_sizes=[1, 1], d_head=16, d_inner=128, num_decoder_layers=1),
    'gemma2': dict(query_pre_attn_scalar=16),
    'gemma3_text': dict(query_pre_attn_scalar=16),
    'gpt_neo': dict(attention_types=[[['global', 'local'], 1]], window_size=8, intermediate_size=128),
    'gpt_oss': dict(layer_types=['sliding_attention', 'full_attention'], sliding_window=8),
    'granitemoehybrid': dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=8, layer_types=['mamba', 'attention'], shared_intermediate_size=128),
    'hubert': dict(conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=32),
    'jamba': dict(mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    'lfm2': dict(layer_types=['conv', 'full_attention'], block_ff_dim=128),
    'llama4_text': dict(intermediate_size_mlp=128, interleave_moe_layer_step=2),
    'mamba': dict(state_size=8, expand=2, time_step_rank=4),
    'mamba2': dict(state_size=8, expand=2, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    'minimax': dict(layer_types=['linear_attention', 'full_attention'], block_size=8),
    'mobilebert': dict(embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32, num_feedforward_networks=2),
    'mobilevit': dict(hidden_sizes=[32, 48, 64], neck_hidden_sizes=[16, 16, 32, 32, 48, 64, 96], image_size=64, num_attention_heads=4),
    'modernbert': dict(global_attn_every_n_layers=2, local_attention=8),
    'mpt': dict(attn_config={'attn_impl': 'torch'}, expansion_ratio=2),
    'nemotron_h': dict(mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=8, layers_block_type=['mamba', 'attention']),
    'nystromformer': dict(segment_means_seq_len=16, num_landmarks=4),
    'phimoe': dict(num_local_experts=4),
    'poolformer': dict(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    'qwen3_next': dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, layer_types=['linear_attention', 'full_attention'], num_hidden_layers=2),
    'recurrent_gemma': dict(lru_width=64, attention_window_size=8, num_hidden_layers=3, block_types=['recurrent', 'recurrent', 'attention']),
    'regnet': dict(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], groups_width=8),
    'resnet': dict(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    'roformer': dict(embedding_size=64, rotary_value=False),
    'rwkv': dict(attention_hidden_size=64, context_length=32),
    'segformer': dict(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=32),
    'squeezebert': dict(embedding_size=64),
    'swin': dict(image_size=64, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 4], window_size=4, num_layers=3, hidden_size=64),
    'swinv2': dict(image_size=64, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 4], window_size=4, num_layers=3, hidden_size=64),
    'wav2vec2': dict(conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=32),
    'whisper': dict(max_source_positions=32, max_target_positions=32, num_mel_bins=16, decoder_start_token_id=1),
    'xlstm': dict(embedding_dim=64, hidden_size=64, num_heads=4, chunk_size=8, num_blocks=2),
    'zamba2': dict(mamba_ngroups=1, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=16, chunk_size=8, num_mem_blocks=1, layers_block_type=['mamba', 'hybrid'], attention_head_dim=32, adapter_rank=8),
}  # fmt: skip
