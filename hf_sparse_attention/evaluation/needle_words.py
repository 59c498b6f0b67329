"""Words the needle keys are made of; nouns are split by parity so that training and evaluation never share a key."""

from __future__ import annotations

import random

ADJECTIVES = """
able amber ancient angry blue bold brave bright broad calm careful cheap clean clear clever cold common cool curious
dark deep dry eager early empty even fair false famous fast fine firm flat fresh full gentle glad golden grand gray
great green happy hard heavy high hollow honest huge humble idle jolly keen kind large late lazy lean light lively
long loose loud low lucky mild narrow neat new noble odd old open pale plain polite poor proud pure quick quiet rare
rapid raw red rich ripe rough round royal sad safe sharp short shy silent simple slim slow small smooth soft sour
stark steep stiff still strange strong sweet swift tall tame tender thick thin tidy tiny tough true vast vivid warm
weak wet white wide wild wise witty young
"""

NOUNS = """
acorn anchor apple arrow badge baker bank barn basket beach bear bell bench berry bird blade boat bone book boot
bottle bowl box branch bread brick bridge broom brush bucket button cabin cake camel candle canoe card carpet cart
castle cat chain chair chalk cheese cherry child church circle city clock cloth cloud coach coat coin comet copper
coral cotton cousin cow crane crown cup curtain dance desk diamond dish dog donkey door dragon dream dress drum duck
eagle egg engine falcon farm father feather fence field finger fire fish flag flame flower flute forest fork fox
frog fruit garden gate giant girl glass glove goat gold goose grape grass guitar hammer hand harbor hat hawk heart
helmet hen hill honey horn horse house island jacket jar jewel judge kettle key king kite knife knot ladder lake
lamp leaf lemon letter lily lion lock maple market mask meadow mill mirror monk moon moose mother mountain mouse
needle nest oak ocean olive onion orange otter oven owl palace paper parrot peach pearl pencil pepper piano picture
pig pilot pine pipe planet plate plum pocket pond prince puzzle queen rabbit raven ribbon ring river road robin
rocket root rope rose sailor salt sand scarf school shadow sheep shell ship shoe silver sister snake soldier spade
spider spoon spring square squirrel stable star station stone storm stove string sugar summer swan sword table
tailor teacher temple thunder tiger tower train tree trumpet tulip turtle valley vase village violin wagon wall
walnut water whale wheel whistle window wing winter wolf wood zebra
"""


def draw_keys(rng: random.Random, count: int, split: str, adjective: bool) -> list[str]:
    """``count`` different keys of one split: a noun, or ``adjective-noun`` as in RULER.

    Raises:
        ValueError: ``split`` is neither ``train`` nor ``eval``, or more keys are asked for than the split has nouns.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}; allowed: train, eval.")
    nouns = NOUNS.split()[0 if split == "train" else 1 :: 2]
    if count > len(nouns):
        raise ValueError(f"{count} different keys were asked for; the {split} split has {len(nouns)} nouns.")
    keys = rng.sample(nouns, count)
    return [f"{rng.choice(ADJECTIVES.split())}-{noun}" for noun in keys] if adjective else keys
