"""The small world that the tasks' texts speak of. Every word is one token, so that a name is one key."""

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Adam Alice Anna Boris Bruno Carl Clara Daniel Diana Edgar Ella Emil Emma Felix Frank Fred Grace Greta Hanna Helen Henry "
    "Hugo Ida Igor Irene Ivan Jack Jane Jonas Julia Karen Karl Klaus Lara Laura Leo Lena Louis Lucy Maria Martin Max Mia Mike "
    "Nina Nora Olga Oscar Otto Paul Paula Peter Rita Rosa Ruth Sam Sarah Simon Sofia Tara Theo Tom Vera Victor"
)


class Fact(NamedTuple):
    """A kind of thing to know of a person: how it is told, how it is asked for, what it may be."""

    told: str
    asked: str
    values: tuple[str, ...]


CITIES = _words("Rome Paris Oslo Cairo Lima Delhi Berlin Tokyo Madrid Boston Dublin Prague Vienna Lisbon Athens Kyoto")
JOBS = _words(
    "baker doctor farmer lawyer painter pilot poet nurse singer tailor teacher writer judge miner sailor waiter"
)
PETS = _words("cat dog horse parrot rabbit turtle snake goat mouse duck pony fox sheep owl bear frog")
COLOURS = _words("red green blue yellow black white brown pink purple orange silver golden gray violet amber ivory")
FOODS = _words("bread rice soup salmon cheese pasta pizza salad beans eggs cake honey corn pie fish steak")
DRINKS = _words("tea coffee milk juice water wine beer cocoa cider lemonade rum gin sake soda punch whisky")
INSTRUMENTS = _words("piano violin guitar flute cello drum harp trumpet organ banjo oboe tuba viola horn lute bass")

FACTS = {
    "city": Fact("- {name} lives in {value}.", "Where does {name} live?", CITIES),
    "job": Fact("- {name} works as a {value}.", "What does {name} work as?", JOBS),
    "pet": Fact("- {name} has a {value}.", "Which pet does {name} have?", PETS),
    "colour": Fact("- {name} likes {value}.", "Which colour does {name} like?", COLOURS),
    "food": Fact("- {name} cooks {value}.", "What does {name} cook?", FOODS),
    "drink": Fact("- {name} drinks {value}.", "What does {name} drink?", DRINKS),
    "instrument": Fact("- {name} plays the {value}.", "What does {name} play?", INSTRUMENTS),
}

VERBS = _words(
    "fetch parse merge load save build check clean close count draw fill find join list make move open pack read"
)
NOUNS = _words(
    "rows file text node page item path user data line table list code name value block cache frame group image"
)
ARGUMENTS = _words(
    "width height limit mode size start stop step offset depth index total scale delay shape weight label flag"
)

WORDS = tuple(dict.fromkeys([*NAMES, *(value for fact in FACTS.values() for value in fact.values), *VERBS, *ARGUMENTS]))

# What else the tasks' lines are made of, as it stands in them.
GRAMMAR = (
    "Question: Answer: Summary of the notes: Document Passage Note from - Where What Which does do has have had in the boss of "
    "live lives work works as a for like likes cook cooks drink drinks play plays pet colour job pass phrase is line: => "
    "result = def"
)
