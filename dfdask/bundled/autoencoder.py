"""Trains the bundled model's autoencoder and evens out its latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from dfdask.bundled.architecture import Autoencoder
from dfdask.bundled.progress import Budget, Log

BATCH = 96
_RATE = 2e-3
_KL_WEIGHT = 1e-3


def to_signal(pixels: Tensor) -> Tensor:
    """(n, 3, h, w) uint8 to float32 between -1 and 1."""
    return pixels.float() / 127.5 - 1


def shake(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (n, 3, h, w; white is 1) moved and scaled a little; white comes in at the sides."""
    count, device = len(pictures), pictures.device
    drawn = torch.randn(count, 3, generator=generator, device=device)
    grid = torch.zeros(count, 2, 3, device=device)
    grid[:, 0, 0] = grid[:, 1, 1] = 1 + 0.06 * drawn[:, 0]
    grid[:, :, 2] = 0.04 * drawn[:, 1:]
    sampled = functional.grid_sample(
        pictures - 1, functional.affine_grid(grid, list(pictures.shape), align_corners=False), align_corners=False
    )
    return sampled + 1


def drawing_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of the pixels and, at two scales, of their differences: these keep edges crisp.

    Beyond pure white and pure black the decoder may go as far as it likes, as both are cut off later: this is
    what makes the background clean.
    """
    drawn = torch.where(wanted >= 1, drawn.clamp(max=1), torch.where(wanted <= -1, drawn.clamp(min=-1), drawn))
    error = drawn - wanted
    loss = error.abs().mean()
    for scale in (1, 2):
        small = functional.avg_pool2d(error, scale) if scale > 1 else error
        loss = loss + (small[..., 1:] - small[..., :-1]).abs().mean()
        loss = loss + (small[..., 1:, :] - small[..., :-1, :]).abs().mean()
    return loss


def train_autoencoder(
    vae: Autoencoder, pixels: Tensor, budget: Budget, log: Log, generator: torch.Generator, batch: int = BATCH
) -> None:
    """Trains on `pixels`, (n, 3, size, size) uint8 on the device, until the budget is spent."""
    device = pixels.device
    on_gpu = device.type == "cuda"
    vae.to(memory_format=torch.channels_last).train()

    def losses(pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            posterior = vae.encode(pictures).latent_dist
            drawn = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return drawing_loss(drawn.float(), pictures), divergence

    compiled = torch.compile(losses, dynamic=False) if on_gpu else losses
    optimizer = torch.optim.AdamW(vae.parameters(), _RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=on_gpu)
    channels, side = vae.config.latent_channels, vae.config.sample_size // 8
    step = 0
    while (progress := budget.progress(step)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / 100) * (1 - progress) + 1e-6
        chosen = torch.randint(len(pixels), (batch,), generator=generator, device=device)
        pictures = shake(to_signal(pixels[chosen]), generator).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, channels, side, side, generator=generator, device=device)
        drawing, divergence = compiled(pictures, noise)
        optimizer.zero_grad()
        (drawing + _KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        log.add("autoencoder", step, drawing=drawing, divergence=divergence)
    vae.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def even_out(vae: Autoencoder, pixels: Tensor) -> None:
    """Shifts and scales every latent channel to mean 0 and deviation 1 over `pixels`, inside the weights.

    Diffusers knows one factor for all channels; with this it is 1, and the transformer's noise is as strong
    in each channel.
    """
    latents = encode(vae, pixels)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) + 1e-6
    count = len(mean)
    # The convolution writes means, then logarithms of variances.
    vae.quant_conv.weight[:count] /= deviation.view(-1, 1, 1, 1)
    vae.quant_conv.bias[:count] = (vae.quant_conv.bias[:count] - mean) / deviation
    vae.quant_conv.bias[count:] -= 2 * deviation.log()
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * mean).sum(1)
    vae.post_quant_conv.weight *= deviation.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: Autoencoder, pixels: Tensor, shaken: torch.Generator | None = None) -> Tensor:
    """Latents (n, 8, size / 8, size / 8), float32, of (n, 3, size, size) uint8 pictures."""
    parts = []
    for piece in pixels.split(128):
        pictures = to_signal(piece)
        parts.append(vae.encode(shake(pictures, shaken) if shaken else pictures).latent_dist.mean)
    return torch.cat(parts)


@torch.no_grad()
def reconstruction_psnr(vae: Autoencoder, pixels: Tensor) -> float:
    """Mean over the pictures, in decibels."""
    values = []
    for piece in pixels.split(128):
        pictures = to_signal(piece)
        drawn = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (drawn - pictures).square().mean((1, 2, 3)).clamp(min=1e-9)))
    mean = torch.cat(values).mean().item()
    return mean if math.isfinite(mean) else 0.0
