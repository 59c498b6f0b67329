"""What synthetic.py does to training rows and queries, so that longer rows find a margin; measured rows are spared."""

import pytest
import torch
from synthetic_model import build_model, scaled_queries, target_loss
from synthetic_training import Trainer, without_start
from test_synthetic_run import options

from hf_sparse_attention.data.synthetic import BOS, IGNORED_LABEL, PAD


def test_query_jitter_is_for_training_only():
    """Scores of each row times one number: a model whose queries are divided by it computes the same."""
    task_options, train_options, _ = options(query_jitter=0.4)
    trainer = Trainer(build_model(task_options), task_options.trained_task(), train_options, torch.device("cpu"))
    trainer.set_lengths(4, 12)
    trainer.set_rate(1.0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.steps(12)
    factor = trainer.factor.flatten()
    assert 0.4 <= factor.min() < factor.max() <= 1
    assert not torch.equal(trainer.model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert trainer.model.state_dict().keys() == before.keys()

    samples = trainer.task.sample(train_options.batch_size, 12, torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        plain = trainer.model(samples.input_ids).logits
        with scaled_queries(trainer.model, trainer.factor):
            scaled = trainer.model(samples.input_ids).logits
        assert torch.equal(trainer.model(samples.input_ids).logits, plain)
        for layer in trainer.model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor[3])
        torch.testing.assert_close(trainer.model(samples.input_ids[3:4]).logits, scaled[3:4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scaled, plain, atol=1e-4)


def test_rows_without_their_start_are_shifted():
    samples = options(task="copy")[0].trained_task().sample(64, (3, 9), torch.Generator().manual_seed(0))
    assert without_start(samples, 0.0) is samples
    rows = without_start(samples, 0.5)
    dropped = rows.input_ids[:, 0] != BOS
    assert 16 < dropped.sum() < 48
    for before, after, filler in zip(samples, rows, (PAD, IGNORED_LABEL)):
        assert torch.equal(after[~dropped], before[~dropped])
        assert torch.equal(after[dropped, :-1], before[dropped, 1:])
        assert (after[dropped, -1] == filler).all()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_steps_are_of_rows_without_their_start(share, monkeypatch):
    begun = []

    def loss(model, input_ids, labels, count):
        begun.append((input_ids[:, 0] == BOS).float().mean().item())
        return target_loss(model, input_ids, labels, count)

    monkeypatch.setattr("synthetic_training.target_loss", loss)
    task_options, train_options, _ = options(start_dropout=share)
    trainer = Trainer(build_model(task_options), task_options.trained_task(), train_options, torch.device("cpu"))
    trainer.set_lengths(4, 12)
    trainer.steps(12)
    assert begun == [1.0] if share == 0 else 0.2 < begun[0] < 0.8
