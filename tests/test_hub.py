"""The Hub: what is pushed at the end is the compact model, whole and alone, and its page tells the truth about it.

All of it is done by real clients, in processes of their own, that talk to the server in hub_server.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hub_server import Hub
from hub_worker import picture
from huggingface_hub import ModelCard
from safetensors.torch import load

ROOT = Path(__file__).parents[1]
WORKER = str(ROOT / "tests" / "hub_worker.py")
SAVED = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", ".gitattributes"}
COMPACT = SAVED | {"model.safetensors", "modeling_oto.py"}
OF_TRAINER = {"training_args.bin", "oto_widths.png", "oto_training.png"}


def client(hub, home, *command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | hub.clients | environment
    done = subprocess.run(
        [sys.executable, *command], cwd=home, env=environment | {"HF_HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after all the scenarios, and their folder."""
    folder, hub = tmp_path_factory.mktemp("pushed"), Hub()
    client(
        hub,
        folder,
        WORKER,
        str(folder),
        "end",
        "every_save",
        "stock",
        "checkpoint",
        "alone",
        "uniform",
        "image",
        "twice",
        "again",
    )
    yield SimpleNamespace(hub=hub, repos=hub.repos, folder=folder)
    hub.shutdown()
    hub.server_close()
    assert hub.unknown == []


def history(repo):
    """(message, files) of every commit but the first, which makes the repository."""
    return [*repo.commits.values()][1:]


def card(commit):
    return ModelCard(commit.files["README.md"].content.decode())


def last(repo, branch="main"):
    return repo.commits[repo.branches[branch]]


LOAD = """
import json, sys, torch, transformers as tf
from huggingface_hub import snapshot_download
from PIL import Image
if sys.argv[1] == "without":
    sys.modules["hf_oto"] = None  # import hf_oto raises
else:
    import hf_oto
answers = {}
for key, (auto, repo, settings) in json.loads(sys.argv[2]).items():
    try:
        if key.startswith("snapshot"):
            repo = snapshot_download(repo)
        model = getattr(tf, auto).from_pretrained(repo, **settings).eval()
        with torch.no_grad():
            answers[key] = model(input_ids=torch.arange(16).view(2, 8)).logits.tolist()
    except (OSError, RuntimeError) as error:
        answers[key] = f"{type(error).__name__}: {error}"
pictures = tf.pipeline("image-classification", "me/image", trust_remote_code=sys.argv[1] == "without")
scores = [answer["score"] for answer in pictures(Image.open("picture.png"))]
assert "word" in tf.AutoTokenizer.from_pretrained("me/end").get_vocab()
assert tf.GenerationConfig.from_pretrained("me/every_save").max_new_tokens == 5
print(json.dumps(answers | {"image": scores}))
"""
BERT, GPT2 = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


@pytest.mark.parametrize("hf_oto", ["with", "without"])
def test_a_fresh_process_loads_what_was_pushed(pushed, hf_oto, tmp_path):
    """With `import hf_oto`, and by trust_remote_code where hf_oto cannot be imported."""
    three_heads, early = history(pushed.repos["me/alone"])[1], history(pushed.repos["me/twice"])[0]
    sha = {id(commit): sha for repo in pushed.repos.values() for sha, commit in repo.commits.items()}
    cases = {
        "end": (BERT, "me/end", {}),
        "snapshot": (BERT, "me/end", {}),
        "every_save": (GPT2, "me/every_save", {}),
        "alone-2": (GPT2, "me/alone", {}),
        "alone-3": (GPT2, "me/alone", {"revision": sha[id(three_heads)]}),
        "checkpoint": (BERT, "me/checkpoint", {"revision": "trial"}),
        "twice": (BERT, "me/twice", {}),
        "uniform": (BERT, "me/uniform", {}),
        "early": (BERT, "me/twice", {"revision": sha[id(early)]}),
        "private": (BERT, "me/checkpoint", {"revision": "trial", "token": False}),
    }
    trust = {"trust_remote_code": True} if hf_oto == "without" else {}
    cases = {key: (auto, repo, settings | trust) for key, (auto, repo, settings) in cases.items()}
    if hf_oto == "without":
        cases["refused"] = (BERT, "me/end", {})
    picture().save(tmp_path / "picture.png")
    answers = json.loads(client(pushed.hub, tmp_path, "-c", LOAD, hf_oto, json.dumps(cases)).splitlines()[-1])
    assert "not a valid model identifier" in answers.pop("private")  # as for a repository that does not exist
    if hf_oto == "without":  # control: nothing honours the record
        assert "mismatch" in answers.pop("refused")
    assert torch.tensor(answers.pop("early")).isfinite().all()
    for key, logits in answers.items():
        assert not isinstance(logits, str), f"{key}: {logits}"
        name = "end" if key == "snapshot" else key
        assert torch.equal(torch.tensor(logits), torch.load(pushed.folder / f"{name}.pt")), key


def test_what_is_pushed_at_the_end_is_whole_and_nothing_else(pushed):
    whole = COMPACT | OF_TRAINER
    assert last(pushed.repos["me/end"]).files.keys() == whole
    assert last(pushed.repos["me/every_save"]).files.keys() == whole | {"generation_config.json"}
    assert last(pushed.repos["me/twice"]).files.keys() == whole
    assert last(pushed.repos["me/alone"]).files.keys() == COMPACT | {"generation_config.json"}
    on_branch = last(pushed.repos["me/checkpoint"], "trial").files
    assert {name for name in on_branch if "/" not in name} == whole
    images = last(pushed.repos["me/image"]).files.keys()
    assert images == whole - {"tokenizer.json", "tokenizer_config.json"} | {"preprocessor_config.json"}
    assert last(pushed.repos["me/uniform"]).files.keys() == whole - {"modeling_oto.py"}
    for name in ("end", "every_save", "twice", "alone"):
        files = last(pushed.repos[f"me/{name}"]).files
        assert json.loads(files["config.json"].content)["oto"]["version"] == 1
        assert files["modeling_oto.py"].content == (ROOT / "hf_oto" / "modeling_oto.py").read_bytes()


def test_stale_shards_are_deleted_and_only_these(pushed):
    *_, before, end = history(pushed.repos["me/every_save"])
    gone = before.files.keys() - end.files.keys()
    shards = {name for name in before.files if re.fullmatch(r"model-0000\d-of-0000\d\.safetensors", name)}
    assert len(shards) > 1 and gone == shards | {"model.safetensors.index.json"}
    assert (before.message, end.message) == ("End of training", "Delete the dense weights")
    *_, before, end = history(pushed.repos["me/checkpoint"])
    assert before.files.keys() - end.files.keys() == gone  # at the top of the branch
    assert {f"last-checkpoint/{name}" for name in gone} <= end.files.keys()  # these are to resume from


def test_pushes_during_training_say_what_they_are(pushed, tmp_path):
    during = [commit for commit in history(pushed.repos["me/every_save"]) if "progress" in commit.message]
    assert len(during) == 3 and "\n# every_save\n" in card(during[0]).text
    widths = []
    for number, commit in enumerate(during):
        text = card(commit).text
        assert "Training is not over" in text
        assert card(commit).data.tags[-2:] == ["hf_oto", "pruned"]
        is_cut = "oto" in json.loads(commit.files["config.json"].content)
        assert is_cut == ("partly cut" in text) == ("modeling_oto.py" in commit.files) != ("the dense model" in text)
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, file in commit.files.items():
            (folder / name).write_bytes(file.content)
        _, width = tf.GPT2LMHeadModel.from_pretrained(folder).transformer.h[0].mlp.c_fc.weight.shape
        assert is_cut == (width < 128)
        widths.append(width)
    assert widths == sorted(widths, reverse=True) and widths[-1] < 128
    assert "Training is not over" not in card(last(pushed.repos["me/every_save"])).text


def test_messages_and_order_are_those_of_the_stock_trainer(pushed):
    messages = {name: [commit.message for commit in history(repo)] for name, repo in pushed.repos.items()}
    assert messages["me/every_save"] == [*messages["me/stock"], "Delete the dense weights"]
    assert messages["me/twice"] == messages["me/stock"]  # nothing is stale if the file names are the same
    assert messages["me/end"] == ["All of it"]
    during = [f"Training in progress, step {step}{what}" for step in (8, 16, 24) for what in ("", ", checkpoint")]
    assert messages["me/checkpoint"] == [*during, "Model save", "Delete the dense weights"]
    repo = pushed.repos["me/checkpoint"]
    assert repo.private and last(repo).message == "initial commit"  # all went to the branch
    assert not pushed.repos["me/end"].private


def test_the_card_keeps_the_metadata_and_shows_the_figures_that_exist(pushed):
    end = card(last(pushed.repos["me/end"]))
    assert end.data.tags == ["mine", "generated_from_trainer", "hf_oto", "pruned"]
    assert (end.data.license, end.data.base_model, end.data.datasets) == ("mit", "me/base", ["some_data"])
    assert [result.metric_type for result in end.data.eval_results] == ["accuracy"]
    assert "](oto_widths.png)" in end.text and "](oto_training.png)" in end.text
    assert ".png" not in card(history(pushed.repos["me/twice"])[0]).text
    assert re.search(r"eval_accuracy: (0.\d+ full with zeros, )?[01].\d+ compact", end.text)
    assert "eval_accuracy" not in card(last(pushed.repos["me/twice"])).text
    assert (
        "- optimizer: DHSPG of hf_oto around torch.optim.sgd.SGD with {'lr': 0.001, 'weight_decay': [0.1, 0.0]}\n"
        in end.text
    )
    assert "- optimizer: DHSPG of hf_oto around torch.optim.adamw.AdamW" in card(last(pushed.repos["me/twice"])).text
    assert "- optimizer: Use " in card(last(pushed.repos["me/stock"])).text  # control: what it replaces
    assert "- optimizer: Use " not in end.text
    assert re.search(r"zeroed full against compact: (\d\.\de-\d\d|0\.0e\+00) in double, ", end.text)
    assert "ignore_mismatched_sizes" in end.text
    weights = load(last(pushed.repos["me/end"]).files["model.safetensors"].content)
    left = sum(w.numel() for w in weights.values()) / 1000
    share = re.search(rf"parameters +34\.6k +{left:.1f}k +(\d\d) %", end.text).group(1)
    assert abs(int(share) - left / 0.346) < 0.7  # 34.6 is rounded too
    plain = card(last(pushed.repos["me/uniform"])).text  # no record: nothing but transformers is needed
    assert "hf_oto\n" not in plain and "trust_remote_code" not in plain and "ignore_mismatched" not in plain
    assert 'BertForSequenceClassification.from_pretrained("me/uniform")' in plain and "uniform=True," in plain
    for commit in history(pushed.repos["me/checkpoint"]):
        assert "hf_of_me" not in str(card(commit))


def test_the_arguments_on_the_card_make_the_same_model(pushed):
    again, end, other = (torch.load(pushed.folder / f"{name}.pt") for name in ("again", "end", "checkpoint"))
    assert torch.equal(again, end) and not torch.equal(other, end)


def test_the_code_on_the_card_runs(pushed, tmp_path):
    """Three ways to load: each block in a process of its own, and the stock checkpoint of the last one here."""
    text = card(last(pushed.repos["me/end"])).text
    with_hf_oto, without, dense, arguments = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert arguments.startswith("OTOTrainingArguments(")
    show = "\nimport torch; print(model.eval()(input_ids=torch.arange(16).view(2, 8)).logits.tolist())"
    one = client(pushed.hub, tmp_path, "-c", with_hf_oto + dense + show)
    two = client(pushed.hub, tmp_path, "-c", "import sys; sys.modules['hf_oto'] = None\n" + without + show)
    expected = torch.load(pushed.folder / "end.pt")
    for out in (one, two):
        assert torch.equal(torch.tensor(json.loads(out.splitlines()[-1])), expected)
    assert "oto" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=torch.arange(16).view(2, 8)).logits, expected, atol=1e-6)


@pytest.mark.slow
def test_of_several_ranks_one_pushes(pushed, tmp_path):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    client(pushed.hub, tmp_path, *ranks, WORKER, str(tmp_path), "ranks")
    messages = [commit.message for commit in history(pushed.repos["me/ranks"])]
    expected = [commit.message for commit in history(pushed.repos["me/every_save"])]
    assert messages == [message for message in expected if "24" not in message]
    assert last(pushed.repos["me/ranks"]).files.keys() == COMPACT | OF_TRAINER
