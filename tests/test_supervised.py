"""The cold start imitates what it is shown: the loss by an independent reference, the order, the folder it leaves."""

import os
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import imitated
import peft
import pytest
import torch
from imitated import Sums, make
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from replay import TinyPolicy
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import launch

from grpo_lightning.functional.random import permutation
from grpo_lightning.policy import CharacterPolicy
from grpo_lightning.supervised import DemonstrationLoader
from grpo_lightning.types import ConfigurationError, Demonstration, Stream


def encoded():
    tokenizer = TinyPolicy(torch.float64).load_tokenizer()
    return Sums().demonstrations(tokenizer)


def as_rank(module, rank, world_size):
    """The module as it is on one of several ranks, without starting them."""
    module._trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, strategy=SingleDeviceStrategy(), training=True
    )
    module.log = lambda *args, **kwargs: None
    module.configure_model()
    return module


def mean_negative_logprob(model, demonstrations):
    """One sequence and one token at a time."""
    logprobs = []
    for prompt, completion in demonstrations:
        logits_LV = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        for t, token in enumerate(completion):
            logprobs.append(logits_LV[len(prompt) - 1 + t].double().log_softmax(0)[token])
    return -sum(logprobs) / len(logprobs)


def gradient(module):
    return torch.cat([p.grad.flatten() for p in module.policy.parameters()])


def test_the_loss_is_the_mean_over_all_tokens_of_the_batch(tmp_path):
    module = as_rank(make(tmp_path)[0], 0, 1)
    loss = module.training_step(encoded(), 0)
    torch.testing.assert_close(loss, mean_negative_logprob(module.policy.model, encoded()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_average_to_the_gradient_of_the_whole_batch(tmp_path, world_size):
    module = make(tmp_path)[0]
    for rank in range(world_size):
        # Eleven demonstrations: unequal shares. DDP divides by the number of ranks.
        (as_rank(module, rank, world_size).training_step(encoded()[:11], 0) / world_size).backward()
    shared = gradient(module)
    module.zero_grad()
    as_rank(module, 0, 1).training_step(encoded()[:11], 0).backward()
    torch.testing.assert_close(shared, gradient(module), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
class TestFit:
    def test_it_learns_and_leaves_a_folder_that_transformers_loads(self, tmp_path):
        module, trainer = make(tmp_path, dtype=torch.float32, max_steps=150)
        trainer.fit(module, Sums())
        model, tokenizer = (auto.from_pretrained(tmp_path / "policy") for auto in (AutoModelForCausalLM, AutoTokenizer))
        for name, weight in module.policy.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight)
        ids = model.generate(**tokenizer("4+4=", return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == "4+4=8"

    def test_an_interrupted_run_goes_on_bit_for_bit(self, tmp_path):
        # Four steps are one epoch of three batches and one batch of the next.
        straight, trainer = make(tmp_path, max_steps=8)
        trainer.fit(straight, Sums())
        before, trainer = make(tmp_path, max_steps=4)
        trainer.fit(before, Sums())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        resumed, trainer = make(tmp_path, max_steps=8)
        trainer.fit(resumed, Sums(), ckpt_path=tmp_path / "a.ckpt")
        for name, weight in straight.policy.state_dict().items():
            assert torch.equal(resumed.policy.state_dict()[name], weight)

    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(self, tmp_path):
        class Asks(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                if trainer.global_step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

        straight, trainer = make(tmp_path, max_steps=8)
        trainer.fit(straight, Sums())
        saved = {"max_steps": 8, "enable_checkpointing": True}
        stopped, trainer = make(tmp_path, callbacks=[Asks(), ModelCheckpoint(tmp_path / "saved")], **saved)
        with pytest.raises(SystemExit):
            trainer.fit(stopped, Sums())
        assert trainer.global_step == 4
        resumed, trainer = make(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "saved")], **saved)
        trainer.fit(resumed, Sums(), ckpt_path="last")
        for name, weight in straight.policy.state_dict().items():
            assert torch.equal(resumed.policy.state_dict()[name], weight)

    def test_a_checkpoint_that_is_torn_is_refused_or_skipped(self, tmp_path):
        module, trainer = make(tmp_path, max_steps=2)
        trainer.fit(module, Sums())
        whole, torn = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
        for path in (whole, torn):
            trainer.save_checkpoint(path)
        torn.write_bytes(torn.read_bytes()[:-1])
        module, trainer = make(tmp_path, max_steps=3)
        with pytest.raises(ConfigurationError, match=r"b\.ckpt is torn"):
            trainer.fit(module, Sums(), ckpt_path=torn)
        module, trainer = make(tmp_path, max_steps=3)
        module.found_checkpoints = [torn, whole]
        with pytest.warns(UserWarning, match="b.ckpt is skipped"):
            trainer.fit(module, Sums(), ckpt_path=torn)
        assert trainer.global_step == 3
        assert not torn.exists()

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    def test_an_adapter_is_trained_alone_and_left_for_peft(self, tmp_path):
        module, trainer = make(tmp_path, dtype=torch.float32, lora={"rank": 2})
        trainer.fit(module, Sums())
        base = TinyPolicy(torch.float32).load_model(seed=5)
        frozen = [p for p in module.policy.parameters() if not p.requires_grad]
        assert all(map(torch.equal, frozen, base.parameters()))
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "policy")
        found = {name.removeprefix("base_model.model."): p for name, p in loaded.named_parameters() if "lora_" in name}
        trained = {name: p for name, p in module.policy.model.named_parameters() if p.requires_grad}
        assert found.keys() == trained.keys()
        assert all(torch.equal(found[name], p) for name, p in trained.items())
        assert any(p.any() for name, p in trained.items() if "lora_B" in name)

    def test_layers_that_are_computed_again_change_nothing(self, tmp_path):
        usual, trainer = make(tmp_path)
        trainer.fit(usual, Sums())
        again, trainer = make(tmp_path, gradient_checkpointing=True)
        trainer.fit(again, Sums())
        assert any(getattr(module, "gradient_checkpointing", False) for module in again.policy.modules())
        for mine, theirs in zip(again.policy.parameters(), usual.policy.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    @pytest.mark.slow
    @pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")
    def test_ranks_that_share_one_copy_leave_what_one_process_leaves(self, tmp_path):
        single, trainer = make(tmp_path, dtype=torch.float32)
        trainer.fit(single, Sums())
        expected = dict(single.policy.model.state_dict())
        start = TinyPolicy(torch.float32).load_model(seed=5).state_dict()
        launch(imitated.imitate, tmp_path / "world", ["ddp", "fsdp2", "deepspeed_2", "deepspeed_3"], num_ranks=2)
        for folder in (tmp_path / "world").glob("*/policy"):
            found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            off = sum((found[name] - w).square().sum() for name, w in expected.items()).sqrt()
            moved = sum((start[name] - w).square().sum() for name, w in expected.items()).sqrt()
            assert off / moved < 1e-4, folder  # of the update, which Adam lets rounding grow to
        assert len(list((tmp_path / "world").glob("*/policy"))) == 4

    @pytest.mark.parametrize(("batch_size", "message"), [(13, "at most the 12 demonstrations, got 13"), (0, ">= 1")])
    def test_a_batch_that_cannot_be_filled_is_refused(self, tmp_path, batch_size, message):
        with pytest.raises(ConfigurationError, match=rf"model\.batch_size must be {message}"):
            fit(*make(tmp_path, batch_size=batch_size))

    @pytest.mark.parametrize("export_to", ["", "..", "run.yaml"])
    def test_a_folder_that_would_lose_what_is_there_is_refused_before_a_step(self, tmp_path, monkeypatch, export_to):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run.yaml").write_text("seed_everything: 0")
        module, trainer = make(tmp_path)
        module.export_to = export_to
        with pytest.raises(ConfigurationError, match=r"^model\.export_to"):
            fit(module, trainer)
        assert trainer.global_step == 0
        with pytest.raises(ConfigurationError, match=r"^model\.export_to"):
            module.check_settings(trainer)
        assert (tmp_path / "run.yaml").is_file()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("gradient_clip_val", -1),
            ("val_check_interval", 0),
            ("limit_train_batches", 0),
            ("limit_train_batches", 0.1),
            ("max_steps", 0),
            ("max_epochs", 0),
            ("accumulate_grad_batches", 0),
            ("reload_dataloaders_every_n_epochs", 1),
        ],
    )
    def test_a_trainer_that_would_train_nothing_or_otherwise_is_refused_beforehand(self, tmp_path, key, value):
        module, trainer = make(tmp_path, **{key: value})
        with pytest.raises(ConfigurationError, match=rf"trainer\.{key} .*{value}"):
            admit(module, trainer)

    def test_demonstrations_longer_than_the_policys_positions_are_refused(self, tmp_path):
        module, trainer = make(tmp_path)
        module.source = CharacterPolicy(hidden_size=16, num_layers=1, num_heads=2, max_positions=17)
        with pytest.raises(ConfigurationError, match=r"a demonstration of 18 tokens, .* exceeds the policy's 17 posit"):
            admit(module, trainer)
        with pytest.raises(ConfigurationError, match=r"a demonstration of 18 tokens"):
            trainer.fit(module, Sums())
        module, trainer = make(tmp_path)
        module.source = CharacterPolicy(hidden_size=16, num_layers=1, num_heads=2, max_positions=18)
        admit(module, trainer)

    def test_a_trial_leaves_neither_policy_nor_checkpoint(self, tmp_path):
        saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
        module, trainer = make(tmp_path, callbacks=[saving], enable_checkpointing=True, fast_dev_run=2)
        trainer.fit(module, Sums())
        assert trainer.global_step == 2
        assert list(tmp_path.iterdir()) == []

    def test_ranks_that_do_not_communicate_are_refused(self, tmp_path):
        module, trainer = make(tmp_path, strategy=DDPStrategy(process_group_backend="fake"))
        with pytest.raises(ConfigurationError, match=r"trainer\.strategy\.process_group_backend .* got fake"):
            admit(module, trainer)

    def test_a_checkpoint_of_a_grpo_run_is_refused(self, tmp_path):
        module, trainer = make(tmp_path, max_steps=1)
        trainer.fit(module, Sums())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        torch.save({**torch.load(tmp_path / "a.ckpt"), "grpo_lightning": {}}, tmp_path / "b.ckpt")
        module, trainer = make(tmp_path)
        with pytest.raises(ConfigurationError, match="ckpt_path: the checkpoint is one of a GRPO run"):
            trainer.fit(module, Sums(), ckpt_path=tmp_path / "b.ckpt")

    def test_a_batch_smaller_than_the_ranks_is_refused(self, tmp_path):
        module, _ = make(tmp_path, batch_size=1)
        as_rank(module, 0, 2)
        with pytest.raises(
            ConfigurationError, match=r"model\.batch_size must be at least the number of ranks = 2, got 1"
        ):
            module.training_loader(Sums())


def admit(module, trainer):
    module.check_settings(trainer)
    module.check_inputs(trainer, Sums())


def fit(module, trainer):
    trainer.fit(module, Sums())


class TestDemonstrationLoader:
    SHOWN = tuple(Demonstration((i,), (i,)) for i in range(7))

    def numbers(self, loader):
        return [[shown.prompt_ids[0] for shown in batch] for batch in loader]

    def order(self, epoch):
        return permutation(7, seed=3, stream=Stream.PROMPT_ORDER, epoch=epoch).tolist()

    def test_every_epoch_is_a_permutation_in_whole_batches(self):
        loader = DemonstrationLoader(self.SHOWN, 3, seed=3)
        assert len(loader) == 2
        for epoch in range(3):
            order = self.order(epoch)
            assert self.numbers(loader) == [order[:3], order[3:6]]
        assert self.order(0) != self.order(1)

    def test_epochs_that_the_trainer_cuts_short_go_on_through_the_demonstrations(self):
        loader = DemonstrationLoader(self.SHOWN, 2, seed=3)
        shown = []
        for _ in range(3):
            batches = iter(loader)
            shown += [self.numbers([next(batches)])[0] for _ in range(2)]
        first, second = self.order(0), self.order(1)
        assert shown == [first[:2], first[2:4], first[4:6], second[:2], second[2:4], second[4:6]]

    @pytest.mark.parametrize("taken", range(5))
    def test_it_goes_on_where_another_one_stood(self, taken):
        def endless(loader):
            while True:
                yield from loader

        first = DemonstrationLoader(self.SHOWN, 3, seed=3)
        batches = endless(first)
        head = [next(batches) for _ in range(taken)]
        second = DemonstrationLoader(self.SHOWN, 3, seed=3)
        second.load_state_dict(first.state_dict())
        others, straight = endless(second), endless(DemonstrationLoader(self.SHOWN, 3, seed=3))
        assert [*head, *(next(others) for _ in range(5))] == [next(straight) for _ in range(taken + 5)]
