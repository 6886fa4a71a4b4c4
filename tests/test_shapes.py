"""The generated clips that t2v_ddpm.py and t2v_rflow.py learn from and are scored by: what is drawn is what is read."""

import itertools

import numpy as np
import pytest

import common
import t2v_ddpm
import t2v_rflow


@pytest.mark.parametrize(
    ("shapes", "sizes", "lengths"),
    [(t2v_ddpm.SHAPES, (16, 64), (8,)), (t2v_rflow.SHAPES, (12, 16), (4, 6))],
    ids=["ddpm", "rflow"],
)
def test_generated_clips_show_their_captions(shapes, sizes, lengths):
    rng, asked = np.random.default_rng(0), common.all_captions(shapes)
    assert len(asked) == len({common.caption_of(a) for a in asked}) == 288
    for size, frames in itertools.product(sizes, lengths):
        clips = np.stack([common.draw_clip(a, frames, size, rng) for a in asked])
        assert common.asked_is_made(clips, asked, shapes)["all_five"] == 1
        assert common.asked_is_made(clips, asked[7:] + asked[:7], shapes)["all_five"] < 0.05
        assert common.asked_is_made(clips[:, ::-1], asked, shapes)["move"] == 0, "the other way round"
        assert common.asked_is_made(clips[:, :1].repeat(frames, 1), asked, shapes)["move"] == 0, (
            "a still picture"
        )
        assert common.asked_is_made(clips * 0, asked, shapes)["shape"] == 0
        noise = rng.integers(0, 256, clips.shape, dtype=np.uint8)
        assert common.asked_is_made(noise, asked, shapes)["all_five"] == 0
    held_out = [a for a in asked if common.is_held_out(a, shapes)]
    assert 40 <= len(held_out) <= 60
    for name, values in common.attributes_of(
        shapes
    ).items():  # each value is trained on, only the combination is new
        assert {a[name] for a in asked if not common.is_held_out(a, shapes)} == set(values)
