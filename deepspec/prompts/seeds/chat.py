"""Seed prompts of the kind `chat`: explanations, advice, letters, stories, lists and rewriting."""

from __future__ import annotations

import random
from dataclasses import dataclass

from deepspec.messages.slots import Number, Template, template, word_lists

LISTS = word_lists("""
science: photosynthesis | gravity | the water cycle | black holes | plate tectonics | vaccines | magnetism |
  evolution | the greenhouse effect | sound waves | the immune system | volcanoes | rainbows | tides | DNA |
  fermentation | atoms | antibiotics | the ozone layer | friction | comets | hibernation | static
  electricity | earthquakes | osmosis
technology: a search engine | solar panels | GPS | a refrigerator | encryption | a barcode scanner | a 3D
  printer | touch screens | wind turbines | a microwave oven | machine learning | cloud storage | an
  electric motor | Wi-Fi | a compiler | a database index | noise-cancelling headphones | a heat pump |
  version control | a hash table
history: the Roman Empire | the Silk Road | the printing press | the Industrial Revolution | the Renaissance
  | ancient Egypt | the Space Race | the Great Wall of China | the Black Death | the French Revolution | the
  Vikings | the Inca Empire | the invention of writing | the Suez Canal | the fall of the Berlin Wall | the
  Ottoman Empire
economy: inflation | compound interest | supply and demand | a mortgage | the stock market | insurance |
  taxes | a budget deficit | exchange rates | opportunity cost | a recession | a pension fund | index funds
audience: a ten-year-old | a beginner | a grandparent | a high school student | a busy manager | a curious
  child | someone without a science background | a new colleague
hobby: gardening | photography | chess | running | baking bread | playing the guitar | knitting |
  birdwatching | painting with watercolours | cycling | swimming | pottery | hiking | learning Spanish |
  writing poetry | woodworking | home brewing | yoga | stargazing | juggling | calligraphy | rock climbing
habit: getting up early | reading every day | drinking enough water | exercising | saving money | keeping a
  diary | cooking at home | going to bed on time | meditating | spending less time on the phone | tidying up
  | taking breaks
problem: I keep forgetting appointments | my neighbours are noisy at night | I feel nervous before
  presentations | I cannot fall asleep | my team misses its deadlines | my houseplants keep dying | I
  procrastinate too much | I get distracted while studying | my laptop is slow | I have too many meetings |
  my bread does not rise | I find it hard to make friends in a new city | my child does not like vegetables
  | my bike tyres go flat often
recipient: my landlord | a customer | my manager | a hotel | the city council | a supplier | a former
  teacher | a colleague | the customer service of an online shop | the parents of my class | the members of
  our sports club | a job recruiter
matter: a late delivery | a broken heater | a day off next Friday | a change of the meeting time | a double
  booking | a missing invoice | an apology for a mistake | thanks for their support | a recommendation
  letter | a refund | the plans for the summer party | a delayed project | a noisy building site | an
  invitation to an open day
tone: polite | friendly | formal | short | cheerful | firm but polite | warm
hero: a lighthouse keeper | a retired astronaut | a lost robot | a young inventor | a talking fox | a night
  bus driver | a clockmaker | a dragon who is afraid of fire | a shy librarian | a cat that runs a bakery |
  an old sailor | a gardener on the moon | a street musician | a detective who never sleeps | a postman in
  the mountains
event: finds a hidden door | receives a letter from the future | must cross a frozen river | makes an
  unlikely friend | loses something precious | hears a strange melody every night | discovers a map | breaks
  an old promise | wakes up in another century | learns to say goodbye | saves the village festival | gets a
  second chance
mood: funny | sad but hopeful | mysterious | gentle | exciting | dreamy
season: spring | summer | autumn | winter | rain | the sea | the night sky | an old tree | a train station |
  morning coffee
city: Lisbon | Kyoto | Istanbul | Buenos Aires | Edinburgh | Marrakesh | Prague | Vancouver | Hanoi | Cape
  Town | Naples | Copenhagen | Mexico City | Seoul | Vienna
country: Brazil | Japan | Kenya | Norway | India | Morocco | Canada | Vietnam | Peru | Greece | Australia |
  Turkey
dish: lentil soup | pancakes | vegetable curry | pizza dough | a potato salad | fried rice | an apple pie |
  hummus | a mushroom risotto | tomato sauce | banana bread | an omelette | a bean stew | oven-roasted
  vegetables
ingredient: eggs | butter | milk | flour | sugar | cream | yeast | soy sauce | garlic | honey
product: a reusable water bottle | a folding bicycle | a desk lamp | handmade soap | a language app |
  waterproof shoes | a garden tool set | a lunch box | a weather station | a board game | a travel pillow |
  an online pottery course
business: a small bakery | a bookshop café | a bike repair shop | a dog-walking service | a community garden
  | a language school | a flower shop | a mobile library | a second-hand clothes store | a climbing gym
animal: elephants | octopuses | honeybees | owls | dolphins | penguins | ants | wolves | bats | sea turtles
  | crows | hummingbirds | salmon | camels | chameleons | beavers
word: resilient | ambiguous | serendipity | frugal | candid | paradox | empathy | meticulous | nostalgia |
  ironic | pragmatic | benevolent
choice: renting or buying a home | working from home or in an office | a laptop or a desktop computer | tea
  or coffee in the morning | living in a city or in the country | a bus pass or a bicycle | e-books or paper
  books | learning alone or in a class | a gas stove or an induction stove | a cat or a dog | cash or cards
policy: cars should be banned from city centres | homework should be optional | the working week should have
  four days | zoos should be closed | public transport should be free | school should start later in the
  morning | every pupil should learn to cook | mobile phones should stay out of classrooms | museums should
  be free
job: nurse | software developer | primary school teacher | electrician | translator | data analyst | chef |
  architect | train driver | graphic designer | park ranger | pharmacist | sales assistant | journalist
skill: active listening | time management | public speaking | negotiation | giving feedback | teamwork |
  critical thinking | decision making | conflict resolution | note taking | delegating work | asking good
  questions
place: the beach | a crowded market | a quiet forest | a mountain hut | a railway café | a desert at dawn |
  a rooftop garden | an empty theatre | a fishing harbour | a library at night
sentence: me and him goes to the market yesterday | the meeting was very very long and it was boring | she
  don't know where is her keys | in my opinion I think that the plan is good | there is many reason why
  people likes music | he speak English good but slow | the informations was not helpful | due to the fact
  that it rained we did not go | I am living here since five years | it's color is more brighter then mine
passage: The old mill by the river closed in spring. Since then, the village has looked for someone to run
  it. Two families have shown interest, but the roof needs repair first. | Bees visit flowers to collect
  nectar. While they do, pollen sticks to their bodies and travels to the next flower. Without this, many
  plants could not make seeds. | Our office moves to the new building on Monday. Please pack your desk by
  Friday noon, label every box, and take personal things home. The lifts will be reserved for the movers. |
  The museum opens a new hall about the sea in June. It shows ship models, maps and a whale skeleton. Entry
  is free in the first week, but visitors need to book a time. | Sleep helps the brain sort what it learned
  during the day. People who sleep too little remember less, react more slowly and catch colds more often. |
  A small town in the north heats its homes with warm water from an old mine. The project took six years.
  Heating bills have fallen, and other towns now want to copy the idea. | The concert was meant to start at
  eight, but the singer's train was late. The audience waited, sang together, and in the end the evening
  became longer and livelier than planned.
virtue: patience | kindness | curiosity | honesty | friendship | courage | boredom | silence | failure |
  music | humour
language: French | Spanish | German | Italian | Portuguese
phrase: Where is the nearest pharmacy | I would like a table for two | What time does the museum open |
  Thank you for your help | Could you speak more slowly | How much does this cost | I have lost my bag | The
  train leaves at noon | I am allergic to nuts | See you tomorrow
group: a family with small children | a group of friends | an elderly couple | a school class | a solo
  traveller | a sports team | ten colleagues
""")


@dataclass(frozen=True)
class Request:
    """A template, and the name of the follow-ups that suit it."""

    template: Template
    kind: str


FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "explain": (
        "Can you give me an everyday example?",
        "Now explain it in just two sentences.",
        "What do people most often get wrong about this?",
        "Why does this matter in daily life?",
        "Please turn that into five short bullet points.",
        "How would you test whether I understood it?",
    ),
    "advice": (
        "Which of these should I start with, and why?",
        "I have only ten minutes a day. What would you change?",
        "What if that does not work?",
        "Can you turn this into a plan for one week?",
        "What is the cheapest way to do it?",
    ),
    "write": (
        "Please make it half as long.",
        "Rewrite it in a more casual tone.",
        "Can you suggest a better opening line?",
        "Now write a second version from another point of view.",
        "Add a short title and a closing sentence.",
    ),
    "list": (
        "Tell me more about the third one.",
        "Sort them from the easiest to the hardest.",
        "Add three that are less well known.",
        "Which one is your favourite, and why?",
    ),
    "rewrite": (
        "Explain what you changed.",
        "Now make it sound more formal.",
        "Give me two other versions.",
    ),
}


def _request(kind: str, text: str, **numbers: Number) -> Request:
    return Request(template(text, **numbers), kind)


TEMPLATES: list[Request] = [
    _request("explain", "Explain {science} to {audience}."),
    _request("explain", "How does {technology} work?"),
    _request("explain", "What do {science} and {science2} have to do with each other, if anything?"),
    _request("explain", "Give a short overview of {history} and say why it still matters."),
    _request("explain", "What were the main causes and effects of {history}?"),
    _request("explain", "What is {economy}? Explain it to {audience} with a simple example."),
    _request("explain", "Why are {animal} important for nature?"),
    _request("explain", "How do {animal} communicate with each other?"),
    _request("explain", 'What does the word "{word}" mean? Use it in {n} sentences.', n=(2, 4)),
    _request("explain", "What does {a_job} do on a normal day?"),
    _request("explain", "Describe {technology} with a comparison from the kitchen."),
    _request("explain", "Is {virtue} something that can be learned? Give reasons."),
    _request("advice", "I want to start {hobby}. What do I need, and how should I begin?"),
    _request("advice", "How can I make {habit} a habit?"),
    _request("advice", "{problem}. What can I do?"),
    _request("advice", "Give me advice: {problem}, and I have already tried the obvious things."),
    _request("advice", "How do I prepare for a job interview as {a_job}?"),
    _request("advice", "What should {group} see in {city} in {n} days?", n=(2, 5)),
    _request("advice", "How can I get better at {skill} at work?"),
    _request("advice", "I have no {ingredient} at home. What can I use in place of it for {dish}?"),
    _request("advice", "Help me choose: {choice}? Ask yourself what matters most and give a recommendation."),
    _request(
        "advice",
        "Make a weekly plan for someone who wants to improve at {hobby} in {n} hours a week.",
        n=(2, 6),
    ),
    _request("write", "Write {a_tone} email to {recipient} about {matter}."),
    _request(
        "write",
        "Write a message to {recipient} about {matter}. It should be {tone} and at most {n} words.",
        n=(40, 120, 20),
    ),
    _request("write", "Write a {mood} short story about {hero} who {event}."),
    _request("write", "Write the first paragraph of a novel in which {hero} {event}."),
    _request("write", "Write a short poem about {season}."),
    _request("write", "Write a haiku about {place} and explain the picture behind it."),
    _request("write", "Write a product description for {product} in about {n} words.", n=(50, 120, 10)),
    _request("write", "Write a short speech about {virtue} for a school graduation."),
    _request("write", "Write a dialogue between {hero} and {hero2}."),
    _request("write", "Describe {place} so that the reader can almost smell and hear it."),
    _request("write", "Write a notice for the door of {business} that announces new opening hours."),
    _request("write", "Write a recipe for {dish} that serves {n} people.", n=(2, 8)),
    _request("write", "Write a short argument in favour of this view: {policy}."),
    _request("write", "Write one paragraph for and one against the claim that {policy}."),
    _request("write", "Write a cover letter of {n} sentences for a position as {a_job}.", n=(4, 9)),
    _request("list", "List {n} interesting facts about {animal}.", n=(3, 8)),
    _request("list", "List {n} tips for {hobby}.", n=(3, 9)),
    _request("list", "Suggest {n} names for {business}.", n=(4, 10)),
    _request("list", "What are {n} things to try when you visit {country} for the first time?", n=(3, 8)),
    _request("list", "Give me {n} ideas for what {group} can do on a rainy afternoon.", n=(3, 8)),
    _request("list", "Name {n} questions that {a_job} should expect from customers or colleagues.", n=(3, 7)),
    _request("list", "Compare {hobby} and {hobby2} as hobbies in a table with cost, time and benefits."),
    _request("list", "Compare life in {country} and {country2}: climate, food and festivals."),
    _request("list", "What are the pros and cons of {choice}?"),
    _request("list", "Make a packing list for a trip to {city} for {n} days.", n=(2, 10)),
    _request("rewrite", 'Correct the grammar of this sentence and explain each mistake: "{sentence}."'),
    _request("rewrite", 'Rewrite this so that it sounds {tone}: "{sentence}."'),
    _request("rewrite", "Summarise this text in one sentence.\n\n{passage}"),
    _request("rewrite", "Rewrite the following text for {audience}.\n\n{passage}"),
    _request("rewrite", "Write {n} questions that the following text answers.\n\n{passage}", n=(2, 5)),
    _request("rewrite", 'Translate "{phrase}" into {language} and explain each word.'),
]


def write(request: Request, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Write a first turn and follow-ups that suit it."""
    return request.template.fill(rng, LISTS), FOLLOW_UPS[request.kind]
