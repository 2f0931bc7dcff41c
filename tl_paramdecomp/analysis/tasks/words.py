"""Words and templates that task prompts are made of."""

# Every word that must be one token stands behind a space, never at the beginning of a prompt.


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Words with their plurals, in -s or behind a stroke."""
    pairs = (word.partition("/") for word in _words(text))
    return tuple((one, many or f"{one}s") for one, _, many in pairs)


FEMALE_NAMES = _words(
    "Mary Anna Emma Sarah Laura Julia Kate Alice Ruth Helen Jane Rose Lucy Clara Grace Nora Amy Eva Lily Susan Linda "
    "Karen Lisa Nancy Rachel Rebecca Diana Maria Ellen Jessica"
)
MALE_NAMES = _words(
    "John Tom David James Peter Mark Paul Adam Henry Jack Simon Luke Oscar Victor Frank George Leo Max Ben Sam Robert "
    "Michael William Richard Thomas Daniel Kevin Brian Steven Andrew"
)
NAMES = FEMALE_NAMES + MALE_NAMES
PLACES = _words("store park school garden market river station library farm beach office restaurant hospital museum")
OBJECTS = _words("book ring drink ball cake letter flower hat key cup lamp ticket map coin bottle basket")
ADJECTIVES = _words("great happy proud young kind clever brave quiet tall gentle careful famous good busy")
JOBS = _words("doctor teacher nurse farmer singer writer painter driver baker sailor friend neighbor lawyer coach")
EVENTS = _words(
    "war trip voyage siege reign project plague contract festival strike study drought campaign conflict crisis dispute "
    "expedition famine marriage mission rebellion revolt struggle tour treaty trial truce winter journey feud"
)

# {S} gives to the other of {A} and {B}. The names stand together and apart, once and twice removed from the place.
IOI_TEMPLATES = (
    "When {A} and {B} got to the {place}, {S} handed a {object} to",
    "After {A} and {B} had left the {place}, {S} gave a {object} to",
    "While {A} was showing {B} around the {place}, {S} passed a {object} to",
    "This morning {A} and {B} walked to the {place}. Then {S} gave a {object} to",
    "Near the {place}, {A} met {B}, and {S} offered a {object} to",
    "Because {A} and {B} both worked at the {place}, {S} lent a {object} to",
    "Yesterday {A} ran into {B} at the {place}. Before long {S} sold a {object} to",
    "Once {A} and {B} were alone in the {place}, {S} decided to give a {object} to",
    "There were only {A} and {B} at the {place}. Later {S} brought a {object} to",
    "On the way to the {place}, {A} and {B} had a long talk. Afterwards {S} showed a {object} to",
)
PRONOUN_TEMPLATES = (
    "So {N} is a {adj} {job}, isn't",
    "Everyone says that {N} was a {adj} {job}, wasn't",
    "The {adj} {job} is called {N}, and",
    "We like {N} because",
    "People waited for {N} at the {place} until",
    "The {job} told us that {N} was late because",
)
# {first} is century and year, {C} the century that the answer goes on with.
GREATER_THAN_TEMPLATES = (
    "The {event} lasted from the year {first} to the year {C}",
    "The {event} began in the year {first} and ended in the year {C}",
    "The long {event} went on from the year {first} until the year {C}",
)
CENTURIES = tuple(str(century) for century in range(11, 19))
YEARS = tuple(f"{year:02d}" for year in range(100))

FUNCTIONS = _words("load save run make find read write check build move open send start stop update create")
ARGUMENTS = _words(
    "size name path data file key value index count mode color width height line text user time date type level page "
    "group image model list source target state table title token weight message number order option frame "
    "event field result layer object point string window"
)
DESCRIPTIONS = _words("first new main current old last given next local full default common public total simple final")
THINGS = _words("part side form part kind place set point case unit base block copy entry")
# {a} to {e} are the arguments of the signature; the third that the text describes is {d}.
DOCSTRING_TEMPLATES = (
    'def {function}(self, {a}, {b}, {c}, {d}, {e}):\n    """the {w} {t} of the {t}\n\n'
    "    :param {b}: the {w} {t}\n    :param {c}: the {w} {t}\n    :param",
    'def {function}(self, {a}, {b}, {c}, {d}, {e}):\n    """\n    The {w} {t}.\n\n'
    "    :param {b}: {w} {t}\n    :param {c}: {w} {t}\n    :param",
)

PEOPLE_PAIRS = _pairs(
    "doctor teacher farmer writer driver lawyer student parent friend neighbor king child/children guard manager"
)
THING_PAIRS = _pairs(
    "key book car house table picture window tree letter ship door chair bridge machine garden box/boxes"
)
# {noun} is the subject; {thing} and {person} stand between it and the verb, in either number.
AGREEMENT_TEMPLATES = (
    "The {noun}",
    "The {noun} near the {thing}",
    "The {noun} behind the {thing}",
    "We know that the {noun} next to the {thing}",
    "The {noun} that the {person} liked",
    "Today the {noun} from the {person}",
)
VERB_PAIRS = _pairs("is/are was/were has/have")
