"""Training with Trainer and with a plain loop: weight decay, alpha schedule, checkpointing, compilation, autocast."""

import pytest
import torch
from families import alone, packed, prompts, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_sparse_attention import AlphaSchedule, AlphaScheduleCallback, SparseAttentionTrainer, convert, parameter_groups
from hf_sparse_attention.training import get_alpha, scale_parameter_names


def arguments(path, **kwargs):
    defaults = {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(**{**defaults, **kwargs})


def rows(count=16, length=12):
    return [{"input_ids": row, "labels": row} for row in prompts(*[length] * count)]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_parameter_groups_cover_every_parameter_once():
    model = tiny_model()
    groups = parameter_groups(model, weight_decay=0.1, lr=1e-3, scale_lr_multiplier=5.0)
    by_name = {group["name"]: group for group in groups}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in by_name.items()} == {
        "decayed": (1e-3, 0.1),
        "undecayed": (1e-3, 0.0),
        "length_scale": (5e-3, 0.0),
    }
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    parameters = dict(model.named_parameters())
    assert {id(p) for p in by_name["length_scale"]["params"]} == {
        id(parameters[name]) for name in scale_parameter_names(model)
    }
    assert any(p is parameters["model.norm.weight"] for p in by_name["undecayed"]["params"])
    assert any(p is parameters["model.layers.0.self_attn.q_proj.weight"] for p in by_name["decayed"]["params"])


def test_trainer_does_not_decay_the_scale(tmp_path):
    model = tiny_model(position="nape")
    trainer = SparseAttentionTrainer(model, arguments(tmp_path, weight_decay=0.5), train_dataset=rows())
    trainer.create_optimizer()
    parameters = {id(p): name for name, p in model.named_parameters()}
    decay = {parameters[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert all(decay[name] == 0 for name in scale_parameter_names(model))
    assert decay["model.layers.0.self_attn.q_proj.weight"] == 0.5


def test_trainer_trains_resumes_and_evaluates(tmp_path):
    def trainer(path, steps):
        torch.manual_seed(3)
        model = tiny_model(position="nape")
        args = arguments(path, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        data = [{"input_ids": r, "labels": r} for r in torch.arange(2, 34).view(4, 8).repeat(4, 1)]
        return SparseAttentionTrainer(model, args, train_dataset=data, eval_dataset=data[:2])

    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert whole.evaluate()["eval_loss"] < losses(whole)[0]
    resumed = trainer(tmp_path / "whole", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(a, b)


# Options of Trainer and how far they may move the losses, relatively.
WAYS = {
    "bf16": ({"bf16": True}, 0.03),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        1e-5,
    ),
    "reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-5),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "aot_eager", "tf32": False}, 1e-5),
    "all": (
        {"bf16": True, "gradient_checkpointing": True, "torch_compile": True, "torch_compile_backend": "aot_eager"},
        0.03,
    ),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("options", "tolerance"), WAYS.values(), ids=WAYS)
def test_trainer_in_every_way_has_the_same_losses(tmp_path, options, tolerance):
    """With the alpha schedule, weight decay and an evaluation after each step; a compiled model is compiled anew."""
    data = [{"input_ids": row, "labels": row} for row in torch.arange(2, 34).view(4, 8).repeat(2, 1)]

    def run(**options):
        torch.manual_seed(3)
        # Compilation takes most of the time: of one layer, for three values of alpha.
        model = AutoModelForCausalLM.from_config(tiny_config(attn_implementation="asentmax", num_hidden_layers=1))
        torch._dynamo.reset()
        callback = AlphaScheduleCallback(model, steps=2)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, weight_decay=0.1, **options)
        trainer = SparseAttentionTrainer(model, args, train_dataset=data, eval_dataset=data[:3], callbacks=[callback])
        trainer.train()
        torch._dynamo.reset()
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return losses(trainer) + evaluations

    expected = run()
    assert len(expected) == 8
    assert expected[3] < expected[0] - 0.1
    assert run(**options) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(use_reentrant):
    model = tiny_model(position="nape").train()
    ids = torch.stack(prompts(10, 10))
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("position", ["model", "nape"])
def test_compiled_training_step(position):
    model = tiny_model(position=position).train()
    ids, positions = packed(prompts(7, 9))
    calls = ({"input_ids": ids, "position_ids": positions}, {"input_ids": ids})
    for call in calls:
        model.zero_grad()
        expected = model(**call, labels=ids, use_cache=False).loss
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(**call, labels=ids, use_cache=False).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)
        torch._dynamo.reset()


@pytest.mark.parametrize(("layers", "graphs"), [(0, 1), (2, 2), (10, 1)])
def test_layers_compiled_one_by_one_share_their_graphs(layers, graphs):
    """Accelerate's regional compilation: torch gives up on a layer's code after eight graphs and runs it eagerly."""
    fields = {"position_encoding": "nape", "alibi_layers": layers}
    model = tiny_model(position=fields, num_hidden_layers=10).train()
    ids, _ = packed(prompts(12))
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_autocast():
    model = tiny_model(position="nape")
    (row,) = prompts(12)
    expected = alone(model, row)
    with torch.autocast("cpu", torch.bfloat16):
        logits = alone(model, row)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_dropout_acts_in_training_only():
    model = tiny_model(attention_dropout=0.5)
    (row,) = prompts(12)
    assert torch.equal(alone(model, row), alone(model, row))
    model.train()
    torch.manual_seed(1)
    first = alone(model, row)
    assert not torch.allclose(first, alone(model, row))
    torch.manual_seed(1)
    assert torch.equal(alone(model, row), first)


class TestAlphaSchedule:
    def patched(self):
        model = AutoModelForCausalLM.from_config(tiny_config())
        convert(model, "asentmax")
        return model

    def test_plain_loop(self):
        model = self.patched()
        schedule = AlphaSchedule(model, target=1.5, steps=4)
        assert get_alpha(model) == 1.0
        assert [schedule.step(n) for n in range(6)] == [1.0, 1.125, 1.25, 1.375, 1.5, 1.5]
        assert get_alpha(model) == 1.5

    def test_start_equals_softmax(self):
        model = self.patched().eval()
        (row,) = prompts(9)
        AlphaSchedule(model, target=1.5, steps=4)
        alpha_one = alone(model, row)
        convert(model, "asentmax", alpha=1.0001)
        torch.testing.assert_close(alone(model, row), alpha_one, atol=5e-3, rtol=5e-3)

    def test_trainer_saves_the_alpha_of_the_step(self, tmp_path):
        model = self.patched()
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        callback = AlphaScheduleCallback(model, steps=4)
        trainer = SparseAttentionTrainer(model, args, train_dataset=rows(), callbacks=[callback])
        trainer.train()
        alphas = [entry["alpha"] for entry in trainer.state.log_history if "loss" in entry]
        assert alphas == [1.125, 1.25, 1.375, 1.5]
        assert get_alpha(model) == 1.5
        for step, alpha in ((2, 1.25), (4, 1.5)):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
            assert loaded.config.sparse_attention["alpha"] == alpha

    def test_fewer_changes_for_compiled_models(self):
        schedule = AlphaSchedule(self.patched(), target=2.0, steps=10, update_every=5)
        assert [schedule.alpha(n) for n in (0, 4, 5, 9, 10)] == [1.0, 1.0, 1.5, 1.5, 2.0]

    def test_a_second_schedule_needs_a_target(self):
        model = self.patched()
        AlphaScheduleCallback(model, steps=3)
        with pytest.raises(ValueError, match=r"alpha is 1.0 already, .*no target is given"):
            AlphaScheduleCallback(model, steps=3)
        assert AlphaScheduleCallback(model, steps=3, target=1.5).schedule.target == 1.5

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"steps \(0\)"):
            AlphaSchedule(self.patched(), target=1.5, steps=0)
        with pytest.raises(ValueError, match=r"alpha is 2\.5"):
            AlphaSchedule(self.patched(), target=2.5, steps=3)
        for target in (1.5, None):
            with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse attention"):
                AlphaSchedule(AutoModelForCausalLM.from_config(tiny_config()), target=target, steps=3)
