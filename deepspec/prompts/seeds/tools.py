"""Conversations with tools, written by the project: a question, the call that answers it, its result, and a next turn.

What is recorded for the assistant serves to know which result belongs to which call; the target's own turns are learnt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from deepspec.messages.prompt import Chat
from deepspec.messages.rows import read_row

PLACES = (
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Kyoto",
    "Quito",
    "Tunis",
    "Perth",
    "Riga",
    "Lima",
    "Ghent",
    "Turin",
    "Hanoi",
)
SKIES = ("clear", "cloudy", "rain", "fog", "snow", "wind")
UNITS = (("kilometres", "miles", 0.6214), ("kilograms", "pounds", 2.2046), ("litres", "gallons", 0.2642))
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = ("dentist", "choir", "gym", "library", "market", "swimming", "piano lesson", "book club")
SYSTEMS = (
    "You are a helpful assistant with tools. Call a tool when a question needs it.",
    "Answer briefly. Use the tools that you are given, and say where a number comes from.",
    "You help people on the road. Look things up before you answer.",
)


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    _tool("weather", "Tell the weather at a place.", place="string"),
    _tool(
        "convert", "Convert an amount from one unit to another.", amount="number", unit="string", to="string"
    ),
    _tool("calculate", "Compute an arithmetic expression.", expression="string"),
    _tool("calendar", "List what is planned on a day.", day="string"),
]
Turn = tuple[str, str, dict[str, Any], dict[str, Any], str]  # question, tool, arguments, result, answer


def _weather(rng: random.Random) -> Turn:
    place, degrees, sky = rng.choice(PLACES), rng.randint(-5, 34), rng.choice(SKIES)
    asked = rng.choice(
        ("What is the weather like in {}?", "Do I need a coat in {} today?", "How warm is it in {}?")
    )
    result = {"place": place, "degrees": degrees, "sky": sky}
    return (
        asked.format(place),
        "weather",
        {"place": place},
        result,
        f"In {place} it is {degrees} degrees, {sky}.",
    )


def _convert(rng: random.Random) -> Turn:
    (unit, to, rate), amount = rng.choice(UNITS), rng.randint(2, 400)
    asked = rng.choice(("How many {2} are {0} {1}?", "Please convert {0} {1} to {2}."))
    value = round(amount * rate, 1)
    arguments = {"amount": amount, "unit": unit, "to": to}
    return (
        asked.format(amount, unit, to),
        "convert",
        arguments,
        {"value": value},
        f"{amount} {unit} are {value} {to}.",
    )


def _calculate(rng: random.Random) -> Turn:
    a, b, c = rng.randint(12, 99), rng.randint(12, 99), rng.randint(2, 40)
    asked = rng.choice(("What is {} times {} plus {}?", "Multiply {} by {} and add {}, please."))
    value = a * b + c
    return (
        asked.format(a, b, c),
        "calculate",
        {"expression": f"{a} * {b} + {c}"},
        {"value": value},
        f"It is {value}.",
    )


def _calendar(rng: random.Random) -> Turn:
    day, thing, hour = rng.choice(DAYS), rng.choice(THINGS), rng.randint(8, 19)
    asked = rng.choice(("What have I planned for {}?", "Am I free on {}?"))
    result = {"day": day, "entries": [{"hour": hour, "what": thing}]}
    return asked.format(day), "calendar", {"day": day}, result, f"On {day} you have {thing} at {hour}."


KINDS = (_weather, _convert, _calculate, _calendar)


def iter_tools(seed: int) -> Iterator[Chat]:
    """Yield conversations of two questions that tools answer; equal ones can come again."""
    rng = random.Random(f"{seed}:tools")
    while True:
        messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(SYSTEMS)}]
        for number, kind in enumerate(rng.sample(KINDS, 2)):
            question, name, arguments, result, answer = kind(rng)
            call = {"id": f"call{number:05d}", "function": {"name": name, "arguments": arguments}}
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": result},
                {"role": "assistant", "content": answer},
            ]
        yield read_row({"messages": messages, "tools": TOOLS}).chat
