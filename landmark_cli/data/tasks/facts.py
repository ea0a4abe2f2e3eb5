"""What is said of people, things, places and records, and how it is asked.

In every wording {s} stands for who or what a fact is about, and {v} for what the fact says of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from landmark_cli.data.tasks.vocabulary import Term


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        subject, value: the vocabularies of {s} and {v}.
        key: what a list, a table or a program calls the value.
        says: sentences that state the fact.
        asks: questions for the value.
        lead: a sentence that the value would end.
        back: a question for the subject; none where a subject may have several values.
        count: a question for how many values the subject has, where it may have several.
    """

    subject: str
    value: str
    key: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    lead: str
    back: str = ""
    count: str = ""


@dataclass(frozen=True)
class Fact:
    """One fact: a relation, who or what it is about, and what it says."""

    relation: Relation
    subject: Term
    value: Term


RELATIONS = (
    Relation("thing", "price", "price",
             ("{s} was sold for {v}", "{s} costs {v}", "they wanted {v} for {s}", "{v} is what {s} goes for",
              "nobody would part with {s} under {v}"),
             ("How much does {s} cost?", "At what price does {s} go?", "What would one pay for {s}?"),
             "{s} costs", "Which article costs {v}?"),
    Relation("thing", "person", "maker",
             ("{s} was made by {v}", "{v} made {s}", "{s} is the work of {v}", "the mark on {s} is that of {v}"),
             ("Who made {s}?", "Whose work is {s}?", "By whom was {s} made?"),
             "{s} was made by", "Which piece did {v} make?"),
    Relation("thing", "place", "location",
             ("{s} is kept at {v}", "{s} stands in a hall at {v}", "they took {s} to {v}, where it has stayed",
              "whoever wants to see {s} must go to {v}"),
             ("Where is {s} kept?", "To which town must one go to see {s}?", "Where does {s} stand?"),
             "{s} is kept at", "What is kept at {v}?"),
    Relation("thing", "weight", "weight",
             ("{s} weighs {v}", "on the scales {s} came to {v}", "{s} was found to weigh {v}",
              "{v} is the weight given for {s}"),
             ("How heavy is {s}?", "What does {s} weigh?", "How much did {s} come to on the scales?"),
             "{s} weighs", "Which object weighs {v}?"),
    Relation("thing", "code", "stock_number",
             ("{s} has the stock number {v}", "under the foot of {s} one reads {v}", "{s} is booked as {v}",
              "a label marked {v} hangs from {s}"),
             ("Under which stock number is {s} booked?", "Which mark does {s} bear?", "How is {s} labelled?"),
             "{s} is booked as", "Which article is booked as {v}?"),
    Relation("thing", "date", "date_of_purchase",
             ("{s} was bought on {v}", "on {v} somebody bought {s}", "{s} came into the house on {v}",
              "the receipt for {s} is dated {v}"),
             ("When was {s} bought?", "On what day did {s} come into the house?", "Which date stands on the receipt "
              "for {s}?"),
             "{s} was bought on", "What was bought on {v}?"),
    Relation("thing", "colour", "lining",
             ("{s} is lined in {v}", "inside, {s} is {v}", "the lining of {s} is {v}", "someone had lined {s} in {v}"),
             ("In which colour is {s} lined?", "What colour has {s} inside?", "How is {s} lined?"),
             "the lining of {s} is", "Which object is lined in {v}?"),
    Relation("person", "trade", "occupation",
             ("{s} is a {v}", "{s} works as a {v}", "as a {v}, {s} was known in every street",
              "{s} earned a living as a {v}"),
             ("What is {s} by trade?", "How does {s} earn a living?", "At what does {s} work?"),
             "by trade {s} is a", "Who is a {v}?"),
    Relation("person", "place", "birthplace",
             ("{s} was born in {v}", "{s} is from {v}", "{v} is where {s} was born", "{s} first saw the light in {v}"),
             ("Where was {s} born?", "From which town does {s} come?", "In what place did {s} first see the light?"),
             "{s} was born in", "Who was born in {v}?"),
    Relation("person", "date", "date_of_birth",
             ("{s} was born on {v}", "the birthday of {s} is given as {v}", "{s} came into the world on {v}",
              "{v} was the day of birth of {s}"),
             ("When was {s} born?", "On what day did {s} come into the world?", "Which birthday has {s}?"),
             "{s} was born on", "Who was born on {v}?"),
    Relation("person", "code", "locker",
             ("{s} has locker {v}", "the locker of {s} is {v}", "{s} keeps a coat in locker {v}",
              "locker {v} was given to {s}"),
             ("Which locker has {s}?", "In which locker does {s} keep a coat?", "What locker was given to {s}?"),
             "the locker of {s} is", "Who has locker {v}?"),
    Relation("person", "dish", "favourite_dish",
             ("{s} likes nothing so much as {v}", "{s} always orders {v}", "for {s} they had to cook {v}",
              "{v} is the favourite dish of {s}"),
             ("What does {s} always order?", "Which dish does {s} like best?", "What did they have to cook for {s}?"),
             "{s} always orders", "Who always orders {v}?"),
    Relation("person", "time", "appointment",
             ("{s} is expected at {v}", "at {v} it is the turn of {s}", "{s} has an appointment at {v}",
              "they told {s} to come at {v}"),
             ("At what hour is {s} expected?", "When is it the turn of {s}?", "For what time was {s} told to come?"),
             "{s} is expected at", "Who is expected at {v}?"),
    Relation("person", "thing", "inheritance",
             ("{s} inherited {v}", "{v} was left to {s}", "in the will, {s} got {v}", "{s} came to possess {v}"),
             ("What did {s} inherit?", "Which object was left to {s}?", "What did {s} get in the will?"),
             "{s} inherited", "Who inherited {v}?"),
    Relation("place", "number", "inhabitants",
             ("{s} has {v} inhabitants", "{v} people live in {s}", "at the last census they found {v} souls in {s}",
              "the population of {s} stands at {v}"),
             ("How many people live in {s}?", "What did the census find for {s}?", "How large is the town of {s}?"),
             "the population of {s} stands at", "Which town has {v} inhabitants?"),
    Relation("place", "date", "date_of_charter",
             ("{s} was granted its charter on {v}", "the charter of {s} is dated {v}",
              "on {v}, {s} became a town", "{s} keeps {v} as the day of its charter"),
             ("When was {s} granted its charter?", "On what day did {s} become a town?", "How is the charter of {s} "
              "dated?"),
             "the charter of {s} is dated", "Which town has a charter dated {v}?"),
    Relation("place", "person", "mayor",
             ("the mayor of {s} is {v}", "{v} was elected mayor of {s}", "in {s} they chose {v} as mayor",
              "{s} is governed by {v}"),
             ("Who is mayor of {s}?", "Whom did they choose as mayor in {s}?", "By whom is {s} governed?"),
             "the mayor of {s} is", "Of which town is {v} the mayor?"),
    Relation("place", "code", "postcode",
             ("letters to {s} need the postcode {v}", "the postcode of {s} is {v}", "{v} is written on letters to {s}",
              "mail for {s} is sorted under {v}"),
             ("What postcode has {s}?", "Under what is mail for {s} sorted?", "What goes on letters to {s}?"),
             "the postcode of {s} is", "Which town has the postcode {v}?"),
    Relation("record", "person", "author",
             ("{s} was written by {v}", "{v} signed {s}", "the hand in {s} is that of {v}", "{s} is due to {v}"),
             ("Who wrote {s}?", "Whose hand is it in {s}?", "By whom was {s} signed?"),
             "{s} was written by", "Which record was written by {v}?"),
    Relation("record", "number", "sheets",
             ("{s} runs to {v} sheets", "there are {v} sheets in {s}", "they counted {v} sheets in {s}",
              "{s} takes up {v} sheets"),
             ("To how many sheets does {s} run?", "How many sheets did they count in {s}?", "How long is {s}, in "
              "sheets?"),
             "the number of sheets in {s}:", "Which record runs to {v} sheets?"),
    Relation("record", "code", "shelf",
             ("{s} stands on shelf {v}", "{s} was put back on shelf {v}", "look for {s} on shelf {v}",
              "shelf {v} holds {s}"),
             ("On which shelf does {s} stand?", "Where should one look for {s}, on what shelf?", "Which shelf holds "
              "{s}?"),
             "{s} stands on shelf", "Which record stands on shelf {v}?"),
    Relation("record", "date", "date_of_closing",
             ("{s} was closed on {v}", "on {v} they closed {s}", "nothing was added to {s} after {v}",
              "the last entry in {s} bears the date {v}"),
             ("When was {s} closed?", "After what day was nothing added to {s}?", "Which date has the last entry in "
              "{s}?"),
             "{s} was closed on", "Which record was closed on {v}?"),
)  # fmt: skip

REPEATED = (
    Relation("person", "place", "journey",
             ("{s} went to {v}", "{s} spent a week in {v}", "{s} was seen at {v}", "{s} wrote a letter from {v}"),
             ("To which places did {s} go?", "Where was {s}, in every place that is told of?",
              "Which towns did {s} see?"),
             "the journeys of {s} led to", count="To how many places did {s} go?"),
    Relation("person", "thing", "sale",
             ("{s} sold {v}", "{s} gave up {v} for money", "{v} was bought of {s}", "{s} put {v} on the market"),
             ("What did {s} sell?", "Which objects were bought of {s}?", "What has {s} put on the market?"),
             "sold by {s}:", count="How many objects did {s} sell?"),
    Relation("place", "person", "guest",
             ("{v} stayed at the inn of {s}", "the inn of {s} had {v} as a guest", "{v} took a room in {s}",
              "{s} saw {v} among its guests"),
             ("Who stayed in {s}?", "Which guests did the inn of {s} have?", "Who took a room in {s}?"),
             "guests in {s}:", count="How many guests were there in {s}?"),
    Relation("record", "person", "witness",
             ("{v} is heard as a witness in {s}", "{s} has a statement by {v}", "what {v} swore stands in {s}",
              "{v} testified, as {s} shows"),
             ("Who is heard as a witness in {s}?", "Whose statements does {s} have?", "Who testified, by {s}?"),
             "witnesses in {s}:", count="How many witnesses are heard in {s}?"),
    Relation("place", "dish", "speciality",
             ("in {s} they serve {v}", "one of the things to eat in {s} is {v}", "{s} prides itself on its {v}",
              "travellers to {s} praise the {v}"),
             ("What is there to eat in {s}?", "Which dishes do they serve in {s}?", "On what does {s} pride itself, "
              "in the kitchen?"),
             "served in {s}:", count="How many dishes of {s} are named?"),
)  # fmt: skip
"""Relations of which a subject may have several values."""

LONG = (
    Relation("thing", "serial", "serial_number",
             ("{s} bears the serial number {v}", "the serial number of {s} is {v}", "into {s} somebody has stamped {v}",
              "{v} is stamped into {s}"),
             ("What is the serial number of {s}?", "What has somebody stamped into {s}?", "Which serial number does "
              "{s} bear?"),
             "the serial number of {s} is", "Which object bears the serial number {v}?"),
    Relation("person", "serial", "licence",
             ("the licence of {s} reads {v}", "{s} was given the licence {v}", "{v} is the licence that {s} holds",
              "{s} has the licence {v}, in full"),
             ("How does the licence of {s} read?", "Which licence does {s} hold?", "What licence was given to {s}?"),
             "the licence of {s} reads", "Who holds the licence {v}?"),
    Relation("record", "serial", "checksum",
             ("the checksum of {s} is {v}", "{s} was sealed with the checksum {v}", "whoever adds up {s} comes to {v}",
              "{v} is noted as the checksum of {s}"),
             ("What is the checksum of {s}?", "To what does one come who adds up {s}?", "Which checksum is noted for "
              "{s}?"),
             "the checksum of {s} is", "Which record has the checksum {v}?"),
    Relation("place", "serial", "cable_address",
             ("telegrams to {s} are addressed {v}", "the cable address of {s} is {v}",
              "whoever cables to {s} writes {v}", "{v} is the cable address of {s}"),
             ("How are telegrams to {s} addressed?", "What is the cable address of {s}?", "What does one write who "
              "cables to {s}?"),
             "the cable address of {s} is", "Which town has the cable address {v}?"),
)  # fmt: skip
"""Relations whose values take dozens of tokens to write down."""


@dataclass(frozen=True)
class Chain:
    """Links from one term {s} to the next {v}, to be followed.

    says: sentences that state a link. asks: questions for the term that is {n} links on. ends: for the last one. lists:
    for all terms behind {s}, in their order.
    """

    term: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    ends: tuple[str, ...]
    lists: tuple[str, ...]


CHAINS = (
    Chain("person",
          ("{s} takes orders from {v}", "{v} is the superior of {s}", "{s} must report to {v}", "over {s} is {v}"),
          ("Go up {n} ranks from {s}: whom do you reach?", "Who is {n} ranks over {s}?"),
          ("Over {s}, who has the highest rank?", "Going up from {s} as far as one can, whom does one reach?"),
          ("Who is over {s}, rank by rank, up to the highest?", "Name everybody over {s}, one rank after another.")),
    Chain("person",
          ("{s} handed the parcel to {v}", "from {s} the parcel went to {v}", "{v} took the parcel from {s}",
           "next after {s} it was {v} who held the parcel"),
          ("The parcel was with {s}; after {n} more hands, who held it?", "Who had the parcel {n} hands after {s}?"),
          ("The parcel left {s}; with whom did it stay?", "Who was the last to hold the parcel that {s} had?"),
          ("Through whose hands did the parcel go after {s}, in turn?", "Name all who held the parcel after {s}.")),
    Chain("thing",
          ("{s} lies inside {v}", "they had put {s} into {v}", "{v} contains {s}", "to get at {s} one must open {v}"),
          ("Around {s} there are others; which is number {n} from within?", "Which is number {n} of those that one "
           "must open to get at {s}, counted from {s}?"),
          ("In which object, the outermost one, does {s} lie?", "To get at {s}, what must one open before all else?"),
          ("What is around {s}, from within outwards?", "Name all that one must open to get at {s}, the innermost "
           "before the others.")),
    Chain("record",
          ("{s} was superseded by {v}", "{v} takes the place of {s}", "instead of {s} see {v}",
           "what stood in {s} now stands in {v}"),
          ("Follow {s} through {n} replacements: where does one end?", "What took the place of {s}, {n} times on?"),
          ("Which one is in force today in place of {s}?", "Follow {s} as far as it goes: where does one end?"),
          ("What took the place of {s}, one after the other?", "Name all by which {s} was replaced, in turn.")),
    Chain("place",
          ("from {s} the road runs to {v}", "the next halt after {s} is {v}", "whoever leaves {s} comes to {v}",
           "{v} follows {s} along the road"),
          ("Starting at {s}, where is one after {n} halts?", "Which is halt number {n} on the road from {s}?"),
          ("Where does the road from {s} end?", "Starting at {s} and going on to the end, where does one arrive?"),
          ("Which halts lie on the road from {s}, in their order?", "Name every halt on the road from {s}, to its "
           "end.")),
)  # fmt: skip
