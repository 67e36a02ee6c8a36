"""A trainer as it is with vLLM, without its engine: transformers draws, and log-probs differ from the trainer's by noise."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from trl_training import TEMPERATURE


class NoEngine(VLLMGeneration):  # type: ignore[misc]
    """What TRL tells vLLM, and no vLLM."""

    def _init_vllm(self) -> None: ...


class AsVLLM(TrainerCallback):  # type: ignore[misc]
    """Make ``trainer`` one with ``use_vllm``; add it after the recorder, which has looked at the trainer's methods by then."""

    def __init__(self, trainer: Any, noise: float = 0.3, **settings: Any) -> None:
        """``settings`` are of the trainer, as ``vllm_importance_sampling_mode``."""
        self.trainer, self.noise, self.generator = trainer, noise, torch.Generator().manual_seed(5)
        told = {
            name: getattr(trainer, name) for name in ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
        }
        trainer.vllm_generation = NoEngine(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            max_completion_length=trainer.max_completion_length,
            **told,
        )
        trainer.use_vllm = True
        trainer.vllm_mode = "server"  # TRL asks an engine of this process how long it may draw
        for name, value in settings.items():
            assert name in vars(trainer)
            setattr(trainer, name, value)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        generate = self.trainer._generate_single_turn

        def draw(prompt_ids: Any, *more: Any, **named: Any) -> Any:
            self.trainer.use_vllm = False
            try:
                responses, _ = generate(prompt_ids, *more, **named)
            finally:
                self.trainer.use_vllm = True
            return responses, [self._log_probs(*pair) for pair in zip(prompt_ids, responses, strict=True)]

        self.trainer._generate_single_turn = draw

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del self.trainer._generate_single_turn

    def _log_probs(self, prompt: list[int], response: list[int]) -> list[float]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        backbone = type(model).forward  # TRL puts another forward into the object
        with torch.no_grad():
            logits = backbone(model, input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        taken = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        noise = self.noise * torch.randn(taken.shape, generator=self.generator)
        return (taken + noise).clamp(max=0.0).tolist()  # type: ignore[no-any-return]
