"""Multiple-choice tasks: the likeliest continuation is the answer. Contexts are those of EleutherAI's harness.

Each reads its data set's own columns, or {"query", "choices", "gold"}: the question as prepared, without "Answer:".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gptcli.eval.task import Item, Row, Shape, Task, choice_item

BLIMP_PHENOMENA = (
    "adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive animate_subject_trans "
    "causative complex_NP_island coordinate_structure_constraint_complex_left_branch "
    "coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 determiner_noun_agreement_2 "
    "determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2 "
    "determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2 "
    "determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun "
    "distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2 "
    "existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2 "
    "existential_there_subject_raising expletive_it_object_raising inchoative intransitive "
    "irregular_past_participle_adjectives irregular_past_participle_verbs irregular_plural_subject_verb_agreement_1 "
    "irregular_plural_subject_verb_agreement_2 left_branch_island_echo_question left_branch_island_simple_question "
    "matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope "
    "passive_1 passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 "
    "principle_A_domain_2 principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1 "
    "regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present sentential_negation_npi_scope "
    "sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 "
    "tough_vs_raising_2 transitive wh_island wh_questions_object_gap wh_questions_subject_gap "
    "wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap "
    "wh_vs_that_with_gap_long_distance"
)
BLIMP = BLIMP_PHENOMENA.split()


def prepared(context: Callable[[str], str]) -> Shape:
    """The shape that any of these may be brought in."""
    return Shape(
        ("query", "choices", "gold"),
        lambda row: choice_item(context(row["query"]), row["choices"], int(row["gold"])),
    )


def question(text: str) -> str:
    return text.rstrip("\n") + "\nAnswer:"


def lettered(context: str, choices: Row, answer: str) -> Item:
    """The hub's {"text": [...], "label": ["A", ...]}."""
    return choice_item(context, choices["text"], list(choices["label"]).index(answer.strip()))


def hellaswag(row: Row) -> Item:
    def clean(text: str) -> str:  # WikiHow's headings are marked in brackets
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choice_item(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


def winogrande(row: Row) -> Item:
    """Partial evaluation (Trinh & Le 2018): how likely is what follows, after each of the two?"""
    before, after = row["sentence"].split("_", 1)
    after = " " + after.strip()
    gold = int(row["answer"]) - 1
    pairs = tuple((before + option, after) for option in (row["option1"], row["option2"]))
    return Item(pairs, gold, choices=(after, after), solved="".join(pairs[gold]))


def copa(row: Row) -> Item:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
    return choice_item(f"{row['premise'].strip()[:-1]} {connector}", choices, int(row["label"]))


def blimp(row: Row) -> Item:
    """Each sentence on its own, after a space: the harness puts one before every choice."""
    sentences = (row["sentence_good"], row["sentence_bad"])
    return Item(tuple(("", " " + sentence) for sentence in sentences), 0, sentences, solved=sentences[0])


def story_cloze(row: Row) -> Item:
    context = " ".join(row[f"input_sentence_{i}"] for i in range(1, 5))
    return choice_item(context, [row["sentence_quiz1"], row["sentence_quiz2"]], int(row["answer_right_ending"]) - 1)


def children_books(row: Row) -> Item:
    """GPT-2's way: each candidate and the rest of the sentence after it, given the twenty sentences before."""
    before, after = row["question"].split("XXXXX", 1)
    context = " ".join([*row["sentences"], before.rstrip()]).rstrip()
    gold = list(row["options"]).index(row["answer"])
    pairs = tuple((context, f" {option}{after}") for option in row["options"])
    return Item(pairs, gold, tuple(option + after for option in row["options"]), solved="".join(pairs[gold]))


def boolq(row: Row) -> Item:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return choice_item(context, ["no", "yes"], int(row["label"] if "label" in row else row["answer"]))


def make(
    name: str,
    about: str,
    data: str,
    columns: str,
    item: Callable[[Row], Item],
    published: str,
    *,
    context: Callable[[str], str] = str.rstrip,
    examples: str | None = "train",
    groups: Sequence[str] = (),
) -> Task:
    """`data` without its split, which follows the last colon; `examples` names the split of k-shot."""
    shapes = (Shape(tuple(columns.split()), item), prepared(context))
    train = f"{data.rsplit(':', 1)[0]}:{examples}" if examples else None
    return Task(name, about, "choice", shapes, data, train, tuple(groups), published)


ARC = "question choices answerKey"
TASKS = [
    make(
        "hellaswag", "how does a scene go on", "hf:Rowan/hellaswag::validation",
        "activity_label ctx_a ctx_b endings label", hellaswag,
        "acc/acc_norm: GPT-2 124M .2892/.3114, 1558M .4004/.5089 (harness); GPT-3 .337 to .789",
    ),
    make(
        "piqa", "everyday physics", "hf:baber/piqa::validation", "goal sol1 sol2 label",
        lambda row: choice_item(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])),
        "acc: GPT-3 175B zero-shot .805 (paper)", context=question,
    ),
    make(
        "arc_easy", "school science", "hf:allenai/ai2_arc:ARC-Easy:test", ARC,
        lambda row: lettered(f"Question: {row['question']}\nAnswer:", row["choices"], row["answerKey"]),
        "acc: GPT-3 175B zero-shot .688 (paper, --normalize answer-context)", context=question,
    ),
    make(
        "arc_challenge", "school science, the hard part", "hf:allenai/ai2_arc:ARC-Challenge:test", ARC,
        lambda row: lettered(f"Question: {row['question']}\nAnswer:", row["choices"], row["answerKey"]),
        "acc: GPT-3 175B zero-shot .514 (paper, --normalize answer-context)", context=question,
    ),
    make(
        "winogrande", "whom does the sentence mean", "hf:allenai/winogrande:winogrande_xl:validation",
        "sentence option1 option2 answer", winogrande, "acc: GPT-3 175B zero-shot .702 (paper)",
    ),
    make(
        "copa", "cause or effect", "hf:aps/super_glue:copa:validation", "premise choice1 choice2 question label", copa,
        "acc: GPT-3 175B zero-shot .91 (paper)",
    ),
    make(
        "boolq", "yes or no, from a passage", "hf:aps/super_glue:boolq:validation", "passage question label", boolq,
        "acc: GPT-3 175B zero-shot .605 (paper)", context=question,
    ),
    make(
        "openbookqa", "elementary science", "hf:allenai/openbookqa:main:test", "question_stem choices answerKey",
        lambda row: lettered(row["question_stem"], row["choices"], row["answerKey"]),
        "acc: GPT-3 175B zero-shot .576 (paper, --normalize answer-context)",
    ),
    make(
        "storycloze", "which ending is right", "hf:LSDSem/story_cloze:2016:test",
        "input_sentence_1 input_sentence_2 input_sentence_3 input_sentence_4 sentence_quiz1 sentence_quiz2 "
        "answer_right_ending", story_cloze, "acc: GPT-3 175B zero-shot .832 (paper)", examples="validation",
    ),
    *(
        make(
            f"cbt_{kind.lower()}", f"Children's Book Test: the {noun} that was left out", f"hf:cam-cst/cbt:{kind}:test",
            "sentences question options answer", children_books, published, examples="validation",
        )
        for kind, noun, published in (
            ("CN", "common noun", "acc: GPT-2 124M .8765, 1558M .9330 (paper); 124M reproduced .8435"),
            ("NE", "name", "acc: GPT-2 124M .834, 1558M .8905 (paper); 124M reproduced .7365"),
        )
    ),
    make(
        "blimp", "grammar: the right one of two sentences, 67 phenomena", "hf:nyu-mll/blimp:{group}:train",
        "sentence_good sentence_bad", blimp, "acc: GPT-2 774M .815 (Warstadt et al. 2020)", examples=None, groups=BLIMP,
    ),
    *(
        make(
            f"blimp_{name}", "one phenomenon of blimp", f"hf:nyu-mll/blimp:{name}:train",
            "sentence_good sentence_bad", blimp, "", examples=None,
        )
        for name in BLIMP
    ),
]  # fmt: skip
