"""Train a flow model in FLUX's shape on the bundled autoencoder: `python -m training.flow WORK --minutes 150`.

Rectified flow (Liu et al. 2022, Esser et al. 2024): x_s = (1 - s) x_0 + s eps, and the transformer predicts eps - x_0. Its
text encoder, a small T5, is learnt along; the pooled text comes from the bundled CLIP text encoder, which stays as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import re
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from training import data
from training.diffusion import LatentTraining, cache_latents, changed, draw_batch, token_ids
from training.export import INSTALLED
from training.loop import Limits, Run

MAX_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """What the transformer and its text encoder are and how they are trained."""

    heads: int = 8
    head_width: int = 32
    rope: tuple[int, int, int] = (4, 14, 14)  # widths for (nothing, row, column), as FLUX divides them
    double: int = 2
    single: int = 5
    text_width: int = 128
    text_layers: int = 2
    vocabulary: int = 2600
    batch: int = 48
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    ema: float = 0.999
    logit_normal: float = 0.5  # share of the times that is drawn around the middle, the others evenly
    caption_dropout: float = 0.1
    variants: int = 4  # of each picture, as in training.diffusion
    plain_share: float = 0.25


CONFIGS = {
    "cpu": FlowConfig(),
    "gpu": FlowConfig(batch=256, weight_decay=0.1, variants=8),
    "tiny": FlowConfig(
        heads=2, head_width=16, rope=(4, 6, 6), double=1, single=1, text_width=32, text_layers=1, vocabulary=100, batch=4,
        variants=2,
    ),
}  # fmt: skip


def build_tokenizer(captions: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer as T5's, of the captions' most frequent words and all of their letters.

    A letter costs more than any word, so that an unknown word is its longest known beginning and then letters. (The unigram
    trainer of `tokenizers` gives other bytes on each run.)
    """
    counts = Counter(word for caption in captions for word in re.findall(r"[^\s,]+", caption.lower()))
    letters = sorted({",", *"".join(counts)})
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - len(letters) - 4]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -20.0) for letter in ("▁", *letters))]
    pieces += [(f"▁{word}", math.log(counts[word] / counts.total())) for word in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(config: FlowConfig) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=config.vocabulary,
            d_model=config.text_width,
            d_kv=config.text_width // 4,
            d_ff=3 * config.text_width,
            num_layers=config.text_layers,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer(config: FlowConfig, latent_channels: int, pooled_width: int) -> FluxTransformer2DModel:
    """It begins as the identity in every block and predicts nothing (adaLN-zero, Peebles and Xie 2023)."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=config.double,
        num_single_layers=config.single,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=pooled_width,
        guidance_embeds=False,
        axes_dims_rope=config.rope,
    )
    for layer in (*modulations(transformer), transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def modulations(transformer: FluxTransformer2DModel) -> list[nn.Linear]:
    """The layers that give shifts, scales and gates from time and pooled text."""
    double = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    single = [block.norm for block in transformer.single_transformer_blocks]
    return [norm.linear for norm in (*double, *single, transformer.norm_out)]


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C), as FluxPipeline does."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def spread(latents: Tensor) -> tuple[float, float]:
    """(shift, scale) so that (latents - shift) * scale has mean 0 and variance 1 over all channels."""
    latents = latents.float()
    return round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)


class FlowTraining(LatentTraining):
    """Text encoder and transformer. Latents are those that the transformer sees, shifted and scaled."""

    def __init__(
        self,
        config: FlowConfig,
        tokenizers: tuple[CLIPTokenizer, PreTrainedTokenizerFast],
        pooling: CLIPTextModel,
        latent_shape: tuple[int, ...],
        device: torch.device,
    ):
        self.tokenizers = tokenizers
        rows, columns = (size // 2 for size in latent_shape[1:])
        self.text_ids = torch.zeros(MAX_TOKENS, 3, device=device)
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)
        self.pooling = pooling.requires_grad_(False).eval().to(device)
        text = build_text_encoder(config)
        transformer = build_transformer(config, latent_shape[0], pooling.config.hidden_size)
        plain = (transformer.x_embedder, transformer.proj_out, transformer.time_text_embed, text.shared)
        model = nn.ModuleDict({"text": text, "transformer": transformer})
        super().__init__(model, config, (*plain, *modulations(transformer)), device)
        for each in (model, self.average.module):
            # The transformer rounds times to the type that this layer gives, and 8 bits are too few for them.
            each["transformer"].x_embedder.register_forward_hook(lambda layer, inputs, output: output.float())

    def even_times(self, even: Tensor) -> Tensor:
        return even.clamp(1e-4, 1 - 1e-4)

    def times(self, even: Tensor, draw: torch.Generator) -> Tensor:
        """s in (0, 1): around the middle (the logistic function of a normal draw) or even."""
        even = self.even_times(even)
        middle = torch.rand(len(even), generator=draw) < self.config.logit_normal
        return torch.where(middle, torch.special.ndtri(even).sigmoid(), even)

    def tokens(self, captions: list[str]) -> tuple[Tensor, ...]:
        return tuple(token_ids(tokenizer, captions) for tokenizer in self.tokenizers)

    def errors(self, model: nn.ModuleDict, latents: Tensor, t: Tensor, noise: Tensor, *tokens: Tensor) -> Tensor:
        """The squared error of the predicted velocity of each picture, (B,)."""
        clip, t5 = tokens
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        with torch.no_grad():
            pooled = self.pooling(clip).pooler_output
        with torch.autocast(self.device.type, torch.bfloat16):
            predicted = model["transformer"](
                hidden_states=pack(noisy),
                timestep=t,
                pooled_projections=pooled,
                encoder_hidden_states=model["text"](t5).last_hidden_state,
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
            ).sample
        return (predicted.float() - pack(noise - latents)).square().mean((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", choices=CONFIGS, default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the preset")
    parser.add_argument("--model", type=Path, default=INSTALLED, help="whose autoencoder and text encoder it uses")
    Limits.add_arguments(parser, minutes=150)
    args = parser.parse_args()

    config, device, folder = changed(CONFIGS[args.preset], args.set), torch.device(args.device), args.work / "flow"
    torch.manual_seed(args.seed)
    folder.mkdir(exist_ok=True)
    training, held_out = data.split(data.read_pictures(args.work))
    vae = AutoencoderKL.from_pretrained(args.model / "vae").to(device)
    latents = cache_latents(vae, args.work, training, config.variants, args.seed, "flow/latents.pt")
    unseen = cache_latents(vae, args.work, held_out, 1, args.seed, "flow/held_out.pt")[0]
    shift, scale = spread(latents)
    latents, unseen = (latents - shift) * scale, (unseen - shift) * scale

    tokenizer = build_tokenizer([t for p in training for t in (*p.captions, *p.keywords)], config.vocabulary)
    clip = CLIPTokenizer.from_pretrained(args.model / "tokenizer")
    pooling = CLIPTextModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32)
    part = FlowTraining(config, (clip, tokenizer), pooling, tuple(latents.shape[2:]), device)
    # All that training.export needs beside a checkpoint.
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.save_config(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer_2")
    part.model["text"].config.save_pretrained(folder / "text_encoder_2")
    part.model["transformer"].save_config(folder / "transformer")

    run = Run(folder, part.parts(), Limits.of(args))
    for step in run.steps(log_every=50):
        # Draws of the step alone, so that a run in slices has those of a run in one go.
        draw, words = torch.Generator().manual_seed(args.seed * 1_000_003 + step), random.Random(f"{args.seed} {step}")
        batch = draw_batch(training, latents, config, draw, words)
        run.record(loss=part.step(*batch, run.learning_rate(config.learning_rate), draw))
        if step % 500 == 499:
            run.record(held_out=part.check(unseen, [picture.name for picture in held_out]).mean())
    print(f"{run.step} steps; `python -m training.export {args.work} --flow` makes a model of them.")


if __name__ == "__main__":
    main()
