"""The part of training that VAE and DiT share: schedule, averaged weights, saved state, log.

A run can be killed at any moment and started again with the same command: its state (weights, averages, optimizer, random
state, step, seconds) is written to one file that takes the place of the last one at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .muon import Muon
from .settings import DitRun, Settings, VaeRun

__all__ = ["Part", "Progress", "Trainer", "device_of", "learning_rate"]

Part = Callable[[], dict[str, Tensor]]  # named terms of a step's loss, over a share of its batch


def learning_rate(share: float, step: int, peak: float, warm_up: int) -> float:
    """Linear warm-up over the first `warm_up` steps, and over the whole run (`share` 0..1) a cosine down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
    return peak * cosine * min(1.0, (step + 1) / warm_up)


def device_of(model: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


LONGEST = 20.0  # seconds of a step that count: one that took longer was stopped, or waited for its clips


@dataclass
class Progress:
    """Where a run stands. `seconds` is training time over all starts."""

    step: int = 0
    seconds: float = 0.0

    def share(self, steps: int, hours: float) -> float:
        """0..1 of the budget, by steps or by hours, whichever is further."""
        return min(1.0, max(self.step / steps, self.seconds / (hours * 3600)))


class Trainer:
    """Trains `models` where they are: what `hidden` says of a parameter's name with Muon, the rest with AdamW.

    Random numbers of a step come from `self.random` (numpy) and `self.noise` (torch), on the processor, so that they are the
    same wherever the models are.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, nn.Module],
        *,
        peak: float,
        warm_up: int,
        average: float,
        steps: int,
        hours: float,
        seed: int,
        keep_every: float,
        threads: int,
        hidden: Callable[[str], bool] = lambda name: False,
        hidden_peak: float = 0.0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.models = folder, dict(models)
        self.warm_up, self.average = warm_up, average
        self.pace = 1.0  # factor on all learning rates, for whoever makes the losses to set
        self.steps, self.hours, self.keep_every = steps, hours, keep_every
        self.parameters = {
            f"{m}.{n}": p for m, model in models.items() for n, p in model.named_parameters() if p.requires_grad
        }
        self.averaged = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        muon = {n: p for n, p in self.parameters.items() if p.ndim > 1 and hidden(n)}
        others = [p for n, p in self.parameters.items() if n not in muon]
        # With the peak of its learning rate.
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=0.0), peak)
        ]
        if muon:
            self.optimizers.append((Muon(muon.values(), lr=hidden_peak, pool=self._pool), hidden_peak))
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.noise = torch.Generator().manual_seed(seed)
        self.progress = Progress()
        torch.set_num_threads(threads)
        self._state = folder / "state.safetensors"
        self._losses: dict[str, list[float]] = {}
        if self._state.exists():
            self._load()

    @classmethod
    def of(
        cls,
        folder: Path,
        models: Mapping[str, nn.Module],
        run: VaeRun | DitRun,
        settings: Settings,
        threads: int,
        hidden: Callable[[str], bool],
    ) -> Trainer:
        """With the budget and the rates of a phase."""
        return cls(
            folder,
            models,
            peak=run.learning_rate,
            warm_up=run.warm_up,
            average=run.average,
            steps=run.steps,
            hours=run.hours,
            seed=settings.seed,
            keep_every=settings.keep_every,
            threads=threads,
            hidden=hidden,
            hidden_peak=run.hidden_rate,
        )

    @property
    def done(self) -> bool:
        return self.share >= 1.0

    @property
    def share(self) -> float:
        """How much of the budget is spent, 0..1."""
        return self.progress.share(self.steps, self.hours)

    def run(self, parts: Callable[[], Sequence[Part]], every: Mapping[int, Callable[[], None]], log: int = 50) -> None:
        """Steps until the budget is spent, once. `parts()` gives equal shares of a step's batch, each of which computes named
        terms, "loss" being the one that is minimised; random numbers are drawn before.

        One part has all the threads. Several are computed side by side with one thread each: small matrices keep two
        threads of one operation waiting for each other, and two operations with a thread each do not wait.

        `every`: step interval -> what is done then, with the averaged weights in place.
        """
        try:
            self._steps(parts, every, log)
        finally:
            self._pool.shutdown()

    def _steps(self, parts: Callable[[], Sequence[Part]], every: Mapping[int, Callable[[], None]], log: int) -> None:
        kept = time.monotonic()
        while not self.done:
            began = time.monotonic()
            terms = self._gradients(parts())
            rate = self.pace * learning_rate(self.share, self.progress.step, 1.0, self.warm_up)
            for optimizer, peak in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            if torch.isfinite(norm):
                for optimizer, _ in self.optimizers:
                    optimizer.step()
            self.progress.step += 1
            self._average()
            spent = time.monotonic() - began
            self.progress.seconds += min(spent, LONGEST)
            for name, value in {**terms, "norm": float(norm)}.items():
                self._losses.setdefault(name, []).append(value)
            if self.progress.step % log == 0 or self.done:
                self._log(rate, spent)
            for interval, action in every.items():
                if self.progress.step % interval == 0 or self.done:
                    with self.averaged_weights():
                        action()
            if time.monotonic() - kept >= self.keep_every or self.done:
                self.save()
                kept = time.monotonic()

    def _gradients(self, parts: Sequence[Part]) -> dict[str, float]:
        """Leaves the mean of the parts' gradients in the parameters; the mean of their terms."""
        parameters = list(self.parameters.values())

        def one(part: Part) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
            terms = part()
            return terms, torch.autograd.grad(terms["loss"], parameters, allow_unused=True)

        done = [one(parts[0])] if len(parts) == 1 else list(self._pool.map(one, parts))
        for parameter, *shares in zip(parameters, *(gradients for _, gradients in done), strict=True):
            parameter.grad = torch.zeros_like(parameter)  # laid out as the parameter, whatever its shares are
            for share in shares:
                if share is not None:
                    parameter.grad.add_(share, alpha=1 / len(parts))
        return {name: sum(float(terms[name].detach()) for terms, _ in done) / len(parts) for name in done[0][0]}

    def averaged_weights(self) -> _Swapped:
        """A context in which the models hold their averaged weights."""
        return _Swapped(self)

    @torch.no_grad()
    def _average(self) -> None:
        # Early averages forget quickly, or the random start would stay in them for long.
        keep = min(self.average, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(list(self.averaged.values()), list(self.parameters.values()), 1 - keep)

    def _log(self, rate: float, seconds: float) -> None:
        terms = {name: round(sum(values) / len(values), 6) for name, values in self._losses.items()}
        self._losses = {}
        line = {
            "step": self.progress.step,
            "hours": round(self.progress.seconds / 3600, 4),
            "rate": round(rate, 7),  # share of the peaks
            "seconds": round(seconds, 3),
            **terms,
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Writes the state whole: safetensors, so that nothing is ever unpickled."""
        moments = {
            f"optimizer.{key}.{name}": value
            for name, parameter in self.parameters.items()
            for optimizer, _ in self.optimizers
            if parameter in optimizer.state
            for key, value in optimizer.state[parameter].items()
        }
        tensors = {
            **{f"now.{name}": p.detach() for name, p in self.parameters.items()},
            **{f"averaged.{name}": value for name, value in self.averaged.items()},
            **moments,
            "noise": self.noise.get_state(),
        }
        about = {
            "random": json.dumps(self.random.bit_generator.state),
            "progress": json.dumps(dataclasses.asdict(self.progress)),
        }
        temporary = self._state.with_suffix(".new")
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, about)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self._state)

    @torch.no_grad()
    def _load(self) -> None:
        with safe_open(self._state, "pt") as file:
            about = file.metadata()
            names = set(file.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"now.{name}"))
                self.averaged[name].copy_(file.get_tensor(f"averaged.{name}"))
                for optimizer, _ in self.optimizers:
                    keys = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
                    if all(f"optimizer.{key}.{name}" in names for key in keys) and _holds(optimizer, parameter):
                        moments = {key: file.get_tensor(f"optimizer.{key}.{name}") for key in keys}
                        # AdamW counts its steps on the processor.
                        optimizer.state[parameter] = {
                            key: value if key == "step" else value.to(parameter.device)
                            for key, value in moments.items()
                        }
            self.noise.set_state(file.get_tensor("noise"))
        self.random.bit_generator.state = json.loads(about["random"])
        self.progress = Progress(**json.loads(about["progress"]))


def _holds(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(parameter is p for group in optimizer.param_groups for p in group["params"])


class _Swapped:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = {name: p.detach().clone() for name, p in self.trainer.parameters.items()}
        for name, parameter in self.trainer.parameters.items():
            parameter.copy_(self.trainer.averaged[name])
        for model in self.trainer.models.values():
            model.eval()

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, parameter in self.trainer.parameters.items():
            parameter.copy_(self.kept[name])
        for model in self.trainer.models.values():
            model.train()
