"""The generated clips that t2v_ddpm.py and t2v_rflow.py learn from and are scored by: what is drawn is what
is read."""

import itertools

import numpy as np
import pytest

from demos import shapes as world


@pytest.mark.parametrize(
    ("shapes", "sizes", "lengths"),
    [(world.DDPM_SHAPES, (16, 64), (8,)), (world.RFLOW_SHAPES, (12, 16), (4, 6))],
    ids=["ddpm", "rflow"],
)
def test_generated_clips_show_their_captions(shapes, sizes, lengths):
    rng, asked = np.random.default_rng(0), world.all_captions(shapes)
    assert len(asked) == len({world.caption_of(a) for a in asked}) == 288
    for size, frames in itertools.product(sizes, lengths):
        clips = np.stack([world.draw_clip(a, frames, size, rng) for a in asked])
        assert world.asked_is_made(clips, asked, shapes)["all_five"] == 1
        assert world.asked_is_made(clips, asked[7:] + asked[:7], shapes)["all_five"] < 0.05
        assert world.asked_is_made(clips[:, ::-1], asked, shapes)["move"] == 0, "the other way round"
        assert world.asked_is_made(clips[:, :1].repeat(frames, 1), asked, shapes)["move"] == 0, (
            "a still picture"
        )
        assert world.asked_is_made(clips * 0, asked, shapes)["shape"] == 0
        noise = rng.integers(0, 256, clips.shape, dtype=np.uint8)
        assert world.asked_is_made(noise, asked, shapes)["all_five"] == 0
    held_out = world.held_out_captions(shapes)
    assert 40 <= len(held_out) <= 60
    for name, values in world.attributes_of(
        shapes
    ).items():  # each value is trained on, only the combination is new
        assert {a[name] for a in asked if not world.is_held_out(a, shapes)} == set(values)
