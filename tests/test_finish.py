"""The natural finish: what it shows where, on pictures of which the answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place
from musetalk.pixels.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.show import blend
from musetalk.show.finish import natural
from musetalk.show.mask import LIPS, lips_map

SIDE = 64  # of the network's faces
BOX = Box(20, 10, 212, 202)
PLACE = Place.of(BOX)
AREA = Box(20, 106, 212, 202)


def scene(seed: int = 3, grain: float = 12) -> torch.Tensor:
    """A frame (240, 240, 3) with light from a side and grain."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(90, 170, 240)[None, :, None].expand(240, 240, 3)
    return (ramp + grain * torch.randn(240, 240, 3, generator=generator)).clamp(0, 255).to(torch.uint8)


def small(frame: torch.Tensor) -> torch.Tensor:
    """The box as the network sees it: (3, SIDE, SIDE) float."""
    part = frame[BOX.y1 : BOX.y2, BOX.x1 : BOX.x2].permute(2, 0, 1).float()[None]
    return F.interpolate(part, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]


def region(level: int = 255) -> Region:
    mask = torch.zeros(AREA.height, AREA.width, dtype=torch.uint8)
    mask[:, 8:-8] = level
    return Region(AREA, mask)


def lips() -> torch.Tensor:
    out = torch.zeros(LIPS, LIPS, dtype=torch.uint8)
    out[46:58, 22:42] = 255
    return out


def shown(frame: torch.Tensor, face: torch.Tensor, where: Region | None = None) -> torch.Tensor:
    out = frame.clone()
    natural(out.unbind(-1), face.clamp(0, 255).to(torch.uint8), PLACE, where or region(), lips())
    return out


def test_where_drawing_and_source_agree_but_for_a_tint_the_source_is_shown() -> None:
    frame = scene()
    tinted = small(frame) + torch.tensor([18.0, -9.0, -14.0])[:, None, None]
    official, ours = frame.clone(), shown(frame, tinted)
    blend.paste(official.unbind(-1), tinted.clamp(0, 255).to(torch.uint8), BOX, region())
    cheek = slice(112, 140), slice(34, 64)
    wrong, right = ((x[cheek].float() - frame[cheek].float()).abs().mean() for x in (official, ours))
    assert float(wrong) > 10, "the official way tints and blurs"
    assert float(right) < 1.5
    mouth = slice(160, 180), slice(100, 130)
    tint = (ours[mouth].float() - frame[mouth].float()).mean(dim=(0, 1)).abs()
    assert float(tint.max()) < 3, "no tint at the lips either, where the drawing is shown"


def test_an_open_mouth_is_the_drawings() -> None:
    frame = scene()
    face = small(frame)
    face[:, 48:56, 26:38] = torch.tensor([40.0, 10.0, 12.0])[:, None, None]
    ours = shown(frame, face)
    inside = ours[10 + 50 * 3 : 10 + 54 * 3, 20 + 29 * 3 : 20 + 35 * 3].float().mean(dim=(0, 1))
    assert float((inside - torch.tensor([40.0, 10.0, 12.0])).abs().max()) < 12


def test_a_jaw_that_drops_is_the_drawings() -> None:
    """Below the mouth and far from the source's lips, a large difference is the drawing's too."""
    frame = scene()
    face = small(frame)
    face[:, 58:64, 22:42] -= 70
    below = (shown(frame, face)[190:200, 90:140].float() - frame[190:200, 90:140].float()).mean()
    assert float(below) < -35


def test_only_the_mask_is_changed_and_in_its_strength() -> None:
    frame = scene()
    assert torch.equal(shown(frame, 255 - small(frame), region(0)), frame)
    ours = shown(frame, 255 - small(frame))
    outside = torch.ones(240, 240, dtype=torch.bool)
    outside[AREA.y1 : AREA.y2, AREA.x1 + 8 : AREA.x2 - 8] = False
    assert torch.equal(ours[outside], frame[outside])
    assert not torch.equal(ours, frame)


def test_rows_that_the_fast_lane_leaves_out_do_not_matter() -> None:
    frame, face = scene(), small(scene())
    other = face.clone()
    other[:, : blend.first_row(PLACE, region(), SIDE)] = 0
    assert torch.equal(shown(frame, face), shown(frame, other))


@pytest.mark.parametrize("box", [Box(-31, 60, 101, 191), Box(121, 101, 263, 251)])
def test_a_box_that_leaves_the_frame(box: Box) -> None:
    frame = scene()
    area = Box(box.x1 & ~1, (box.y1 + box.height // 2) & ~1, box.x2 & ~1, box.y2 & ~1).clipped(240, 240)
    everything = Region(area, torch.full((area.height, area.width), 255, dtype=torch.uint8))
    drawn = torch.full((3, SIDE, SIDE), 90, dtype=torch.uint8)
    drawn[:, SIDE // 2 :: 8] = 230  # stripes: no tint of the source's
    for planes in (frame.unbind(-1), tuple(Planes.of(torch.full((240 * 360,), 90, dtype=torch.uint8), 240, 240))):
        before = [plane.clone() for plane in planes]
        natural(planes, drawn, Place.of(box), everything, lips())
        for plane, was in zip(planes, before, strict=True):
            step = 240 // len(plane)
            outside = torch.ones_like(plane, dtype=torch.bool)
            outside[area.y1 // step : area.y2 // step, area.x1 // step : area.x2 // step] = False
            assert torch.equal(plane[outside], was[outside])
            assert not torch.equal(plane[~outside], was[~outside])


def test_planes_and_rgb_show_the_same() -> None:
    """The worker's 4:2:0 planes against the library's RGB."""
    colour = Colour()
    smooth = F.interpolate(scene().permute(2, 0, 1)[None].float(), size=(16, 16), mode="area")
    frame = F.interpolate(smooth, size=(240, 240), mode="bilinear")[0].permute(1, 2, 0)
    levels = from_rgb(frame.to(torch.uint8)[None], colour)[0]
    buffer = torch.cat([levels[0].flatten(), *(blend.quads(c).flatten() for c in levels[1:])])
    planes = Planes.of(buffer, 240, 240)
    face = small(frame)
    face[:, 48:56, 26:38] = 60
    want = shown(to_rgb(planes, colour), face)
    drawn = from_rgb(face.clamp(0, 255).to(torch.uint8).permute(1, 2, 0)[None], colour)[0]
    natural(tuple(planes), drawn, PLACE, region(), lips())
    apart = (to_rgb(planes, colour).float() - want.float()).abs()
    assert float(apart.mean()) < 1
    assert float(apart[112:140, 40:200].max()) < 6


def test_lips_map_follows_the_labels() -> None:
    face = 64.0, 32.0, 448.0, 416.0
    labels = torch.zeros(512, 512, dtype=torch.uint8)
    labels[320:352, 200:312] = 12  # in the frame: rows 160..176, columns 100..156
    found = lips_map(labels, face)
    rows, columns = (found > 200).any(1).nonzero().flatten(), (found > 200).any(0).nonzero().flatten()
    unit = 192 / LIPS
    assert abs((int(rows[0]) + int(rows[-1]) + 1) / 2 * unit + 16 - 168) < unit
    assert abs((int(columns[0]) + int(columns[-1]) + 1) / 2 * unit + 32 - 128) < unit
    assert not lips_map(torch.zeros_like(labels), face).any()


def test_the_drawing_gets_the_sources_grain_but_no_edge_of_it() -> None:
    """At the source's lips, which are drawn: the source's detail where both are alike, grain like the skin's where not."""
    frame = scene(grain=4)
    frame[170:, 40:200] -= 60  # an edge through the source's lips
    face = torch.full((3, SIDE, SIDE), 130.0)
    ours = shown(frame, face)[:, 95:135].float()
    assert float(ours[160:166].std(dim=1).mean()) > 3
    assert 2 < float(ours[174:180].std(dim=1).mean()) < 5
    rows = ours[160:180].mean(dim=(1, 2))
    assert float((rows[1:] - rows[:-1]).abs().max()) < 60 / 2


def test_lips_that_the_drawing_has_not_leave_no_outline() -> None:
    """A clear picture: where the drawn mouth is narrower, plain skin is drawn over the source's lips."""
    frame = torch.full((240, 240, 3), 150, dtype=torch.uint8)
    frame[158:172, 92:140] = torch.tensor([120, 70, 80], dtype=torch.uint8)
    ours = shown(frame, torch.full((3, SIDE, SIDE), 150.0))[112:196, 40:190]
    assert int((ours.int() - 150).abs().max()) <= 1


def test_a_wrong_tint_around_the_face_is_not_the_faces() -> None:
    """The network draws another background: what lies outside the mask says nothing about the skin."""
    frame = scene()
    face = small(frame)
    face[:, :, :10] -= 90
    narrow = region()
    narrow.mask[:, : 12 * 3] = 0
    face[:, 48:56, 26:38] = 130
    ours = shown(frame, face, narrow)[160:172, 105:125].float().mean(dim=(0, 1))
    assert float((ours - 130).abs().max()) < 4


def test_teeth_do_not_get_the_skins_tint() -> None:
    frame = scene()
    face = small(frame) + torch.tensor([-20.0, 0.0, 25.0])[:, None, None]
    face[:, 49:55, 27:37] = 245
    ours = shown(frame, face)[10 + 51 * 3 : 10 + 53 * 3, 20 + 30 * 3 : 20 + 34 * 3].float().mean(dim=(0, 1))
    assert float(ours.min()) > 235


def slant(soft: float) -> torch.Tensor:
    """A drawing (3, SIDE, SIDE): light skin, and a dark mouth whose slanting edge takes a few cells."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    mouth = torch.sigmoid((y - 50 - 0.3 * (x - 32)) / soft) * ((x - 32).abs() < 10) * (y < 58)
    return (200 - 110 * mouth).expand(3, -1, -1)


def test_an_enlarged_drawing_is_steeper_but_keeps_its_range() -> None:
    frame = torch.full((240, 240, 3), 200, dtype=torch.uint8)
    face = torch.full((3, SIDE, SIDE), 200.0)
    face[:, 50:, 28:36] = 90
    face[:, 49, 28:36] = 160  # the decoder's soft edge
    for drawing, gain in ((face, 1.2), (slant(1.0), 1.25)):
        official, ours = frame.clone(), shown(frame, drawing)
        blend.paste(official.unbind(-1), drawing.to(torch.uint8), BOX, region())
        steep, steeper = (float((x[140:178, 106:126].float().diff(dim=0)).abs().max()) for x in (official, ours))
        assert steeper > gain * steep
        assert int(ours[130:190, 106:126].min()) >= 89
        assert int(ours[130:190, 106:126].max()) <= 201


def test_a_slanting_edge_has_no_stairs() -> None:
    """Where the level is crossed half way, in each column: on a straight line."""
    ours = shown(torch.full((240, 240, 3), 200, dtype=torch.uint8), slant(0.5))[130:180, 98:134, 0].float()
    below = (ours < 145).float().argmax(dim=0)
    above, under = (ours.gather(0, (below - k)[None])[0] for k in (1, 0))
    crossed = below - 1 + (above - 145) / (above - under)
    at = torch.arange(len(crossed)).float()
    centred = at - at.mean()
    line = crossed.mean() + centred * (crossed * centred).sum() / centred.square().sum()
    assert float((crossed - line).abs().max()) < 0.2


def test_a_moustache_called_a_mouth_is_the_sources() -> None:
    """Strands that the network draws as a smear, under labels of lips: both agree but for the strands."""
    frame = scene(grain=0)
    frame[148:166, 86:146:4] -= 50
    frame[148:166, 87:146:4] -= 50
    smear = F.avg_pool2d(F.pad(small(frame)[None], (3, 3, 1, 1), mode="replicate"), (3, 7), 1)[0]
    apart = (shown(frame, smear)[152:162, 96:136].float() - frame[152:162, 96:136].float()).abs()
    assert float(apart.mean()) < 4


def test_a_drawing_that_wavers_around_the_lips_makes_no_flicker() -> None:
    """The network is never quite still; where nothing moves, nothing may move in the film."""
    frame = scene(grain=2)
    waves = 4 * torch.sin(torch.arange(SIDE) * 0.8)[None, :, None] * torch.sin(torch.arange(SIDE) * 0.7)
    first, second = (shown(frame, small(frame) + sign * waves)[140:196, 70:170].float() for sign in (1, -1))
    assert float((first - second).abs().mean()) < 0.8


def test_a_jaw_that_moves_far_from_the_mouth_is_the_drawings() -> None:
    frame = scene(grain=4)
    face = small(frame)
    face[:, 52:, 8:16] += torch.tensor([60.0, 90.0, 80.0])[:, None, None]
    moved = (shown(frame, face)[172:196, 50:62].float() - frame[172:196, 50:62].float()).mean()
    assert float(moved) > 55


def test_teeth_have_no_pores() -> None:
    frame = scene(grain=12)
    face = small(frame)
    face[:, 49:55, 27:37] = 245
    teeth = shown(frame, face)[10 + 51 * 3 : 10 + 53 * 3, 20 + 30 * 3 : 20 + 34 * 3].float()
    assert float(teeth.std()) < 3


def test_a_beard_called_a_mouth_is_not_all_drawn() -> None:
    """A parser may label a whole beard as lips."""
    face = 64.0, 32.0, 448.0, 416.0
    labels = torch.zeros(512, 512, dtype=torch.uint8)
    labels[256:420, 64:448] = 12
    found = lips_map(labels, face)
    assert not (found[:, : LIPS // 12] > 5).any()
    assert not found[: LIPS // 2].any()
    assert (found[LIPS * 3 // 4, LIPS // 3 : LIPS * 2 // 3] > 200).all()


def test_a_face_smaller_than_the_networks_grid_gets_its_grain_too() -> None:
    """Its grid loses nothing of such a face, but the drawing does: flat lips would lie in grainy skin."""
    frame = scene(grain=8)
    box = Box(60, 60, 60 + SIDE, 60 + SIDE)
    area = Box(60, 92, 60 + SIDE, 60 + SIDE)
    face = torch.full((3, SIDE, SIDE), 130, dtype=torch.uint8)
    face[:, 44:60, 20:44] -= 45  # shown, since it is not the source's
    mask = torch.full((area.height, area.width), 255, dtype=torch.uint8)
    natural(frame.unbind(-1), face, Place.of(box), Region(area, mask), lips())
    drawn = frame[60 + 48 : 60 + 56, 60 + 26 : 60 + 38].float()
    assert float(drawn.std(dim=(0, 1)).mean()) > 3


def dark(brightest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A dark skin of levels around 40 with a patch of the brightest level beside the mouth's rows, and a drawing with teeth."""
    frame = (scene(grain=3).float() * 0.3).to(torch.uint8)
    frame[40:60, 60:90] = brightest
    face = small(frame)
    face[:, 48:54, 27:37] = 220
    return frame, face


def test_teeth_do_not_glow_in_a_dark_picture() -> None:
    """Networks draw teeth as in daylight; nothing around the face is brighter than 70 levels."""
    frame, face = dark(70)
    ours = shown(frame, face)
    teeth = ours[10 + 49 * 3 : 10 + 53 * 3, 20 + 29 * 3 : 20 + 35 * 3].float()
    assert 55 < float(teeth.mean()) < 80
    assert float((ours[112:140, 34:64].float() - frame[112:140, 34:64].float()).abs().mean()) < 1.5, "skin stays the source's"


def test_dark_skin_in_daylight_keeps_white_teeth() -> None:
    frame, face = dark(235)
    teeth = shown(frame, face)[10 + 49 * 3 : 10 + 53 * 3, 20 + 29 * 3 : 20 + 35 * 3].float()
    assert float(teeth.mean()) > 205
