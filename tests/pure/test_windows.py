"""Plans of sliding windows, their fuse weights and their noise, over a grid of lengths."""

from __future__ import annotations

import pytest
import torch
from latentmotion.sampling.fuse import FuseMethod, Fusion, window_weights
from latentmotion.sampling.noise import NoiseKind, arrange_noise
from latentmotion.sampling.windows import PlanError, WindowPlan, WindowSchedule, halving

MOST = 200
STEPS = [0, 1, 2, 5, 19]
SETTINGS = [(1, 0), (2, 1), (5, 2), (8, 0), (8, 3), (12, 11), (16, 4), (16, 15), (24, 12), (32, 8), (64, 16), (100, 50)]
SCHEDULES = [  # with the strides and loops that mean something to them
    (WindowSchedule.STATIC, 1, False),
    (WindowSchedule.BATCHED, 1, False),
    *((WindowSchedule.UNIFORM, stride, False) for stride in (1, 2, 3)),
    *((WindowSchedule.LOOPED, stride, closed_loop) for stride in (1, 2, 3) for closed_loop in (False, True)),
]


@pytest.mark.parametrize(("schedule", "stride", "closed_loop"), SCHEDULES)
@pytest.mark.parametrize(("length", "overlap"), SETTINGS)
def test_every_frame_is_covered_and_no_window_too_long(schedule, length, overlap, stride, closed_loop):
    plan = WindowPlan(schedule, length, overlap, stride, closed_loop)
    for frames in range(1, MOST + 1):
        for step in {0, STEPS[frames % len(STEPS)]}:
            windows = plan.windows(frames, step)
            assert {frame for window in windows for frame in window} == set(range(frames)), (frames, step)
            assert all(0 < len(window) <= length for window in windows)
            assert all(len(set(window)) == len(window) for window in windows), (frames, step)


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.UNIFORM])
def test_neighbouring_windows_overlap_as_asked(schedule):
    windows = WindowPlan(schedule, 16, 4).windows(100, step=3)
    assert all(window == list(range(window[0], window[0] + 16)) for window in windows)
    assert all(b[0] - a[0] <= 12 for a, b in zip(windows, windows[1:], strict=False))


@pytest.mark.parametrize(("length", "overlap"), [(2, 1), (8, 3), (16, 4), (16, 15), (64, 16)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_closed_loop_bridges_the_ends_at_every_step(length, overlap, stride):
    plan = WindowPlan(WindowSchedule.LOOPED, length, overlap, stride, closed_loop=True)
    for frames in range(length + 1, MOST + 1, 7):
        for step in range(8):
            assert any({frames - 1, 0} <= set(window) for window in plan.windows(frames, step)), (frames, step)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_without_overlap_closed_loop_changes_nothing(stride):
    """As the help page says; the ends are then met because the windows move."""
    for frames in range(1, 100):
        closed, open_ = (WindowPlan(WindowSchedule.LOOPED, 16, 0, stride, loop) for loop in (True, False))
        assert [closed.windows(frames, s) for s in range(8)] == [open_.windows(frames, s) for s in range(8)]
    meets = [any({0, 47} <= set(window) for window in open_.windows(48, step)) for step in range(8)]
    assert not meets[0] and sum(meets) == 7



def test_uniform_windows_move_from_step_to_step():
    plan = WindowPlan(WindowSchedule.UNIFORM, 16, 4)
    assert plan.windows(100, 0) != plan.windows(100, 1)
    assert WindowPlan(WindowSchedule.STATIC, 16, 4).windows(100, 0) == WindowPlan(WindowSchedule.STATIC).windows(100, 1)


def test_halving_mirrors_the_bits():
    assert [halving(step) for step in range(5)] == [0.0, 0.5, 0.25, 0.75, 0.125]


@pytest.mark.parametrize(
    ("length", "overlap", "stride"), [(16, 16, 1), (16, 17, 1), (16, -1, 1), (0, 0, 1), (16, 4, 0)]
)
def test_impossible_settings_are_refused_by_name(length, overlap, stride):
    with pytest.raises(PlanError, match="context_"):
        WindowPlan(WindowSchedule.STATIC, length, overlap, stride)


@pytest.mark.parametrize(("schedule", "stride", "closed_loop"), SCHEDULES)
@pytest.mark.parametrize(("length", "overlap"), SETTINGS)
def test_windows_that_agree_fuse_to_what_they_agree_on(schedule, stride, closed_loop, length, overlap):
    """Weights of a frame sum to one: for lengths about the window's, and others up to 200 at each setting."""
    whole = torch.randn(MOST, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = WindowPlan(schedule, length, overlap, stride, closed_loop)
    first = (7 * SETTINGS.index((length, overlap)) + 29 * SCHEDULES.index((schedule, stride, closed_loop))) % 25 + 1
    for number, frames in enumerate([length, length + 1, 2 * length - overlap + 1, *range(first, MOST + 1, 25)]):
        method = list(FuseMethod)[(first + number) % len(FuseMethod)]
        clip = whole[:frames]
        fusion = Fusion(clip, 0, method, overlap, plan.loops)
        for window in plan.windows(frames, STEPS[frames % len(STEPS)]):
            fusion.add(window, clip[window])
        torch.testing.assert_close(fusion.mean(), clip, msg=f"{frames} frames, {method.value}")


@pytest.mark.parametrize("method", FuseMethod)
@pytest.mark.parametrize("loops", [False, True])
def test_weights_are_positive(method, loops):
    for length in range(1, MOST + 1, 3):
        for overlap in {0, 1, length // 4, length // 2, length - 1}:
            for first in (0, 5, MOST - length):
                assert min(window_weights(method, range(first, first + length), MOST, overlap, loops)) > 0


def test_fusion_on_a_time_axis_weighs_as_the_formula_says():
    fusion = Fusion(torch.zeros(1, 1, 3, 1), 2, FuseMethod.PYRAMID, 1)
    fusion.add([0, 1], torch.full((1, 1, 2, 1), 1.0))
    fusion.add([1, 2], torch.full((1, 1, 2, 1), 4.0))
    assert fusion.mean().flatten().tolist() == [1.0, 2.5, 4.0]


def test_overlap_linear_fades_only_inside_the_clip():
    assert window_weights(FuseMethod.OVERLAP_LINEAR, range(8), 20, 3) == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert window_weights(FuseMethod.OVERLAP_LINEAR, range(8), 20, 0) == [1.0] * 8
    assert window_weights(FuseMethod.PYRAMID, range(5), 20, 3) == [1, 2, 3, 2, 1]


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("closed_loop", [False, True])
def test_overlap_linear_fades_over_the_seam_of_a_loop(step, closed_loop):
    """Windows that go evenly round a loop weigh alike, whichever of them starts at frame 0 or ends with the clip."""
    plan = WindowPlan(WindowSchedule.LOOPED, 16, 4, closed_loop=closed_loop)
    share = torch.zeros(48, dtype=torch.float64)
    for window in plan.windows(48, step):
        weights = window_weights(FuseMethod.OVERLAP_LINEAR, window, 48, 4, plan.loops)
        assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 8 + [0.8, 0.6, 0.4, 0.2])
        share[window] += torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(share, torch.ones_like(share))


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.UNIFORM, WindowSchedule.BATCHED])
def test_closed_loop_gives_other_schedules_no_seam(schedule):
    assert not WindowPlan(schedule, closed_loop=True).loops and WindowPlan(WindowSchedule.LOOPED).loops


@pytest.mark.parametrize("axis", [0, 2])
def test_shuffled_noise_permutes_the_piece_one_window_earlier(axis):
    noise = torch.randn(1, 2, 40, 3).movedim(2, axis)
    out = arrange_noise(noise, NoiseKind.SHUFFLED, 16, 4, axis, seed=5).movedim(axis, 0)
    given = noise.movedim(axis, 0)
    assert torch.equal(out[:16], given[:16])
    for start in range(16, 40, 12):
        piece = {tuple(frame.flatten().tolist()) for frame in out[start : start + 12]}
        assert piece <= {tuple(frame.flatten().tolist()) for frame in out[start - 16 : start - 4]}
        assert len(piece) == min(12, 40 - start)
    assert not torch.equal(out, arrange_noise(noise, NoiseKind.SHUFFLED, 16, 4, axis, seed=6).movedim(axis, 0))
    assert torch.equal(out, arrange_noise(noise, NoiseKind.SHUFFLED, 16, 4, axis, seed=5).movedim(axis, 0))


@pytest.mark.parametrize("schedule", [WindowSchedule.STATIC, WindowSchedule.BATCHED])
@pytest.mark.parametrize("kind", [NoiseKind.SHUFFLED, NoiseKind.REPEATED])
def test_no_window_sees_the_same_noise_twice(schedule, kind):
    """In windows that stay where they are; those of other schedules move over the pieces."""
    plan = WindowPlan(schedule, 16, 4)
    noise = arrange_noise(torch.randn(100, 3), kind, plan.length, plan.shared, 0, seed=5)
    assert len({tuple(frame.tolist()) for frame in noise}) == 16
    for window in plan.windows(100)[:-1]:
        assert len({tuple(noise[frame].tolist()) for frame in window}) == 16


def test_independent_noise_is_left_alone_and_repeated_noise_repeats():
    noise = torch.randn(20, 4)
    assert torch.equal(arrange_noise(noise, NoiseKind.INDEPENDENT, 8, 2, 0, 1), noise)
    repeated = arrange_noise(noise, NoiseKind.REPEATED, 8, 2, 0, 1)
    assert torch.equal(repeated[8:14], noise[:6])
