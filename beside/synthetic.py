"""The embedded default: short clips, drawn on the fly, in which an action cannot be told from how its actor looks.

1 to 3 jointed figures on a moving texture. A figure carries up to three labels at once, one of each group at most,
drawn independently of one another and of its size, colours, place and path:

    own motion (jump, march, sway): told by the figure's movement; it may as well stand still in any of these poses;
    detail (hold ball, hold rod, hold hoop): told by a few pixels in the hand of an arm that is bent without them too;
    context (watch cone, watch disc, meet): told by what the stretched arm points at, further away than the figure's box
        is wide; it may as well point at nothing, past other cones, discs and figures.

The third group is not in the crop of the figure's box. Every pointing actor has its partner (the cone, the disc, the
figure it meets, or nothing) at a place drawn from one distribution whatever the partner is, and both ends keep the same
distances from everything else. `describe` gives a scene in numbers, `draw` its pixels; both follow from (split, seed,
index) alone.
Not in the paper: it is what lets its claims be seen within minutes.
"""
# T frames, H height, W width, N actors present in some frame, C classes; positions are complex, x + iy in pixels

import numpy as np
import torch
from PIL import Image, ImageDraw

CLASS_NAMES = ["jump", "march", "sway", "hold ball", "hold rod", "hold hoop", "watch cone", "watch disc", "meet"]
CLASS_GROUPS = {"own motion": [0, 1, 2], "detail": [3, 4, 5], "context": [6, 7, 8]}
JUMP, MARCH, SWAY, BALL, ROD, HOOP, CONE, DISC, MEET = range(9)
SPLITS = ("train", "val")
LENGTHS = {"train": 100_000, "val": 320}
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))    # of ImageNet, as for the real data sets
NORMALISED = ((np.arange(256)[:, None] / 255 - MEAN) / STD).T.astype(np.float32)    # (3, 256)

SEPARATION = 27.0       # degrees between a pointing actor's partner and everything else that it could point at
BACK_SEPARATION = 10.0  # the same from the partner's end
NEAREST, FURTHEST = 33.0, 62.0      # |dx| and distance of an actor and its partner
CLEARANCE = 16.0        # between any two of actors and things, sideways (heights count 1 / sqrt 2)
EDGE = 11.0             # from the upper and lower edge
COSINES = np.cos(np.deg2rad([SEPARATION, BACK_SEPARATION] * 2))     # for the ends of two pairs
ACTING = 0.72           # share of the actors with a class of a group
MEETING = 0.3         # share of the clips of two or three actors with a meeting
POINTING = (0.32, 0.32, 0.14)        # the other actors' shares pointing at a cone, a disc, nothing
HELD_RADIUS = {BALL: 3.8, HOOP: 5.2}
RADII = {"hip": 1.5, "shoulder": 1.5, "pointing hand": 1.5, "elbow": 1.25, "hand": 1.25,    # limbs' half thickness
         "knee left": 1.25, "knee right": 1.25, "foot left": 1.25, "foot right": 1.25}
WORLD = HEIGHT, WIDTH = 64, 96      # of a scene in its own pixels; other sizes of frames show the same, resized
SCALE = 2               # a scene is drawn this much larger and reduced


def interval(rng, frames):
    """First and last + 1 frame of an action: the whole clip or a part of it, evenly."""
    if rng.random() < 0.5:
        return 0, frames
    length = int(rng.integers(frames // 2, frames))
    start = int(rng.integers(0, frames - length + 1))
    return start, start + length


def closer_than(cosine, origin, one, other):
    """Is the cosine of the angle at `origin` between `one` and `other` above `cosine`? Complex arrays, broadcast."""
    to_one, to_other = one - origin, other - origin
    return (to_one.conj() * to_other).real > cosine * np.abs(to_one) * np.abs(to_other)


def within(points, across, down):
    """Are complex points in the frame, that far from its sides and from its upper and lower edge?"""
    x, y = points.real, points.imag
    return (x > across) & (x < WIDTH - across) & (y > down) & (y < HEIGHT - down)


def square(middle, radius):
    """x1, y1, x2, y2 of the square around complex points."""
    return middle.real - radius, middle.imag - radius, middle.real + radius, middle.imag + radius


def candidate_paths(rng, count, margin):
    """Straight paths, as positions at the clip's two ends: (count, 2) complex. A fifth of them is fast."""
    u = rng.random((5, count), np.float32) - np.float32(0.5)
    step = (u[2] + 1j * u[3]) * np.where(u[4] < 0.3, np.float32(4), np.float32(30))
    middle = WIDTH / 2 + u[0] * (WIDTH + 2 * margin) + 1j * (HEIGHT / 2 + u[1] * (HEIGHT - 2 * EDGE))
    return np.stack((middle - step, middle + step), 1)                                            # (count, 2)


def try_layout(rng, spans, loose):
    """Paths of `len(spans)` pairs (the actor, then its partner) and of `loose` others, or None where a draw fails.

    spans: the share of the clip, (start, end) in [0, 1], in which both ends of a pair have to be in the frame.
    Returns (2 * len(spans) + loose, 2) complex: positions at the clip's two ends.
    """
    placed = np.zeros((0, 2), complex)
    for span in [*spans, *[None] * loose]:
        if span:
            new = candidate_paths(rng, 512 if len(placed) else 128, 0).reshape(-1, 2, 2)              # (K, 2, 2)
            gap = new[:, 1] - new[:, 0]
            new = new[((np.abs(gap.real) > NEAREST) & (np.abs(gap) < FURTHEST)).all(-1)]
            inside = within(new[..., :1] + (new[..., 1:] - new[..., :1]) * np.array(span), 5, EDGE)       # (K, 2, 2)
            new = new[inside.all((1, 2))]
        else:
            new = candidate_paths(rng, 48, 6)[:, None]                                              # (K, 1, 2)
        fits = np.ones(len(new), bool)
        if len(placed):
            gap = new[:, :, None] - placed                                                        # (K, 1 or 2, P, 2)
            new = new[(gap.real ** 2 + gap.imag ** 2 / 2 > CLEARANCE ** 2).all((1, 2, 3))]
            origins = placed[:2 * len(spans)]        # of the pairs placed, each from both of its ends
            aims = origins.reshape(-1, 2, 2)[:, ::-1].reshape(-1, 2)
            fits = ~closer_than(COSINES[:len(origins), None], origins, aims, new[:, :, None]).any((1, 2, 3))
            if span:
                there = new[:, ::-1, None]                                                        # (K, 2, 1, 2)
                fits &= ~closer_than(COSINES[:2, None, None], new[:, :, None], there, placed).any((1, 2, 3))
        if not fits.any():
            return None
        placed = np.concatenate((placed, new[np.argmax(fits)]))
    return placed


def contrasting(rng, *others):
    """A colour that differs from all the others."""
    colours = rng.integers(70, 256, (12, 3))
    difference = np.abs(colours[:, None] - np.array(others)[None]).sum(-1).min(-1)                # (12,)
    return tuple(colours[np.argmax(np.minimum(difference, 210))].tolist())


def cast(rng):
    """Who is in a clip, before anything is placed: the number of actors, [(actor, partner)] and the loose things.

    A partner is "cone", "disc", "nothing" or the number of the actor that is met.
    """
    count = int(rng.choice(3, p=(0.2, 0.4, 0.4))) + 1
    order = rng.permutation(count).tolist()
    pairs = []
    if count > 1 and rng.random() < MEETING:
        pairs.append((order.pop(), order.pop()))
    for actor in order:
        choice = int(np.searchsorted(np.cumsum(POINTING), rng.random()))
        if choice < 3 and len(pairs) < 2:
            pairs.append((actor, ("cone", "disc", "nothing")[choice]))
    things = [kind for kind in ("cone", "disc") if kind not in dict(pairs).values()]    # one of each, where there is room
    if rng.random() < 0.5:
        things.append(("cone", "disc")[int(rng.integers(2))])
    return count, pairs, things


def wave(rng, frames, start):
    """The course of a periodic motion, near +-1 most of the time and never near 0 when it starts: (T,)."""
    period = rng.uniform(3.6, 5.2)
    phase = rng.uniform(-0.7, 0.7) + np.pi * rng.integers(2)
    swing = np.cos(phase + 2 * np.pi * (np.arange(frames) - start) / period)
    return np.sign(swing) * np.abs(swing) ** 0.6


def new_actor(rng, frames, background):
    """An actor's looks, pose and labels of the first two groups; none depends on another."""
    tall = rng.uniform(24, 36)
    skin = contrasting(rng, background)
    actor = {
        "height": tall, "skin": skin, "shirt": contrasting(rng, background, skin),
        "trousers": contrasting(rng, background, skin), "colour": contrasting(rng, background, skin),
        "side": 1 - 2 * int(rng.integers(2)), "lean": (0.0, 0.0, 0.0, -0.33, 0.33)[int(rng.integers(5))],
        "stance": rng.uniform(0.07, 0.17) * tall, "lifted": (0, 0, 0, -1, 1)[int(rng.integers(5))],
        "bend": rng.uniform(-0.35, 0.35), "rod": 8.5j * np.exp(1j * rng.uniform(-0.7, 0.7)), "labels": {}, "intervals": {}}
    for group in ("own motion", "detail"):
        actor["labels"][group] = CLASS_GROUPS[group][int(rng.integers(3))] if rng.random() < ACTING else None
        actor["intervals"][group] = interval(rng, frames)
    actor["wave"] = wave(rng, frames, actor["intervals"]["own motion"][0])
    actor["amplitude"] = rng.uniform(0.9, 1.2)
    return actor


def pose(actor, targets):
    """Adds the joints in every frame, {name: (T,) complex}, and the direction of the stretched arm (NaN: it hangs)."""
    tall, path = actor["height"], actor["path"]
    motion, moving = actor["labels"]["own motion"], shown(actor, "own motion")
    swing = actor["wave"] * actor["amplitude"] * moving
    body = path - 1j * swing * 5.5 * (motion == JUMP)
    lift = np.where(moving & (motion == MARCH), swing, -actor["lifted"])     # (T,): above 0 the left foot, below the right
    lean = np.clip(actor["lean"] + swing * 0.55 * (motion == SWAY), -0.65, 0.65)
    radius = 0.1 * tall
    hip = body + 0.06j * tall
    trunk = np.exp(1j * lean)
    up = -1j * (0.56 * tall)                                 # from the hip to the crown
    shoulder_up = up + 1j * (2 * radius + 1.5)
    joints = {"hip": hip, "head": hip + trunk * (up + 1j * radius), "shoulder": hip + trunk * shoulder_up}
    for name, sign in (("left", -1), ("right", 1)):
        raised = np.maximum(-sign * lift, 0)
        foot = hip + sign * actor["stance"] + 0.44j * tall - 0.28j * tall * raised
        joints["foot " + name] = foot
        joints["knee " + name] = (hip + foot) / 2 + sign * (0.4 + 0.13 * tall * raised)
    resting = path + 0.06j * tall + shoulder_up              # it follows nobody's motion, which would tell a meeting
    direction = np.full(len(path), np.nan)
    if targets is not None:
        pointing = slice(*actor["intervals"]["context"])
        direction[pointing] = np.angle(targets - resting)[pointing]
    side, reach = actor["side"], 6.5 + 0.15 * tall
    arm = np.where(np.isnan(direction), np.pi / 2 + side * 0.25, direction)
    joints["pointing hand"] = joints["shoulder"] + reach * np.exp(1j * arm)
    joints["elbow"] = joints["shoulder"] + (side * 5 + 2j) * tall / 30
    joints["hand"] = joints["elbow"] + np.exp(1j * side * actor["bend"]) * (side * 6 - 4.5j) * tall / 30
    actor.update(joints=joints, direction=direction, radius=radius)


def shown(actor, group):
    """(T,) bool: the frames in which the group's action is carried out."""
    shown = np.zeros(len(actor["path"]), bool)
    if actor["labels"][group] is not None:
        shown[slice(*actor["intervals"][group])] = True
    return shown


def outlines(actor):
    """Extent of what is drawn, (T, 4) x1, y1, x2, y2 in pixels, not cut to the frame."""
    joints, held, label = actor["joints"], shown(actor, "detail"), actor["labels"]["detail"]
    circles = [(joints[name], radius) for name, radius in RADII.items()] + [(joints["head"], actor["radius"])]
    if label == ROD:
        circles += [(joints["hand"] + np.where(held, end, 0), 1.25) for end in (actor["rod"], -actor["rod"])]
    elif label is not None:
        circles.append((joints["hand"], held * HELD_RADIUS[label]))
    points = np.array([point for point, _ in circles])                                            # (10 to 12, T)
    x1, y1, x2, y2 = square(points, np.array([np.full(len(held), radius) for _, radius in circles]))
    return np.stack((x1.min(0), y1.min(0), x2.max(0), y2.max(0)), -1)                             # (T, 4)


def visibility(scene):
    """Adds to actors and things their boxes cut to the frame, (T, 4), and where they are present, (T,) bool."""
    pillar = scene["pillar"]
    for one in scene["actors"] + scene["things"]:
        if "joints" in one:
            whole, points = outlines(one), np.stack(list(one["joints"].values()))                 # (T, 4), (10, T)
        else:
            whole = np.stack(square(one["path"], one["radius"]), -1)                              # (T, 4)
            points = one["path"] + np.array((-0.8, -0.4, 0, 0.4, 0.8))[:, None] * one["radius"]   # (5, T)
        one["box"] = np.clip(whole, 0, (WIDTH, HEIGHT) * 2)
        area, inside = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (whole, one["box"]))
        hidden = np.zeros(points.shape, bool)
        if pillar:
            hidden |= np.abs(points.real - pillar["x"]) < pillar["width"] / 2
        for nearer in scene["actors"]:
            if nearer["depth"] > one["depth"]:
                gap = points - nearer["path"]
                hidden |= (np.abs(gap.real) < 0.12 * nearer["height"]) & (np.abs(gap.imag) < 0.5 * nearer["height"])
        one["present"] = (inside / area > 0.5) & (hidden.mean(0) < 0.7)


def place_pillar(rng, background, ends):
    """A pillar before everything, in a third of the clips, that hides no pointing pair's arm: `ends`, their paths."""
    width, places = rng.uniform(6, 10), rng.uniform(4, WIDTH - 4, 6)
    for x in places[:6 if rng.random() < 0.35 else 0]:
        if all((np.abs(path.real - x) > width / 2 + 9).all() for path in ends):
            return {"x": x, "width": width, "colour": contrasting(rng, background)}
    return None


def describe(config, split, seed, index):
    """The scene of a clip without its pixels, a plain dict: actors, things, pillar, background.

    Of an actor: height, colours and pose; path and joints (T,) complex; labels {group: class id or None} and their
    intervals; partner ("actors" or "things", number) or None; direction (T,) of the stretched arm, radians, NaN where
    it hangs; box (T, 4) x1, y1, x2, y2, present (T,); seen (T, C) 0/1, the labels; cause (T, 4), NaN without one.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    frames = config.frames
    count, pairs, loose_things = cast(rng)
    spans = [interval(rng, frames) for _ in pairs]
    ends = [end for pair in pairs for end in pair]
    loose = [actor for actor in range(count) if actor not in ends] + loose_things
    ends += loose[:5 - 2 * len(pairs)]                       # more find no room
    shares = [(start / (frames - 1), (stop - 1) / (frames - 1)) for start, stop in spans]
    while (layout := try_layout(rng, shares, len(ends) - 2 * len(pairs))) is None:
        pass                                                 # 2.4 tries on average, 45 at most in 4,000 clips
    paths = list(layout[:, :1] + np.diff(layout) * np.linspace(0, 1, frames))                     # each (T,)
    background = tuple(rng.integers(20, 100, 3).tolist())
    actors, things = [new_actor(rng, frames, background) for _ in range(count)], []
    scene = {"frames": frames, "background": background, "actors": actors, "things": things}
    for end, path in zip(ends, paths):
        if isinstance(end, int):
            actors[end]["path"] = path
        elif end != "nothing":
            things.append({"kind": end, "path": path, "radius": rng.uniform(4.5, 6), "colour": contrasting(rng, background)})
    for depth, one in zip(rng.permutation(len(ends)).tolist(), actors + things):
        one["depth"] = depth
    aim(scene, pairs, paths, spans)
    scene["pillar"] = place_pillar(rng, background, paths[:2 * len(pairs)])
    scene["texture"] = int(rng.integers(2 ** 31))
    visibility(scene)
    labelling(scene)
    return scene


def aim(scene, pairs, paths, spans):
    """Gives every actor its partner and its label of the third group, and poses it."""
    partners = {}
    for (actor, partner), here, there, span in zip(pairs, paths[::2], paths[1::2], spans):
        partners |= {actor: (partner, there, span), partner: (actor, here, span)}     # that of a thing serves nobody
    for number, actor in enumerate(scene["actors"]):
        partner, target, span = partners.get(number, (None, None, (0, 0)))
        label = MEET if isinstance(partner, int) else {"cone": CONE, "disc": DISC}.get(partner)
        actor["labels"]["context"], actor["intervals"]["context"], actor["partner"] = label, span, None
        if label == MEET:
            actor["partner"] = ("actors", partner)
        elif label is not None:
            actor["partner"] = ("things", [thing["path"] is target for thing in scene["things"]].index(True))
        if target is not None:
            actor["side"] = -1 if target.real.mean() > actor["path"].real.mean() else 1   # the arms do not cross
        pose(actor, target)


def out_of_reach(box, other):
    """Where are boxes (T, 4) disjoint and their centres further apart than either is wide? (T,) bool."""
    gap = np.maximum(other[:, :2] - box[:, 2:], box[:, :2] - other[:, 2:]).max(-1)
    apart = np.hypot(*((box[:, :2] + box[:, 2:] - other[:, :2] - other[:, 2:]) / 2).T)
    return (gap > 0) & (apart > np.maximum(box[:, 2] - box[:, 0], other[:, 2] - other[:, 0]))


def labelling(scene):
    """Adds to every actor its labels where they can be seen and the box of its context's cause."""
    for actor in scene["actors"]:
        actor["seen"] = np.zeros((len(actor["path"]), len(CLASS_NAMES)), np.float32)
        actor["cause"] = np.full((len(actor["path"]), 4), np.nan)
        for group, label in actor["labels"].items():
            if label is None:
                continue
            seen = shown(actor, group) & actor["present"]
            if group == "detail":
                hand = actor["joints"]["hand"]
                seen &= within(hand, 2, 2)
                if scene["pillar"]:
                    seen &= np.abs(hand.real - scene["pillar"]["x"]) > scene["pillar"]["width"] / 2 + 1
            if group == "context":
                kind, number = actor["partner"]
                cause = scene[kind][number]
                seen &= cause["present"] & out_of_reach(actor["box"], cause["box"])
                actor["cause"] = np.where(seen[:, None], cause["box"], np.nan)
            actor["seen"][:, label] = seen


def moving_background(scene, frames):
    """T images of a smooth texture that slides behind the scene, SCALE times the frames' size."""
    rng = np.random.default_rng(scene["texture"])
    height, width = (SCALE * side for side in WORLD)
    slack = 16 * SCALE
    cells = (int(rng.integers(4, 12)), int(rng.integers(5, 16)), 3)
    coarse = rng.integers(-20, 21, cells) + np.array(scene["background"])
    texture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    texture = texture.resize((width + slack, height + slack), Image.Resampling.BICUBIC)
    corners = np.linspace(rng.uniform(0, slack, 2), rng.uniform(0, slack, 2), frames).astype(int).tolist()   # (T, 2)
    return [texture.crop((x, y, x + width, y + height)) for x, y in corners]


def draw_thing(canvas, thing, frame):
    middle = SCALE * thing["path"][frame]
    x1, y1, x2, y2 = square(middle, SCALE * thing["radius"])
    if thing["kind"] == "disc":
        canvas.ellipse((x1, y1, x2, y2), fill=thing["colour"])
    else:
        canvas.polygon((middle.real, y1, x2, y2, x1, y2), fill=thing["colour"])


def draw_actor(canvas, actor, frame):
    points = {name: SCALE * path[frame] for name, path in actor["joints"].items()}
    joints = {name: (point.real, point.imag) for name, point in points.items()}
    skin = actor["skin"]
    for side in ("left", "right"):
        canvas.line((joints["hip"], joints["knee " + side], joints["foot " + side]), actor["trousers"], round(2.5 * SCALE))
    canvas.line((joints["hip"], joints["shoulder"]), actor["shirt"], round(0.15 * actor["height"] * SCALE))
    canvas.line((joints["shoulder"], joints["elbow"], joints["hand"]), skin, round(2.5 * SCALE))
    canvas.line((joints["shoulder"], joints["pointing hand"]), skin, 3 * SCALE)
    canvas.ellipse(square(points["head"], SCALE * actor["radius"]), fill=skin)
    if shown(actor, "detail")[frame]:
        (x, y), label, colour = joints["hand"], actor["labels"]["detail"], actor["colour"]
        if label == ROD:
            rod = SCALE * actor["rod"]
            canvas.line((x - rod.real, y - rod.imag, x + rod.real, y + rod.imag), colour, round(2.5 * SCALE))
        else:
            style = {"fill": colour} if label == BALL else {"outline": colour, "width": 2 * SCALE}
            canvas.ellipse(square(points["hand"], SCALE * HELD_RADIUS[label]), **style)


def draw(scene, size=WORLD):
    """The scene's pixels: (T, H, W, 3) uint8."""
    images = moving_background(scene, scene["frames"])
    order = sorted(scene["actors"] + scene["things"], key=lambda one: one["depth"])
    pillar = scene["pillar"]
    for frame, image in enumerate(images):
        canvas = ImageDraw.Draw(image)
        for one in order:
            (draw_thing if "kind" in one else draw_actor)(canvas, one, frame)
        if pillar:
            left, right = (SCALE * (pillar["x"] + side * pillar["width"] / 2) for side in (-1, 1))
            canvas.rectangle((left, -1, right, SCALE * HEIGHT), fill=pillar["colour"])
    return np.stack([image.reduce(SCALE) if size == WORLD else image.resize(size[::-1], Image.Resampling.BILINEAR)
                     for image in images])                                                        # (T, H, W, 3)


def to_target(scene, video, size=WORLD):
    """The data sets' target dict; besides `cause` (N, T, 4), cx, cy, w, h of the context's cause, NaN without one."""
    frames = scene["frames"]
    actors = [actor for actor in scene["actors"] if actor["present"].any()]

    def relative(boxes):      # (N, T, 4) x1, y1, x2, y2 pixels -> cx, cy, w, h in [0, 1]
        boxes = np.array(boxes, np.float64).reshape(-1, frames, 4) / ((WIDTH, HEIGHT) * 2)
        low, high = boxes[..., :2], boxes[..., 2:]
        return torch.from_numpy(np.concatenate(((low + high) / 2, high - low), -1)).float()       # (N, T, 4)

    present = np.array([actor["present"] for actor in actors], bool).reshape(-1, frames)           # (N, T)
    labels = np.array([actor["seen"] for actor in actors], np.float32).reshape(-1, frames, len(CLASS_NAMES))    # (N, T, C)
    return {"boxes": relative([np.where(actor["present"][:, None], actor["box"], 0) for actor in actors]),
            "present": torch.from_numpy(present), "labels": torch.from_numpy(labels),
            "frames": torch.ones(frames, dtype=torch.bool), "video": video, "frame_ids": torch.arange(1, frames + 1),
            "size": torch.tensor(size), "cause": relative([actor["cause"] for actor in actors])}


class SyntheticDataset(torch.utils.data.Dataset):
    """Clips drawn when they are asked for; `ds[i]` -> (clip (3, T, H, W) normalised, target), like the real data sets.

    config: frames, test_size (H; W is 1.5 H), and with `train` (None: in the training split) flip and permute_colours, drawn
    like the scene from split, seed and index: a run meets a clip once. `scene(i)` is what is drawn before a flip.
    ValueError for an unknown split, fewer than 4 frames or a Config of key frames.
    """

    def __init__(self, config, split, seed=0, length=None, train=None):
        if split not in SPLITS:
            raise ValueError(f"synthetic: unknown split {split!r}; there are: {', '.join(SPLITS)}")
        if config.frames < 4 or config.key_frame:
            raise ValueError(f"synthetic: frames={config.frames} is too short for an action, or key_frame=True was set: it has "
                             "none; take --set frames=8 key_frame=False")
        self.config, self.split, self.seed, self.train = config, split, seed, split == "train" if train is None else train
        self.size = (config.test_size, config.test_size * 3 // 2)
        self.name, self.class_names, self.class_groups = "synthetic", CLASS_NAMES, CLASS_GROUPS
        self.videos = [f"{split}-{seed}-{index:06d}" for index in range(LENGTHS[split] if length is None else length)]

    def __len__(self):
        return len(self.videos)

    def scene(self, index):
        """What a clip is drawn from, see `describe`."""
        return describe(self.config, self.split, self.seed, range(len(self))[index])

    def __getitem__(self, index):
        scene = self.scene(index)
        clip, target = draw(scene, self.size), to_target(scene, self.videos[index], self.size)
        if self.train:
            rng = np.random.default_rng([self.seed, SPLITS.index(self.split), range(len(self))[index], 1])
            if rng.random() < self.config.flip:
                clip = clip[:, :, ::-1]
                for boxes in (target["boxes"], target["cause"]):
                    boxes[..., 0] = 1 - boxes[..., 0]
            if self.config.permute_colours:
                clip = clip[..., rng.permutation(3)]
        clip = np.stack([NORMALISED[channel][clip[..., channel]] for channel in range(3)])        # (3, T, H, W)
        return torch.from_numpy(clip), target

    def ground_truth(self):
        """(frames, tubes) as metrics.py takes them: a row a frame and label, a tube a run of frames with one label.

        Boxes x1, y1, x2, y2 in pixels of the frames as they are, (H, W) = target["size"].
        """
        tubes, rows = [], [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)))]
        scale = np.array(self.size[::-1] * 2) / np.array(WORLD[::-1] * 2)
        for video in range(len(self)):
            for actor in self.scene(video)["actors"]:
                for label in range(len(CLASS_NAMES)):
                    on = np.flatnonzero(actor["seen"][:, label])
                    for run in np.split(on, np.flatnonzero(np.diff(on) > 1) + 1) if len(on) else []:
                        boxes = actor["box"][run] * scale
                        tubes.append({"video": video, "label": label, "frames": run + 1, "boxes": boxes})
                        rows.append((video * 1_000_000 + run + 1, np.full(len(run), label), boxes))
        return dict(zip(("frame", "label", "box"), map(np.concatenate, zip(*rows)))), tubes
