"""The evaluation task `word_problems`: grade-school arithmetic in stories of its own.

No template here shares a scenario or a phrase with those of the training seeds
(`deepspec/prompts/seeds/math.py`): a test holds both to that. Changing a template changes the task: raise the
version in its YAML.
"""

from __future__ import annotations

import random

from deepspec.messages.slots import Template, template, word_lists

LISTS = word_lists("""
keeper: zookeeper | marine biologist | volunteer | apprentice | vet | trainer
maker: candle maker | weaver | glassblower | shoemaker | bookbinder | blacksmith
crew: miners | divers | climbers | rowers | surveyors | firefighters
goods: blankets | lanterns | scarves | teapots | kites | drums
seabird: gulls | puffins | terns | cormorants
metal: copper | tin | silver | nickel
yarn: blue wool | green wool | white wool | red wool
crop: barley | rye | oats | wheat | maize
instrument: violins | flutes | trumpets | cellos
planet: Mars | Venus | Saturn | Neptune
""")

TEMPLATES: list[Template] = [
    template(
        "The stairs of a lighthouse have {a} flights with {b} stairs in each. The keeper climbs to the "
        "lamp {c} times a day. How many stairs does the keeper climb upwards in one week?",
        a=(4, 9),
        b=(12, 22),
        c=(2, 4),
    ),
    template(
        "A colony of {seabird} counts {n} nests. Every nest had {e} eggs, and {p} percent of the eggs "
        "hatched. Calculate the number of chicks.",
        n=(20, 80, 20),
        e=(2, 4),
        p=(25, 75, 25),
    ),
    template(
        "An elevator may carry {w} kilograms. {k} crates that weigh {c} kilograms apiece already stand in "
        "it. Up to how many people of {m} kilograms each can ride along?",
        w=(600, 900, 50),
        k=(3, 6),
        c=(35, 60, 5),
        m=(70, 80, 5),
    ),
    template(
        "{a_maker} burns a candle that is {h} centimetres tall. It shrinks by {r} centimetres each hour, "
        "and after {t} hours the flame is blown out. What height remains?",
        r=(2, 3),
        t=(2, 6),
        h=lambda s: s["r"] * s["t"] + 5,
    ),
    template(
        "In a chess club everyone plays once against everyone else. The club counts {n} members. If a game "
        "takes {m} minutes on average, how many hours of play are there in all?",
        n=(6, 16, 2),
        m=(20, 60, 20),
    ),
    template(
        "A freight train is made up of {a} wagons. Each wagon carries {b} containers, but {c} wagons run "
        "empty. At the border {d} containers are unloaded. How many containers continue the journey?",
        a=(14, 30),
        b=(3, 6),
        c=(2, 5),
        d=(8, 20),
    ),
    template(
        "{a_keeper} feeds {n} sea lions. Adults eat {a} fish daily, pups eat {b}. If {k} of the sea lions "
        "are pups, how many fish does the whole group eat in {d} days?",
        n=(9, 18),
        a=(12, 20),
        b=(4, 8),
        k=(2, 6),
        d=(3, 7),
    ),
    template(
        "A printing press produces {a} sheets a minute. After {b} minutes it jams for {c} minutes and then "
        "runs on for another {d} minutes at half its speed. Find the number of sheets printed.",
        a=(40, 120, 20),
        b=(5, 25, 5),
        c=(3, 9),
        d=(4, 12, 2),
    ),
    template(
        "Two alloys contain {metal}: the first {p} percent, the second {q} percent. {a} kilograms of the "
        "first are melted together with {b} kilograms of the second. How many kilograms of {metal} does "
        "the mixture contain?",
        p=(10, 40, 10),
        q=(50, 90, 10),
        a=(10, 50, 10),
        b=(10, 40, 10),
    ),
    template(
        "A parking garage has {f} floors with {s} spaces on each floor. At eight in the morning it is "
        "empty. {a} cars enter per hour and {b} leave per hour. By one in the afternoon, how many spaces "
        "remain free?",
        f=(3, 6),
        s=(60, 110, 10),
        a=(30, 50),
        b=(5, 20),
    ),
    template(
        "To knit one pullover takes {g} grams of {yarn}, sold in balls of {k} grams at {p} euros a ball. "
        "How many balls do {n} pullovers take, and what do they cost together?",
        g=(350, 650, 50),
        k=(50, 100, 50),
        p=(3, 8),
        n=(2, 5),
    ),
    template(
        "{n} {crew} set out with drinking water for {d} days. On the third morning, {k} more join them "
        "with no water of their own. For how many further days will the supply last if everybody drinks "
        "equally?",
        n=(6, 12),
        d=(8, 16),
        k=(2, 6),
    ),
    template(
        "A rope {total} metres long is to be cut into pieces of {a} metres and {b} metres, equally many of "
        "both. How many pieces of each length result, and is any rope wasted?",
        a=(2, 5),
        b=(6, 9),
        total=(100, 240, 10),
    ),
    template(
        "A mill grinds {a} sacks of {crop} before lunch and {b} sacks after it. From one sack come {c} "
        "kilograms of meal. The miller keeps one tenth as a fee. How many kilograms go back to the growers?",
        a=(8, 20, 2),
        b=(10, 30, 2),
        c=(20, 40, 10),
    ),
    template(
        "An orchestra seats {n} musicians. One third of them play strings, and of the remaining ones every "
        "other plays a wind instrument. How many neither play strings nor wind?",
        n=(36, 108, 6),
    ),
    template(
        "A pendulum swings {a} times in {b} seconds. How long, in minutes and seconds, do {c} swings take?",
        k=(2, 4),
        a=(5, 12),
        b=lambda s: s["a"] * s["k"],
        c=(100, 400, 20),
    ),
    template(
        "A probe on its way to {planet} sends {a} pictures daily. Each picture occupies {m} megabytes, "
        "while the link transfers {t} megabytes per hour. For how many hours a day must the link be open?",
        t=(20, 60, 10),
        m=(4, 12, 2),
        a=(50, 150, 10),
    ),
    template(
        "A museum charges {p} euros for adults and half of that for pupils. On Sunday {a} adults and {b} "
        "pupils came, on Saturday only a third as many of either. How much was taken at the desk over the "
        "weekend?",
        p=(6, 16, 2),
        a=(60, 240, 30),
        b=(30, 150, 30),
    ),
    template(
        "A hot-air balloon rises {a} metres each minute for {b} minutes, drifts level for {c} minutes, "
        "then sinks {d} metres each minute. Starting at sea level, how long is the entire flight until "
        "landing?",
        k=(2, 4),
        d=(15, 40, 5),
        a=lambda s: s["d"] * s["k"],
        b=(5, 12),
        c=(20, 50, 5),
    ),
    template(
        "A workshop owns {a} {instrument}. Restoring one needs {h} hours, and {k} people each put in {d} "
        "hours daily. After how many whole working days is the last of them restored?",
        a=(6, 18),
        h=(10, 24),
        k=(2, 4),
        d=(6, 8),
    ),
    template(
        "A caravan trades {goods} for salt: {a} {goods} are worth {b} bars. It arrives with {n} {goods} "
        "and uses {c} bars to pay for water. With how many bars does it set off again?",
        a=(2, 5),
        b=(6, 12),
        k=(6, 15),
        n=lambda s: s["a"] * s["k"],
        c=(5, 20),
    ),
    template(
        "A snail at the bottom of a well {h} metres deep crawls up {a} metres by day and slips back {b} "
        "metres by night. On which day does it reach the rim?",
        b=(2, 4),
        a=lambda s: s["b"] + 2,
        h=(11, 31, 2),
    ),
    template(
        "Someone counts the wheels outside a depot: tricycles and bicycles, {n} in number, have {w} wheels "
        "between them. Work out how many tricycles stand there.",
        n=(12, 40),
        t=(3, 11),
        w=lambda s: 2 * s["n"] + s["t"],
    ),
    template(
        "{a_maker} sends out {n} parcels. Postage is {p} euros up to two kilograms and {q} euros above. "
        "{k} of the parcels are heavy. The post office then takes {d} euros off the sum. How much postage "
        "is due?",
        n=(12, 40),
        p=(4, 6),
        q=(8, 12),
        k=(3, 10),
        d=(5, 15),
    ),
]


def word_problems(count: int, seed: int) -> list[list[str]]:
    """Return `count` problems of one turn each, templates in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [[TEMPLATES[i % len(TEMPLATES)].fill(rng, LISTS)] for i in range(count)]
