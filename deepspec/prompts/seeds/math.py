"""Seed prompts of the kind `math`: grade-school word problems with drawn numbers, people by their trade."""

from __future__ import annotations

import random

from deepspec.messages.slots import Template, template, word_lists

LISTS = word_lists("""
role: baker | teacher | farmer | gardener | carpenter | librarian | florist | mechanic | painter | tailor |
  fisher | nurse | shopkeeper | potter | cook | driver | plumber | waiter | student | jeweller
treat: muffins | bread rolls | cookies | pies | pretzels | cupcakes | tarts | bagels
fruit: apples | pears | plums | oranges | peaches | lemons | mangoes | apricots
thing: notebooks | pencils | stickers | marbles | postcards | buttons | beads | badges | stamps | cards
tool: hammers | brushes | lamps | baskets | buckets | ladders | chairs | mugs
shop: bookshop | toy shop | hardware store | garden centre | grocery store | market stall
gift: bicycle | tent | guitar | camera | skateboard | telescope | pair of boots
animal: goats | sheep | cows | donkeys | horses | rabbits
flower: roses | tulips | lilies | daisies | sunflowers
subject: history | science | geography | music | spelling
drink: lemonade | apple juice | iced tea | orange juice | ginger ale
vehicle: truck | van | bus | car | motorbike
place: lake | castle | beach | museum | farm | mountain village
""")

TEMPLATES: list[Template] = [
    template(
        "{a_role} makes {a} trays of {treat} with {b} on each tray. {c} of them are sold before noon. "
        "How many {treat} are left?",
        a=(3, 9),
        b=(6, 24, 2),
        c=lambda s: s["a"] * s["b"] // 3,
    ),
    template(
        "At a {shop}, one box of {thing} costs ${p}. {a_role} buys {a} boxes and pays with a ${bill} bill. "
        "How much change comes back?",
        p=(3, 9),
        a=(2, 6),
        bill=lambda s: 20 if s["p"] * s["a"] <= 20 else 100,
    ),
    template(
        "{a_role} saves ${a} every week towards a {gift} that costs ${p}. There is already ${b} in the jar. "
        "After how many weeks is there enough money?",
        a=(5, 20, 5),
        b=(10, 60, 5),
        p=(95, 300, 5),
    ),
    template(
        "A {vehicle} travels at {v} kilometres per hour for {h} hours and then at {w} kilometres per hour "
        "for {k} hours. How far does it go altogether?",
        v=(40, 90, 10),
        h=(2, 5),
        w=(30, 80, 10),
        k=(1, 4),
    ),
    template(
        "There are {a} {fruit} in a basket. {a_role} takes {b} of them, and then twice as many as that are "
        "added. How many {fruit} does the basket hold now?",
        a=(15, 60),
        b=(4, 14),
    ),
    template(
        "{a_role} shares {total} {thing} equally among {n} children. Each child then gives {g} back. "
        "How many {thing} does each child keep?",
        n=(3, 9),
        each=(6, 15),
        g=(1, 4),
        total=lambda s: s["n"] * s["each"],
    ),
    template(
        "A shirt costs ${p}. It is marked down by {d} percent, and {a_role} has a coupon for another ${c} "
        "off. What is the final price?",
        p=(20, 80, 20),
        d=(10, 50, 5),
        c=(2, 5),
    ),
    template(
        "A recipe for {n} people needs {g} grams of flour. {a_role} wants to cook for {m} people. "
        "How many grams of flour are needed?",
        n=(2, 6, 2),
        unit=(40, 90, 10),
        g=lambda s: s["n"] * s["unit"],
        m=(7, 15),
    ),
    template(
        "{a_role} is {a} years old and has a sister who is {b} years younger. How old will the sister be "
        "when {the} is {c}?",
        a=(20, 40),
        b=(3, 12),
        c=(45, 70),
        the=lambda s: f"the {s['role']}",
    ),
    template(
        "The scores of {a_role} in four {subject} tests are {a}, {b}, {c} and {d}. What is the average "
        "score?",
        a=(60, 96, 4),
        b=(60, 96, 4),
        c=(60, 96, 4),
        d=(60, 96, 4),
    ),
    template(
        "A rectangular field is {a} metres long and {b} metres wide. {a_role} puts up a fence round it "
        "that costs ${p} per metre. What does the whole fence cost?",
        a=(20, 80, 5),
        b=(10, 45, 5),
        p=(3, 12),
    ),
    template(
        "One machine fills {a} bottles of {drink} in an hour and a newer one fills {b}. "
        "How many bottles do they fill together in a shift of {h} hours?",
        a=(40, 120, 10),
        b=(130, 240, 10),
        h=(4, 9),
    ),
    template(
        "{a_role} earns ${w} an hour and is paid one and a half times that for every hour above {n}. "
        "How much is the pay for a week of {h} hours?",
        w=(12, 30, 2),
        n=(35, 40, 5),
        h=(42, 50),
    ),
    template(
        "A farm has {a} {animal} and {times} times as many chickens. How many legs do all these animals "
        "have?",
        a=(6, 20),
        times=(2, 5),
    ),
    template(
        "There are {n} rows of seats in a hall with {m} seats in each row. {p} percent of the seats are "
        "taken. How many seats are empty?",
        n=(10, 30, 5),
        m=(12, 28, 4),
        p=(20, 80, 20),
    ),
    template(
        "{a_role} reads {a} pages on Monday and {d} pages more each day than the day before. "
        "How many pages have been read by the end of Friday?",
        a=(8, 30),
        d=(2, 9),
    ),
    template(
        "A ribbon of {total} centimetres is divided into two pieces. One piece is {k} times as long as the "
        "other. How long is the shorter piece?",
        k=(2, 6),
        short=(9, 40),
        total=lambda s: (s["k"] + 1) * s["short"],
    ),
    template(
        "The ratio of red to blue {thing} in a bag is {a} to {b}. There are {total} {thing} in all. "
        "How many of them are blue?",
        a=(2, 5),
        b=(3, 8),
        k=(4, 12),
        total=lambda s: (s["a"] + s["b"]) * s["k"],
    ),
    template(
        "{a_role} plants {n} beds of {flower} with {m} plants in each bed. One plant in {k} does not grow. "
        "How many plants survive?",
        k=(3, 6),
        n=(4, 10),
        m=lambda s: s["k"] * 5,
    ),
    template(
        "A taxi ride costs ${base} plus ${p} for every kilometre. {a_role} pays ${total}. "
        "How many kilometres was the ride?",
        base=(3, 7),
        p=(2, 4),
        km=(5, 30),
        total=lambda s: s["base"] + s["p"] * s["km"],
    ),
    template(
        "{n} friends order {m} pizzas cut into {k} slices each and share them equally. "
        "How many slices does each friend get, and how many are left over?",
        n=(4, 9),
        m=(3, 8),
        k=(6, 12, 2),
    ),
    template(
        "{a_role} walks {a} steps on the way to work and {b} steps at work each day, and the same way home. "
        "How many steps are that in {d} days?",
        a=(1200, 3600, 100),
        b=(2000, 6000, 500),
        d=(4, 6),
    ),
    template(
        "A {shop} sells {tool} at ${p} each, or {n} for ${deal}. How much does {a_role} save by buying "
        "{total} of them at the better price?",
        p=(6, 15),
        n=(3, 5),
        deal=lambda s: s["p"] * s["n"] - 4,
        total=lambda s: 2 * s["n"],
    ),
    template(
        "A tank holds {total} litres of water and is one quarter full. A pump adds {r} litres per minute. "
        "How many minutes does it take to fill the tank?",
        r=(5, 25, 5),
        k=(8, 30),
        total=lambda s: s["r"] * s["k"] * 4,
    ),
    template(
        "A class trip to the {place} costs ${bus} for the bus and ${t} for each child's ticket. {n} "
        "children go, and the costs are split equally. How much does each child pay?",
        n=(15, 30),
        k=(4, 11),
        bus=lambda s: s["n"] * s["k"],
        t=(3, 15),
    ),
    template(
        "{a_role} has {a} {thing}. A friend has half as many, and a neighbour has {b} more than the friend. "
        "How many {thing} do the three of them have together?",
        a=(20, 90, 2),
        b=(3, 18),
    ),
    template(
        "Three numbers add up to {total}. The second is twice the first, and the third is {d} more than "
        "the second. What are the three numbers?",
        x=(4, 30),
        d=(2, 15),
        total=lambda s: 5 * s["x"] + s["d"],
    ),
    template(
        "A floor is {a} metres by {b} metres. Square tiles with sides of {t} centimetres cost ${p} each. "
        "How much do the tiles for the whole floor cost?",
        a=(3, 9),
        b=(2, 7),
        t=(25, 50, 25),
        p=(2, 6),
    ),
    template(
        "At {h} o'clock the temperature was {a} degrees. It dropped by {d} degrees every hour. "
        "What was the temperature {k} hours later?",
        h=(4, 9),
        a=(5, 20),
        d=(2, 4),
        k=(3, 8),
    ),
    template(
        "{a_role} buys {a} kilograms of {fruit} for ${p} per kilogram and sells them for ${q} per "
        "kilogram, but {w} kilograms go bad. How big is the profit or loss?",
        a=(20, 60, 5),
        p=(2, 4),
        q=(5, 8),
        w=(2, 7),
    ),
    template(
        "A film lasts {m} minutes and starts at {h}:{q} in the evening. There is a break of {k} minutes. "
        "At what time does the evening end?",
        m=(85, 150, 5),
        h=(6, 8),
        q=(10, 50, 5),
        k=(10, 25, 5),
    ),
    template(
        "Two trucks leave the same depot in opposite directions. One drives at {v} kilometres per hour, "
        "the other at {w}. How far apart are they after {h} hours?",
        v=(50, 80, 5),
        w=(55, 95, 5),
        h=(2, 6),
    ),
    template(
        "{a_role} can finish a job in {a} hours and a helper needs {b} hours. How long does the job take "
        "if they work together?",
        a=(2, 8),
        b=(3, 12),
    ),
    template(
        "{a_role} packs {total} {treat} into boxes of {n}. Full boxes sell for ${p} each and the rest is "
        "given away. How much money comes in?",
        total=(60, 200),
        n=(6, 12, 2),
        p=(5, 14),
    ),
    template(
        "{p} percent of the {n} pupils in a school cycle, a quarter come by bus, and the others walk. "
        "How many pupils walk?",
        p=(10, 50, 5),
        n=(200, 900, 100),
    ),
    template(
        "Solve for x: {a}x + {b} = {total}. Show each step.",
        a=(2, 12),
        b=(1, 40),
        x=(2, 20),
        total=lambda s: s["a"] * s["x"] + s["b"],
    ),
    template(
        "What is {p} percent of {n}? Explain how to get there in your head.", p=(5, 95, 5), n=(40, 900, 20)
    ),
    template(
        "A jug of {drink} serves {n} glasses. A party of {m} guests drinks {k} glasses each. "
        "How many jugs does {a_role} have to prepare?",
        n=(6, 10),
        m=(12, 40),
        k=(2, 4),
    ),
]

ENDINGS = (
    "",
    "",
    "",
    "",
    " Show your work.",
    " Think step by step.",
    " Explain your reasoning.",
    " Give the answer only at the end.",
)
FOLLOW_UPS = (
    "Now double every number in the problem. What changes in the answer?",
    "Can you check the answer in a different way?",
    "Explain the same solution to a child in primary school.",
    "Write a similar problem of your own and solve it.",
    "Which step do people usually get wrong here?",
    "Write the calculation as a single expression.",
)


def write(template: Template, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Write a first turn and follow-ups that suit it."""
    return template.fill(rng, LISTS) + rng.choice(ENDINGS), FOLLOW_UPS
