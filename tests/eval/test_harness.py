"""Our figures equal EleutherAI's harness: with its Hugging Face backend on the exported checkpoint, and with ours."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import ModelConfig
from gptcli.errors import UserError
from gptcli.eval.run import Options, Subject, run_task
from gptcli.eval.scorer import Scorer
from gptcli.eval.tasks import TASKS
from gptcli.exchange.transfer import export_hugging_face, import_model
from gptcli.generate import Engine
from gptcli.model import GPT
from gptcli.modeldir import load_model, open_model_dir, save_model
from gptcli.tokenizer.build import gpt2_from_files

pytest.importorskip("lm_eval")
from gptcli.eval.harness import GptcliLM, read_kwargs, run_harness

# Their task files over local rows of ours, as their own tasks state them.
CHOICE = "output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n"
BOTH = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
THEIRS = {
    "arc_easy": CHOICE + BOTH + 'doc_to_text: "{{query}}\\nAnswer:"\n',
    "piqa": CHOICE + BOTH + 'doc_to_text: "{{query}}Answer:"\n',  # these queries end in a line's end
    "copa": CHOICE + "metric_list: [{metric: acc}]\n" + 'doc_to_text: "{{query}}"\n',
    "blimp": "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_target: 0\n"
    'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\nmetric_list: [{metric: acc}]\n',
    "lambada": 'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{\' \' + continuation}}"\n'
    "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]\n",
    "wikitext": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
    "doc_to_target: !function preprocess_wikitext.wikitext_detokenizer\n"
    "process_results: !function preprocess_wikitext.process_results\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "gsm8k": "output_type: generate_until\n"
    'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
    "generation_kwargs: {until: ['Question:', '\\n'], do_sample: false, max_gen_toks: 24}\n"
    "metric_list: [{metric: exact_match}]\n",
}


@dataclass(frozen=True)
class Checkpoint:
    ours: Scorer
    exported: Path


def opened(folder: Path, exported: Path) -> Checkpoint:
    export_hugging_face(folder, exported, dtype=None, check_logits=False)
    model_dir = open_model_dir(folder)
    return Checkpoint(Scorer(Engine(load_model(model_dir), model_dir.tokenizer)), exported)


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory) -> Checkpoint:
    """A real model, of Llama's shape: its tokenizer puts a bos before every text."""
    folder = tmp_path_factory.mktemp("stories")
    import_model(str(shared_data / "weights/stories260K/stories260K.bin"), folder / "ours")
    return opened(folder / "ours", folder / "hf")


@pytest.fixture(scope="module")
def random_gpt2(shared_data: Path, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gpt2")
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, context_length=128, vocab_size=50257, init_std=0.2))
    model.init_weights(0)
    (folder / "ours").mkdir()
    tokenizer = gpt2_from_files(shared_data / "tok/gpt2")
    save_model(folder / "ours", model.config, dict(model.named_parameters()), tokenizer)
    return opened(folder / "ours", folder / "hf")


def write_theirs(shared_data: Path, folder: Path, limit: int) -> dict[str, Path]:
    """Task files named ours_TASK, and the rows that both sides read."""
    import lm_eval

    shutil.copy(Path(lm_eval.__file__).parent / "tasks/wikitext/preprocess_wikitext.py", folder)
    sources = {name: shared_data / f"eval/{name}.jsonl" for name in ("arc_easy", "piqa", "copa")}
    sources["lambada"] = shared_data / "eval/lambada_openai.jsonl"
    sources["blimp"] = shared_data / "eval/blimp/adjunct_island.jsonl"
    sources["gsm8k"] = shared_data / "sft/gsm8k_train.jsonl"
    rows = {name: path.read_text("utf-8").splitlines()[:limit] for name, path in sources.items()}
    text = (shared_data / "text/wikitext2/test.txt").read_text("utf-8")
    rows["wikitext"] = [json.dumps({"page": text[i * 3000 : (i + 1) * 3000]}) for i in range(max(2, limit // 10))]
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        head = f"task: ours_{name}\ndataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
        head += f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(head + THEIRS[name])
    return {name: folder / f"{name}.jsonl" for name in rows}


def theirs(model: Any, names: list[str], folder: Path) -> dict[str, dict[str, float]]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = [f"ours_{name}" for name in names]
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    return {
        name.removeprefix("ours_"): {k.split(",")[0]: v for k, v in row.items() if k.endswith(",none")}
        for name, row in found["results"].items()
    }


def hugging_face(exported: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=8)


def agree(checkpoint: Checkpoint, shared_data: Path, tmp_path: Path, limit: int, names: list[str]) -> None:
    files = write_theirs(shared_data, tmp_path, limit)
    expected = theirs(hugging_face(checkpoint.exported), names, tmp_path)
    adapted = theirs(GptcliLM(scorer=checkpoint.ours), names, tmp_path)
    subject = Subject(checkpoint.ours, "c", "t", {})
    for name in names:
        found = run_task(TASKS[name], subject, Options(data=[str(files[name])]))
        shared = expected[name].keys() & found.metrics.keys()
        assert shared, name
        for metric in shared:
            assert found.metrics[metric] == pytest.approx(expected[name][metric], rel=1e-3, abs=1e-6), (name, metric)
        for metric, value in expected[name].items():
            if isinstance(value, float):
                assert adapted[name][metric] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, metric)
        print(name, {metric: (found.metrics[metric], expected[name][metric]) for metric in sorted(shared)})


ALL = ["lambada", "piqa", "arc_easy", "copa", "blimp", "wikitext"]


@pytest.mark.parametrize("name", ["stories", "random_gpt2"])
def test_a_few_items_agree(name, request, shared_data, tmp_path):
    agree(request.getfixturevalue(name), shared_data, tmp_path, 12, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories", "random_gpt2"])
def test_many_items_agree(name, request, shared_data, tmp_path):
    agree(request.getfixturevalue(name), shared_data, tmp_path, 100, ALL)


@pytest.mark.slow
def test_written_answers_agree(stories, shared_data, tmp_path):
    from lm_eval.api.instance import Instance

    rows = [json.loads(line) for line in write_theirs(shared_data, tmp_path, 8)["gsm8k"].read_text().splitlines()]
    settings = {"until": ["Question:", " and"], "do_sample": False, "max_gen_toks": 24}
    requests = [Instance("generate_until", {}, (row["question"], dict(settings)), i) for i, row in enumerate(rows)]
    ours = GptcliLM(scorer=stories.ours).generate_until(requests)
    # their decoding, which has only the answer's own tokens, loses a space that begins it
    assert [text.lstrip(" ") for text in ours] == hugging_face(stories.exported).generate_until(requests)
    assert any(ours)


def test_results_are_ours(stories, shared_data, tmp_path):
    write_theirs(shared_data, tmp_path, 12)
    found = run_harness(stories.ours, ["ours_piqa", "ours_wikitext"], checkpoint="c", include=tmp_path, limit=10)
    piqa, wikitext = sorted(found, key=lambda r: r.task)
    assert piqa.metrics.keys() == {"acc", "acc_norm"}
    assert piqa.n == len(piqa.items) == 10
    assert piqa.stderr["acc"] > 0
    assert wikitext.metrics["word_perplexity"] > 1
    assert not wikitext.aggregates  # not a mean of items
    with pytest.raises(UserError, match="lm_eval has no such task"):
        run_harness(stories.ours, ["hellaswagg"], checkpoint="c")


def test_their_settings_are_read_or_refused():
    until, new, params = read_kwargs({"until": "\n", "do_sample": False, "temperature": 0.7})
    assert (until, new, params.temperature) == (("\n",), 256, 0.0)
    until, new, params = read_kwargs({"until": ["a", "b"], "max_gen_toks": 5, "temperature": 0.7, "top_p": 0.9})
    assert (until, new, params.temperature, params.top_p) == (("a", "b"), 5, 0.7, 0.9)
    with pytest.raises(UserError, match="generation_kwargs: penalty_alpha has no meaning"):
        read_kwargs({"penalty_alpha": 0.6})
