"""How many kernels a training step launches on one GPU, counted in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import MARGINS, device_for
from fresh_processes import run_fresh
from launches import counted

import fastmargin as fm
from fastmargin import testing

AT_MOST = 8

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts launches of the interpreter"
)


@pytest.fixture(autouse=True)
def triton():
    device_for("triton")


def step(
    margin,
    reduction="mean",
    x_dtype=torch.float32,
    wants=("x", "weight"),
    training=True,
    **options,
):
    """Names of the launches of the forward pass, and of the backward pass."""
    options = {"backend": "triton", "precision": "fp16", "validate": False} | options
    case = testing.make_case("some_ignored", 20, 70, 24).to(torch.float32)
    head = fm.MarginHead(24, 70, margin, **options).train(training)
    head.weight.requires_grad_("weight" in wants)
    x = case.x.to(x_dtype).requires_grad_("x" in wants)
    upstream = torch.ones(20)
    with counted() as forward:
        loss = head(x, case.labels, reduction)
    with counted() as backward:
        loss.backward(upstream if reduction == "none" else None)
    return forward.names, backward.names


FORWARD = ["row_prologue_kernel", "stage_kernel", "stats_forward_kernel"]
FORWARD += ["stats_finish_kernel", "margin_loss_kernel"]
UPSTREAM = "aten::ones_like"  # what autograd begins with
BACKWARD = [UPSTREAM, "rows_backward_kernel", "centre_pass_kernel"]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adaface", "arcface", "cosface", "adaface_cvlface"])
def test_launches_of_a_training_step(name, x_dtype):
    forward, backward = step(MARGINS[name](), x_dtype=x_dtype)
    assert forward == FORWARD and backward == BACKWARD
    assert len(forward + backward) <= AT_MOST


def test_kappaface_launches_its_sums_besides():
    forward, backward = step(MARGINS["kappaface"]())
    assert forward[: len(FORWARD)] == FORWARD and backward == BACKWARD
    sums = forward[len(FORWARD) :]
    assert sums.count("aten::index_put_") == 2 and len(sums) <= 12


@pytest.mark.parametrize("angular", [True, False])
def test_elasticface_launches_its_draw_and_its_counter_besides(angular):
    margin = fm.ElasticFace(std=0.1, angular=angular)
    forward, backward = step(margin)
    assert forward == ["row_normals_kernel", *FORWARD, "aten::add_"] and backward == BACKWARD
    assert len(forward + backward) == AT_MOST + 2
    forward, backward = step(margin.eval(), training=False)
    assert forward == FORWARD and backward == BACKWARD


def test_filtered_elasticface_draws_in_one_launch():
    forward, _ = step(fm.Filtered(fm.ElasticFace(), 0.3))
    plain, _ = step(fm.Filtered(fm.ArcFace(), 0.3))
    assert sorted(forward) == sorted([*plain, "row_normals_kernel", "aten::add_"])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_launches_of_other_reductions(reduction):
    forward, backward = step(MARGINS["adaface"](), reduction)
    assert forward == FORWARD
    assert backward == (BACKWARD if reduction == "sum" else BACKWARD[1:])


def test_launches_of_one_gradient():
    forward, backward = step(MARGINS["adaface"](), wants=("x",))
    assert forward == FORWARD and backward == BACKWARD[:2]
    forward, backward = step(MARGINS["adaface"](), wants=("weight",))
    assert forward == FORWARD and backward == BACKWARD


def test_launches_with_rows_left_out():
    """One more, that sorts the rows; nothing is read back."""
    forward, backward = step(MARGINS["adaface"](), row_tolerance=1e-3)
    assert forward == FORWARD
    assert backward == [UPSTREAM, "rows_backward_kernel", "compact_kernel", "centre_pass_kernel"]


SAMPLED = ["mark_kernel", "permutation_kernel", "place_kernel"]
SPREAD = ["aten::zeros", "aten::clamp", "aten::remainder", "aten::index_copy_"]


def test_launches_of_sampled_classes():
    forward, backward = step(MARGINS["adaface"](), sample_rate=0.5)
    assert forward == SAMPLED + FORWARD and backward[:3] == BACKWARD
    assert backward[3:] == SPREAD


def test_launches_of_operators_one_by_one():
    """Around a rule for hard negatives, and around the nearest: ATen between the passes alone."""
    rule = fm.Filtered(fm.CosFace(), 0.3)
    forward, backward = step(rule)
    passes = ["own_rows_kernel", "aten::_to_copy", "stage_kernel", "centre_pass_kernel"]
    assert backward[-len(passes) - 2 :] == ["through_stats_kernel", *passes, "through_norm_kernel"]
    forward, backward = step(fm.NPT(top_k=3))
    assert forward == [
        *("row_prologue_kernel", "aten::_to_copy", "stage_kernel", "topk_scan_kernel"),
        *("topk_merge_kernel", "hinge_loss_kernel", "aten::zeros_like"),
    ]
    assert backward == [
        *(UPSTREAM, "aten::mul", "aten::mul", "topk_backward_kernel", *SPREAD[:3]),
        *("aten::index_put_", "through_norm_kernel"),
    ]


def test_launches_of_corrected_samples():
    forward, backward = step(fm.ArcFace(), sample_rate=0.5, correct_sampling=True)
    assert forward[:3] == SAMPLED
    assert len(forward + backward) <= 100


def shared_out(group) -> tuple[list[str], list[str]]:
    """In a process of its own, which has all classes of the group of one."""
    return step(fm.ArcFace(), group=group, batch_size=20)


def test_launches_with_classes_shared_out():
    """Of one process, collectives aside."""
    (found,) = run_fresh(1, shared_out)
    assert found.error is None, found
    forward, backward = found.value
    assert {"stage_kernel", "stats_forward_kernel"} <= set(forward)
    assert {"own_rows_kernel", "centre_pass_kernel", "through_norm_kernel"} <= set(backward)
    assert len(forward + backward) <= 53


def test_margins_that_do_more_launch_more():
    """So that the count above is not blind: a penalty and a margin of Python show."""
    forward, backward = step(MARGINS["no_form"]())
    assert "aten::sqrt" in forward and "aten::log_sigmoid_forward" in forward
    assert len(forward + backward) > 30


def test_metrics_launch_when_read():
    device = device_for("triton")
    head = fm.MarginHead(5, 7, fm.ArcFace(), backend="triton", device=device, validate=False)
    head(torch.randn(3, 5, device=device), torch.tensor([0, 1, -1], device=device))
    with counted() as reading:
        assert len(head.metrics) == 6
    assert len(reading.names) > 6
