"""Trains the bundled model `cogvideox-tiny` from nothing on two CPU cores.

Stages, in order; each reads what the one before left in `--work` (build/tiny); training
resumes from its last checkpoint, also with a larger `--steps`:

    vae          shapes -> AutoencoderKLCogVideoX                          vae.pt
    latents      shapes -> encoder -> latents, one file of 1000 clips each latents-*.pt
    transformer  latents, captions -> CogVideoXTransformer3DModel + T5     transformer.pt
    export       all of it, fp16 -> a diffusers folder, and the prompt files
    sheet        the folder -> a contact sheet (PNG) through the real pipeline

    torchrun --nproc-per-node 2 tools/train_tiny.py vae --steps 1120
    torchrun --nproc-per-node 2 tools/train_tiny.py latents --clips 4000
    torchrun --nproc-per-node 2 tools/train_tiny.py transformer --steps 3800
    python tools/train_tiny.py export
    python tools/train_tiny.py sheet --out sheet.png

The commands, times and losses of the published weights are in the folder's README.md.
The noise schedule is the pipeline's own: v-prediction with zero terminal SNR (Lin et al. 2023,
"Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3) and 10 % of the
captions dropped for classifier-free guidance (Ho & Salimans 2022).
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import shapes
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "lemica_trt" / "zoo" / "cogvideox-tiny"
PROMPTS = ROOT / "calibration" / "cogvideox-tiny"

TOKENS = 16  # text tokens a prompt is padded to: max_sequence_length
SHARD = 1000  # clips in one latents-*.pt

# Data-parallel training under torchrun, one thread a process: on two busy cores it is about
# twice as fast as two threads, which wait for each other at every small operation.
PROCESSES, RANK = (int(os.environ.get(key, n)) for key, n in (("WORLD_SIZE", 1), ("RANK", 0)))


# ---------------------------------------------------------------- the modules


def build_vae() -> AutoencoderKLCogVideoX:
    """8 x in space, 4 x in time, as CogVideoX: [3, 9, 64, 64] <-> [16, 3, 8, 8].

    The posterior starts narrow (log-variance -6): from 0, its noise drowns the early signal.
    """
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 64),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=shapes.HEIGHT,
        sample_width=shapes.WIDTH,
    )
    nn.init.constant_(vae.encoder.conv_out.conv.bias[16:], -6.0)
    return vae


def build_transformer() -> CogVideoXTransformer3DModel:
    """6 blocks of 4 heads x 32 over 16 text and 3 x 4 x 4 video tokens; zero-initialised output.

    adaLN's modulations and the head start at zero, so that each block starts as the identity
    (Peebles & Xie 2023, section 3.2, "adaLN-Zero").
    """
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=6,
        sample_width=8,
        sample_height=8,
        sample_frames=shapes.FRAMES,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TOKENS,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.normal_(norm.linear.weight, std=1e-3)
            nn.init.zeros_(norm.linear.bias)
    for linear in (model.norm_out.linear, model.proj_out):
        nn.init.normal_(linear.weight, std=1e-3)
        nn.init.zeros_(linear.bias)
    return model


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Two T5 layers of width 64 over the small vocabulary."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            decoder_start_token_id=0,
        )
    )


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer (unigram) with one token a word; letters are lower-cased.

    The lower-casing is a SentencePiece character map, compiled here from a table, since that is
    the one normaliser that a T5Tokenizer keeps when transformers saves and loads it.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(
        vocab=special + [(f"\u2581{word}", -3.0) for word in shapes.WORDS],
        extra_ids=0,
        model_max_length=TOKENS,
        _spm_precompiled_charsmap=lower_case_map(),
    )


def lower_case_map() -> bytes:
    """SentencePiece's compiled character map A-Z -> a-z, and `. , ! ?` -> a space."""
    import io
    import tempfile

    import sentencepiece

    rules = {chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)}
    rules |= dict.fromkeys(".,!?", " ")
    table = "".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in rules.items())
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.write(table)
        file.flush()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(map(str, shapes.CAPTIONS)),
            model_writer=model,
            vocab_size=64,
            hard_vocab_limit=False,
            normalization_rule_tsv=file.name,
            minloglevel=2,
        )
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return proto.normalizer_spec.precompiled_charsmap


def build_scheduler() -> CogVideoXDDIMScheduler:
    """CogVideoX-2B's schedule, less its SNR shift: 8 x 8 latents need less noise than 60 x 90."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )


# ---------------------------------------------------------------- the optimiser


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for matrices (Jordan et al. 2024, "Muon").

    Convolution kernels count as matrices [out, in * kernel]. Matrices of one shape go through
    the iteration together, in one batch: small ones cost little that way.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                update = update.reshape(len(p), -1)
                by_shape.setdefault(tuple(update.shape), []).append((p, update))
            for shape, pairs in by_shape.items():
                updates = orthogonal_from_matrices(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update.reshape(p.shape), alpha=-scale)


def orthogonal_from_matrices(g: Tensor, steps: int = 5) -> Tensor:
    """Nearly the orthogonal factor of each matrix, fp32 `[n, rows, columns]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Trainer:
    """Two optimisers, one linear-decay schedule, an exponential moving average, one file."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        file: Path,
        steps: int,
        muon_lr: float,
        adam_lr: float,
        decay: float,
        ema: float,
    ) -> None:
        self.modules, self.file, self.steps, self.decay, self.ema = modules, file, steps, decay, ema
        named = [(n, p) for m in modules.values() for n, p in m.named_parameters()]
        is_matrix = {n: p.ndim >= 2 and not n.startswith(("shared", "encoder.embed")) for n, p in named}
        self.optimizers = [
            Muon([p for n, p in named if is_matrix[n]], lr=muon_lr),
            torch.optim.AdamW(
                [p for n, p in named if not is_matrix[n]],
                lr=adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.base_lrs = [muon_lr, adam_lr]
        self.average = {k: [p.detach().clone() for p in m.parameters()] for k, m in modules.items()}
        self.step = 0
        self.seconds = 0.0
        if file.exists():
            state = torch.load(file, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.average, self.step = state["average"], state["step"]
            self.seconds = state["seconds"]
            print(f"resumed {file.name} at step {self.step}", flush=True)

    def update(self, loss: Tensor) -> None:
        """One step: backward, mean over processes, clip, both optimisers, average."""
        loss.backward()
        if PROCESSES > 1:
            grads = [p.grad for m in self.modules.values() for p in m.parameters()]
            flat = torch.cat([g.flatten() for g in grads])
            distributed.all_reduce(flat)
            parts = flat.div_(PROCESSES).split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        rate = min(1.0, (self.step + 1) / 100, (self.steps - self.step) / (self.decay * self.steps))
        for optimizer, lr in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * max(rate, 0.0)
        nn.utils.clip_grad_norm_([p for m in self.modules.values() for p in m.parameters()], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.ema, self.step / (self.step + 10))
        for key, module in self.modules.items():
            torch._foreach_lerp_(self.average[key], [p.detach() for p in module.parameters()], 1 - keep)

    def seed(self, seed: int) -> None:
        """Randomness of the coming step: by seed, step and process, so a resumed run is the same."""
        torch.manual_seed((seed * 1_000_003 + self.step) * 64 + RANK)

    def save(self) -> None:
        if RANK:
            return
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


def load_average(module: nn.Module, file: Path, key: str) -> nn.Module:
    """The module with the averaged weights of a checkpoint, for inference."""
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["modules"][key])
    for p, average in zip(module.parameters(), state["average"][key], strict=True):
        p.data.copy_(average)
    return module.eval().requires_grad_(False)


# ---------------------------------------------------------------- vae


def video_from_clips(clips: np.ndarray) -> Tensor:
    """uint8 `[n, frames, h, w, 3]` -> fp32 `[n, 3, frames, h, w]` in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def crops_from_video(video: Tensor, size: int = 32) -> Tensor:
    """One random window a clip, placed where something moves: cheap early training."""
    windows = []
    for clip in video:
        motion = (clip[:, -1] - clip[:, 0]).abs().sum(0).flatten()
        centre = int(torch.multinomial(motion + 1e-3, 1))
        y, x = (
            min(max(c - size // 2 + int(torch.randint(-8, 9, ())), 0), n - size)
            for c, n in zip(divmod(centre, clip.shape[3]), clip.shape[2:], strict=True)
        )
        windows.append(clip[:, :, y : y + size, x : x + size])
    return torch.stack(windows)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and squared error on values, and L1 on differences of neighbours: colour, sharp edges."""
    edges = sum(F.l1_loss(y.diff(dim=dim), x.diff(dim=dim)) for dim in (3, 4))
    return 2.0 * F.l1_loss(y, x) + 8.0 * F.mse_loss(y, x) + 0.5 * edges


def train_vae(work: Path, steps: int, seed: int) -> None:
    """The first 95 % of the steps on 9 x 32 x 32 windows, batch 4; the rest on whole clips, 2.

    (The batch is that of all processes together.)
    """
    torch.manual_seed(seed)
    vae = build_vae().train()
    trainer = Trainer({"vae": vae}, work / "vae.pt", steps, muon_lr=6e-3, adam_lr=3e-3, decay=0.5, ema=0.98)
    mean = 0.0
    while trainer.step < steps:
        tick = time.time()
        trainer.seed(seed)
        windows = trainer.step < 0.95 * steps
        batch = (4 if windows else 2) // PROCESSES
        x = video_from_clips(shapes.draw_clips(batch, torch.initial_seed())[0])
        x = crops_from_video(x) if windows else x
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        reconstruction = reconstruction_loss(y, x)
        kl = posterior.kl().sum() / posterior.mean.numel()  # nats an element
        trainer.update(reconstruction + 2.5e-5 * kl)
        trainer.seconds += time.time() - tick
        mean = reconstruction.item() if trainer.step % 20 == 1 else mean + reconstruction.item()
        if trainer.step % 20 == 0 and RANK == 0:
            psnr = -10 * math.log10(F.mse_loss(y.detach(), x).item() / 4)
            print(
                f"vae step {trainer.step} loss {mean / 20:.4f} psnr {psnr:.1f} dB kl {kl.item():.2f}"
                f" {'windows' if windows else 'clips'} {trainer.seconds:.0f} s",
                flush=True,
            )
        if trainer.step % 100 == 0:
            trainer.save()
    trainer.save()


# ---------------------------------------------------------------- latents


@torch.no_grad()
def make_latents(work: Path, count: int, seed: int) -> None:
    """Posterior means, fp16 `[1000, 3, 16, 8, 8]` a file, unscaled, and the captions."""
    vae = load_average(build_vae(), work / "vae.pt", "vae")
    for shard in range(math.ceil(count / SHARD)):
        file = work / f"latents-{shard:03d}.pt"
        if file.exists() or shard % PROCESSES != RANK:
            continue
        clips, captions = shapes.draw_clips(SHARD, seed + 1 + shard)
        parts = [vae.encode(video_from_clips(c)).latent_dist.mode() for c in np.split(clips, 125)]
        latents = torch.cat(parts).permute(0, 2, 1, 3, 4).half()
        torch.save({"latents": latents, "captions": [str(c) for c in captions]}, file)
        print(f"{file.name}: std {latents.float().std():.3f}", flush=True)


def load_latents(work: Path) -> tuple[Tensor, list[str]]:
    """All shards, divided by the std of the first, fp32 `[n, 3, 16, 8, 8]`, and the captions."""
    shards = [torch.load(f, weights_only=True) for f in sorted(work.glob("latents-*.pt"))]
    if not shards:
        raise SystemExit(f"no latents-*.pt in {work}: run the stage `latents` first")
    latents = torch.cat([s["latents"] for s in shards]).float() * scaling_factor(work)
    return latents, [caption for s in shards for caption in s["captions"]]


def scaling_factor(work: Path) -> float:
    """1 / std of the first shard: what the pipeline multiplies latents by."""
    first = torch.load(work / "latents-000.pt", weights_only=True)["latents"].float()
    return round(1 / first.std().item(), 4)


# ---------------------------------------------------------------- transformer


def train_transformer(work: Path, steps: int, seed: int, batch: int) -> None:
    """v-prediction on uniform timesteps; loss is the mean squared error of v."""
    latents, captions = load_latents(work)
    tokenizer = build_tokenizer()
    prompts = ["", *sorted(set(captions))]
    ids = tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    prompt_of = torch.tensor([prompts.index(c) for c in captions])

    torch.manual_seed(seed)
    transformer = build_transformer().train()
    text_encoder = build_text_encoder(len(tokenizer)).train()
    trainer = Trainer(
        {"transformer": transformer, "text_encoder": text_encoder},
        work / "transformer.pt",
        steps,
        muon_lr=4e-3,
        adam_lr=1.5e-3,
        decay=0.45,
        ema=0.995,
    )
    alphas = build_scheduler().alphas_cumprod.float()  # [1000]
    own = batch // PROCESSES
    mean = 0.0
    while trainer.step < steps:
        tick = time.time()
        trainer.seed(seed)
        index = torch.randint(0, len(latents), (own,))
        x0 = latents[index]
        noise = torch.randn_like(x0)
        # stratified: one timestep in each of `own` equal parts of the range
        t = ((torch.arange(own) + torch.rand(own)) * (1000 / own)).long().clamp(max=999)
        a = alphas[t].sqrt()[:, None, None, None, None]
        s = (1 - alphas[t]).sqrt()[:, None, None, None, None]
        prompt = prompt_of[index] * (torch.rand(own) >= 0.1)  # 0 is the empty prompt
        text = text_encoder(ids[prompt])[0]
        v = transformer(a * x0 + s * noise, text, t, return_dict=False)[0]
        loss = F.mse_loss(v, a * noise - s * x0)
        trainer.update(loss)
        trainer.seconds += time.time() - tick
        mean = loss.item() if trainer.step % 50 == 1 else mean + loss.item()
        if trainer.step % 50 == 0 and RANK == 0:
            print(
                f"transformer step {trainer.step} loss {mean / 50:.4f} {trainer.seconds:.0f} s",
                flush=True,
            )
        if trainer.step % 200 == 0:
            trainer.save()
    trainer.save()


# ---------------------------------------------------------------- export and contact sheet


def export(work: Path, folder: Path) -> None:
    """Averaged weights in fp16 -> the diffusers folder, put in place by one rename."""
    tokenizer = build_tokenizer()
    vae = load_average(build_vae(), work / "vae.pt", "vae")
    vae.register_to_config(scaling_factor=scaling_factor(work))
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=load_average(build_text_encoder(len(tokenizer)), work / "transformer.pt", "text_encoder"),
        vae=vae,
        transformer=load_average(build_transformer(), work / "transformer.pt", "transformer"),
        scheduler=build_scheduler(),
    )
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(new)
    # transformers loads in the dtype that its config names, diffusers in fp32: name fp32, so that
    # a plain from_pretrained gives one dtype throughout.
    config = new / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in new.rglob("*.safetensors"):  # written as 0600: a package must be readable
        file.chmod(0o644)
    if folder.exists():
        card = folder / "README.md"
        if card.exists():
            shutil.copy(card, new / "README.md")
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    PROMPTS.mkdir(parents=True, exist_ok=True)
    for split in ("calibration", "held_out"):
        (PROMPTS / f"{split}.txt").write_text(shapes.prompt_file_of(split))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder.name}: {size / 1e6:.2f} MB", flush=True)


def sheet(folder: Path, out: Path, seed: int, count: int, split: str) -> None:
    """`count` prompts x 9 frames, 50 DDIM steps, guidance 4, fp32, upscaled twice."""
    from PIL import Image

    pipeline = CogVideoXPipeline.from_pretrained(folder)  # fp32
    pipeline.set_progress_bar_config(disable=True)
    prompts = [str(c) for c in shapes.captions_of(split)[:count]]
    frames = pipeline(
        prompts,
        num_frames=shapes.FRAMES,
        height=shapes.HEIGHT,
        width=shapes.WIDTH,
        max_sequence_length=TOKENS,
        guidance_scale=4.0,
        num_inference_steps=50,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        output_type="np",
    ).frames  # [count, frames, h, w, 3] in [0, 1]
    rows = [np.concatenate(list(clip), axis=1) for clip in np.asarray(frames)]
    image = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    out.parent.mkdir(parents=True, exist_ok=True)
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(out)
    print("\n".join(f"row {i}: {p}" for i, p in enumerate(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "latents", "transformer", "export", "sheet"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny", help="checkpoints")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the diffusers folder")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="the contact sheet")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=8, help="prompts on the sheet")
    parser.add_argument("--split", default="held_out", help="whose prompts the sheet shows")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads // PROCESSES)
    if PROCESSES > 1:
        distributed.init_process_group("gloo")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.work, args.steps, args.seed)
    elif args.stage == "latents":
        make_latents(args.work, args.clips, args.seed)
    elif args.stage == "transformer":
        train_transformer(args.work, args.steps, args.seed, args.batch)
    elif args.stage == "export":
        export(args.work, args.folder)
    else:
        sheet(args.folder, args.out, args.seed, args.count, args.split)


if __name__ == "__main__":
    main()
