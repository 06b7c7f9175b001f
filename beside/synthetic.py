"""The embedded default: short clips, drawn on the fly, in which looks do not tell an action.

1 to 3 jointed figures on a moving texture. A figure carries up to three labels at once, at most one
of each group, drawn independently of one another and of its size, colours, place and path:

    own motion (jump, march, sway): told by the figure's movement; without one it may stand still in
        any of these poses;
    detail (hold ball, hold rod, hold hoop): told by a few pixels in the hand of an arm that is bent
        without them too;
    context (watch cone, watch disc, meet): told by what the stretched arm points at, further away
        than the figure's box is wide; it may as well point at nothing, past other cones, discs and
        figures.

The third group is not in the crop of the figure's box. Every pointing actor has its partner (the
cone, the disc, the figure it meets, or nothing) at a place drawn from one distribution whatever the
partner is, and both ends keep the same distances from everything else. `describe` gives a scene in
numbers, `draw` its pixels; both follow from (split, seed, index) alone.
Not in the paper: it is what lets its claims be seen within minutes.
"""
# T frames, H height, W width, N actors present in some frame, C classes, K candidates, P placed
# positions are complex, x + iy in pixels; a path is straight and given by its two ends

import numpy as np
import torch
from PIL import Image, ImageDraw

CLASS_NAMES = ["jump", "march", "sway", "hold ball", "hold rod", "hold hoop",
               "watch cone", "watch disc", "meet"]
CLASS_GROUPS = {"own motion": [0, 1, 2], "detail": [3, 4, 5], "context": [6, 7, 8]}
JUMP, MARCH, SWAY, BALL, ROD, HOOP, CONE, DISC, MEET = range(9)
SPLITS = ("train", "val")
LENGTHS = {"train": 100_000, "val": 320}

SEPARATION = 27.0       # degrees between a partner and all else that its actor could point at
BACK_SEPARATION = 10.0  # the same from the partner's end
COSINES = np.cos(np.deg2rad([SEPARATION, BACK_SEPARATION] * 2))    # for the ends of two pairs
NEAREST = 33.0          # |dx| of an actor and its partner, at least
FURTHEST = 62.0         # their distance, at most
CLEARANCE = 16.0        # between any two of actors and things, sideways (heights count 1 / sqrt 2)
EDGE = 11.0             # from the upper and lower edge
ACTING = 0.72           # share of the actors with a class of a group
MEETING = 0.3           # share of the clips of two or three actors with a meeting
POINTING = (0.32, 0.32, 0.14)    # shares of the other actors that point at a cone, a disc, nothing
HELD_RADIUS = {BALL: 3.8, HOOP: 5.2}
RADII = {"hip": 1.5, "shoulder": 1.5, "pointing hand": 1.5, "elbow": 1.25, "hand": 1.25,
         "knee left": 1.25, "knee right": 1.25, "foot left": 1.25, "foot right": 1.25}
HEIGHT, WIDTH = 64, 96  # of a scene in its own pixels; frames of other sizes show the same, resized
WORLD = HEIGHT, WIDTH
SCALE = 2               # a scene is drawn this much larger and reduced


# ---- who and where ----

def interval(rng, frames):
    """First and last + 1 frame of an action: the whole clip or a part of it, equally often."""
    if rng.random() < 0.5:
        return 0, frames
    length = int(rng.integers(frames // 2, frames))
    start = int(rng.integers(0, frames - length + 1))
    return start, start + length


def closer_than(cosine, origin, one, other):
    """Is the angle at `origin` between `one` and `other` smaller than that of `cosine`?

    Complex arrays that broadcast.
    """
    to_one = one - origin
    to_other = other - origin
    return (to_one.conj() * to_other).real > cosine * np.abs(to_one) * np.abs(to_other)


def within(points, across, down):
    """Are complex points `across` away from the frame's sides and `down` from its other edges?"""
    x, y = points.real, points.imag
    return (x > across) & (x < WIDTH - across) & (y > down) & (y < HEIGHT - down)


def square(middle, radius):
    """x1, y1, x2, y2 of the square around complex points."""
    x, y = middle.real, middle.imag
    return x - radius, y - radius, x + radius, y + radius


def candidate_paths(rng, count, margin):
    """Straight paths as (count, 2) complex, the clip's two ends. A fifth of them is fast."""
    u = rng.random((5, count), np.float32) - np.float32(0.5)
    step = (u[2] + 1j * u[3]) * np.where(u[4] < 0.3, np.float32(4), np.float32(30))
    x = WIDTH / 2 + u[0] * (WIDTH + 2 * margin)
    y = HEIGHT / 2 + u[1] * (HEIGHT - 2 * EDGE)
    middle = x + 1j * y
    return np.stack((middle - step, middle + step), 1)                     # (count, 2)


def candidate_pairs(rng, count, span):
    """Paths of an actor and its partner, far enough apart and both in the frame during `span`.

    span: start and end in [0, 1] of the clip. Returns (K, 2, 2) complex: who, end of the clip.
    """
    pairs = candidate_paths(rng, count, 0).reshape(-1, 2, 2)               # (count / 2, 2, 2)
    gap = pairs[:, 1] - pairs[:, 0]                                        # (count / 2, 2)
    reachable = (np.abs(gap.real) > NEAREST) & (np.abs(gap) < FURTHEST)
    pairs = pairs[reachable.all(-1)]
    start, end = pairs[..., :1], pairs[..., 1:]                            # (K, 2, 1) each
    inside = within(start + (end - start) * np.array(span), 5, EDGE)       # (K, 2, 2)
    return pairs[inside.all((1, 2))]


def try_layout(rng, spans, loose):
    """Paths of `len(spans)` pairs (the actor, then its partner) and of `loose` others.

    spans: for each pair the share of the clip, (start, end) in [0, 1], in which both of its ends
    have to be in the frame. Returns (2 * len(spans) + loose, 2) complex, positions at the clip's
    two ends, or None where a draw fails.
    """
    placed = np.zeros((0, 2), complex)                                     # (P, 2)
    for number in range(len(spans) + loose):
        is_pair = number < len(spans)
        if is_pair:
            new = candidate_pairs(rng, 512 if len(placed) else 128, spans[number])    # (K, 2, 2)
        else:
            new = candidate_paths(rng, 48, 6)[:, None]                     # (K, 1, 2)
        gap = new[:, :, None] - placed                                     # (K, 1 or 2, P, 2)
        clear = gap.real ** 2 + gap.imag ** 2 / 2 > CLEARANCE ** 2
        new = new[clear.all((1, 2, 3))]
        # Nothing new may stand where a pair that is placed looks, from either of its ends.
        origins = placed[:2 * len(spans)]
        aims = origins.reshape(-1, 2, 2)[:, ::-1].reshape(-1, 2)           # the other end of each
        cosines = COSINES[:len(origins), None]
        in_the_way = closer_than(cosines, origins, aims, new[:, :, None])  # (K, 1 or 2, P, 2)
        fits = ~in_the_way.any((1, 2, 3))                                  # (K,)
        if is_pair:                                # nor anything placed where the new pair looks
            there = new[:, ::-1, None]                                     # (K, 2, 1, 2)
            in_its_way = closer_than(COSINES[:2, None, None], new[:, :, None], there, placed)
            fits &= ~in_its_way.any((1, 2, 3))
        if not fits.any():
            return None
        placed = np.concatenate((placed, new[np.argmax(fits)]))
    return placed


def contrasting(rng, *others):
    """A colour that differs from all the others."""
    colours = rng.integers(70, 256, (12, 3))
    difference = np.abs(colours[:, None] - np.array(others)[None]).sum(-1).min(-1)    # (12,)
    return tuple(colours[np.argmax(np.minimum(difference, 210))].tolist())


def cast(rng):
    """Who is in a clip, before anything is placed: number of actors, pairs and loose things.

    pairs: [(actor, partner)]; a partner is "cone", "disc", "nothing" or the number of the actor
    that is met.
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
    partners = [partner for _, partner in pairs]
    things = [kind for kind in ("cone", "disc") if kind not in partners]    # one of each, if room
    if rng.random() < 0.5:
        things.append(("cone", "disc")[int(rng.integers(2))])
    return count, pairs, things


# ---- an actor ----

def wave(rng, frames, start):
    """The course of a periodic motion, (T,): mostly near +-1 and never near 0 when it starts."""
    period = rng.uniform(3.6, 5.2)
    phase = rng.uniform(-0.7, 0.7) + np.pi * rng.integers(2)
    swing = np.cos(phase + 2 * np.pi * (np.arange(frames) - start) / period)
    return np.sign(swing) * np.abs(swing) ** 0.6


def new_actor(rng, frames, background):
    """An actor's looks, pose and labels of the first two groups; none depends on another."""
    tall = rng.uniform(24, 36)
    skin = contrasting(rng, background)
    actor = {
        "height": tall,
        "skin": skin,
        "shirt": contrasting(rng, background, skin),
        "trousers": contrasting(rng, background, skin),
        "colour": contrasting(rng, background, skin),    # of what is held
        "side": 1 - 2 * int(rng.integers(2)),            # of the bent arm
        "lean": (0.0, 0.0, 0.0, -0.33, 0.33)[int(rng.integers(5))],
        "stance": rng.uniform(0.07, 0.17) * tall,
        "lifted": (0, 0, 0, -1, 1)[int(rng.integers(5))],
        "bend": rng.uniform(-0.35, 0.35),
        "rod": 8.5j * np.exp(1j * rng.uniform(-0.7, 0.7)),
        "labels": {},
        "intervals": {},
    }
    for group in ("own motion", "detail"):
        acts = rng.random() < ACTING
        actor["labels"][group] = CLASS_GROUPS[group][int(rng.integers(3))] if acts else None
        actor["intervals"][group] = interval(rng, frames)
    actor["wave"] = wave(rng, frames, actor["intervals"]["own motion"][0])
    actor["amplitude"] = rng.uniform(0.9, 1.2)
    return actor


def shown(actor, group):
    """(T,) bool: the frames in which the group's action is carried out."""
    frames = np.zeros(len(actor["path"]), bool)
    if actor["labels"][group] is not None:
        frames[slice(*actor["intervals"][group])] = True
    return frames


def pose(actor, target):
    """Adds the joints in every frame, {name: (T,) complex}, the head's radius and `direction`.

    target (T,) complex: the path of what the arm points at during the context's interval, or None.
    direction (T,): of the stretched arm, radians; NaN where it hangs.
    """
    tall, path, side = actor["height"], actor["path"], actor["side"]
    motion, moving = actor["labels"]["own motion"], shown(actor, "own motion")
    swing = actor["wave"] * actor["amplitude"] * moving
    body = path - 1j * swing * 5.5 * (motion == JUMP)
    # (T,): the left foot is lifted where this is above 0, the right one where it is below
    lift = np.where(moving & (motion == MARCH), swing, -actor["lifted"])
    lean = np.clip(actor["lean"] + swing * 0.55 * (motion == SWAY), -0.65, 0.65)

    radius = 0.1 * tall
    hip = body + 0.06j * tall
    trunk = np.exp(1j * lean)
    crown = -1j * (0.56 * tall)                              # from the hip
    shoulder = crown + 1j * (2 * radius + 1.5)               # from the hip
    joints = {"hip": hip, "head": hip + trunk * (crown + 1j * radius),
              "shoulder": hip + trunk * shoulder}
    for name, sign in (("left", -1), ("right", 1)):
        raised = np.maximum(-sign * lift, 0)
        foot = hip + sign * actor["stance"] + 0.44j * tall - 0.28j * tall * raised
        joints["foot " + name] = foot
        joints["knee " + name] = (hip + foot) / 2 + sign * (0.4 + 0.13 * tall * raised)

    direction = np.full(len(path), np.nan)
    if target is not None:
        resting = path + 0.06j * tall + shoulder             # not `joints`: a motion that two
        # arms follow would tell a meeting
        pointing = slice(*actor["intervals"]["context"])
        direction[pointing] = np.angle(target - resting)[pointing]
    arm = np.where(np.isnan(direction), np.pi / 2 + side * 0.25, direction)
    joints["pointing hand"] = joints["shoulder"] + (6.5 + 0.15 * tall) * np.exp(1j * arm)
    joints["elbow"] = joints["shoulder"] + (side * 5 + 2j) * tall / 30
    forearm = np.exp(1j * side * actor["bend"]) * (side * 6 - 4.5j) * tall / 30
    joints["hand"] = joints["elbow"] + forearm
    actor.update(joints=joints, direction=direction, radius=radius)


def outlines(actor):
    """Extent of what is drawn, (T, 4) x1, y1, x2, y2 in pixels, not cut to the frame."""
    joints, label = actor["joints"], actor["labels"]["detail"]
    held = shown(actor, "detail")                                          # (T,)
    circles = [(joints[name], radius) for name, radius in RADII.items()]
    circles.append((joints["head"], actor["radius"]))
    if label == ROD:
        for end in (actor["rod"], -actor["rod"]):
            circles.append((joints["hand"] + np.where(held, end, 0), 1.25))
    elif label is not None:
        circles.append((joints["hand"], held * HELD_RADIUS[label]))
    boxes = [np.stack(np.broadcast_arrays(*square(*circle)), -1) for circle in circles]
    boxes = np.stack(boxes)                                                # (10 to 12, T, 4)
    return np.concatenate((boxes[..., :2].min(0), boxes[..., 2:].max(0)), -1)    # (T, 4)


# ---- a scene ----

def describe(config, split, seed, index):
    """The scene of a clip without its pixels, a plain dict: actors, things, pillar, background.

    Of an actor: height, colours and pose; path and joints (T,) complex; labels {group: class id or
    None} and their intervals; partner ("actors" or "things", number) or None; direction (T,) of the
    stretched arm, radians, NaN where it hangs; box (T, 4) x1, y1, x2, y2, present (T,); seen (T, C)
    0/1, the labels; cause (T, 4), NaN without one.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    frames = config.frames
    count, pairs, loose_things = cast(rng)
    spans = [interval(rng, frames) for _ in pairs]
    ends = [end for pair in pairs for end in pair]
    loose = [actor for actor in range(count) if actor not in ends] + loose_things
    ends += loose[:5 - 2 * len(pairs)]                       # more find no room
    shares = [(start / (frames - 1), (stop - 1) / (frames - 1)) for start, stop in spans]
    layout = None
    while layout is None:                    # 2.4 tries on average, 45 at most in 4,000 clips
        layout = try_layout(rng, shares, len(ends) - 2 * len(pairs))
    paths = layout[:, :1] + np.diff(layout) * np.linspace(0, 1, frames)    # (ends, T)

    background = tuple(rng.integers(20, 100, 3).tolist())
    actors = [new_actor(rng, frames, background) for _ in range(count)]
    things, places = [], []                  # places: of each end ("actors" or "things", number)
    for end, path in zip(ends, paths):
        if end == "nothing":
            places.append(None)
        elif end in ("cone", "disc"):
            places.append(("things", len(things)))
            things.append({"kind": end, "path": path, "radius": rng.uniform(4.5, 6),
                           "colour": contrasting(rng, background)})
        else:
            places.append(("actors", end))
            actors[end]["path"] = path
    for depth, one in zip(rng.permutation(len(ends)).tolist(), actors + things):
        one["depth"] = depth

    scene = {"frames": frames, "background": background, "actors": actors, "things": things}
    point(scene, places, paths, spans)
    scene["pillar"] = place_pillar(rng, background, paths[:2 * len(pairs)])
    scene["texture"] = int(rng.integers(2 ** 31))
    add_visibility(scene)
    add_labels(scene)
    return scene


def point(scene, places, paths, spans):
    """Gives every actor its partner and its label of the third group, and poses it.

    places, paths: of the ends, those of pair k at 2k (the actor) and 2k + 1 (its partner).
    """
    partners = {}                            # of an actor: its partner, the partner's path, when
    for k, span in enumerate(spans):
        here, there = 2 * k, 2 * k + 1
        partners[places[here]] = places[there], paths[there], span
        partners[places[there]] = places[here], paths[here], span    # serves an actor that is met
    for number, actor in enumerate(scene["actors"]):
        partner, target, span = partners.get(("actors", number), (None, None, (0, 0)))
        if partner is None:
            label = None
        elif partner[0] == "actors":
            label = MEET
        else:
            label = {"cone": CONE, "disc": DISC}[scene["things"][partner[1]]["kind"]]
        actor["partner"] = partner
        actor["labels"]["context"], actor["intervals"]["context"] = label, span
        if target is not None:               # the bent arm is on the other side: arms do not cross
            actor["side"] = -1 if target.real.mean() > actor["path"].real.mean() else 1
        pose(actor, target)


def place_pillar(rng, background, paths):
    """A pillar in front of everything, in a third of the clips, or None.

    It hides no arm of a pointing pair; paths (pairs * 2, T): of their ends.
    """
    width = rng.uniform(6, 10)
    places = rng.uniform(4, WIDTH - 4, 6)
    if rng.random() >= 0.35:
        return None
    for x in places:
        if (np.abs(paths.real - x) > width / 2 + 9).all():
            return {"x": x, "width": width, "colour": contrasting(rng, background)}
    return None


def area(boxes):
    """Area (T,) of boxes (T, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def behind(pillar, points, margin=0.0):
    """Are complex points hidden by the pillar (or None), widened by `margin` at both sides?"""
    if pillar is None:
        return np.zeros(points.shape, bool)
    return np.abs(points.real - pillar["x"]) < pillar["width"] / 2 + margin


def add_visibility(scene):
    """Adds to actors and things their boxes cut to the frame, (T, 4), and `present`, (T,) bool.

    Present: over half of the box is in the frame and at least three tenths are not hidden.
    """
    for one in scene["actors"] + scene["things"]:
        if "joints" in one:
            whole = outlines(one)                                          # (T, 4)
            points = np.stack(list(one["joints"].values()))                # (10, T)
        else:
            whole = np.stack(square(one["path"], one["radius"]), -1)       # (T, 4)
            across = np.array((-0.8, -0.4, 0, 0.4, 0.8))[:, None]
            points = one["path"] + across * one["radius"]                  # (5, T)
        one["box"] = np.clip(whole, 0, (WIDTH, HEIGHT) * 2)
        hidden = behind(scene["pillar"], points)
        for other in scene["actors"]:
            if other["depth"] > one["depth"]:                              # it stands in front
                gap = points - other["path"]
                hidden |= ((np.abs(gap.real) < 0.12 * other["height"])
                           & (np.abs(gap.imag) < 0.5 * other["height"]))
        one["present"] = (area(one["box"]) / area(whole) > 0.5) & (hidden.mean(0) < 0.7)


def out_of_reach(box, other):
    """Where are boxes (T, 4) disjoint and their centres further apart than either is wide? (T,)"""
    gap = np.maximum(other[:, :2] - box[:, 2:], box[:, :2] - other[:, 2:]).max(-1)
    between = (box[:, :2] + box[:, 2:] - other[:, :2] - other[:, 2:]) / 2  # (T, 2), of the centres
    width = np.maximum(box[:, 2] - box[:, 0], other[:, 2] - other[:, 0])
    return (gap > 0) & (np.hypot(*between.T) > width)


def add_labels(scene):
    """Adds to every actor its labels where they can be seen and the box of its context's cause."""
    for actor in scene["actors"]:
        frames = len(actor["path"])
        actor["seen"] = np.zeros((frames, len(CLASS_NAMES)), np.float32)
        actor["cause"] = np.full((frames, 4), np.nan)
        for group, label in actor["labels"].items():
            if label is None:
                continue
            seen = shown(actor, group) & actor["present"]                  # (T,)
            if group == "detail":
                hand = actor["joints"]["hand"]
                seen &= within(hand, 2, 2) & ~behind(scene["pillar"], hand, 1)
            if group == "context":
                kind, number = actor["partner"]
                cause = scene[kind][number]
                seen &= cause["present"] & out_of_reach(actor["box"], cause["box"])
                actor["cause"] = np.where(seen[:, None], cause["box"], np.nan)
            actor["seen"][:, label] = seen


# ---- its pixels ----

def moving_background(scene):
    """T images of a smooth texture that slides behind the scene, SCALE times the frames' size."""
    rng = np.random.default_rng(scene["texture"])
    height, width, slack = SCALE * HEIGHT, SCALE * WIDTH, SCALE * 16
    cells = (int(rng.integers(4, 12)), int(rng.integers(5, 16)), 3)
    coarse = rng.integers(-20, 21, cells) + np.array(scene["background"])
    texture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    texture = texture.resize((width + slack, height + slack), Image.Resampling.BICUBIC)
    start = rng.uniform(0, slack, 2)
    stop = rng.uniform(0, slack, 2)
    corners = np.linspace(start, stop, scene["frames"]).astype(int).tolist()    # (T, 2)
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
    skin, limb = actor["skin"], round(2.5 * SCALE)
    for side in ("left", "right"):
        leg = joints["hip"], joints["knee " + side], joints["foot " + side]
        canvas.line(leg, actor["trousers"], limb)
    trunk = joints["hip"], joints["shoulder"]
    canvas.line(trunk, actor["shirt"], round(0.15 * actor["height"] * SCALE))
    canvas.line((joints["shoulder"], joints["elbow"], joints["hand"]), skin, limb)
    canvas.line((joints["shoulder"], joints["pointing hand"]), skin, 3 * SCALE)
    canvas.ellipse(square(points["head"], SCALE * actor["radius"]), fill=skin)
    if shown(actor, "detail")[frame]:
        draw_held(canvas, actor, points["hand"])


def draw_held(canvas, actor, hand):
    label, colour = actor["labels"]["detail"], actor["colour"]
    if label == ROD:
        one, other = hand - SCALE * actor["rod"], hand + SCALE * actor["rod"]
        canvas.line((one.real, one.imag, other.real, other.imag), colour, round(2.5 * SCALE))
    elif label == BALL:
        canvas.ellipse(square(hand, SCALE * HELD_RADIUS[BALL]), fill=colour)
    else:
        canvas.ellipse(square(hand, SCALE * HELD_RADIUS[HOOP]), outline=colour, width=2 * SCALE)


def draw(scene, size=WORLD):
    """The scene's pixels: (T, H, W, 3) uint8. size: H, W."""
    order = sorted(scene["actors"] + scene["things"], key=lambda one: one["depth"])
    pillar = scene["pillar"]
    frames = []
    for frame, image in enumerate(moving_background(scene)):
        canvas = ImageDraw.Draw(image)
        for one in order:
            draw_one = draw_actor if "joints" in one else draw_thing
            draw_one(canvas, one, frame)
        if pillar:
            left = SCALE * (pillar["x"] - pillar["width"] / 2)
            right = SCALE * (pillar["x"] + pillar["width"] / 2)
            canvas.rectangle((left, -1, right, SCALE * HEIGHT), fill=pillar["colour"])
        if size == WORLD:
            frames.append(image.reduce(SCALE))
        else:
            frames.append(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return np.stack(frames)                                                # (T, H, W, 3)


# ---- the data set ----

def relative(boxes, frames):
    """N arrays (T, 4) x1, y1, x2, y2 in pixels -> (N, T, 4) float32 cx, cy, w, h in [0, 1]."""
    boxes = np.array(boxes, np.float64).reshape(-1, frames, 4)             # (N, T, 4)
    boxes = boxes / ((WIDTH, HEIGHT) * 2)
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.from_numpy(np.concatenate(((low + high) / 2, high - low), -1)).float()


def to_target(scene, video, size=WORLD):
    """The data sets' target dict but for `video_index`.

    Besides `cause` (N, T, 4): cx, cy, w, h of the context's cause, NaN without one.
    """
    frames, num_classes = scene["frames"], len(CLASS_NAMES)
    actors = [actor for actor in scene["actors"] if actor["present"].any()]
    boxes = [np.where(actor["present"][:, None], actor["box"], 0) for actor in actors]
    present = np.array([actor["present"] for actor in actors], bool)
    labels = np.array([actor["seen"] for actor in actors], np.float32)
    return {
        "boxes": relative(boxes, frames),
        "present": torch.from_numpy(present.reshape(-1, frames)),                  # (N, T)
        "labels": torch.from_numpy(labels.reshape(-1, frames, num_classes)),       # (N, T, C)
        "frames": torch.ones(frames, dtype=torch.bool),
        "frame_ids": torch.arange(1, frames + 1),
        "size": torch.tensor(size),
        "video": video,
        "cause": relative([actor["cause"] for actor in actors], frames),
    }


class SyntheticDataset:
    """Clips drawn when they are asked for, for a DataLoader; an item is as data.py says.

    config: frames, test_size (H; W is 1.5 H), and where `augment` is set flip and permute_colours,
    drawn like the scene from split, seed and index: a run meets a clip once. train: the initial
    value of `augment`, by default True for the training split. `scene(i)` is what is drawn, before
    a flip. ValueError for an unknown split, fewer than 4 frames or a Config of key frames.
    """

    def __init__(self, config, split, seed=0, length=None, train=None):
        if split not in SPLITS:
            raise ValueError(f"synthetic: unknown split {split!r}; there are: {', '.join(SPLITS)}")
        if config.frames < 4:
            raise ValueError(f"synthetic: frames={config.frames} is too short for an action; "
                             "take --set frames=8")
        if config.key_frame:
            raise ValueError("synthetic: key_frame=True was set, but all of its frames are "
                             "annotated; take --set key_frame=False")
        length = LENGTHS[split] if length is None else length
        self.config, self.split, self.seed = config, split, seed
        self.augment = split == "train" if train is None else train
        self.size = (config.test_size, config.test_size * 3 // 2)
        self.name, self.class_names, self.class_groups = "synthetic", CLASS_NAMES, CLASS_GROUPS
        self.videos = [f"{split}-{seed}-{index:06d}" for index in range(length)]
        self.clip_videos = np.arange(length)                 # a video has one clip

    def __len__(self):
        return len(self.videos)

    def scene(self, index):
        """What a clip is drawn from, see `describe`."""
        return describe(self.config, self.split, self.seed, range(len(self))[index])

    def __getitem__(self, index):
        index = range(len(self))[index]                      # IndexError beyond the last one
        scene = self.scene(index)
        clip = draw(scene, self.size)                                      # (T, H, W, 3)
        target = to_target(scene, self.videos[index], self.size)
        target["video_index"] = index
        if self.augment:
            rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])
            if rng.random() < self.config.flip:
                clip = clip[:, :, ::-1]
                for boxes in (target["boxes"], target["cause"]):
                    boxes[..., 0] = 1 - boxes[..., 0]
            if self.config.permute_colours:
                clip = clip[..., rng.permutation(3)]
        clip = np.ascontiguousarray(clip.transpose(3, 0, 1, 2))            # (3, T, H, W)
        return torch.from_numpy(clip), target

    def ground_truth(self):
        """(frames, tubes) as metrics.py takes them; "video" is an index of self.videos.

        frames: arrays "video", "frame", "label", "box", a row for each label of a box; tubes: a
        dict for each unbroken run of frames in which an actor has a label. Boxes are x1, y1, x2, y2
        in pixels of the frames as they are, (H, W) = target["size"].
        """
        scale = np.array(self.size[::-1] * 2) / np.array(WORLD[::-1] * 2)
        tubes = []
        for video in range(len(self)):
            for actor in self.scene(video)["actors"]:
                for label in range(len(CLASS_NAMES)):
                    on = np.flatnonzero(actor["seen"][:, label])
                    for run in np.split(on, np.flatnonzero(np.diff(on) > 1) + 1):
                        if len(run):
                            tubes.append({"video": video, "label": label, "frames": run + 1,
                                          "boxes": actor["box"][run] * scale})
        lengths = [len(tube["frames"]) for tube in tubes]
        frames = {
            "video": np.repeat(np.array([tube["video"] for tube in tubes], np.int64), lengths),
            "frame": np.concatenate([np.zeros(0, np.int64)] + [tube["frames"] for tube in tubes]),
            "label": np.repeat(np.array([tube["label"] for tube in tubes], np.int64), lengths),
            "box": np.concatenate([np.zeros((0, 4))] + [tube["boxes"] for tube in tubes]),
        }
        return frames, tubes
