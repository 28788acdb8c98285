"""Who sees whom, by loops over the definition, and by gradients: the prompt reaches what stands behind it through the gist alone."""

import pytest
import torch

from refimpl.data.prompting.compression.gist_mask import Hiding, hidden
from refimpl.model.config import Config
from refimpl.model.model import Decoder, initialize_

G = 9


def test_by_hand():
    """Oracle: by hand; prompt 1 2, two gists, input 3 4: rows are who looks, 1 is hidden."""
    found = hidden(torch.tensor([[1, 2, G, G, 3, 4]]), G)[0].int().tolist()
    assert found == [[0] * 6] * 4 + [[1, 1, 0, 0, 0, 0]] * 2
    found = hidden(torch.tensor([[1, 2, G, G, 3, 4]]), G, "negative")[0].int().tolist()
    assert found == [[0] * 6] * 4 + [[1, 1, 1, 1, 0, 0]] * 2
    assert not hidden(torch.tensor([[1, 2, G, G, 3, 4]]), G, "positive").any()


@pytest.mark.parametrize("condition", ["gist", "negative", "positive"])
def test_by_loops(condition, generator):
    """Oracle: the definition said pair by pair, on rows with gists anywhere, at the ends, and none."""
    rows = torch.randint(0, 5, (40, 8), generator=generator)
    for i, row in enumerate(rows[:-5]):
        first = int(torch.randint(0, 8, (), generator=generator))
        row[first : first + 1 + i % 3] = G
    found, seen = hidden(rows, G, condition), 0
    for row, answer in zip(rows.tolist(), found.tolist(), strict=True):
        places = [i for i, token in enumerate(row) if token == G]
        for i in range(8):
            for j in range(8):
                behind = bool(places) and i > places[-1]
                gone = {
                    "gist": bool(places) and j < places[0],
                    "negative": bool(places) and j <= places[-1],
                    "positive": False,
                }
                assert answer[i][j] == (behind and gone[condition])
                seen += answer[i][j]
    assert (seen > 50) == (condition != "positive")


def dependence(layers, hides):
    """Largest gradient of the outputs behind the gist by the prompt's embeddings, prompt 0 1 2, gist 3, then 4 5."""
    config = Config(vocabulary=11, d_model=16, n_layers=layers, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    model = initialize_(Decoder(config), torch.Generator().manual_seed(0), std=0.3).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    out = model.hidden(x, Hiding(hides))[0, 4:]
    (grad,) = torch.autograd.grad((out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum(), x)
    return float(grad[0, :3].abs().max())


def test_the_prompt_is_seen_through_the_gist_alone():
    """Oracle: gradients, which are exactly 0 where no path leads: in one layer the gist passes nothing on yet; in two, only the gist does,
    and not if the prompt is hidden from the gist, too. Negative controls: no mask; two layers."""
    tokens = torch.tensor([[1, 2, 3, G, 4, 5]])
    mask, none = hidden(tokens, G), hidden(tokens, G, "positive")
    without = mask.clone()
    without[0, 3, :3] = True  # the gist itself sees no prompt
    assert dependence(1, mask) == 0 and dependence(1, none) > 1e-3
    assert dependence(2, mask) > 1e-3 and dependence(2, without) == 0
    assert dependence(3, hidden(tokens, G, "negative")) == 0


def test_it_holds_nothing():
    hides = Hiding(torch.zeros(1, 2, 2, dtype=torch.bool))
    k = torch.ones(1, 1, 2, 4)
    same, value, positions = hides.update(0, k, k + 1, k, torch.tensor([[0, 1]]))
    assert same is k and torch.equal(value, k + 1) and positions.tolist() == [[[[0, 1], [0, 1]]]]
    hides.compress_prefill()
    hides.reset()
    assert hides.length == hides.nbytes == 0
