"""The bundled model's parts, untrained, and how they are saved.

A PixArt-alpha pipeline: a unigram tokenizer, a T5 encoder, a transformer with cross-attention over 64
tokens, and a KL autoencoder with 8 channels at an eighth of 128 pixels.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

# Diffusers loads its classes lazily: type checkers see empty stand-ins of them.
Pipeline: TypeAlias = Any
"""A PixArtAlphaPipeline."""
Autoencoder: TypeAlias = Any
"""An AutoencoderKL."""

SIZE = 128
"""Pixels a side."""
CHANNELS = 8
"""Of what the transformer denoises, at an eighth of the pixels' height and width."""
VOCABULARY = 2048
MAX_TOKENS = 120
"""Prompts longer than this are cut: the default of PixArt's pipeline."""
_TOKENIZER = "T5TokenizerFast"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPACE = "\u2581"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A vocabulary of the words in `texts` and of subwords, with printable ASCII below: unseen words work.

    Everything is lower case, as the pipeline lowers prompts. The stages around the vocabulary are those of
    transformers' own T5 tokenizer, which from version 5 on takes nothing but the vocabulary from the file.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY // 2 - 64,  # printable ASCII comes on top
        special_tokens=[_PAD, _END, _UNKNOWN],
        unk_token=_UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    scores = _settled(json.loads(tokenizer.to_str())["model"]["vocab"])
    # Subwords alone cut common words such as "apple" in two: whole words fill the other half.
    counts = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if len(scores) == VOCABULARY:
            break
        scores[_SPACE + word] = math.log(count / counts.total())
    # The name that both transformers 4 and 5 know; in 5 it is another for T5Tokenizer, and not declared.
    tokenizer_class: Any = getattr(transformers, _TOKENIZER)
    fast: PreTrainedTokenizerFast = tokenizer_class(
        vocab=list(scores.items()), extra_ids=0, model_max_length=MAX_TOKENS
    )
    return fast


def _settled(pieces: list[tuple[str, float]]) -> dict[str, float]:
    """The pieces' scores with printable ASCII, in an order that is the same every time: the trainer has ties.

    It also numbers the characters that it keeps only because it must, in any order: here all are as unlikely.
    """
    special, learned = pieces[:3], pieces[3:]
    lowest = min((score for piece, score in learned if len(piece) > 1), default=0.0)
    floor = round(lowest - 1, 4)
    scores = {chr(code): floor for code in range(33, 127) if not chr(code).isupper()}
    scores |= {piece: round(score, 4) if score >= lowest else floor for piece, score in learned}
    return dict(special) | dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])))


def build_pipeline(tokenizer: PreTrainedTokenizerFast, size: int = SIZE) -> Pipeline:
    """All parts with random weights, from torch's current seed."""
    channels = CHANNELS
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=8,
        cross_attention_dim=192,
        caption_channels=192,
        sample_size=size // 8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler())


def make_scheduler(shift: float = 1.0) -> DPMSolverMultistepScheduler:
    """A second-order solver for the straight flow from noise to picture."""
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)


def weights(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    """The parts that have weights, by their name in the pipeline."""
    return {name: getattr(pipeline, name) for name in ("text_encoder", "transformer", "vae")}


def save_pipeline(pipeline: Pipeline, path: Path) -> None:
    """A diffusers directory with weights of 16 bits that load as 32 bits unless asked otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = weights(pipeline)
        dtypes = {name: next(part.parameters()).dtype for name, part in parts.items()}
        for part in parts.values():
            torch.nn.Module.half(part)  # diffusers' own warns of nothing
        pipeline.save_pretrained(path)
        for name, part in parts.items():
            torch.nn.Module.to(part, dtypes[name])
    _write(path / "tokenizer" / "tokenizer_config.json", _tokenizer_config())
    index = json.loads((path / "model_index.json").read_text())
    _write(path / "model_index.json", {**index, "tokenizer": ["transformers", _TOKENIZER]})
    config_path = path / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"  # else transformers 5 takes the dtype of the file, diffusers never does
    _write(config_path, config)


def load_pipeline(path: Path) -> Pipeline:
    """What `save_pipeline` wrote, in 32 bits; never from a hub."""
    return PixArtAlphaPipeline.from_pretrained(path, local_files_only=True)


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": _TOKENIZER,
        "pad_token": _PAD,
        "eos_token": _END,
        "unk_token": _UNKNOWN,
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
