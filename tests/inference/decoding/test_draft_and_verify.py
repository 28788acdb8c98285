"""The loop: rows, stops and counts, with drafters that are written out."""

import torch

from refimpl.inference.decoding.draft_and_verify import Draft, Reader, Rows, draft_and_verify
from refimpl.model.generate import generate

PROMPTS = torch.tensor([[5, 7, 33], [8, 1, 2]])


class Scripted:
    """Guesses what it is told, of what really follows: for each round and row, how many are right of three."""

    calls = 0

    def __init__(self, follows, right, counts=3):
        self.follows, self.right, self.counts, self.seen = follows, iter(right), counts, []

    def propose(self, rows):
        self.seen.append(rows.lengths.tolist())
        right = torch.tensor(next(self.right))
        place = (rows.lengths[:, None] - 3 + torch.arange(3)).clamp(max=self.follows.shape[1] - 1)
        tokens = self.follows.gather(1, place)
        tokens = torch.where(torch.arange(3) < right[:, None], tokens, (tokens + 1) % 61)
        return Draft(tokens, torch.full((2,), self.counts))


def greedy(draft, logits):
    """The rule, one row and one guess after the other."""
    best, kept = logits.argmax(-1), []
    for row, count in enumerate(draft.counts.tolist()):
        same = [bool(draft.tokens[row, i] == best[row, i]) for i in range(count)]
        kept.append(same.index(False) if False in same else count)
    return torch.tensor(kept), best[torch.arange(len(kept)), torch.tensor(kept)]


def test_rows_go_on_at_their_own_pace(target):
    """Oracle: by hand. Rows take right + 1 tokens a round; the second is at its end first and waits."""
    follows = generate(target, PROMPTS, 10)
    drafter = Scripted(follows, [(0, 3), (1, 3), (3, 2), (2, 0), (0, 0)])
    decoded = draft_and_verify(target, PROMPTS, 10, drafter, greedy)
    assert drafter.seen == [[3, 3], [4, 7], [6, 11], [10, 13], [13, 13]][: len(drafter.seen)]
    assert torch.equal(decoded.tokens, follows)
    assert decoded.target_calls == 4 and decoded.rounds.tolist() == [4, 3]
    assert decoded.accepted.tolist() == [6, 7] and decoded.rejected.tolist() == [2, 0]
    assert decoded.drafted.tolist() == [11, 7]  # 3 a round, but no more than there is room for: 2 in the last, then 1
    assert decoded.widths.tolist() == [4, 4, 4, 3]
    assert decoded.depths.tolist() == [[3, 3, 3, 2], [3, 3, 1, 0]]
    assert decoded.stood.tolist() == [[0, 1, 3, 2], [3, 3, 1, 0]]


def test_a_row_may_put_fewer_guesses_than_others(target):
    """Oracle: by hand: what stands behind `counts` is not looked at, though it is right."""
    follows = generate(target, PROMPTS, 10)
    decoded = draft_and_verify(target, PROMPTS, 10, Scripted(follows, [(3, 3)] * 10, counts=1), greedy)
    assert decoded.target_calls == 5 and decoded.drafted.tolist() == [5, 5]
    assert decoded.widths.tolist() == [2] * 5  # nor read
    assert torch.equal(decoded.tokens, follows)


def test_no_guess_at_all_is_plain_decoding(target):
    class Silent:
        calls = 0

        def propose(self, rows):
            return Draft(rows.text[:, :0], torch.zeros(2, dtype=torch.int64))

    decoded = draft_and_verify(target, PROMPTS, 7, Silent(), greedy)
    assert torch.equal(decoded.tokens, generate(target, PROMPTS, 7)) and decoded.target_calls == 7


def test_a_stop_token_inside_the_guesses_ends_a_row():
    """Oracle: by hand. Of guesses 4 9 6 all stand, and 9 is a stop token; the other row's 9 was not kept."""
    rows = Rows.begin(torch.tensor([[1, 2], [1, 2], [1, 2]]), 8, {9, 50})
    guesses = torch.tensor([[4, 9, 6], [5, 9, 6], [3, 3, 3]])
    taken = rows.append(guesses, torch.tensor([3, 1, 0]), torch.tensor([7, 8, 50]))
    assert taken.tolist() == [2, 2, 1]
    assert rows.running.tolist() == [False, True, False]
    assert rows.lengths.tolist() == [4, 4, 3] and rows.room.tolist() == [0, 5, 0]
    assert rows.last(2).tolist() == [[4, 9], [5, 8], [2, 50]]
    assert rows.append(guesses, torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])).tolist() == [0, 1, 0]
    assert rows.new(2).tolist() == [[4, 9, 9], [5, 8, 1], [50, 50, 50]]


def test_a_reader_forgets_what_was_not_kept(target):
    """Oracle: the last hidden state of the whole text, read at once."""
    rows, reader = Rows.begin(PROMPTS, 8, ()), Reader(target, None, 11)
    guesses = torch.tensor([[1, 2], [3, 4]])
    with torch.no_grad():
        reader.read(rows, 1, guesses)
        rows.append(guesses, torch.tensor([0, 2]), torch.tensor([9, 10]))
        hidden = reader.read(rows, 1)[:, -1]
        expected = [target.hidden(torch.tensor([x]))[0, -1] for x in ([5, 7, 33, 9], [8, 1, 2, 3, 4, 10])]
    torch.testing.assert_close(hidden, torch.stack(expected), rtol=1e-4, atol=1e-4)  # of size 10, through 3 layers
    assert reader.calls == 2
