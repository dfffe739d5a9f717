"""CTC in the LLM's embedding space."""

import pytest
import torch

from pam_espnet.fileio import load_strict
from pam_espnet.frontend.ctc_head import EmbeddingCTC

IDS = [5, 9, 40]


@pytest.fixture
def head() -> EmbeddingCTC:
    torch.manual_seed(0)
    return EmbeddingCTC(IDS, torch.randn(3, 16))


def test_frames_on_the_embeddings_decode_to_their_tokens(head: EmbeddingCTC) -> None:
    blank = head.blank.detach()
    frames = torch.stack([head.rows[0], head.rows[0], blank, head.rows[0], head.rows[2], head.rows[1]])[None]
    assert head.greedy(frames * 3.0, torch.tensor([6])) == [[5, 5, 40, 9]]
    assert head.greedy(frames, torch.tensor([3])) == [[5]]


def test_loss_agrees_with_one_utterance_at_a_time_and_ignores_padding(head: EmbeddingCTC) -> None:
    frames, lengths = torch.randn(2, 7, 16), torch.tensor([7, 4])
    answers = [[5, 9], [40]]
    total, count, skipped = head.loss(frames, lengths, answers)
    single = [head.loss(frames[i : i + 1, : lengths[i]], lengths[i : i + 1], [answers[i]])[0] for i in range(2)]
    assert (count, skipped) == (3, 0)
    assert total.item() == pytest.approx(sum(s.item() for s in single), rel=1e-5)


def test_what_cannot_be_aligned_is_counted(head: EmbeddingCTC) -> None:
    frames, lengths = torch.randn(3, 3, 16, requires_grad=True), torch.tensor([3, 3, 3])
    total, count, skipped = head.loss(frames, lengths, [[5, 5, 5], [7], [9]])  # repeats need blanks; 7 is unknown
    assert (count, skipped) == (1, 2) and torch.isfinite(total)
    nothing, count, skipped = head.loss(frames, lengths, [[7], [7], []])
    assert (nothing.item(), count, skipped) == (0.0, 0, 3)
    nothing.backward()


def test_posteriors_are_read_back_as_the_embeddings_that_they_are_of() -> None:
    torch.manual_seed(0)
    embeddings = 3.0 * torch.randn(3, 16)
    head = EmbeddingCTC(IDS, embeddings, temperature=0.001)  # all or nothing
    frames = torch.stack([0.1 * embeddings[2], head.blank.detach(), embeddings[0]])[None].requires_grad_()
    expected = head.expected_embeddings(frames)
    assert torch.allclose(expected[0], torch.stack([embeddings[2], torch.zeros(16), embeddings[0]]), atol=1e-4)
    head.log_temperature.data.fill_(0.0)
    mean = head.log_probs(frames).exp()[..., 1:] @ embeddings
    assert torch.allclose(head.expected_embeddings(frames), mean, atol=1e-5)
    alone = head.expected_embeddings(frames, alone=torch.tensor([2]))
    assert torch.allclose(alone[:, :2], mean[:, :2], atol=1e-5)
    head.expected_embeddings(frames)[0, 0, 0].backward()
    assert frames.grad is not None and bool(frames.grad[0, 0].any()) and head.blank.grad is not None


def test_training_changes_no_rows(head: EmbeddingCTC) -> None:
    rows = head.rows.clone()
    frames = torch.nn.Parameter(torch.randn(1, 6, 16))
    optimizer = torch.optim.Adam([frames, *head.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(frames, torch.tensor([6]), [[9, 40]])[0].backward()
        optimizer.step()
    assert head.greedy(frames, torch.tensor([6])) == [[9, 40]]
    assert torch.equal(rows, head.rows) and set(head.state_dict()) == {"blank", "log_temperature"}


def test_rows_must_fit_the_ids() -> None:
    with pytest.raises(ValueError, match="rows"):
        EmbeddingCTC([1, 1], torch.randn(2, 4))


def test_a_bag_depends_on_neither_time_nor_number(head: EmbeddingCTC) -> None:
    blank = head.blank.detach()
    frames = torch.stack([blank, head.rows[1], blank, head.rows[0], blank])[None]
    lengths = torch.tensor([5])
    total, count, skipped = head.bag_loss(frames, lengths, [[5, 9, 5]])
    assert (count, skipped) == (2, 0)  # types, not tokens
    assert total.item() == pytest.approx(head.bag_loss(frames.flip(1), lengths, [[9, 5]])[0].item(), rel=1e-5)
    assert total < head.bag_loss(frames, lengths, [[5, 40]])[0]
    assert head.detect(frames, lengths, [2]) == [{5, 9}]
    # A temperature of its own, and by default CTC's.
    own, learned = float(head.log_temperature.exp().detach()), [[5, 40]]
    assert head.bag_loss(frames, lengths, learned)[0] == head.bag_loss(frames, lengths, learned, temperature=own)[0]
    wide, sharp = (head.bag_loss(frames, lengths, [[5]], temperature=t)[0] for t in (own, own / 2))
    assert sharp < wide


def test_bags_of_a_batch_ignore_padding_and_count_what_they_cannot_name(head: EmbeddingCTC) -> None:
    frames, lengths = torch.randn(3, 7, 16, requires_grad=True), torch.tensor([7, 4, 2])
    answers = [[5, 9], [40], [7]]  # 7 is unknown to the head
    total, count, skipped = head.bag_loss(frames, lengths, answers)
    single = [head.bag_loss(frames[i : i + 1, : lengths[i]], lengths[i : i + 1], [answers[i]])[0] for i in range(2)]
    assert (count, skipped) == (3, 1)
    assert total.item() == pytest.approx(sum(s.item() for s in single), rel=1e-5)
    nothing, count, skipped = head.bag_loss(frames, lengths, [[7], [], [7]])
    assert (nothing.item(), count, skipped) == (0.0, 0, 3)
    nothing.backward()


def test_each_expert_has_its_own_temperature() -> None:
    torch.manual_seed(0)
    head = EmbeddingCTC(IDS, torch.randn(3, 16), num_experts=2)
    head.log_temperature.data[1] -= 1.0
    frames, lengths, expert = torch.randn(3, 5, 16), torch.tensor([5, 4, 5]), torch.tensor([1, 0, 1])
    together = head.log_probs(frames, expert)
    for b, one in enumerate(expert.tolist()):
        single = EmbeddingCTC(IDS, head.rows * head.norms[:, None], head.log_temperature[one].exp().item())
        single.blank.data.copy_(head.blank.data)
        own, length = frames[b : b + 1], lengths[b : b + 1]
        torch.testing.assert_close(together[b], single.log_probs(own)[0])
        chosen = expert[b : b + 1]
        torch.testing.assert_close(head.pooled_scores(own, length, chosen), single.pooled_scores(own, length))
        torch.testing.assert_close(head.expected_embeddings(own, chosen), single.expected_embeddings(own))
        for loss in ("loss", "bag_loss"):
            mine = getattr(head, loss)(own, length, [[5, 9]], chosen)[0]
            torch.testing.assert_close(mine, getattr(single, loss)(own, length, [[5, 9]])[0])
    with pytest.raises(ValueError, match="whose temperature"):
        head.log_probs(frames)


def test_one_temperature_of_an_earlier_version_is_for_all_experts() -> None:
    head = EmbeddingCTC(IDS, torch.randn(3, 16), num_experts=2)
    load_strict(head, {"blank": torch.zeros(16), "log_temperature": torch.tensor(-3.0)}, "earlier")
    assert head.log_temperature.tolist() == [-3.0, -3.0]


def test_a_prior_explains_what_is_true_of_any_answer(head: EmbeddingCTC) -> None:
    """With the shares as prior, scores that say nothing lose nothing on the mean answer; without it they do."""
    answers = [[5, 9], [5, 5], [5], [5, 9]]
    shares = head.log_shares(answers)
    torch.testing.assert_close(shares.exp(), torch.tensor([1.0, 0.5, 0.25]))  # 40 is in none: as one that is in one
    assert torch.equal(head.log_shares([]), torch.zeros(3))
    frames, lengths = torch.zeros(2, 4, 16, requires_grad=True), torch.tensor([4, 4])
    total, count, _ = head.bag_loss(frames, lengths, [[5], [9, 5]], log_prior=shares.expand(2, -1))
    expected = -(2 * shares[0] + shares[1] - 3 * shares.logsumexp(0))
    assert count == 3 and total.item() == pytest.approx(expected.item(), rel=1e-5)
    second = head.bag_loss(frames, lengths, [[7], [9]], log_prior=torch.stack([torch.zeros(3), shares]))[0]  # its row
    assert second.item() == pytest.approx((shares.logsumexp(0) - shares[1]).item(), rel=1e-5)
