"""When the next request is admitted."""

from das_asr.runtime.pace import Pace


def pace(admission: float, step: float, steps: int) -> Pace:
    made = Pace()
    made.admitted(admission)
    made.stepped(step)
    made.completed(steps)
    return made


def test_an_idle_decoder_admits_whoever_comes():
    assert pace(admission=1.0, step=0.01, steps=20).admits(1, ages=[])


def test_without_experience_everybody_is_admitted():
    assert Pace().admits(1, ages=[0, 3])


def test_a_lone_newcomer_waits_for_an_utterance_that_ends_sooner_than_the_encoder_would():
    assert not pace(admission=1.0, step=0.01, steps=20).admits(1, ages=[10])


def test_a_crowd_does_not_wait():
    assert pace(admission=1.0, step=0.01, steps=20).admits(20, ages=[10])


def test_an_utterance_that_has_just_begun_is_not_waited_for_when_the_encoder_is_cheap():
    assert pace(admission=0.1, step=0.01, steps=20).admits(1, ages=[0])
    assert not pace(admission=0.1, step=0.01, steps=20).admits(1, ages=[15])


def test_the_more_are_held_up_the_larger_the_crowd_must_be():
    slow = pace(admission=1.0, step=0.01, steps=20)
    assert slow.admits(10, ages=[10])
    assert not slow.admits(10, ages=[10, 10])


def test_an_utterance_longer_than_usual_counts_as_nearly_done():
    assert not pace(admission=0.1, step=0.01, steps=20).admits(5, ages=[100])
    assert pace(admission=0.1, step=0.01, steps=20).admits(11, ages=[100])


def test_the_means_follow_what_is_measured():
    changing = pace(admission=1.0, step=0.01, steps=20)
    for _ in range(50):
        changing.admitted(0.01)
    assert changing.admits(1, ages=[10])
