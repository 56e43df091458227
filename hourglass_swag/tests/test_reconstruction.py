"""Token reconstruction: both rules, the normalisations, and what is rejected."""

import pytest
import torch
from torch import Tensor

from common.tests.reference import array
from hourglass_swag.models.ops import reconstuction
from hourglass_swag.models.ops.reconstruction import (
    NaiveUnpooling,
    TokenReconstructionBlock,
    naive_unpool,
    reconstruction_weights,
)


def draw(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(array(name, shape, 3))


def reconstruct(block: TokenReconstructionBlock, before: Tensor, after: Tensor, x: Tensor) -> Tensor:
    state = block.derive_unpooler()
    state.update_state(feat_before_pooling=before)
    state.update_state(feat_after_pooling=after, hard_labels=None)
    tokens, flag = state.call(x)
    assert flag is False
    return tokens


def test_every_token_takes_over_its_cluster():
    x = draw("x", 2, 4, 3)
    labels = torch.tensor([[0, 3, 3, 1, 2], [2, 2, 0, 1, 3]])
    tokens = naive_unpool(x, labels)
    assert all(torch.equal(tokens[b, p], x[b, labels[b, p]]) for b in range(2) for p in range(5))


@pytest.mark.parametrize("k", [1, 3, 4, -1])
def test_l1_is_the_weighted_mean_of_the_paper(k):
    before, after = draw("before", 2, 6, 3), draw("after", 2, 4, 3)
    weights = reconstruction_weights(before, after, k, 0.5, "l1")
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 6, dtype=torch.float64))
    assert ((weights > 0).sum(2) == (k if k > 0 else 4)).all()
    nearest = torch.cdist(before, after).argmin(2)
    assert torch.equal(weights.argmax(2), nearest)


def test_l2_rows_have_unit_norm_and_agree_with_l1_for_one_neighbour():
    before, after, x = draw("before", 1, 6, 3), draw("after", 1, 4, 3), draw("x", 1, 4, 5)
    rows = reconstruction_weights(before, after, 3, 0.5, "l2")
    torch.testing.assert_close(rows.square().sum(2), torch.ones(1, 6, dtype=torch.float64))
    assert (rows.sum(2) > 1).all()
    one = [reconstruct(TokenReconstructionBlock(1, 0.5, norm), before, after, x) for norm in ("l2", "l1")]
    torch.testing.assert_close(one[0], one[1])
    torch.testing.assert_close(one[0], naive_unpool(x, torch.cdist(before, after).argmin(2)))


def test_ties_keep_more_than_k():
    after = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]]])
    weights = reconstruction_weights(torch.zeros(1, 1, 2), after, 1, 1.0, "l1")
    torch.testing.assert_close(weights, torch.tensor([[[0.5, 0.5, 0.0]]]))


def test_distances_that_underflow_give_zero_and_not_nan():
    far = draw("b", 1, 3, 2) + 100
    tokens = reconstruct(TokenReconstructionBlock(2, 1.0), far, draw("a", 1, 3, 2), draw("x", 1, 3, 2))
    assert torch.equal(tokens, torch.zeros(1, 3, 2, dtype=torch.float64))


def test_a_state_never_updated_changes_nothing():
    x = draw("x", 1, 4, 3)
    state = NaiveUnpooling().derive_unpooler()
    assert state.call(x)[0] is x
    assert state.get("hard_labels", 7) == 7
    state.update_state(anything="kept")
    assert (state.anything, state.updated) == ("kept", True)
    with pytest.raises(ValueError, match="hard_labels"):
        state.call(x)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="got 0"):
        TokenReconstructionBlock(k=0)
    with pytest.raises(ValueError, match="between 1 and the number of clusters, 4, or negative for all; got 5"):
        reconstruct(TokenReconstructionBlock(5), draw("b", 1, 6, 2), draw("a", 1, 4, 2), draw("x", 1, 4, 2))
    with pytest.raises(ValueError, match="'l2' or 'l1'"):
        TokenReconstructionBlock(normalize="max")  # pyright: ignore[reportArgumentType]


def test_published_module_name():
    assert reconstuction.TokenReconstructionBlock is TokenReconstructionBlock
