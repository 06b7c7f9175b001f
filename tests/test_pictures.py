"""beside/pictures.py: pictures whose pixels are known beforehand."""
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from beside import pictures

CELLS = (5, 7)                                                          # H', W' of a map

@pytest.mark.parametrize("size", [(60, 80), (61, 47), (240, 320)])
def test_a_bright_cell_lands_on_its_place_of_the_frame(size):
    for i, j in [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)]:
        cell = np.zeros((1, *CELLS))
        cell[0, i, j] = 0.02
        full = pictures.upsample(cell, size)[0]
        assert full.shape == size and full.max() > 0.8
        sums = np.zeros(CELLS)                                          # over the picture's cells
        rows = (np.arange(size[0]) + 0.5) * 5 // size[0]
        columns = (np.arange(size[1]) + 0.5) * 7 // size[1]
        np.add.at(sums, (rows.astype(int)[:, None], columns.astype(int)[None]), full)
        assert np.unravel_index(sums.argmax(), CELLS) == (i, j)
    centre = [(full.sum(1) * (np.arange(size[0]) + 0.5)).sum() / full.sum() for full in
              pictures.upsample(np.eye(35)[17].reshape(1, *CELLS), size)]    # the middle cell
    np.testing.assert_allclose(centre, size[0] / 2, atol=1e-3 * max(size))


def test_frames_under_a_map_are_grey_and_half_as_bright():
    picture = Image.new("RGB", (6, 4), (200, 100, 0))
    plain = np.asarray(pictures.shine(picture, np.zeros((0, 4, 6)), []))
    assert (plain == (0.299 * 200 + 0.587 * 100) // 2).all()
    lit = np.asarray(pictures.shine(picture, np.ones((1, 4, 6)), [(0, 80, 160)]))
    assert (lit[0, 0] == np.array([29, 109, 189])).all(), "at 1 a quarter of the grey is left"


@pytest.mark.parametrize("count, size, width, columns, panel", [
    (1, (1080, 1920), 1920, 1, (1080, 1920)), (2, (1080, 1920), 1920, 2, (540, 960)),
    (5, (1080, 1920), 1920, 3, (360, 640)), (2, (1920, 1080), 1920, 2, (1080, 607)),
    (10, (64, 96), 1920, 5, (256, 384)), (2, (240, 320), 1920, 2, (480, 640)),
    (4, (64, 96), 480, 2, (135, 202)), (1, (2160, 3840), 1920, 1, (1080, 1920))])
def test_panels_fill_rows_of_bounded_size(count, size, width, columns, panel):
    assert pictures.arrange(count, size, width) == (columns, panel)
    rows = -(-count // columns)
    assert columns * panel[1] <= width and rows * panel[0] <= width * 9 / 16


def test_letters_and_lines_grow_with_the_picture():
    sizes = [pictures.letter_size(size) for size in [(240, 320), (540, 960), (1080, 1920)]]
    assert sizes == [14, 15, 30]
    image = Image.new("RGB", (200, 200))
    pictures.draw_boxes(image, np.array([[20, 20, 180, 180.0]]), [(255, 0, 0)], 28)
    assert (np.asarray(image)[100, :40, 0] == 255).sum() == 4


def test_labels_stand_beside_their_boxes_off_heads_and_each_other():
    random = np.random.default_rng(0)
    for _ in range(30):
        corner = random.uniform((0, 0), (500, 250), (6, 2))
        boxes = np.concatenate([corner, corner + random.uniform(40, 110, (6, 2))], 1)
        extents = random.uniform((60, 20), (110, 60), (5, 2))
        places = pictures.place_labels(boxes[:5], extents, (640, 360), boxes[5:])
        labels = np.concatenate([places, places + extents], 1)
        assert (labels >= 0).all() and (labels[:, 2:] <= (640, 360)).all()
        heads = boxes.copy()
        heads[:, 3] = boxes[:, 1] + (boxes[:, 3] - boxes[:, 1]) / 3
        overlap = pictures.common_area(labels[:, :], np.concatenate([heads, labels]))
        np.testing.assert_allclose(overlap, extents.prod(1), rtol=1e-6)     # with itself alone
    alone = pictures.place_labels(np.array([[100, 100, 150, 200.0]]), np.array([[80, 30.0]]),
                                   (640, 360), np.zeros((0, 4)))
    assert alone.tolist() == [[100, 69]], "above, where there is room"
    top = pictures.place_labels(np.array([[100, 0, 150, 200.0]]), np.array([[80, 30.0]]),
                                 (640, 360), np.zeros((0, 4)))
    assert top.tolist() == [[151, 0]], "to the right, as there is none above"


def test_the_area_boxes_share_is_counted_pixel_by_pixel():
    random = np.random.default_rng(1)
    boxes, others = (random.integers(0, 12, (count, 4)).astype(float) for count in (5, 3))
    for part in (boxes, others):
        part[:, 2:] += part[:, :2]
    counts = np.zeros((2, 5, 3, 24, 24))
    for k, box in enumerate(boxes.astype(int)):
        counts[0, k, :, box[1]:box[3], box[0]:box[2]] = 1
    for m, box in enumerate(others.astype(int)):
        counts[1, :, m, box[1]:box[3], box[0]:box[2]] = 1
    expected = counts.prod(0).sum((1, 2, 3))
    np.testing.assert_allclose(pictures.common_area(boxes, others), expected)


def test_a_video_of_odd_size_plays_with_all_its_frames(tmp_path):
    av = pytest.importorskip("av")
    shades = [np.full((61, 83, 3), 10 + 12 * i, np.uint8) for i in range(19)]
    pictures.save_video(tmp_path / "a.mp4", iter(shades), 12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert stream.average_rate == Fraction(25, 2)
        assert stream.codec_context.pix_fmt == "yuv420p"
    assert len(frames) == 19 and frames[0].shape == (62, 84, 3)
    for frame, shade in zip(frames, shades):
        assert abs(float(frame.mean()) - shade.mean()) < 4
