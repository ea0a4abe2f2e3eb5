"""Names and values that no text holds already, made of parts: people, things, places, codes, prices, dates.

A vocabulary is what all choices of its parts give, so that it is far larger than what training can learn by heart, and
so that two terms may differ in one part alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count

import numpy as np


@dataclass(frozen=True)
class Term:
    """One name or value. parts: its shape, then a word for each place of the shape."""

    parts: tuple[str, ...]

    def __str__(self) -> str:
        return self.parts[0].format(*self.parts[1:])


@dataclass(frozen=True)
class Vocabulary:
    """All terms of a kind. shapes: format strings. parts: the words to choose from for each place of a shape."""

    shapes: tuple[str, ...]
    parts: tuple[Sequence[str], ...]

    @property
    def size(self) -> int:
        """How many terms there are."""
        return sum(math.prod(len(self.parts[place]) for place in _places(shape)) for shape in self.shapes)

    def draw(self, generator: np.random.Generator) -> Term:
        """A term, all alike likely."""
        return Term(tuple(pick(generator, choices) for choices in (self.shapes, *self.parts)))

    def differing(self, term: Term, generator: np.random.Generator) -> Term:
        """A term of the same shape that differs from another one in one of its parts."""
        places = sorted(_places(term.parts[0]))
        place = places[int(generator.integers(len(places)))]
        others = [word for word in self.parts[place] if word != term.parts[place + 1]]
        return Term((*term.parts[: place + 1], pick(generator, others), *term.parts[place + 2 :]))


def _places(shape: str) -> set[int]:
    """The places that a shape has words for."""
    return {int(number) for number in re.findall(r"\{(\d+)\}", shape)}


def pick(generator: np.random.Generator, choices: Sequence[str]) -> str:
    """One of several, all alike likely."""
    return choices[int(generator.integers(len(choices)))]


def _words(text: str) -> tuple[str, ...]:
    words = tuple(text.split())
    if len(set(words)) < len(words):
        raise ValueError(f"a word stands twice in: {text}")
    return words


def _numbers(first: int, last: int, width: int = 0) -> tuple[str, ...]:
    return tuple(str(number).zfill(width) for number in range(first, last + 1))


FIRST_NAMES = _words("""
    Abram Adela Agnes Albin Alma Alois Amalia Ansel Arvid Astrid August Aurel Beata Benno Berta Birger Blanka Boris
    Bruno Camille Carsten Cecily Clemens Conrad Cordula Cyril Dagny Damian Delia Dietrich Dora Edith Egon Eileen Elias
    Elsbeth Emeric Erna Esther Eustace Fabian Fausta Felix Fiona Florian Frieda Gabor Gerda Gideon Gisela Greta Gunnar
    Hanna Hedwig Helmut Hilda Horace Hulda Ida Ignaz Ingrid Irma Isak Ivo Jakob Jarmila Jasper Joachim Jolanda Jorun
    Judith Kajsa Kaspar Katya Kilian Klara Knut Konstanze Lambert Laszlo Leonie Linus Lorenz Ludmila Magnus Malwine
    Marcel Margit Matilda Milan Mirela Moritz Nadia Nestor Nils Nora Oda Oleg Olof Ottilie Otmar Pavel Petra Philippa
    Quentin Ragnar Rainer Ramona Rasmus Renata Roland Rosalind Rufus Sabina Saskia Selma Severin Sibyl Sigrid Silvan
    Stefan Svea Tamara Tibor Thekla Tilda Tobias Ulrik Ursula Valentin Veronika Viktor Vilma Walburga Wenzel Willem
    Winifred Xaver Yngve Yvonne Zacharias Zdenka Zelma
""")
_SURNAME_STARTS = _words("""
    Ader Alm Bachen Balt Bern Birk Blaken Bran Brem Calder Corv Dahl Darn Dorn Drav Eben Eich Elm Fal Farn Fels Fen
    Gar Glan Gold Grun Hald Harn Heim Hol Ister Jar Kalt Kel Kern Kolm Lan Leid Lind Lorn Mal Mar Melk Mor Nad Neu
    Nord Oster Pel Quar Rav Rein Ros Salz Sand Schar Sel Stern Sul Tann Thal Tor Ul Var Vel Wald Wern Wester Wil Zell
""")
_SURNAME_ENDS = _words("""
    ach auer bach beck berg born bruck by dahl dorf eck egger en er feld gaard garten hagen hammer hardt haus heim hof
    holt horst ing inger kamp land ler lund mann mark meier moor ner nitz now quist reuth ron sen ske son stad stein
    strom tal ton ung vik wald wick
""")
_PLACE_STARTS = _words("""
    Aln Amber Arken Ash Bel Black Bram Bright Cald Cob Crow Dar Deep Dun Ebon Elder Ever Fair Fal Fern Flint Gales Glen
    Grey Hal Hart Haven High Hollow Ingle Iron Kel Kings Lam Lark Lime Long Mal Mere Mill Moss Nether North Oak Otter
    Pen Pine Quill Raven Red Rush Sal Shel Silver Spar Stan Stone Swan Tar Thorn Tide Under Upper Vale Wake Wells West
    White Wick Wild Win Wolf Yar
""")
_PLACE_ENDS = _words("""
    bank barrow beck borough bourne bridge brook bury castle cliff combe cote cross dale den down fell field ford gate
    grove ham hatch haven heath hill holm hurst lake leigh low marsh mead mere minster moor mouth pool port rick ridge
    ry shaw stead stoke stone stow thorpe ton wade wall water well wich wood worth
""")
_PLACE_SHAPES = (
    "{0}{1}", "Old {0}{1}", "New {0}{1}", "Great {0}{1}", "Little {0}{1}", "Lower {0}{1}", "Port {0}{1}",
    "Mount {0}{1}", "Fort {0}{1}", "Saint {0}{1}",
)  # fmt: skip
_ADJECTIVES = _words("""
    battered bent bevelled blackened bleached blunt broad broken bulky carved chipped clumsy coarse cracked crooked
    curved dented dim domed dull dusty enamelled engraved faded fluted folded forked fragile frosted gilded glazed
    grimy hammered heavy hinged hollow knotted lacquered large lidded lopsided mended mottled narrow notched numbered
    oiled ornate oval padded painted patched pitted plain pleated pointed polished rough round rusted scorched scratched
    shallow shiny sealed slender smooth speckled spotless squat stained striped sturdy tall tangled tapered tarnished
    thick tilted tiny twisted unsigned upright varnished warped weathered wide worn
""")
_MATERIALS = _words("""
    alabaster amber ash bamboo beech birch bone brass bronze canvas cedar cherry chrome clay copper coral cork cotton
    crystal ebony elm felt flint glass granite horn iron ivory jade lead leather linen mahogany maple marble nickel
    oak onyx paper pearl pewter pine porcelain quartz rosewood rubber satin silk silver slate steel stone straw teak tin
    velvet walnut wax wicker wool zinc
""")
_NOUNS = _words("""
    abacus amphora anvil armchair atlas axe balance banner barometer barrel basin basket bassoon beaker bell bellows
    bench bobbin bookend bottle bowl box bracelet brooch bucket buckle bust cabinet candlestick canister casket
    censer chalice chandelier chest chisel cradle clarinet clock coffer comb compass cradle-board crate crown crucible
    cup cupboard cylinder decanter desk dial dish doll drum easel figurine flask flute footstool fork frame funnel
    globe goblet gong harp hatstand helmet hourglass inkwell jar jug kettle key ladle lamp lantern lectern lens locket
    loom lute magnet mallet mask medal metronome mirror mortar mug music-stand necklace oar organ-pipe padlock paddle
    pedestal pendant pendulum pipe pitcher plaque plate plough pot press prism pulley puppet quill rack rake razor
    reel ring rocking-horse rudder saddle saucer scales sceptre screen seal shears shield shovel shuttle sickle sieve
    skillet snuffbox spade spindle spoon statuette stool stopper strongbox sundial tankard teapot telescope thimble
    tile toolbox torch tray trestle tripod trough trowel trumpet tumbler urn vase vat vice wheel whistle windmill
    workbench yoke zither
""")
_LETTERS, _DIGITS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ"), tuple("0123456789")
_MONTHS = _words("January February March April May June July August September October November December")
_TRADES = _words("""
    actuary archivist baker beekeeper binder blacksmith brewer bricklayer butcher carpenter cartographer chandler
    chemist clockmaker cobbler cooper courier dentist draper dyer engraver farrier ferryman fishmonger florist forester
    furrier gardener geologist glazier glover goldsmith grocer gunsmith harpist hatter jeweller joiner lawyer
    lighthouse-keeper locksmith mason midwife miller milliner miner notary nurse optician organist painter perfumer
    pharmacist pilot plumber potter printer publisher roofer saddler sailmaker sculptor shepherd shipwright silversmith
    spinner stonecutter surveyor tailor tanner teacher thatcher tinsmith translator turner typesetter upholsterer
    violinist weaver wheelwright
""")
_TRADE_KINDS = _words("""
    retired travelling junior senior former deputy licensed wandering master royal municipal part-time self-taught
    renowned hired
""")
_COLOURS = _words("""
    amaranth apricot azure beige black blue bronze brown burgundy buff carmine cerise charcoal cobalt cream crimson cyan
    ecru emerald fawn fuchsia gold green grey indigo ivory khaki lavender lemon lilac magenta maroon mauve mustard navy
    ochre olive orange peach pink plum puce purple red russet rust saffron salmon sand sapphire scarlet sepia sienna
    tan teal terracotta turquoise ultramarine umber vermilion violet white yellow
""")
_SHADES = _words("pale light bright deep dark dull vivid soft smoky dusty milky glossy")
_FOODS = _words("""
    almond anchovy apple apricot artichoke asparagus barley bean beetroot blackberry cabbage caraway carrot celery
    cherry chestnut chicory cinnamon crab cress cucumber currant damson eel fennel fig garlic ginger gooseberry
    hazelnut honey kale leek lemon lentil lobster mackerel medlar mushroom mussel nettle onion orange oyster parsnip
    pear pepper plum potato prawn pumpkin quince radish raspberry rhubarb rosemary saffron sage salmon sorrel spinach
    thyme trout turnip venison walnut
""")
_DISHES = _words("""
    bake broth cake casserole chutney crumble curry dumplings flan fritters gratin jelly loaf mousse omelette pancakes
    pasties pickle pie pudding ragout risotto salad sauce sorbet soup stew strudel tart terrine
""")

_LETTER, _DIGIT, _HEX = "A", "9", "h"


def _patterned(patterns: Sequence[str]) -> Vocabulary:
    """Terms in which every A is a capital letter, every 9 a digit, and every h a hexadecimal digit."""
    choices = {_LETTER: _LETTERS, _DIGIT: _DIGITS, _HEX: tuple("0123456789abcdef")}
    # Each pattern fills the places from the first on that have what it takes.
    most = {kind: max(pattern.count(kind) for pattern in patterns) for kind in choices}
    first = {_LETTER: 0, _DIGIT: most[_LETTER], _HEX: most[_LETTER] + most[_DIGIT]}
    shapes = []
    for pattern in patterns:
        places = {kind: count(begin) for kind, begin in first.items()}
        shapes.append("".join(f"{{{next(places[one])}}}" if one in places else one for one in pattern))
    return Vocabulary(tuple(shapes), tuple(chain.from_iterable([choices[kind]] * most[kind] for kind in choices)))


VOCABULARIES = {
    "person": Vocabulary(("{0} {1}{2}",), (FIRST_NAMES, _SURNAME_STARTS, _SURNAME_ENDS)),
    "place": Vocabulary(_PLACE_SHAPES, (_PLACE_STARTS, _PLACE_ENDS)),
    "thing": Vocabulary(("the {0} {1} {2}",), (_ADJECTIVES, _MATERIALS, _NOUNS)),
    "record": Vocabulary(
        ("file {0}{1}-{2}{3}{4}{5}", "folder {0}{1}.{2}{3}{4}{5}", "dossier {2}{3}{4}{5}/{0}{1}",
         "docket {0}-{2}{3}{4}{5}-{1}", "bundle {2}{3}-{0}{1}-{4}{5}"),
        (_LETTERS, _LETTERS, _DIGITS, _DIGITS, _DIGITS, _DIGITS),
    ),
    "code": Vocabulary(
        ("{0}{1}{4}{5}{6}{7}", "{4}{5}-{0}{1}-{6}{7}", "{0}{4}{1}{5}{2}{6}", "{0}{1}{2}{3}{4}{5}",
         "{4}{5}{6}{7}{0}", "{0}{1}/{4}{5}{6}", "{4}{5}{6}.{7}{4}{0}", "{4}{5}{6}{7}{8}{9}", "{4}{5}{6}{7}{8}{9}{10}",
         "{4}{5}{6}{7}{8}{9}{10}{11}", "{0}{1}{2}-{4}{5}{6}{7}{8}{9}", "{12}{4}{13}{5}{6}-{14}{7}{15}{8}-{9}{12}{10}",
         "{4}{12}{13}{5}{14}{6}{7}{15}{8}{9}"),
        (_LETTERS, _LETTERS, _LETTERS, _LETTERS, *(_DIGITS,) * 8, *(tuple("abcdef"),) * 4),
    ),
    "price": Vocabulary(
        ("£{0}.{1}", "${0}.{1}", "{0}.{1} euros", "{0}.{1} francs", "{0}.{1} crowns", "{0}.{1} roubles"),
        (_numbers(1, 4999), _numbers(0, 99, 2)),
    ),
    "date": Vocabulary(
        ("{0} {1} {2}", "{1} {0}, {2}", "the {0} of {1} {2}"), (_numbers(1, 28), _MONTHS, _numbers(1702, 2049)),
    ),
    "number": Vocabulary(("{0}{1}",), (_numbers(1, 999), _numbers(0, 99, 2))),
    "weight": Vocabulary(("{0}.{1} kg", "{0}.{1} pounds", "{0}.{1} ounces"), (_numbers(1, 499), _numbers(0, 9))),
    "time": Vocabulary(("{0}:{1}",), (_numbers(0, 23, 2), _numbers(0, 59, 2))),
    "trade": Vocabulary(("{0} {1}",), (_TRADE_KINDS, _TRADES)),
    "colour": Vocabulary(("{0} {1}",), (_SHADES, _COLOURS)),
    "dish": Vocabulary(("{0} {1} with {2}", "{0} {1} on {2}"), (_FOODS, _DISHES, _FOODS)),
    # From 19 characters to 39, so that it takes dozens of tokens to write one down.
    "serial": _patterned((
        "AAAAA-99999-AAAAA-99999", "A9A9A-9A9A9-A9A9A-9A9A9-A9A9A", "9999 9999 9999 9999 9999",
        "99999999999999999999999", "AA99 9999 9999 9999 9999 99", "AAAA/999/AAAA/999/AAAA", "999.AAA.999.AAA.999",
        "AA-999999-AA-999999-AA-999999", "hh:hh:hh:hh:hh:hh:hh:hh:hh:hh", "hhhhhhhhhhhhhhhhhhhhhhhh",
        "hhhhhhhhhh_hhhhhhhhhh_hhhhhhhhhh", "0xhhhhhhhhhhhhhhhhhhhh", "hhhhhh-hhhhhh-hhhhhh-hhhhhh",
        "hhh.hhh.hhh.hhh.hhh.hhh.hhh.hhh.hhh.hhh",
    )),
}  # fmt: skip
