"""What people wear and where they stand, in colours and in words: all that a caption may have to tell."""

from __future__ import annotations

from dataclasses import dataclass

from .exact import Stream

__all__ = ["COLOURS", "MOTIONS", "PLACES", "RGB", "Look", "Place", "caption", "draw_look", "draw_place"]

RGB = tuple[float, float, float]  # 0..255

COLOURS: dict[str, RGB] = {
    "red": (200, 40, 45),
    "orange": (235, 130, 35),
    "yellow": (235, 205, 60),
    "green": (50, 145, 65),
    "blue": (45, 85, 195),
    "purple": (125, 60, 160),
    "pink": (235, 140, 175),
    "white": (235, 235, 230),
    "black": (40, 40, 48),
    "brown": (120, 75, 45),
}
HAIR: dict[str, RGB] = {
    "black": (35, 30, 32),
    "brown": (95, 60, 38),
    "blond": (215, 180, 105),
    "red": (165, 75, 40),
    "grey": (160, 160, 160),
}
SKIN: tuple[RGB, ...] = ((245, 210, 185), (230, 185, 150), (200, 150, 110), (150, 100, 70), (105, 70, 50))
SHOES: tuple[RGB, ...] = ((50, 45, 45), (110, 70, 45), (225, 225, 225), (150, 40, 40))
SKIES: dict[str, RGB] = {
    "blue": (140, 185, 235),
    "orange": (240, 180, 120),
    "grey": (185, 190, 200),
    "purple": (165, 140, 200),
}
GROUNDS: dict[str, RGB] = {
    "green": (105, 160, 85),
    "yellow": (205, 185, 105),
    "brown": (140, 110, 80),
    "grey": (140, 145, 150),
    "blue": (80, 115, 165),
}
WALLS: dict[str, RGB] = {
    "red": (185, 100, 90),
    "green": (125, 170, 130),
    "blue": (120, 150, 195),
    "yellow": (220, 200, 130),
    "white": (215, 215, 210),
    "pink": (225, 175, 185),
}
FLOORS: dict[str, RGB] = {"brown": (145, 105, 75), "grey": (135, 135, 140), "green": (95, 125, 95)}

# A place, as "behind ... : upper thing and lower thing"; what is painted is in `scenery`.
PLACES: dict[str, tuple[str, dict[str, RGB], dict[str, RGB]]] = {
    "hills": ("{lower} hills under a {upper} sky", SKIES, GROUNDS),
    "city": ("a {lower} city under a {upper} sky", SKIES, GROUNDS),
    "beach": ("a {lower} beach and a {upper} sky", SKIES, GROUNDS),
    "bricks": ("a {upper} brick wall and a {lower} floor", WALLS, FLOORS),
    "stripes": ("a {upper} striped wall and a {lower} floor", WALLS, FLOORS),
    "tiles": ("a {upper} tiled wall and a {lower} floor", WALLS, FLOORS),
}
MOTIONS: dict[str, str] = {
    "walk": "walks",
    "wave": "waves",
    "dance": "dances",
    "turn": "turns around",
    "squat": "squats",
    "raise": "raises both arms",
}
TOPS = {"t-shirt": "t-shirt", "sweater": "sweater"}
BOTTOMS = {"trousers": "trousers", "shorts": "shorts", "skirt": "skirt"}


@dataclass(frozen=True)
class Place:
    """A background: its kind and its two named colours, which the caption tells; the rest is in the stream."""

    kind: str
    upper: str
    lower: str

    @property
    def words(self) -> str:
        words = PLACES[self.kind][0].format(upper=self.upper, lower=self.lower)
        return words.replace("a orange", "an orange")


@dataclass(frozen=True)
class Look:
    """How a person looks. `top` "dress" has no bottom of its own. Colours without a name are only seen in the photo."""

    person: str
    hair: str
    long_hair: bool
    top: str
    top_colour: str
    bottom: str
    bottom_colour: str
    skin: RGB
    shoes: RGB

    @property
    def clothes(self) -> str:
        if self.top == "dress":
            return f"{_a(self.top_colour)} dress"
        lower = _a(self.bottom_colour) if self.bottom == "skirt" else self.bottom_colour
        return f"{_a(self.top_colour)} {self.top} and {lower} {self.bottom}"


def draw_look(stream: Stream) -> Look:
    person = stream.choice(("man", "woman"))
    if person == "woman" and stream.chance(0.25):
        top, bottom = "dress", "skirt"
    else:
        top = stream.choice(tuple(TOPS))
        bottom = stream.choice(tuple(BOTTOMS) if person == "woman" else ("trousers", "shorts"))
    top_colour, bottom_colour = stream.two(tuple(COLOURS))
    return Look(
        person=person,
        hair=stream.choice(tuple(HAIR)),
        long_hair=person == "woman" and stream.chance(0.8),
        top=top,
        top_colour=top_colour,
        bottom=bottom,
        bottom_colour=top_colour if top == "dress" else bottom_colour,
        skin=stream.choice(SKIN),
        shoes=stream.choice(SHOES),
    )


def draw_place(stream: Stream) -> Place:
    kind = stream.choice(tuple(PLACES))
    _, uppers, lowers = PLACES[kind]
    return Place(kind, stream.choice(tuple(uppers)), stream.choice(tuple(lowers)))


def caption(look: Look, place: Place, motion: str) -> str:
    """One sentence that tells all named things."""
    length = "long" if look.long_hair else "short"
    return (
        f"a {look.person} with {length} {look.hair} hair in {look.clothes} {MOTIONS[motion]}, "
        f"in the background {place.words}"
    )


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
