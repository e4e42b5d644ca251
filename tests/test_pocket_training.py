"""Training of the pocket checkpoint: it runs from nothing to a bundle that animates, and goes on after a kill."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from dynamictrl_edge.export.checkpoint import Checkpoint
from dynamictrl_edge.export.exporter import export_checkpoint
from pocket.clips import COLUMNS, FRAMES, ROWS, make_clip
from pocket.evaluate import of_bundle
from pocket.training import train_vae as vae_phase
from pocket.training.card import model_card
from pocket.training.checkpoint import LIMIT
from pocket.training.language import Language, write_tokenizer
from pocket.training.latents import Batch
from pocket.training.muon import Muon, orthogonal
from pocket.training.networks import SCHEDULER, make_text_encoder, make_transformer, make_vae, rotary
from pocket.training.settings import FULL, SMOKE
from pocket.training.start import spent_on
from pocket.training.train import _scaling, train
from pocket.training.train_dit import Networks, Tables, _losses, sample, train_dit
from pocket.training.trainer import Trainer, learning_rate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Networks]:
    folder = tmp_path_factory.mktemp("pocket") / "run"
    return folder, train(folder, SMOKE)


def test_a_smoke_training_ends_in_a_checkpoint(trained: tuple[Path, Networks]) -> None:
    folder, _ = trained
    assert json.loads((folder / "done.json").read_text())["bytes"] > 0
    for phase in ("vae", "dit"):
        lines = [json.loads(line) for line in (folder / phase / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4 and np.isfinite(lines[-1]["loss"])
        assert list((folder / phase).glob("sheet-*.png"))
    assert "# Pocket DynamiCtrl" in (folder / "checkpoint" / "README.md").read_text()
    checkpoint = Checkpoint(folder / "checkpoint")
    assert checkpoint.json("transformer")["patch_size_t"] == 2
    assert checkpoint.tensors("vae").info("decoder.conv_in.conv.weight").dtype == "BF16"


def test_the_bundle_animates_as_the_networks_do(trained: tuple[Path, Networks]) -> None:
    folder, networks = trained
    export_checkpoint(
        folder / "checkpoint", folder / "bundle", height=ROWS, width=COLUMNS, frames=FRAMES, fps=8, reuse=False
    )
    clip = make_clip("held-out", 0, masking="none")
    animate, codec = of_bundle(folder / "bundle", steps=2, threads=1)
    made = animate(clip.reference, clip.pose, clip.caption, 0, 1.0)
    expected = sample(networks, clip.reference, clip.pose, clip.caption, steps=2, guidance=1.0, seed=0)
    assert made.shape == clip.truth.shape
    # One stream of noise for both; the checkpoint is in bfloat16, and latents were computed in it here.
    assert np.abs(made.astype(int) - expected).mean() < 3
    assert codec.decode(codec.encode(clip.truth)).shape == clip.truth.shape


def test_a_finished_checkpoint_is_a_beginning(trained: tuple[Path, Networks], tmp_path: Path) -> None:
    first, networks = trained
    settings = dataclasses.replace(SMOKE, vae=dataclasses.replace(SMOKE.vae, steps=1), sheet_clips=1)
    settings = dataclasses.replace(settings, dit=dataclasses.replace(SMOKE.dit, steps=1))
    again = train(tmp_path / "run", settings, start=first / "checkpoint")
    for (name, new), old in zip(again.vae.named_parameters(), networks.vae.parameters(), strict=True):
        rounded = old.to(torch.bfloat16).float()
        assert torch.equal(new, rounded) == name.startswith("encoder.") or torch.allclose(new, rounded, atol=0.05), name
    assert again.scaling_factor == networks.scaling_factor
    assert not torch.equal(again.vae.decoder.conv_in.conv.weight, networks.vae.decoder.conv_in.conv.weight)
    spent = json.loads((tmp_path / "run" / "checkpoint" / "training.json").read_text())
    assert spent["vae"]["steps"] == spent["dit"]["steps"] == spent["own"]["steps"] == spent["pixels"]["steps"] == 5
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert "5 steps in" in card and "The last 5 of them learned from the transformer's own estimates" in card
    assert "In the last 5 a part of the loss was what an error shows in pixels" in card
    plain = dataclasses.replace(settings, dit=dataclasses.replace(settings.dit, own_share=0.0, pixel_share=0.0))
    card = model_card(plain, spent_on(tmp_path / "run", None, plain.dit))
    assert "own estimates" not in card and "in pixels" not in card


def test_a_vae_that_was_trained_further_does_not_fit_the_latents_of_before(trained: tuple[Path, Networks]) -> None:
    folder, networks = trained
    path = folder / "scaling.json"
    before = path.read_text()
    path.write_text(json.dumps({"scaling_factor": 1.0, "vae_steps": 3}))
    with pytest.raises(SystemExit, match="Remove that folder"):
        _scaling(folder, networks.vae)
    path.write_text(before)
    assert _scaling(folder, networks.vae) == networks.scaling_factor


class Killed(Exception):
    pass


def test_training_goes_on_after_a_kill_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SMOKE, sheet_every=1000, sheet_clips=1)
    vae_phase.train_vae(tmp_path / "whole", settings, 1)

    steps, real = 0, vae_phase._loss

    def killed(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(vae_phase, "_loss", killed)
    with pytest.raises(Killed):
        vae_phase.train_vae(tmp_path / "broken", settings, 1)
    vae_phase.train_vae(tmp_path / "broken", settings, 1)

    whole, broken = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for name in whole:
        torch.testing.assert_close(broken[name], whole[name], rtol=0, atol=0, msg=name)


def test_a_state_holds_weights_averages_moments_and_random_numbers(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            tmp_path,
            {"m": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))},
            peak=0.1,
            warm_up=1,
            average=0.9,
            steps=3,
            hours=1,
            seed=0,
            keep_every=0,
            threads=1,
            hidden=lambda name: name == "m.0.weight",
            hidden_peak=0.1,
        )

    first = trainer()
    model = first.models["m"]
    first.run(lambda: [lambda: {"loss": model(torch.randn(4, 2, generator=first.noise)).square().mean()}], {})
    again = trainer()
    assert again.done and again.progress.step == 3
    for name, parameter in first.parameters.items():
        assert torch.equal(again.parameters[name], parameter)
        assert torch.equal(again.averaged[name], first.averaged[name])
        number = int(name == "m.0.weight")  # Muon's, or AdamW's
        before = first.optimizers[number][0].state[parameter]
        after = again.optimizers[number][0].state[again.parameters[name]]
        assert before.keys() == after.keys() == ({"momentum"} if number else {"step", "exp_avg", "exp_avg_sq"})
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(again.noise.get_state(), first.noise.get_state())
    assert again.random.random() == first.random.random()


def test_a_step_shared_by_threads_is_the_step_of_one(tmp_path: Path) -> None:
    run = dataclasses.replace(SMOKE.dit, batch=4, steps=1)
    settings = dataclasses.replace(SMOKE, dit=run, sheet_every=1000, sheet_clips=2)
    language_folder = tmp_path / "tokenizer"
    language_folder.mkdir()
    write_tokenizer(language_folder, settings.shapes.vocabulary)
    language = Language(language_folder, settings.shapes.text_length)
    torch.manual_seed(0)
    vae = make_vae(settings.shapes).eval().requires_grad_(False)
    states = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        train_dit(folder, settings, vae, language, 1.0, threads, lambda networks: None)
        states.append(load_file(folder / "state.safetensors"))
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        states[-1]["losses"] = torch.tensor([lines[-1][name] for name in ("loss", "mse", "mse_noisy", "mse_clean")])
    alone, shared = states
    # What the optimizers keep of a first step is a factor times its gradients. The weights say less: AdamW moves a number by
    # a whole step even where its gradient is nothing but rounding.
    gradients = [name for name in alone if name.startswith(("optimizer.exp_avg.", "optimizer.momentum."))]
    assert len(gradients) > 20
    for name in (*gradients, "losses"):
        assert (shared[name] - alone[name]).norm() <= 1e-4 * alone[name].norm() + 1e-9, name


class Recorder(nn.Module):
    """A transformer that keeps what it is given, and answers with `answers`, call by call."""

    def __init__(self, *answers: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answers, self.calls = answers, list[tuple[Tensor, Tensor]]()

    def forward(self, latents: Tensor, text: Tensor, timesteps: Tensor, *others: Any) -> Tensor:
        noisy = latents.chunk(2, dim=2)[0]
        self.calls.append((noisy, timesteps))
        return self.answers[len(self.calls) - 1](noisy, timesteps)


@pytest.mark.parametrize(("own_share", "pixel_share"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_what_the_loss_wants_is_the_truth_from_the_latents_that_were_seen(own_share: float, pixel_share: float) -> None:
    shapes = SMOKE.shapes
    f, h, w = shapes.latent_size
    video = torch.randn(6, f, shapes.latent_channels, h, w, generator=torch.Generator().manual_seed(1))
    batch = Batch(
        video,
        torch.zeros_like(video),
        torch.zeros_like(video[:, 0]),
        torch.zeros(6, f, 1, h, w),
        torch.zeros(6, 32, dtype=torch.long),
    )
    alphas = CogVideoXDPMScheduler.from_config(SCHEDULER).alphas_cumprod.float()
    scale = 0.5

    def velocity(estimate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """v from which the scheduler's estimate, sqrt(a) x - sqrt(1 - a) v, is `estimate`."""

        def answer(noisy: Tensor, timesteps: Tensor) -> Tensor:
            alpha = alphas[timesteps][:, None, None, None, None]
            return (alpha.sqrt() * noisy - estimate) / (1 - alpha).sqrt()

        return answer

    wrong = torch.full_like(video, 7.0)
    answers = [velocity(wrong), velocity(video * scale)] if own_share else [velocity(video * scale)]
    transformer = Recorder(*answers)
    settings = dataclasses.replace(
        SMOKE, dit=dataclasses.replace(SMOKE.dit, own_share=own_share, pixel_share=pixel_share)
    )
    networks = Networks(settings, None, transformer, lambda tokens: [tokens], None, scale)  # type: ignore[arg-type]
    draws = np.random.default_rng(2), torch.Generator().manual_seed(2)
    kernel = torch.ones(1, shapes.latent_channels, 2, 3, 3) if pixel_share else None
    (part,) = _losses(networks, batch, Tables(alphas, rotary(shapes), kernel), *draws, 1)
    assert part()["loss"] < 1e-6

    noisy, timesteps = transformer.calls[-1]
    alpha = alphas[timesteps][:, None, None, None, None]
    start = wrong if own_share else video * scale
    noise = (noisy - alpha.sqrt() * start) / (1 - alpha).sqrt()
    assert noise.mean().abs() < 0.05 and abs(noise.std() - 1) < 0.05
    if own_share:
        seen, before = transformer.calls[0]
        assert (before >= timesteps).all()
        alpha = alphas[before][:, None, None, None, None]
        noise = (seen - alpha.sqrt() * video * scale) / (1 - alpha).sqrt()
        assert abs(noise.std() - 1) < 0.05


def test_products_in_bfloat16_change_a_gradient_little() -> None:
    torch.manual_seed(4)
    shapes = SMOKE.shapes
    f, h, w = shapes.latent_size
    video, pose = torch.randn(2, 2, f, shapes.latent_channels, h, w)
    batch = Batch(video, pose, video[:, 0], torch.rand(2, f, 1, h, w), torch.randint(0, 50, (2, shapes.text_length)))
    transformer, text_encoder = make_transformer(shapes), make_text_encoder(shapes)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)  # new ones answer zero
    networks = Networks(SMOKE, None, transformer, text_encoder, None, 1.0)  # type: ignore[arg-type]
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    found = []
    for bf16 in (False, True):
        tables = Tables.of(SMOKE, None, "cpu", bf16=bf16)
        draws = np.random.default_rng(5), torch.Generator().manual_seed(5)
        terms = [part() for part in _losses(networks, batch, tables, *draws, 2)]
        loss = torch.stack([share["loss"] for share in terms]).mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert loss.dtype == torch.float32
        found.append((loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (exact, gradient), (rounded, other) = found
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.99


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adam(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert values.min() > 0.6 and values.max() < 1.25
    kernel = nn.Parameter(torch.zeros(shape[0], shape[1], 3, 3))
    kernel.grad = torch.randn_like(kernel)
    Muon([kernel], lr=0.01).step()
    assert kernel.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_averaged_weights_are_only_borrowed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    trainer = Trainer(
        tmp_path, {"m": model}, peak=0.1, warm_up=1, average=0.9, steps=3, hours=1, seed=0, keep_every=9, threads=1
    )
    trainer.averaged["m.weight"].zero_()
    before = model.weight.detach().clone()
    with trainer.averaged_weights():
        assert not model.weight.any()
    assert torch.equal(model.weight, before)


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    assert learning_rate(0.0, 0, 1.0, 10) == pytest.approx(0.1)
    assert learning_rate(0.01, 10, 1.0, 10) == pytest.approx(1.0, abs=1e-3)
    assert learning_rate(1.0, 500, 1.0, 10) == pytest.approx(0.02)


def test_every_word_of_a_caption_is_one_token_and_fits(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FULL.shapes.vocabulary)
    language = Language(tmp_path, FULL.shapes.text_length)
    assert len(language) <= FULL.shapes.vocabulary
    for i in range(8):
        text = make_clip("held-out", i).caption
        ids = language.ids(text)
        assert len(ids) == FULL.shapes.text_length and ids[-1] == 0
        assert (ids > 1).sum() == len(text.split()) + text.count(",")
        assert np.array_equal(language.ids(text.upper()), ids)


def test_the_full_networks_fit_the_repository() -> None:
    makers = (make_vae, make_transformer, make_text_encoder)
    with torch.device("meta"):
        count = sum(p.numel() for make in makers for p in make(FULL.shapes).parameters())
    assert 2 * count + 400_000 < LIMIT  # two bytes each; names, tokenizer and card
