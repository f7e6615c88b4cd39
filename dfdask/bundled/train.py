"""Trains the bundled model from random weights on rendered glyphs.

    python -m dfdask.bundled.train glyphs.npz OUT --vae-minutes 4 --minutes 9

OUT/model is usable at any time once the autoencoder is done; OUT/log.jsonl has the losses. ``--resume
MODEL`` goes on from a model made so, with a new learning-rate schedule. Seeded; with ``--steps`` instead of
minutes, and on a CPU, the weights are the same every time.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfdask.bundled.architecture import Pipeline, build_pipeline, load_pipeline, save_pipeline, train_tokenizer, weights
from dfdask.bundled.autoencoder import encode, even_out, reconstruction_psnr, train_autoencoder
from dfdask.bundled.captions import Captions, dressed, paired, repainted, sample, unambiguous, variations
from dfdask.bundled.optimizer import Muon
from dfdask.bundled.progress import Budget, Log
from dfdask.bundled.render import Glyph, GlyphFileError, Pixels, load_glyphs

TOKENS = 32
"""Tokens of a caption while training: the longest name has eleven."""
BATCH = 1024
_RATE = 6e-3
_AVERAGE = 0.999
_SHAKEN = 3
PAIRS_PER_GLYPH = 9
_CHECKPOINT_STEPS = 3000


@dataclass(frozen=True)
class Lesson:
    """Captions as tokens (n, TOKENS) int64, each with the pictures' latents it may show, (n,) int64."""

    tokens: Tensor
    pictures: Tensor
    share: float


def tokenize(pipeline: Pipeline, captions: Captions, offset: int, share: float, device: str) -> Lesson:
    """`offset` is where the captions' pictures start among all latents."""
    tokens = pipeline.tokenizer(
        captions.texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    pictures = torch.tensor(captions.pictures) + offset
    return Lesson(tokens.input_ids.to(device), pictures.to(device), share)


def make_lessons(
    pipeline: Pipeline, glyphs: list[Glyph], pixels: Pixels, seed: int, device: str, limit: int | None = None
) -> tuple[list[Lesson], Tensor]:
    """What to learn, and the latents (m, 8, h, w): of the glyphs, of other pictures made of them, of shaken ones.

    `limit` is the most pictures of each kind besides the glyphs, for a short run on a CPU.
    """
    glyphs, rng = unambiguous(glyphs), random.Random(seed)
    varied = variations(glyphs, pixels, random.Random(seed))
    names = Captions([glyph.name for glyph in glyphs], list(range(len(glyphs))))
    vae, generator = pipeline.vae, torch.Generator(device).manual_seed(seed)
    originals = on_device(pixels, device)
    latents = [encode(vae, originals)]
    lessons = [tokenize(pipeline, names, 0, 0.28, device), tokenize(pipeline, varied, 0, 0.28, device)]
    first = len(glyphs)
    for share, (captions, pictures) in (
        (0.14, repainted(glyphs, pixels)),
        (0.14, paired(glyphs, pixels, PAIRS_PER_GLYPH * len(glyphs), random.Random(seed))),
        (0.12, dressed(glyphs, pixels)),
    ):
        if limit is not None:
            captions, pictures = sample(captions, pictures, limit, rng)
        if len(pictures):
            latents.append(encode(vae, on_device(pictures, device)))
            lessons.append(tokenize(pipeline, captions, first, share, device))
            first += len(pictures)
    for _ in range(_SHAKEN if limit is None else 0):
        latents.append(encode(vae, originals, generator))
        lessons.append(tokenize(pipeline, varied, first, 0.04 / _SHAKEN, device))
        first += len(glyphs)
    return lessons, torch.cat(latents) * vae.config.scaling_factor


def on_device(pixels: Pixels, device: str) -> Tensor:
    """(n, 3, size, size) uint8."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)


def draw_times(count: int, generator: torch.Generator) -> Tensor:
    """Shares of noise (count,) between 0 and 1: mostly in the middle and above, where the text decides."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    uniform = torch.rand(count, generator=generator, device=generator.device)
    even = torch.rand(count, generator=generator, device=generator.device) < 0.25
    return torch.where(even, uniform, torch.sigmoid(0.4 + normal)).clamp(1e-3, 0.999)


def velocity(pipeline: Pipeline, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
    """The flow from picture to noise as the transformer sees it; the prompt's padding is masked."""
    mask = (tokens != 0).long()
    text = pipeline.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
    flow: Tensor = pipeline.transformer(
        noisy,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=times * 1000,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return flow


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon trains: no embeddings, and not the first or last layer."""
    return parameter.ndim == 2 and ("block" in name) and "bias" not in name and "embed" not in name


def train_transformer(
    pipeline: Pipeline,
    lessons: list[Lesson],
    latents: Tensor,
    budget: Budget,
    log: Log,
    output: Path,
    seed: int,
    batch: int = BATCH,
    rate: float = _RATE,
    optimizer_name: str = "muon",
) -> None:
    """Trains the text encoder and the transformer; what they end with is the average over their last steps."""
    device = latents.device
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(seed + 1)
    modules = nn.ModuleDict({name: part for name, part in weights(pipeline).items() if name != "vae"}).train()
    named = dict(modules.named_parameters())
    parameters = list(named.values())
    matrices = [value for name, value in named.items() if is_matrix(name, value) and optimizer_name == "muon"]
    taken = {id(matrix) for matrix in matrices}
    muon = Muon(list(matrices))
    rest = [value for value in parameters if id(value) not in taken]
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=on_gpu)
    average = [parameter.detach().clone() for parameter in parameters]
    empty = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    empty[0] = 1
    shares = torch.tensor([lesson.share for lesson in lessons], device=device)
    tokens = torch.cat([lesson.tokens for lesson in lessons])
    shown = torch.cat([lesson.pictures for lesson in lessons])
    sizes = torch.tensor([len(lesson.pictures) for lesson in lessons], device=device)
    starts = sizes.cumsum(0) - sizes

    def loss_of(noisy: Tensor, times: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            flow = velocity(pipeline, noisy, times, ids)
        return (flow.float() - target).square().mean()

    # As one graph of kernels: starting them one by one takes as long again as running them.
    compiled = torch.compile(loss_of, dynamic=False, mode="reduce-overhead") if on_gpu else loss_of
    step = 0
    while (progress := budget.progress(step)) < 1:
        now = rate * min(1, (step + 1) / 300) * (1 - progress) + 1e-6
        kinds = torch.multinomial(shares, batch, replacement=True, generator=generator)
        picks = torch.rand(batch, generator=generator, device=device) * sizes[kinds]
        rows = starts[kinds] + picks.long().minimum(sizes[kinds] - 1)
        unconditional = torch.rand(batch, 1, generator=generator, device=device) < 0.1
        ids = torch.where(unconditional, empty, tokens[rows])
        clean = latents[shown[rows]]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        times = draw_times(batch, generator)
        level = times.view(-1, 1, 1, 1)
        loss = compiled(clean.lerp(noise, level), times, ids, noise - clean)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adam.param_groups:
            group["lr"] = now
        adam.step()
        muon.step(now)
        step += 1
        decay = min(_AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        log.add("transformer", step, flow=loss)
        if step % _CHECKPOINT_STEPS == 0:
            save_pipeline(pipeline, output / "model")
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    modules.eval()


def train(options: argparse.Namespace) -> None:
    """All of it: reads the glyph file, writes `options.output`."""
    glyphs, pixels = load_glyphs(options.glyphs)
    device = options.device
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    log = Log(output / "log.jsonl")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    if options.resume:
        pipeline = load_pipeline(options.resume)
    else:
        texts = [text for glyph in glyphs for text in (glyph.name, *glyph.keywords)]
        texts += repainted(glyphs, pixels[:, ::8, ::8])[0].texts
        pipeline = build_pipeline(train_tokenizer(texts), size=pixels.shape[1])
    for part in weights(pipeline).values():
        part.to(device)
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in weights(pipeline).items()}
    log.write(part="start", glyphs=len(glyphs), seed=options.seed, device=_device_name(device), **counts)
    originals = on_device(pixels, device)
    if options.vae_minutes > 0 and (options.steps is None or not options.resume):
        pictures = torch.cat([originals, on_device(repainted(glyphs, pixels)[1], device)])
        generator = torch.Generator(device).manual_seed(options.seed)
        budget = Budget(options.vae_minutes, options.steps)
        train_autoencoder(pipeline.vae, pictures, budget, log, generator, min(options.batch, 96))
        even_out(pipeline.vae, originals)
    log.write(part="autoencoder", psnr=round(reconstruction_psnr(pipeline.vae, originals), 2))
    save_pipeline(pipeline, output / "model")
    lessons, latents = make_lessons(pipeline, glyphs, pixels, options.seed, device, options.limit)
    log.write(part="lessons", captions=sum(len(lesson.pictures) for lesson in lessons), latents=len(latents))
    budget = Budget(options.minutes, options.steps)
    train_transformer(
        pipeline, lessons, latents, budget, log, output, options.seed, options.batch, options.rate, options.optimizer
    )
    save_pipeline(pipeline, output / "model")
    log.write(part="done", peak_gib=_peak_gib(device))


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _peak_gib(device: str) -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else 0.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model from random weights on rendered glyphs.")
    parser.add_argument("glyphs", type=Path, help="what python -m dfdask.bundled.render wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="of the text encoder and the transformer")
    parser.add_argument("--vae-minutes", type=float, default=4.0, help="of the autoencoder; 0 leaves it as it is")
    parser.add_argument("--steps", type=int, help="of either, in place of minutes")
    parser.add_argument("--resume", type=Path, help="a model that this script wrote")
    parser.add_argument("--limit", type=int, help="the most pictures of each kind besides the glyphs as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=_RATE)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    try:
        train(parse(arguments))
    except GlyphFileError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
