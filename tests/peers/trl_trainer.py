"""TRL's own `GRPOTrainer`, handed a recorded rollout instead of a model's.

Its rewards, advantages, masks, micro-batches and losses are its own code. What is replaced is the forward pass: the
log-probabilities that it would compute come from the recording. Generation is replaced by its `rollout_func`.
"""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from peers.rollout import GROUP_SIZE, LENGTHS, MAX_LENGTH, Outcome, RecordedRollout

EOS, WORD = 1, 2


def save_tiny_model(folder: Path) -> None:
    words = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(WORD, 16)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=EOS, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Peer:
    """Makes trainers that know nothing but a recorded rollout.

    Args:
        model_folder: Of the tiny model.
        output_folder: Which the trainers ask for.
    """

    def __init__(self, model_folder: Path, output_folder: Path) -> None:
        self.model_folder, self.output_folder = model_folder, output_folder

    def trainer(
        self, rollout: RecordedRollout, *, num_microbatches: int = 1, corrects_sampler: bool = False, **settings
    ) -> GRPOTrainer:
        """A trainer about to take the first optimizer step on the rollout.

        Args:
            rollout: Its completions, rewards and log-probabilities.
            num_microbatches: TRL's `gradient_accumulation_steps`, and `steps_per_generation` unless that is a setting.
            corrects_sampler: Weighs the loss by vLLM's correction. vLLM itself is not asked.
            settings: Of `GRPOConfig`.
        """
        updates_again = rollout.old_logprobs_BT is not None
        steps = settings.get("steps_per_generation", num_microbatches)
        config = GRPOConfig(
            output_dir=str(self.output_folder),
            **{
                "per_device_train_batch_size": len(LENGTHS) // steps,
                "gradient_accumulation_steps": num_microbatches,
                "steps_per_generation": steps,
                "num_generations": GROUP_SIZE,
                "num_iterations": 2 if updates_again else 1,
                "max_completion_length": MAX_LENGTH,
                "reward_weights": list(rollout.weights_K),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
            }
            | settings,
        )
        trainer = _RecordedTrainer(
            rollout,
            model=str(self.model_folder),
            processing_class=PreTrainedTokenizerFast.from_pretrained(self.model_folder),
            reward_funcs=[_column(rollout, k) for k in range(len(rollout.weights_K))],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["w2"] * len(LENGTHS)}),
            rollout_func=lambda prompts, trainer: _completions(rollout),
        )
        if corrects_sampler:  # set late: the constructor would start vLLM
            trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
        return trainer

    def advantages(self, rollout: RecordedRollout, **settings) -> Tensor:
        """Those that TRL gives the completions, shape B."""
        trainer = self.trainer(rollout, **settings)
        return trainer._generate_and_score_completions(_inputs())["advantages"]

    def outcome(self, rollout: RecordedRollout, *, num_microbatches: int = 1, **settings) -> Outcome:
        """The loss that TRL accumulates over one optimizer step."""
        trainer = self.trainer(rollout, num_microbatches=num_microbatches, **settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = num_microbatches  # as the training loop does
        loss = torch.zeros(())
        for step in range(num_microbatches):
            trainer._step = step
            loss = loss + trainer.compute_loss(trainer.model, trainer._prepare_inputs(_inputs()))
        return Outcome.of(loss, rollout, trainer.microbatches)


class _RecordedTrainer(GRPOTrainer):
    """`GRPOTrainer` without forward passes."""

    def __init__(self, rollout: RecordedRollout, **arguments) -> None:
        self.recorded, self.microbatches = rollout, []
        super().__init__(**arguments)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *, compute_entropy=False, **_
    ):
        rows = input_ids[:, 0]  # each completion's prompt is its own number
        recorded = self.recorded
        if compute_entropy:
            self.microbatches.append(rows)
            return recorded.logprobs_BT[rows], recorded.entropy_BT[rows], None
        logprobs_BT = recorded.reference_logprobs_BT if model is self.ref_model else recorded.old_logprobs_BT
        return logprobs_BT[rows], None, None


def _column(rollout: RecordedRollout, k: int):
    def reward(completions, **_):
        return [None if value != value else value for value in rollout.rewards_BK[:, k].tolist()]

    reward.__name__ = f"reward_{k}"
    return reward


def _completions(rollout: RecordedRollout) -> dict:
    sampler_BT = rollout.sampler_logprobs_BT
    return {
        "prompt_ids": [[row] for row in range(len(LENGTHS))],
        "completion_ids": [
            [WORD] * (length - 1) + [WORD if is_truncated else EOS]
            for length, is_truncated in zip(LENGTHS, rollout.is_truncated_B.tolist(), strict=True)
        ],
        "logprobs": None
        if sampler_BT is None
        else [row[:length] for row, length in zip(sampler_BT.tolist(), LENGTHS, strict=True)],
    }


def _inputs() -> list[dict]:
    return [{"prompt": "w2"} for _ in LENGTHS]
