"""When the next request is admitted."""

from das_asr.runtime.pace import Pace


def pace(admission: float, step: float, steps: int, each: float = 0.0) -> Pace:
    """Of steps that take `step` seconds with one utterance, and `each` more with every other."""
    made = Pace()
    made.admitted(admission)
    for utterances in (1, 2, 3):
        made.stepped(utterances, step + each * (utterances - 1))
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


def test_where_sharing_a_step_saves_little_requests_are_served_one_after_the_other():
    shares = pace(admission=0.01, step=0.01, steps=20)
    assert shares.admits(1, ages=[0])
    assert not pace(admission=0.01, step=0.01, steps=20, each=0.008).admits(1, ages=[0])
    halves = pace(admission=0.01, step=0.01, steps=20, each=0.005)  # 20 * 0.005 saved, 0.01 + 20 * 0.005 lost
    assert not halves.admits(1, ages=[0])
    assert halves.admits(2, ages=[0])


def test_a_crowd_is_tried_even_if_sharing_seemed_to_save_nothing():
    hopeless = pace(admission=0.01, step=0.01, steps=20, each=0.02)
    assert not hopeless.admits(3, ages=[0])
    assert hopeless.admits(50, ages=[0])


def test_steps_with_more_utterances_are_tried_while_nothing_is_known_of_them():
    made = Pace()
    made.admitted(0.01)
    made.stepped(1, 0.01)
    made.completed(20)
    assert made.admits(1, ages=[0])


def test_a_slow_first_step_is_soon_forgotten():
    made = pace(admission=0.05, step=0.01, steps=20)
    made.stepped(4, 0.1)
    assert not made.admits(1, ages=[0])
    for _ in range(20):
        made.stepped(4, 0.01)
    assert made.admits(1, ages=[0])
