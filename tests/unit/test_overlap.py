"""Overlap: evaluation prompts are found in training text whatever their numbers, but not by their frame."""

import pytest

from deepspec.prompts.overlap import Overlap, normalise

FERRY = "A ferry carries 12 cars and 40 passengers over the lake on every trip."


def test_normalise_drops_case_punctuation_and_numbers():
    assert normalise("The  Baker's 3.5 kg, at_once: [1, 2, -3]!") == [
        "the",
        "baker's",
        "#",
        "kg",
        "at",
        "once",
        "#",
    ]


def test_scripts_without_spaces_count_a_character_as_a_word():
    assert normalise("猫が好き 7") == ["猫", "が", "好", "き", "#"]


def test_an_evaluation_prompt_inside_a_longer_text_is_found():
    found = Overlap([FERRY], 8).hits(f"Here is a puzzle. {FERRY} How many trips?")
    assert found == "a ferry carries # cars and # passengers"


def test_other_numbers_and_punctuation_do_not_hide_a_prompt():
    assert Overlap([FERRY], 8).hits("a ferry carries 7 cars, and 9 passengers over the lake")


def test_seven_shared_words_are_no_overlap_at_n_8():
    assert Overlap([FERRY], 8).hits("A ferry carries 12 cars and 40 bicycles.") is None


def test_lists_of_numbers_are_no_overlap():
    assert Overlap(["sort [1, 2, 3, 4, 5, 6, 7, 8, 9]"], 4).hits("add [9, 8, 7, 6, 5, 4, 3, 2, 1] up") is None


def test_a_frame_that_many_prompts_share_is_no_overlap_but_their_content_is():
    frame = "Solve this and put your final answer in a box."
    stories = ["seven swans swim", "red kites rise", "old maps fade", "cold rain falls"]
    overlap = Overlap([f"{story} slowly over the {story}. {frame}" for story in stories], 6)
    assert overlap.hits(f"Something else entirely. {frame}") is None
    assert overlap.hits("Did red kites rise slowly over the red kites?") == "red kites rise slowly over the"


def test_two_evaluation_prompts_alike_do_not_make_each_other_a_frame():
    overlap = Overlap([FERRY, FERRY.replace("lake", "river")], 8)
    assert overlap.hits(FERRY)


def test_a_prompt_that_is_nothing_but_frame_still_matches_as_a_whole():
    frame = "Tell me about the sea in ten words"
    overlap = Overlap([frame, f"{frame} please", f"{frame} now", f"{frame} again"], 8)
    assert overlap.hits(f"Hello. {frame}.") == "tell me about the sea in ten words"


def test_a_short_evaluation_prompt_is_found_as_a_contiguous_whole():
    overlap = Overlap(["Which planet is hottest?"], 8)
    assert overlap.hits("I wonder: which planet is hottest, and why?") == "which planet is hottest"
    assert overlap.hits("Which small planet is hottest?") is None


def test_one_or_two_words_match_only_an_equal_prompt():
    overlap = Overlap(["Go on."], 8)
    assert overlap.hits("Why do clocks go on ticking?") is None
    assert overlap.hits("go on") == "go on"


@pytest.mark.parametrize("text", ["", "?!", "12"])
def test_empty_texts_match_nothing(text):
    assert Overlap(["", "..."], 8).hits(text) is None
