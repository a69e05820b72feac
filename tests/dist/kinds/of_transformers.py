"""Models of transformers that are none of causal language, and what is special about some that are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.dist.kinds.difference import ROWS, Made, ids, kind, of_towers

__all__: list[str] = []

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}
QUIET: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_probs_dropout_prob": 0.0}
BERT: dict[str, Any] = {**TEXT, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, **QUIET}


def transformers_model(name: str, config: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(config)


@of_towers(frozen="vision_model")
def clip() -> Made:
    from transformers import CLIPConfig

    text = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    batch = {"input_ids": ids(), "pixel_values": torch.randn(ROWS, 3, 16, 16), "return_loss": True}
    return transformers_model("CLIPModel", config), batch


@kind
def wav2vec2(**changed: Any) -> Made:
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(
        **TEXT,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **{
            "layerdrop": 0.0,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "apply_spec_augment": False,
            "ctc_loss_reduction": "mean",
            **changed,
        },
    )
    batch = {"input_values": torch.randn(ROWS, 800), "labels": ids(tokens=5)}
    return transformers_model("Wav2Vec2ForCTC", config), batch


@kind
def modernbert() -> Made:
    from transformers import ModernBertConfig

    config = ModernBertConfig(**TEXT, max_position_embeddings=32, cls_token_id=1, sep_token_id=2)
    return transformers_model("ModernBertForMaskedLM", config), {"input_ids": ids(), "labels": ids()}


@kind
def bert_decoder() -> Made:
    from transformers import BertConfig

    batch = {"input_ids": ids(), "labels": ids()}
    return transformers_model("BertLMHeadModel", BertConfig(**BERT, is_decoder=True)), batch


@kind
def roberta_decoder() -> Made:
    from transformers import RobertaConfig

    model = transformers_model("RobertaForCausalLM", RobertaConfig(**BERT, is_decoder=True))
    return model, {"input_ids": ids(), "labels": ids()}


@of_towers(frozen="model.vision_tower")
def gemma3_with_images() -> Made:
    from transformers import Gemma3Config

    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    x_BS = ids()
    x_BS[:, 2:6] = 90
    batch = {"input_ids": x_BS, "pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": ids()}
    batch["token_type_ids"] = (x_BS == 90).long()
    return transformers_model("Gemma3ForConditionalGeneration", config), batch


@kind
def opt_with_layerdrop() -> Made:
    """Each layer is skipped in every second step; a rank's random numbers are its own."""
    from transformers import OPTConfig

    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes["vocab_size"] = VOCABULARY
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0, layerdrop=0.5)
    return transformers_model("OPTForCausalLM", config), {"input_ids": ids(), "labels": ids()}


@kind
def wav2vec2_with_layerdrop() -> Made:
    """Also in an adapter, which draws with numpy."""
    model, batch = wav2vec2(layerdrop=0.5, add_adapter=True, num_adapter_layers=2, output_hidden_size=32)
    return model, batch


@of_towers(frozen="model.vision_tower")
def gemma3_text_alone() -> Made:
    """A vision-language model that is given no image: its vision tower has no gradients."""
    model, batch = gemma3_with_images()
    return model, {"input_ids": ids(), "labels": batch["labels"]}


@kind
def bert_classifier() -> Made:
    from transformers import BertConfig

    model = transformers_model("BertForSequenceClassification", BertConfig(**BERT, num_labels=3))
    return model, {"input_ids": ids(), "labels": torch.randint(3, (ROWS,))}


@of_towers(frozen="encoder")
def t5() -> Made:
    """Position biases of the first layer are handed to the others, of an encoder and a decoder."""
    from transformers import T5Config

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers_model("T5ForConditionalGeneration", config), {"input_ids": ids(), "labels": ids(tokens=8)}


@of_towers(frozen="model.encoder")
def whisper_for_speech() -> Made:
    from transformers import WhisperConfig

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    places = {"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **heads, **tokens, **places, dropout=0.0)
    batch = {"input_features": torch.randn(ROWS, 8, 32), "labels": ids(tokens=8)}
    return transformers_model("WhisperForConditionalGeneration", config), batch


@kind
def vit() -> Made:
    from transformers import ViTConfig

    config = ViTConfig(**VISION, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": torch.randint(3, (ROWS,))}
    return transformers_model("ViTForImageClassification", config), batch


@of_towers(frozen="model.visual")
def qwen2_5_vl() -> Made:
    """An image of 4 x 4 patches, merged to 2 x 2 tokens, in each row."""
    from transformers import Qwen2_5_VLConfig

    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    vision |= {"patch_size": 4, "temporal_patch_size": 1, "window_size": 8, "fullatt_block_indexes": [1]}
    vision |= {"out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 32, "rope_parameters": rope}
    places = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **places)
    x_BS = ids()
    x_BS[:, 1], x_BS[:, 2:6], x_BS[:, 6] = 92, 90, 93
    batch = {"input_ids": x_BS, "labels": ids(), "pixel_values": torch.randn(16 * ROWS, 3 * 4 * 4)}
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * ROWS)
    batch["mm_token_type_ids"] = (x_BS == 90).int()
    return transformers_model("Qwen2_5_VLForConditionalGeneration", config), batch
