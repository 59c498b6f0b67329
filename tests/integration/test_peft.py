"""LoRA, DoRA and prefix tuning: the length scale trains, is stored, and comes back with the adapter."""

import json
import logging
import re

import peft
import pytest
import torch
import transformers
from families import alone, prompts, tiny_config, tiny_model
from packaging.version import Version
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.logging import warning_once

from hf_sparse_attention import (
    AlphaSchedule,
    AlphaScheduleCallback,
    SparseAttentionTrainer,
    check_trainable,
    convert,
    load_adapter,
    lora_config,
    parameter_groups,
    revert,
    set_alpha,
)
from hf_sparse_attention.peft import SparseLoraConfig
from hf_sparse_attention.training import scale_parameter_names

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# Holds as long as this pair of releases is installed, and no longer: a pass is then a failure.
older_than_transformers = pytest.mark.xfail(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION}, here is {peft.__version__}",
    strict=True,
)
families = pytest.mark.parametrize("family", ["llama", "gpt_neox"])
dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture
def warned(caplog):
    """The text of warnings, of which each is given once per process."""
    warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    yield caplog
    warning_once.cache_clear()


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a softmax checkpoint; the answer loads it."""

    def save(family="llama"):
        AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / family)
        return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / family)

    return save


def adapted(model, seed=1, **kwargs):
    """A PEFT model in evaluation mode whose adapter is far from its start."""
    wrapped = get_peft_model(model, lora_config(model, r=4, **kwargs))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return wrapped.eval()


def trained_adapter(load, folder, seed=1, position="nape", **kwargs):
    """Saves an adapter for a converted model; answers with its logits on a fixed row, and the row."""
    model = load()
    convert(model, "asentmax", position_encoding=position)
    wrapped = adapted(model, seed, **kwargs)
    wrapped.save_pretrained(folder)
    return alone(wrapped, ROW)


ROW = torch.arange(2, 13)


@families
@dora
class TestLora:
    def test_trains_the_scale_and_nothing_of_the_base(self, family, dora):
        model = tiny_model(family, position="nape")
        base = {name: p.clone() for name, p in model.named_parameters()}
        wrapped = get_peft_model(model, lora_config(model, r=4, use_dora=dora)).train()
        optimizer = torch.optim.AdamW(parameter_groups(wrapped, weight_decay=0.1, lr=1e-2))
        ids = torch.stack(prompts(9, 9))
        losses = []
        for _ in range(5):
            loss = wrapped(input_ids=ids, labels=ids).loss
            loss.backward()
            # lora_A has zero gradient in the first step, as lora_B starts at zero.
            without = {n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None}
            assert not without
            scale = {n: p.grad for n, p in wrapped.named_parameters() if "modules_to_save" in n}
            assert len(scale) == 8
            assert all(gradient.abs().sum() > 0 for gradient in scale.values())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        trainable = [n for n, p in wrapped.named_parameters() if p.requires_grad]
        assert all("lora_" in n or ".length_scale.modules_to_save.default." in n for n in trainable)
        assert check_trainable(wrapped) == []
        unloaded = dict(wrapped.unload().named_parameters())
        assert all(torch.equal(unloaded[n], p) for n, p in base.items() if ".length_scale." not in n)

    def test_saved_adapter_on_a_fresh_softmax_checkpoint(self, family, dora, checkpoint, tmp_path):
        load = checkpoint(family)
        expected = trained_adapter(load, tmp_path / "adapter", use_dora=dora)
        loaded = load_adapter(load(), tmp_path / "adapter").eval()
        assert torch.equal(alone(loaded, ROW), expected)
        assert loaded.config.sparse_attention["position_encoding"] == "nape"
        assert isinstance(loaded.peft_config["default"], SparseLoraConfig)

    def test_merged_model_is_a_plain_checkpoint(self, family, dora, tmp_path):
        wrapped = adapted(tiny_model(family, position="nape"), use_dora=dora)
        expected = alone(wrapped, ROW)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(alone(merged, ROW), expected, atol=2e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path)
        assert torch.equal(alone(AutoModelForCausalLM.from_pretrained(tmp_path), ROW), alone(merged, ROW))

    def test_switching_and_hot_swap(self, family, dora, checkpoint, tmp_path):
        load = checkpoint(family)
        first = trained_adapter(load, tmp_path / "1", seed=1, use_dora=dora)
        second = trained_adapter(load, tmp_path / "2", seed=2, use_dora=dora)
        assert not torch.allclose(first, second, atol=0.1)
        model = load_adapter(load(), tmp_path / "1").eval()
        load_adapter(model, tmp_path / "2", "second")
        assert torch.equal(alone(model, ROW), first)
        model.set_adapter("second")
        assert torch.equal(alone(model, ROW), second)
        model.set_adapter("default")
        assert torch.equal(alone(model, ROW), first)
        pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
        load_adapter(model, tmp_path / "2")
        assert torch.equal(alone(model, ROW), second)
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
        with model.disable_adapter():
            plain = load()
            convert(plain, "asentmax", position_encoding="nape")
            assert torch.equal(alone(model, ROW), alone(plain, ROW))


class TestSettingsTravelWithTheAdapter:
    def test_alpha_is_that_of_saving(self, checkpoint, tmp_path):
        load = checkpoint()
        model = load()
        convert(model)
        schedule = AlphaSchedule(model, target=1.75, steps=2)
        wrapped = adapted(model)
        assert wrapped.peft_config["default"].sparse_attention["alpha"] == 1.0
        schedule.step(2)
        wrapped.save_pretrained(tmp_path / "adapter")
        stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert stored["sparse_attention"] == model.config.sparse_attention
        assert stored["sparse_attention"]["alpha"] == 1.75
        assert stored["modules_to_save"] == ["length_scale"]
        loaded = load_adapter(load(), tmp_path / "adapter").eval()
        assert torch.equal(alone(loaded, ROW), alone(wrapped, ROW))

    def test_other_settings_are_refused(self, checkpoint, tmp_path):
        load = checkpoint()
        trained_adapter(load, tmp_path / "adapter")
        model = load()
        convert(model, "asentmax", alpha=2.0, position_encoding="nope")
        message = r"alpha 1.5 \(the model has 2.0\), position_encoding 'nape' \(the model has 'nope'\)"
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / "adapter")
        assert not hasattr(model, "peft_config")
        loaded = load_adapter(load(), tmp_path / "adapter")
        set_alpha(loaded, 1.25)
        with pytest.raises(ValueError, match=r"alpha 1.5 \(the model has 1.25\)"):
            load_adapter(loaded, tmp_path / "adapter", "again")

    def test_backend_may_differ(self, checkpoint, tmp_path):
        load = checkpoint()
        expected = trained_adapter(load, tmp_path / "adapter")
        model = load()
        convert(model, "asentmax", position_encoding="nape", backend="reference")
        loaded = load_adapter(model, tmp_path / "adapter").eval()
        torch.testing.assert_close(alone(loaded, ROW), expected, atol=1e-4, rtol=1e-4)

    def test_replacing_an_adapter_of_another_shape_is_refused(self, checkpoint, tmp_path):
        load = checkpoint()
        trained_adapter(load, tmp_path / "1")
        trained_adapter(load, tmp_path / "2", lora_alpha=32)
        model = load_adapter(load(), tmp_path / "1").eval()
        before = alone(model, ROW)
        with pytest.raises(ValueError, match="cannot replace the adapter 'default' in place: its lora_alpha is 32"):
            load_adapter(model, tmp_path / "2")
        assert torch.equal(alone(model, ROW), before)

    def test_adapters_of_other_kinds_are_refused(self, checkpoint, tmp_path):
        load = checkpoint()
        get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match=r"adapter_config.json has no sparse_attention"):
            load_adapter(load(), tmp_path / "lora")
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(load(), prefix).save_pretrained(tmp_path / "prefix")
        with pytest.raises(ValueError, match="prefix: a PREFIX_TUNING adapter, not LoRA"):
            load_adapter(load(), tmp_path / "prefix")
        trained_adapter(load, tmp_path / "sparse")
        softmax = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="which has other adapters, computes attn_implementation='sdpa'"):
            load_adapter(softmax, tmp_path / "sparse", "second")
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            load_adapter(load(), tmp_path / "missing")

    def test_misspelt_setting_in_the_file_is_named(self, checkpoint, tmp_path):
        load = checkpoint()
        trained_adapter(load, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(path.read_text().replace('"gamma_range"', '"gama_range"'))
        with pytest.raises(ValueError, match=r"no field 'gama_range'.*Did you mean 'gamma_range'"):
            load_adapter(load(), tmp_path)

    def test_peft_and_transformers_load_it_too(self, checkpoint, tmp_path, caplog):
        load = checkpoint()
        expected = trained_adapter(load, tmp_path / "adapter", position="model")
        model = load()
        convert(model)
        with pytest.warns(UserWarning, match=r"\['sparse_attention'\]"):
            loaded = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        assert torch.equal(alone(loaded, ROW), expected)
        with pytest.warns(UserWarning, match=r"\['sparse_attention'\]"):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="asentmax").eval()
        # transformers 5.4 does not load modules_to_save, and reports that.
        missing = re.search(r"length_scale\.modules_to_save\.default\.beta_proj\.weight *\| MISSING", caplog.text)
        assert missing or torch.equal(alone(loaded, ROW), expected)


class TestTrainer:
    def run(self, folder, resume=None):
        torch.manual_seed(3)
        model = tiny_model(position="nape")
        callback = AlphaScheduleCallback(model, steps=4)
        rows = [{"input_ids": row, "labels": row} for row in torch.arange(2, 34).view(4, 8).repeat(4, 1)]
        arguments = TrainingArguments(
            str(folder),
            max_steps=6,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            weight_decay=0.5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        wrapped = get_peft_model(model, lora_config(model))
        trainer = SparseAttentionTrainer(wrapped, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def test_checkpoints_are_adapters_and_resume(self, tmp_path):
        whole = self.run(tmp_path)
        losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        scale = scale_parameter_names(whole.model)
        names = {id(p): name for name, p in whole.model.named_parameters()}
        for group in whole.optimizer.param_groups:
            assert group["weight_decay"] == 0 or not any(names[id(p)] in scale for p in group["params"])
        for step, alpha in ((2, 1.25), (4, 1.5)):
            stored = json.loads((tmp_path / f"checkpoint-{step}" / "adapter_config.json").read_text())
            assert stored["sparse_attention"]["alpha"] == alpha
        resumed = self.run(tmp_path, resume=str(tmp_path / "checkpoint-2"))
        assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == pytest.approx(losses, abs=1e-5)
        for a, b in zip(resumed.model.parameters(), whole.model.parameters()):
            torch.testing.assert_close(a, b)


class TestConfig:
    def test_fields(self):
        config = lora_config(tiny_model(), r=3, modules_to_save=["lm_head"], target_modules=["q_proj"])
        assert (config.r, config.modules_to_save, config.target_modules) == (
            3,
            ["lm_head", "length_scale"],
            {"q_proj"},
        )
        assert (config.task_type, config.sparse_attention["preset"]) == ("CAUSAL_LM", "asentmax")
        assert lora_config(tiny_model(preset="entmax")).modules_to_save is None

    def test_needs_sparse_attention(self):
        model = AutoModelForCausalLM.from_config(tiny_config())
        with pytest.raises(ValueError, match=r"has no sparse attention; call hf_sparse_attention.convert\(model\)"):
            lora_config(model)

    def test_all_linear_leaves_the_scale_to_modules_to_save(self):
        model = tiny_model()
        wrapped = get_peft_model(model, lora_config(model))
        assert not any("lora_" in n for n, _ in wrapped.named_parameters() if "length_scale" in n)
        assert any("down_proj.lora_A" in n for n, _ in wrapped.named_parameters())

    @pytest.mark.parametrize("preset", ["ssmax", "entmax"])
    def test_other_presets(self, preset, tmp_path):
        model = tiny_model(preset=preset)
        model.save_pretrained(tmp_path / "base")
        wrapped = adapted(model)
        assert check_trainable(wrapped) == []
        wrapped.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(alone(load_adapter(base, tmp_path / "adapter").eval(), ROW), alone(wrapped, ROW))

    def test_bf16_base(self):
        model = tiny_model().to(torch.bfloat16)
        wrapped = get_peft_model(model, lora_config(model)).train()
        ids = torch.stack(prompts(9))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)


class TestFrozenScale:
    MESSAGE = "length scale of sparse attention (modules named length_scale) is frozen"

    def step(self, model):
        ids = torch.stack(prompts(9))
        model.train()(input_ids=ids, labels=ids).loss.backward()

    def test_first_training_step_warns_once(self, warned):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
        alone(model, ROW)
        assert self.MESSAGE not in warned.text
        self.step(model)
        self.step(model)
        assert warned.text.count(self.MESSAGE) == 1

    @older_than_transformers
    def test_native_adapters_of_transformers_warn_too(self, warned):
        model = tiny_model()
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
        self.step(model)
        assert self.MESSAGE in warned.text

    @pytest.mark.parametrize("wrap", [lambda m: m, lambda m: get_peft_model(m, lora_config(m))], ids=["full", "lora"])
    def test_no_warning_where_it_trains(self, warned, wrap):
        model = wrap(tiny_model())
        self.step(model)
        assert check_trainable(model) == []
        assert self.MESSAGE not in warned.text

    def test_no_warning_without_scale(self, warned):
        self.step(get_peft_model(tiny_model(preset="entmax"), LoraConfig(task_type="CAUSAL_LM")))
        assert self.MESSAGE not in warned.text

    def test_check_trainable_names_the_parameters(self, warned):
        model = tiny_model()
        every = sorted(name for name, _ in model.named_parameters() if ".length_scale." in name)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        assert check_trainable(wrapped) == every
        assert self.MESSAGE in warned.text
        partial = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["beta_proj"]))
        assert check_trainable(partial) == [name for name in every if "gamma_proj" in name]

    def test_trainer_warns_before_the_first_step(self, warned, tmp_path):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
        SparseAttentionTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True)).create_optimizer()
        assert self.MESSAGE in warned.text

    def test_converting_under_an_adapter_warns(self, warned):
        model = AutoModelForCausalLM.from_config(tiny_config())
        convert(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")))
        assert "convert it before the adapter is made with hf_sparse_attention.lora_config" in warned.text

    def test_convert_and_revert_do_not_drop_an_adapters_scale(self):
        for kwargs in ({}, {"modules_to_save": ["beta_proj"]}):
            model = tiny_model()
            config = LoraConfig(task_type="CAUSAL_LM", **kwargs) if kwargs else lora_config(model)
            wrapped = get_peft_model(model, config).eval()
            before = alone(wrapped, ROW)
            with pytest.raises(ValueError, match="an adapter holds the length scale"):
                convert(wrapped, "asentmax", alpha=2.0)
            with pytest.raises(ValueError, match="an adapter holds the length scale"):
                revert(wrapped)
            assert torch.equal(alone(wrapped, ROW), before)


@families
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
class TestPrefixTuning:
    def wrapped(self, model):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        wrapped = get_peft_model(model, config)
        torch.nn.init.normal_(wrapped.prompt_encoder["default"].embedding.weight)
        return wrapped

    def test_softmax_preset_equals_stock_attention(self, family, tmp_path):
        model = tiny_model(family, preset="softmax")
        model.save_pretrained(tmp_path)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        ours, theirs = self.wrapped(model).eval(), self.wrapped(stock).eval()
        theirs.prompt_encoder.load_state_dict(ours.prompt_encoder.state_dict())
        ids = torch.stack(prompts(7, 7))
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        for extra in ({}, {"attention_mask": mask}):
            with torch.no_grad():
                actual, expected = (m(input_ids=ids, **extra).logits for m in (ours, theirs))
            torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(actual[1, 3:], expected[1, 3:], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("position", ["model", "nape"])
    def test_trains_and_saves(self, family, position, tmp_path, warned):
        model = tiny_model(family, position=position)
        model.save_pretrained(tmp_path / "base")
        wrapped = self.wrapped(model).train()
        ids = torch.stack(prompts(9, 9))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        gradients = {n for n, p in wrapped.named_parameters() if p.grad is not None}
        assert gradients == {"prompt_encoder.default.embedding.weight"}
        assert TestFrozenScale.MESSAGE in warned.text
        wrapped.eval().save_pretrained(tmp_path / "prefix")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, wrapped(input_ids=ids).logits)

    # Its prefix would be ignored, also with transformers' own attention.
    @older_than_transformers
    @pytest.mark.filterwarnings("ignore:Both .past_key_values. and .cache. are set:FutureWarning")
    @pytest.mark.parametrize("position", ["model", "nape"])
    def test_generates(self, family, position):
        wrapped = self.wrapped(tiny_model(family, position=position)).eval()
        ids = torch.stack(prompts(9))
        row = ids
        with torch.no_grad():
            for _ in range(4):
                row = torch.cat([row, wrapped(input_ids=row).logits[:, -1:].argmax(-1)], dim=1)
        generated = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert generated.tolist() == row.tolist()
