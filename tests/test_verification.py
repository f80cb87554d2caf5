"""Verification figures against brute force, and the pairs of insightface's .bin files."""

from __future__ import annotations

import io
import itertools
import pickle

import pytest
import torch

from fastmargin import verification
from fastmargin.data import VerificationPairs
from fastmargin.verification import Pairs


def test_roc_by_hand():
    pairs = Pairs(torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.85, 0.3, 0.2, 0.1]))
    curve = verification.roc(pairs)
    # accepted at thresholds .9 .85 .8 .3 .2 .1, after the point that accepts nobody
    assert (curve.tar * 3).round().tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert (curve.far * 4).tolist() == [0, 0, 1, 1, 2, 3, 4]
    # of 12 genuine/impostor couples: 4 + 3 + 2 in the right order, one tie
    assert verification.auc(curve) == pytest.approx((4 + 3 + 2 + 0.5) / 12)
    assert verification.tar_at_far(curve, 0.0) == pytest.approx(1 / 3)
    assert verification.tar_at_far(curve, 0.25) == pytest.approx(2 / 3)
    assert verification.tar_at_far(curve, 0.49) == pytest.approx(2 / 3)
    assert verification.tar_at_far(curve, 0.5) == 1


def test_far_limit_is_inclusive_at_45_of_4500():
    impostor = torch.arange(4500.0)
    genuine = torch.tensor([4454.5, 4455.5])  # 45 impostors lie above the first
    curve = verification.roc(Pairs(genuine, impostor))
    assert verification.tar_at_far(curve, 1e-2) == 1
    assert verification.tar_at_far(curve, 44 / 4500) == 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_figures_against_brute_force(tied):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    if tied:
        features = features.sign()  # eight directions only: many equal cosines
    people = torch.randint(0, 5, (24,), generator=generator)
    unit = features / features.norm(dim=1, keepdim=True)
    scores = {True: [], False: []}
    for i in range(24):
        for j in range(i):
            score = round((unit[i] @ unit[j]).item(), 9)
            scores[(people[i] == people[j]).item()].append(score)
    genuine, impostor = scores[True], scores[False]
    wins = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor)
    pairs = verification.all_pairs(features, people)
    assert sorted(pairs.genuine.tolist()) == pytest.approx(sorted(genuine), abs=1e-8)
    rounded = Pairs(pairs.genuine.round(decimals=9), pairs.impostor.round(decimals=9))
    curve = verification.roc(rounded)
    assert verification.auc(curve) == pytest.approx(wins / len(genuine) / len(impostor))
    for far in (0.0, 0.01, 0.1, 0.5, 1.0):
        allowed = [
            sum(g >= t for g in genuine) / len(genuine)
            for t in [*genuine, *impostor, 2.0]
            if sum(i >= t for i in impostor) / len(impostor) <= far
        ]
        assert verification.tar_at_far(curve, far) == pytest.approx(max(allowed))


def test_rank_one_by_hand():
    # image 0 has its person (2) nearest, 1 has a stranger (2), 2 has 0, 3 has a stranger (1)
    angle = torch.deg2rad(torch.tensor([0.0, 25.0, 10.0, 90.0]))
    features = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.tensor([[1], [9], [2], [3]])
    people = torch.tensor([0, 1, 0, 2])
    assert verification.rank_one(features, people) == 0.5


# ---- given pairs ---------------------------------------------------------------------------


def unit_pairs(scores):
    """Features (2 P, 2) whose pairs have these cosines."""
    angle = torch.tensor(scores, dtype=torch.float64).acos()
    second = torch.stack([angle.cos(), angle.sin()], 1)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand_as(second)
    return torch.stack([first, 3 * second], 1).flatten(0, 1)


def brute_force_accuracy(scores, same, folds):
    """Thresholds tried one by one, the lowest of the best is taken."""
    found = []
    for fold in range(folds):
        judged = [i for i in range(len(same)) if i * folds // len(same) == fold]
        others = [i for i in range(len(same)) if i not in judged]
        values = sorted({scores[i] for i in others})
        between = [(low + high) / 2 for low, high in itertools.pairwise(values)]
        tried = [values[0] - 1, *between, values[-1] + 1]
        best = max(tried, key=lambda t: sum((scores[i] >= t) == same[i] for i in others))
        found.append(sum((scores[i] >= best) == same[i] for i in judged) / len(judged))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("count, folds", [(40, 10), (23, 10), (7, 7), (6, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_ten_folds_against_brute_force(count, folds, ties):
    generator = torch.Generator().manual_seed(count)
    scores = 1.6 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.8
    if ties:
        scores = (4 * scores).round() / 4
    same = torch.rand(count, generator=generator) < 0.4 + 0.3 * scores
    features = unit_pairs(scores.tolist())
    unit = torch.nn.functional.normalize(features, dim=1)
    given = (unit[::2] * unit[1::2]).sum(1)
    accuracy, deviation = verification.ten_fold_accuracy(features, same, folds)
    wanted = brute_force_accuracy(given.tolist(), same.tolist(), folds)
    assert accuracy == pytest.approx(wanted.mean().item())
    assert deviation == pytest.approx(wanted.std(unbiased=False).item())


def test_ten_folds_of_only_equal_or_different_pairs():
    features = unit_pairs([0.1, 0.5, 0.3, 0.9])
    for answer in (True, False):
        same = torch.full((4,), answer)
        assert verification.ten_fold_accuracy(features, same, 2) == (1.0, 0.0)


@pytest.mark.parametrize("count, answers, folds", [(8, 3, 2), (8, 4, 5), (8, 4, 1)])
def test_ten_folds_refuse(count, answers, folds):
    with pytest.raises(ValueError, match="two features per answer"):
        verification.ten_fold_accuracy(torch.ones(count, 2), torch.ones(answers).bool(), folds)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_must_be_finite(bad):
    features = torch.ones(8, 2)
    features[3, 1] = bad
    for figure in (
        lambda: verification.ten_fold_accuracy(features, torch.ones(4).bool(), 2),
        lambda: verification.all_pairs(features, torch.arange(8)),
        lambda: verification.rank_one(features, torch.arange(8)),
    ):
        with pytest.raises(ValueError, match="finite"):
            figure()


def picture(value):
    image = pytest.importorskip("PIL.Image").new("RGB", (4, 6), (value, 100, 200))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_bin_file(tmp_path):
    images = [picture(value) for value in range(6)]
    for protocol in (0, 2, 5):
        (tmp_path / "x.bin").write_bytes(pickle.dumps((images, [True, False, True]), protocol))
        pairs = VerificationPairs(tmp_path / "x.bin")
        assert len(pairs) == 6 and pairs.same.tolist() == [True, False, True]
        assert pairs[3].shape == (3, 6, 4)
        assert round(float(pairs[3][0, 0, 0] * 127.5 + 127.5)) == 3


def test_bin_file_of_python_2(tmp_path):
    """Its strings are bytes."""
    image = picture(7)
    text = b"(lp0\n" + b"S" + repr(image)[1:].encode() + b"\na"
    second = b"S" + repr(image)[1:].encode() + b"\na"
    (tmp_path / "x.bin").write_bytes(b"(" + text + second + b"(lI01\nat.")
    pairs = VerificationPairs(tmp_path / "x.bin")
    assert len(pairs) == 2 and pairs.same.tolist() == [True]
    assert round(float(pairs[1][0, 0, 0] * 127.5 + 127.5)) == 7


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps(([Harmful()], [True])), "print"),
        (b"", "lfw.bin"),
        (b"no pickle", "lfw.bin"),
        (pickle.dumps([1, 2, 3]), "lfw.bin"),
        (pickle.dumps(5), "lfw.bin"),
        (pickle.dumps(([b"a"], [True])), "two images"),
        (pickle.dumps((["a", "b"], [True])), "as bytes"),
        (pickle.dumps((1, 2)), "lfw.bin"),
        (b"(S'a'\nS'b'\naI1\nt.", "lfw.bin"),
    ],
)
def test_bin_files_that_are_refused(tmp_path, capsys, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VerificationPairs(tmp_path / "x.bin")
    assert "ran" not in capsys.readouterr().out


def test_bin_file_with_a_broken_image(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([picture(1), b"broken"], [False])))
    with pytest.raises(ValueError, match=r"x\.bin, image 1"):
        VerificationPairs(tmp_path / "x.bin")[1]
