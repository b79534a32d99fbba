import pytest
import torch

from sheepop.config import load_config
from sheepop.models.transformer import TransformerModel

B, T, D, F, LAYERS = 3, 45, 40, 92, 2


def learn(compiled):
    """The gradients of a model, and the bytes of the blocks of memory that autograd keeps for the backward pass."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": D, "num_layers": LAYERS, "num_heads": 4, "d_ff": F, "max_seq_len": 48}
    settings = sizes | {"positions": "learned", "dropout": 0.0}
    config = load_config(overrides={f"model.{name}": value for name, value in settings.items()})
    model = TransformerModel(config.model).train()
    model.compile_blocks(compiled)
    token_ids = torch.randint(0, 97, (B, T))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(token_ids, targets=token_ids)
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], sum(kept.values())


@pytest.mark.usefixtures("compiler")
def test_compiled_blocks_make_norms_and_activations_again_and_learn_the_same():
    torch._dynamo.reset()
    expected, kept = learn(compiled=False)
    found, kept_compiled = learn(compiled=True)
    for gradient, same in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-5)
    # The outputs of both norms and of the activation, fp32.
    assert kept - kept_compiled >= LAYERS * 4 * B * T * (2 * D + F)
