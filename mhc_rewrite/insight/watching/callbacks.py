"""Trainers that say when a step begins and when its gradients are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_rewrite.errors import ConfigError

if TYPE_CHECKING:
    from mhc_rewrite.insight.watching.recording import Watch


def attach(watch: Watch, trainer: Any) -> None:
    """Hangs a callback into transformers' `Trainer` or Lightning's.

    Raises:
        ConfigError: it is neither.
    """
    if hasattr(trainer, "callback_handler"):
        # Before the reporters, which get what it adds to the log.
        trainer.callback_handler.callbacks.insert(0, _transformers_callback(watch))
    elif hasattr(trainer, "fit") and isinstance(getattr(trainer, "callbacks", None), list):
        trainer.callbacks.append(_lightning_callback(watch, type(trainer).__module__.partition(".")[0]))
    else:
        raise ConfigError(
            f"attach takes a Trainer of transformers or of Lightning, not {type(trainer).__name__}. In a loop of your "
            "own call watch(...).step(loss=loss) between backward and the optimizer's step."
        )


def _transformers_callback(watch: Watch) -> Any:
    from transformers import TrainerCallback

    class WatchCallback(TrainerCallback):
        """Trainer's log gets the last sample's figures: so TensorBoard, Weights & Biases and Trackio do."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watch.use(given.get("optimizer"))

        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watch.begin(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.found = watch.end() or self.found

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            if logs is not None and "loss" in logs:
                logs.update(self.found)
                state.log_history[-1].update(self.found)
                self.found = {}

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watch.close()

    return WatchCallback()


def _lightning_callback(watch: Watch, package: str) -> Any:
    import importlib

    lightning = importlib.import_module(package)  # `lightning` or `pytorch_lightning`, whose the trainer is
    base = lightning.Callback if hasattr(lightning, "Callback") else lightning.pytorch.Callback

    class WatchCallback(base):  # type: ignore[misc, valid-type]
        """The module's log gets the figures of each sample."""

        def __init__(self) -> None:
            self.loss: Any = None
            self.step = -1

        def on_train_start(self, trainer: Any, module: Any) -> None:
            for optimizer in trainer.optimizers[:1]:
                watch.use(optimizer)

        def on_train_batch_start(self, trainer: Any, module: Any, *given: Any) -> None:
            if trainer.global_step != self.step:  # the first batch of those that are accumulated
                self.step, self.loss = trainer.global_step, None
                watch.begin(trainer.global_step)

        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            if self.loss is None:
                self.loss = loss.detach() * trainer.accumulate_grad_batches  # which Lightning has divided it by

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if found := watch.end(self.loss):
                module.log_dict(found, rank_zero_only=True)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            watch.close()

    return WatchCallback()
