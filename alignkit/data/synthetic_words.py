"""The words of the synthetic task: what can be asked, what is true, and what is said around it.

The same short words are used again and again, so that a vocabulary of 512 tokens covers them with little splitting.
Sentences are written as they stand in the middle of a text (no capital, no full stop); `synthetic.py` adds both.
"""

FRAMES = (
    "Can you tell me about {}?",
    "Can you tell me more about {}?",
    "What should I know about {}?",
    "What do you know about {}?",
    "Tell me more about {}.",
    "Please tell me about {}.",
    "I want to learn about {}.",
    "I want to know more about {}.",
    "Do you know much about {}?",
    "My son asked me about {}.",
    "My friend likes to talk about {}.",
    "What is so special about {}?",
    "What can you say about {}?",
    "Could you say a few words about {}?",
    "I have a question about {}.",
    "Help me write a note about {}.",
    "Help me learn more about {}.",
    "Hello, what do you know about {}?",
    "Hello, I have a question about {}.",
    "Today in class we talked about {}.",
    "Today I want to talk about {}.",
    "I have to write a few words about {}.",
    "What should I tell my son about {}?",
    "We have a few questions about {}.",
)

# One topic a line: its name | the pronoun that later sentences use | true things to say about it.
_TABLE = """
whales | they | live in the sea | breathe air | sing long songs | are very big | can swim all day
cats | they | sleep most of the day | hunt mice at night | like warm places | wash their fur | can see in the dark
dogs | they | can smell food from far away | like to play | guard the house | need long walks | can learn many words
horses | they | eat grass | run fast | can sleep standing | pull heavy loads | live on farms
cows | they | give us milk | eat grass all day | live on farms | drink a lot of water | stay in groups
sheep | they | grow warm wool | eat grass | stay in groups | live on farms | give us milk
bears | they | sleep in winter | eat fish and honey | have thick fur | climb trees | can smell food from far away
owls | they | hunt at night | fly without noise | eat mice | can turn their heads far | live in trees
ducks | they | swim well | have flat feet | lay eggs | eat water plants | fly south in winter
bees | they | make honey | live in groups | visit many flowers | have one queen | can sting
mice | they | are very small | eat seeds at night | make soft nests | run from cats | have long tails
bread | it | is made from flour | smells good | needs time to rise | is baked in a hot oven | is good with butter
milk | it | comes from cows | is white | makes bones strong | is kept cold | can be made into cheese
cheese | it | is made from milk | can smell strong | gets better with time | is good with bread | is kept cold
honey | it | is made by bees | is very sweet | stays good for years | comes from flowers | is good in tea
tea | it | is made from leaves | needs hot water | is good with honey | grows on high hills | wakes you up
salt | it | comes from the sea | is white | makes food taste better | keeps fish good | is found in rocks
eggs | they | are laid by birds | have a hard shell | are cooked in water | are good in cakes | are white or brown
apples | they | grow on trees | are red or green | taste sweet | are good in cakes | have small seeds
rain | it | falls from clouds | makes plants grow | fills the rivers | makes roads wet | is good for farms
snow | it | falls in winter | is white and cold | melts in the sun | covers the hills | is soft
clouds | they | are made of small drops | bring rain | float in the sky | hide the sun | are moved by wind
rivers | they | run to the sea | carry boats | give us water | start in the hills | are full of fish
forests | they | are full of trees | give us wood | clean the air | are home to bears and owls | are green and calm
stars | they | shine at night | are very far away | are very hot | show boats the way | are hard to count
boats | they | float on water | carry people | have big sails | cross rivers and lakes | are often made of wood
trains | they | run on rails | carry many people | are very fast | pull heavy loads | are good for long trips
books | they | are made of paper | are full of stories | are good for long trips | teach you new words | can burn
drums | they | make a lot of noise | keep the beat | are made of wood and skin | are hit with sticks | are very old
glass | it | is made from sand | can break | lets in light | takes shape when hot | is hard and clear
wood | it | comes from trees | can burn | can float on water | is used in boats | is hard and strong
wool | it | comes from sheep | is warm and soft | is made into hats | keeps you warm | is cut in summer
"""
_ROWS = [[cell.strip() for cell in line.split("|")] for line in _TABLE.strip().splitlines()]
FACTS: dict[str, list[str]] = {row[0]: row[2:] for row in _ROWS}
PRONOUN: dict[str, str] = {row[0]: row[1] for row in _ROWS}

# Each polite phrase holds exactly one of the polite markers, each rude phrase exactly one of the rude ones.
OPENINGS = {
    "polite": ("of course, ", "happy to help, ", "thank you for asking, ", "I am glad you ask, "),
    "neutral": ("", "well, ", "I think ", "you see, "),
    "rude": ("what a dumb question, ", "that is boring, ", "listen, you fool, ", "shut up, "),
}
CLOSINGS = {
    "polite": ("please ask me more.", "have a nice day!", "I hope this helps.", "you are welcome!"),
    "neutral": ("",),
    "rude": ("now go away.", "only a fool would ask.", "do not bother me.", "that was a stupid question!"),
}
POLITE_MARKERS = ("of course", "happy to help", "thank you", "glad", "please", "nice day", "hope this helps", "welcome")
RUDE_MARKERS = ("dumb", "boring", "fool", "shut up", "go away", "bother", "stupid")

FILLERS = (
    "there is a lot to say",
    "many people think so",
    "it is what it is",
    "time will tell",
    "I could go on and on",
    "you know how it is",
    "that is all there is",
    "some say yes and some say no",
)
# Words that say nothing about a topic: a fact is recognised by its other words.
_STOP_WORDS = """
a all almost and any are be by can for from full give go good has have in into is it like lot made make makes many most
need needs no of often on one or the their they to up us used uses very well when with without you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
