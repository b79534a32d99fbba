"""What the loop gets to see of the text, by either packing."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from sheepop.config import load_config
from sheepop.data.corpus import open_corpus
from sheepop.data.dataset import IGNORE_INDEX
from sheepop.training.batches import batch_loader, to_device
from sheepop.training.distributed import World
from sheepop.training.run import set_up

CPU = torch.device("cpu")


@pytest.fixture
def run_of(many_documents, tiny_config):
    """Set up a run over the documents: `run_of(**{"data.packing": "best_fit"})`."""

    def make(world=None, **settings):
        return set_up(tiny_config(**settings), open_corpus(many_documents), device=CPU, world=world or World(0, 1))

    return make


def same_batch(one, other):
    return (
        (one.index, one.num_targets) == (other.index, other.num_targets)
        and one.token_ids.equal(other.token_ids)
        and one.targets.equal(other.targets)
        and (one.document_ids is None) == (other.document_ids is None)
        and (one.document_ids is None or one.document_ids.equal(other.document_ids))
    )


PACKINGS = [
    {"data.packing": "concatenate"},
    {"data.document_mask": True},
    {"data.packing": "best_fit"},
    {"training.token_noise": 0.3},
]


@pytest.mark.parametrize("settings", PACKINGS)
def test_an_epoch_has_each_token_as_a_target_once(run_of, settings):
    run = run_of(**settings)
    load = batch_loader(run)
    tokens = run.corpus.split("train").tokens
    for epoch in range(2):
        first = epoch * run.sampler.steps_per_epoch
        batches = [batch for step in range(first, first + run.sampler.steps_per_epoch) for batch in load(step)]
        seen = Counter()
        for batch in batches:
            scored = batch.targets != IGNORE_INDEX
            assert batch.num_targets == int(scored.sum())
            seen.update(batch.targets[scored].tolist())
        assert seen == Counter(tokens[1:].tolist())


@pytest.mark.parametrize("settings", PACKINGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_step_is_the_same_at_once_and_on_any_number_of_processes(run_of, settings, world_size):
    alone = batch_loader(run_of(**settings))
    in_order = [alone(step) for step in range(20)]
    for step in (13, 4, 19, 0):
        shares = [
            batch_loader(replace(run_of(**settings), world=World(rank, world_size)))(step) for rank in range(world_size)
        ]
        assert len({len(share) for share in shares}) == 1  # an empty one stands in for those that are missing
        everything = sorted((batch for share in shares for batch in share), key=lambda batch: batch.index)
        together = [batch for batch in everything if batch.num_targets]
        assert [batch.index for batch in together] == list(range(len(together)))
        assert len(together) == len(in_order[step])
        assert all(map(same_batch, together, in_order[step]))


def test_packed_documents_see_only_themselves_and_are_seldom_cut(run_of):
    run = run_of(**{"data.packing": "best_fit"})
    end_of_text = run.tokenizer.end_of_text_id
    load = batch_loader(run)
    for step in range(run.sampler.steps_per_epoch):
        for batch in load(step):
            for inputs, targets, documents in zip(batch.token_ids, batch.targets, batch.document_ids, strict=True):
                is_used = targets != IGNORE_INDEX
                begins = torch.diff(documents, prepend=torch.tensor([-1])) != 0
                # An end-of-text token always begins a document; what begins without one is the rest of a long one.
                assert (begins & is_used)[(inputs == end_of_text) & is_used].all()
                assert not is_used[int(is_used.sum()) :].any()


def test_best_fit_sets_the_mask_and_is_trained_and_told(train_in, many_documents, tmp_path, capsys):
    assert load_config(overrides={"data.packing": "best_fit"}).data.document_mask
    settings = {"data.path": str(many_documents), "data.packing": "best_fit", "training.max_steps": 6}
    train_in(tmp_path / "run", **settings)
    assert "packing: best fit" in capsys.readouterr().err
    assert load_config(tmp_path / "run" / "config.json").data.document_mask


def test_a_copy_to_the_cpu_is_no_copy():
    tensor = torch.arange(6)
    assert to_device(tensor.numpy(), CPU).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("settings", [{}, {"data.packing": "best_fit"}])
def test_noise_changes_a_share_of_the_inputs_and_nothing_else(run_of, settings):
    clean, noisy = run_of(**settings), run_of(**settings, **{"training.token_noise": 0.3})
    text = set(clean.corpus.split("train").tokens[:].tolist())
    changed = total = 0
    for step in range(clean.sampler.steps_per_epoch):
        for one, other in zip(batch_loader(clean)(step), batch_loader(noisy)(step), strict=True):
            assert same_batch(replace(one, token_ids=other.token_ids), other)
            is_changed = one.token_ids != other.token_ids
            assert set(other.token_ids[is_changed].tolist()) <= text
            changed, total = changed + int(is_changed.sum()), total + is_changed.numel()
    assert 0.2 < changed / total < 0.3  # some draw the token that was there
    assert not batch_loader(noisy)(0)[0].token_ids.equal(batch_loader(noisy)(1)[0].token_ids)
