import labelled
import pytest
from labelled import LOCATION, ORGAN, STATE, frame

from surgery_r1_jax import tracecheck, vocabulary
from surgery_r1_jax.records import Record
from surgery_r1_jax.tracecheck import Reason

ANSWER, BOX, BOTH = range(3)
FORCEPS, SCISSORS = "bipolar_forceps", "monopolar_curved_scissors"


def record(kind, name, topic=None, pixels=(0, 0, 1280, 1024)):
    box = tuple(edge / side for edge, side in zip(pixels, (1280, 1024) * 2, strict=True))
    return labelled.record(kind, name, topic, box)


AT, BY, TISSUE = (10, 20, 110, 220), (600, 500, 900, 800), (300, 200, 700, 600)
KIDNEY = record(ORGAN, "kidney", pixels=TISSUE)
IDLE, LEFT = record(STATE, "Idle", FORCEPS, AT), record(LOCATION, "left-top", FORCEPS, AT)
CUTTING, RIGHT = record(STATE, "Cutting", SCISSORS, BY), record(LOCATION, "right-bottom", SCISSORS, BY)
SCENE = frame(KIDNEY, IDLE, CUTTING, LEFT, RIGHT)
START = "The bipolar forceps rest, idle, at the left top of the kidney. "


def judged(text, about=CUTTING, want=ANSWER, whole=SCENE, **options):
    return tracecheck.check(text, whole, about, want=want, **options)


@pytest.mark.parametrize(
    "text",
    [
        START + "The scissors cut. So the answer is Cutting.",
        START + "The monopolar curved scissors at right-bottom of the kidney is Cutting.",
        START + "With open jaws the scissors work on pale tissue at right-bottom of the kidney: Cutting.",
        START + "Scissors: at the bottom right, cutting [600, 500, 900, 800]. The answer is therefore Cutting!",
        START + "In [600, 500, 900, 800] the monopolar_curved_scissors is seen. Its state is Cutting.",
        "Two instruments: the bipolar_forceps and the monopolar_curved_scissors.\nThe scissors are Cutting.",
        "Cutting is what the scissors do; the forceps are idle at top left. The answer is Cutting.",
        "The kidney [300, 200, 700, 600] lies in the middle. The forceps (Idle) wait. The scissors (Cutting) work.",
    ],
)
def test_free_words_that_the_labels_bear_out_pass(text):
    assert judged(text) == Reason.OK


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (START + "The scissors grasp. So the answer is Cutting.", Reason.STATE),
        (START + "It is Cutting. The scissors are Cutting.", Reason.STATE),
        (START + "The scissors are at the top, Cutting.", Reason.LOCATION),
        (START + "The scissors are at the left. They cut.", Reason.NOT_READABLE),
        (START + "The scissors are above the kidney. So the answer is Cutting.", Reason.NOT_READABLE),
        (START + "The scissors are not Idle. The scissors are Cutting.", Reason.NOT_READABLE),
        (START + "The stapler is Cutting. The scissors are Cutting.", Reason.INSTRUMENT),
        (START + "The prograsp forceps are Idle. The scissors are Cutting.", Reason.INSTRUMENT),
        (START + "Three instruments are here. The scissors are Cutting.", Reason.COUNT),
        (START + "A single tool, the scissors, is Cutting.", Reason.COUNT),
        ("The bipolar_forceps and the bipolar_forceps are here. The scissors are Cutting.", Reason.COUNT),
        (START + "The scissors [600, 500, 900, 803] are Cutting.", Reason.BOX),
        (START + "The scissors within [300, 200, 700, 600] are Cutting.", Reason.BOX),
        (START + "The kidney [600, 500, 900, 800] is seen. The scissors are Cutting.", Reason.BOX),
        (START + "The scissors [600, 500, 900] are Cutting.", Reason.NOT_READABLE),
        (START + "The scissors [600, 500, 900, 800 are Cutting.", Reason.NOT_READABLE),
        ("The scissors are Cutting. So the answer is Cutting.", Reason.LEFT_OUT),
        ("The forceps and the scissors are Cutting.", Reason.STATE),
        ("The forceps at left-top and the scissors at right-bottom are Idle. The answer is Cutting.", Reason.STATE),
        ("The scissors are Cutting. " + START, Reason.OTHER_ANSWER),
        (START + "The scissors are at right-bottom of the kidney.", Reason.OTHER_ANSWER),
        (START + "The scissors are at right-bottom. The answer is Idle.", Reason.STATE),
        (START + "The scissors are </think> Cutting.", Reason.NOT_PLAIN),
        (START + "The sciss\u043ers are Cutting.", Reason.NOT_PLAIN),
        ("", Reason.NOT_PLAIN),
        (START * 200, Reason.NOT_PLAIN),
    ],
)
def test_what_the_labels_do_not_bear_out_is_refused_by_its_reason(text, reason):
    assert judged(text) == reason


def test_a_text_must_end_with_what_is_wanted():
    said = START + "The scissors are Cutting"
    assert judged(said + ", in [600, 500, 900, 800].", want=BOTH) == Reason.OK
    assert judged(said + ".", want=BOTH) == Reason.OTHER_BOX
    assert judged("The scissors [600, 500, 900, 800] are Cutting. " + START, want=BOX) == Reason.OTHER_BOX
    assert (
        judged("The scissors [600, 500, 900, 800] wait. " + START + "The answer lies in [10, 20, 110, 220].")
        == Reason.BOX
    )
    assert judged("The scissors are there. " + START + "[600, 500, 900, 800] holds the answer.", want=BOX) == Reason.OK
    assert judged(START + "Also the scissors. The organ is the kidney.", KIDNEY) == Reason.OK
    assert judged("The organ is the kidney. " + START + "Also the scissors.", KIDNEY) == Reason.OTHER_ANSWER


def test_an_instrument_and_a_state_differ_by_their_case_alone():
    sucking = record(STATE, "Suction", "suction", AT)
    whole = frame(sucking)
    assert judged("The suction is in the state Suction.", sucking, whole=whole) == Reason.OK
    assert judged("Suction is the state of the suction.", sucking, whole=whole) == Reason.OK
    idle = record(STATE, "Idle", "suction", AT)
    assert judged("The suction is Idle.", idle, whole=frame(idle)) == Reason.OK
    assert judged("The suction is Suction. It is Idle.", idle, whole=frame(idle)) == Reason.STATE


def test_which_of_two_instruments_of_one_name_is_meant_must_be_told_right():
    busy, right = record(STATE, "Grasping", FORCEPS, BY), record(LOCATION, "right-top", FORCEPS, BY)
    whole = frame(IDLE, LEFT, busy, right)
    one = "The bipolar_forceps at left-top is Idle. "
    assert judged(one + "The bipolar_forceps at right-top is Grasping.", busy, whole=whole) == Reason.OK
    assert judged(one + "The bipolar_forceps at left-top is Grasping.", busy, whole=whole) == Reason.LOCATION
    assert judged(one + "The bipolar_forceps [10, 20, 110, 220] is Grasping.", busy, whole=whole) == Reason.BOX
    assert judged(one + "Two tools. The answer is Grasping.", busy, whole=whole) == Reason.OK


def test_a_location_of_the_image_is_not_one_of_the_organ():
    text = START + "The scissors are Cutting."
    assert judged(text, reference="organ") == Reason.OK
    assert judged(text, reference="image") == Reason.LOCATION


def test_nothing_is_claimed_that_no_label_holds():
    whole = frame(KIDNEY, IDLE)
    assert judged("The bipolar_forceps is Idle.", IDLE, whole=whole) == Reason.OK
    assert judged("The bipolar_forceps at left-top is Idle.", IDLE, whole=whole) == Reason.LOCATION
    assert judged("The bipolar_forceps is Idle.", IDLE, whole=frame(IDLE)) == Reason.OK
    assert judged("The bipolar_forceps near the kidney is Idle.", IDLE, whole=frame(IDLE)) == Reason.ORGAN


def test_an_answer_of_another_kind_must_be_in_the_text():
    free = Record("Is the view clear?", "smoke", IDLE.box, len(vocabulary.KINDS), None, "labels.txt:1")
    assert judged("The picture is grey. The answer is smoke.", free, whole=frame(free)) == Reason.OK
    assert judged("The picture is grey. The answer is clear.", free, whole=frame(free)) == Reason.OTHER_ANSWER
