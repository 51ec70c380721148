"""Sharing through the Hub: the real client, in a process of its own, against a Hub on this machine (`hub_server`)."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bundled import ASSETS, shallow_clip
from fresh import Parent
from hub_server import File, HubServer
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModel, PeftModel, get_peft_model
from small_classifier import contents, raises
from small_clip import perturb
from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments
from transformers.image_utils import httpx

from sep_peft import CardDetails, Score, SEPClassifier, SEPConfig
from sep_peft.classifier.sharing import push_folder
from sep_peft.classifier.whitened import Whitening
from sep_peft.cli.app import main


IMAGE = sorted((ASSETS / "caltech101" / "test" / "cup").iterdir())[0]
NAMES = ["cup", "lamp", "umbrella"]
BASE, REPO, TOKEN = "ann/clip-small", "ann/household", "hf_ann"
BY_TRAINER = "ann/by-trainer"
TOKENS = {TOKEN: "ann", "hf_bob": "bob"}
FILES = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "sep_classes.json"]
DETAILS = CardDetails(shots=16, scores=[Score("Caltech 101", 61.7, 36.1)], license="mit")


# functions that run in the client's process, which never logged in: tokens are arguments


def make_classifier(base: str = BASE, names=tuple(NAMES)) -> SEPClassifier:
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(base, token=TOKEN)
    config = SEPConfig.published(num_text_prompts=3, fusion_rank=2, share_fusion=True, fusion_hidden_size=8)
    model = get_peft_model(CLIPModel.from_pretrained(base, token=TOKEN), config)
    perturb(model)
    return SEPClassifier.from_class_names(model, processor, names, template="an image of a {}.").eval()


def push_all_parts_and_then_few(repo: str, subfolder: str | None) -> tuple[list[str], list]:
    """What was there after a push with every part that a folder may hold, and the prediction of one without them."""
    classifier, place = make_classifier(), {"subfolder": subfolder, "token": TOKEN}
    classifier.keep_prototypes(1.5)
    classifier.whitening = Whitening(torch.zeros(128), torch.eye(128))
    classifier.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    classifier.push_to_hub(repo, CardDetails(confusion=b"PNG"), save_processor=True, **place)
    before = HfApi(token=TOKEN).list_repo_files(repo)
    plain = make_classifier()
    HfApi(token=TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id=repo)
    plain.push_to_hub(repo, delete_patterns="*.txt", **place)
    return before, plain.predict(IMAGE)


def base_model() -> CLIPModel:
    return CLIPModel.from_pretrained(BASE, token=TOKEN)


def embedding(model) -> list[float]:
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixel_values).pooler_output[0].tolist()


def push_base() -> None:
    HfApi(token=TOKEN).create_repo(BASE, private=True)
    HfApi(token=TOKEN).upload_folder(repo_id=BASE, folder_path=shallow_clip(2))


def push(
    repo: str = REPO, details: CardDetails | None = DETAILS, base: str = BASE, names=tuple(NAMES), **options
) -> dict:
    classifier = make_classifier(base, names)
    address = classifier.push_to_hub(repo, details, **{"private": True, "token": TOKEN} | options)
    return {
        "address": str(address),
        "prediction": classifier.predict(IMAGE),
        "embedding": embedding(classifier.model),
        "base embedding": embedding(base_model()),
    }


def push_by_trainer(folder: str) -> list[float]:
    """One step of Trainer that leaves its checkpoint and its result on the Hub; the classifier's embedding after it."""
    HfApi(token=TOKEN).create_repo(BY_TRAINER, private=True)
    HfApi(token=TOKEN).create_branch(BY_TRAINER, branch="trained")
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        save_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=BY_TRAINER,
        hub_token=TOKEN,
        hub_private_repo=True,
        hub_strategy="checkpoint",
        hub_always_push=True,
        hub_revision="trained",
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    samples = [{"pixel_values": image, "labels": label} for label, image in enumerate(images)]
    classifier = make_classifier()
    trainer = Trainer(classifier.train(), arguments, train_dataset=samples)
    trainer.train()
    trainer.push_to_hub(revision="trained")
    return embedding(classifier.eval().model)


def predict(repo: str = REPO, with_model: bool = False, **options) -> list:
    options = {"token": TOKEN} | options
    if not with_model:
        return SEPClassifier.from_pretrained(repo, **options).predict(IMAGE)
    processor = AutoProcessor.from_pretrained(BASE, token=TOKEN)
    return SEPClassifier.from_pretrained(repo, model=base_model(), processor=processor, **options).predict(IMAGE)


def predict_by_a_second_adapter(**options) -> dict:
    first = make_classifier(names=("crab",))
    before = embedding(first.model)
    loaded = SEPClassifier.from_pretrained(REPO, model=first.model, adapter_name="second", token=TOKEN, **options)
    loaded.processor = first.processor
    prediction = loaded.predict(IMAGE)
    first.model.set_adapter("default")
    return {"prediction": prediction, "unchanged": embedding(first.model) == before}


def save(folder: Path, details: CardDetails | None = None, base: str = BASE, **options) -> list:
    """Save a classifier that tells the same as `push` shares; its prediction."""
    classifier = make_classifier(base, **options)
    classifier.save_pretrained(folder, details)
    return classifier.predict(IMAGE)


def command(*arguments) -> tuple[int, str, str]:
    """Exit code and output of ``sep-peft``."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def embed_with_peft(auto: bool, **options) -> list[float]:
    options = {"token": TOKEN} | options
    return embedding(
        AutoPeftModel.from_pretrained(REPO, **options)
        if auto
        else PeftModel.from_pretrained(base_model(), REPO, **options)
    )


def embed_with_transformers() -> list[float]:
    model = base_model()
    model.load_adapter(REPO, adapter_kwargs={"token": TOKEN})
    return embedding(model)


def live_in_transformers() -> dict:
    """What transformers' own adapter methods do with it."""
    model = base_model()
    model.load_adapter(REPO, adapter_kwargs={"token": TOKEN})
    seen: dict = {"active": [model.active_adapters()]}
    model.add_adapter(
        SEPConfig.published(num_text_prompts=1, num_vision_prompts=2, fusion="none"), adapter_name="second"
    )
    perturb(model, "second")
    seen["second"] = embedding(model)
    model.set_adapter("default")
    seen["back"] = embedding(model)
    seen["active"].append(model.active_adapters())
    model.delete_adapter("second")
    seen["after deletion"] = embedding(model)
    model.disable_adapters()
    seen["disabled"] = embedding(model)
    return seen


def push_plain(repo: str) -> None:
    make_classifier().model.push_to_hub(repo, private=True, token=TOKEN)


def download(repo: str, name: str, **options) -> None:
    hf_hub_download(repo, name, **{"token": TOKEN} | options)


def upload(name: str, content: str) -> None:
    HfApi(token=TOKEN).upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id=REPO)


def predict_in_small_chunks(**options) -> list:
    """The client forgets what it has of a chunk when the line goes dead, so chunks must be smaller than the file."""
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 512
    return predict(**options)


# the two sides


@pytest.fixture(scope="module")
def hub():
    with HubServer(TOKENS) as server:
        yield server


def environment_of(hub: HubServer, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@contextmanager
def environment(**values: str):
    """Environment variables for processes that start in the block."""
    before = dict(os.environ)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def attempt(function, args, options) -> tuple:
    torch.set_num_threads(1)
    try:
        return function(*args, **options), None
    except Exception as error:  # the client's errors cannot be pickled
        return None, [type(error).__name__, str(error)]


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Runs one of the functions above in the client's process and returns its result and its error."""
    with environment(**environment_of(hub, tmp_path_factory.mktemp("home"))):
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(int).result(timeout=300)  # the process starts with this environment
    with pool:
        yield lambda function, *args, **options: pool.submit(attempt, function, args, options).result(timeout=300)


@pytest.fixture(scope="module")
def call(client):
    """The result of a function that must not fail."""

    def run(function, *args, **options):
        result, error = client(function, *args, **options)
        assert error is None, error
        return result

    return run


@pytest.fixture(scope="module")
def pushed(call) -> dict:
    """What the classifier gave that was pushed to REPO."""
    call(push_base)
    return call(push)


def downloads(hub: HubServer, since: int) -> list[str]:
    """Contents that were sent, by path, from request number `since` on."""
    return [
        r.path
        for r in hub.requests[since:]
        if r.method == "GET" and r.path.startswith(("/storage", "/api/resolve-cache"))
    ]


# uploads


def test_trainer_pushes(hub, call, pushed, tmp_path):
    """Its draft of a card, the weights, and the last checkpoint to go on from."""
    trained = call(push_by_trainer, str(tmp_path))
    repo, files = hub.repos[BY_TRAINER], hub.files(BY_TRAINER, "trained")
    assert repo.private
    weights = [path for path in files if path.endswith(".safetensors") and "/" not in path]
    assert weights and all(files[f"last-checkpoint/{path}"] == files[path] for path in weights)
    card = ModelCard(files["README.md"].content.decode())
    assert set(card.data.tags) == {
        "sep",
        "sep_peft",
        "peft",
        "clip",
        "few-shot",
        "prompt-learning",
        "generated_from_trainer",
    }
    assert card.data.base_model == BASE
    assert len(trained) == len(pushed["embedding"]) and trained != pushed["embedding"]


def test_what_is_uploaded(hub, pushed):
    """Everything in one commit; weights in LFS, all else plain."""
    repo, files = hub.repos[REPO], hub.files(REPO)
    assert repo.private
    assert repo.messages == ["initial commit", "Upload SEP adapter"]
    assert pushed["address"] == f"{hub.url}/{REPO}/commit/{repo.branches['main']}"
    assert {name: file.lfs for name, file in files.items()} == {name: name == FILES[3] for name in FILES}
    config = json.loads(files["adapter_config.json"].content)
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("SEP", BASE)
    classes = json.loads(files["sep_classes.json"].content)
    assert (classes["names"], classes["templates"]) == (NAMES, ["an image of a {}."])


def test_card_that_is_uploaded(hub, pushed):
    data = ModelCard(hub.files(REPO)["README.md"].content.decode()).data.to_dict()
    result = data.pop("model-index")[0]
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "sep_peft",
        "license": "mit",
        "metrics": ["accuracy"],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["sep", "sep_peft", "peft", "clip", "few-shot", "prompt-learning"],
    }
    assert result["name"] == "household"
    assert result["results"][0]["metrics"] == [{"type": "accuracy", "value": 61.7, "name": "Accuracy with SEP"}]


def test_branch_and_subfolder(hub, call, pushed):
    """A branch of its own, made by the upload; what is on the main branch stays as it is."""
    main = hub.files(REPO)
    there = call(push, revision="small", subfolder="birds/first", names=("crab", "cup"))
    assert hub.files(REPO) == main
    assert set(hub.files(REPO, "small")) == {*FILES, *(f"birds/first/{name}" for name in FILES[1:])}
    place = {"revision": "small", "subfolder": "birds/first"}
    assert call(predict, **place) == there["prediction"]
    assert call(predict, with_model=True, **place) == there["prediction"]
    assert call(predict, revision="small") == pushed["prediction"]
    card = hub.files(REPO, "small")["birds/first/README.md"].content.decode()
    assert f'SEPClassifier.from_pretrained("{REPO}", subfolder="birds/first")' in card


@pytest.mark.parametrize("subfolder", [None, "birds/first"])
def test_nothing_of_an_earlier_push_is_loaded_with_a_later_one(subfolder, hub, call, pushed):
    repo, below = f"ann/parts-{subfolder is None}", f"{subfolder}/" if subfolder else ""
    before, prediction = call(push_all_parts_and_then_few, repo, subfolder)
    optional = {"sep_prototypes.safetensors", "sep_whitening.safetensors", "sep_confusion.png", "processor_config.json"}
    assert {below + name for name in optional} <= set(before)
    assert set(hub.files(repo)) == {".gitattributes", *(below + name for name in FILES[1:])} | (
        {"mine.txt"} if subfolder else set()
    )
    assert call(predict, repo, subfolder=subfolder) == prediction


def test_a_base_model_in_the_same_place_keeps_its_processor(hub, call, pushed):
    files = hub.files(BASE)
    call(push, BASE)
    assert set(hub.files(BASE)) == {*files, *FILES}
    hub.repos[BASE].commit("main", files, "as it was")


def test_a_processor_goes_with_the_adapter_that_it_came_with(hub, call, saved):
    """Of a folder without one that of its base model is shared where that is asked for."""
    given = ("push", saved, "ann/processor", "--token", TOKEN, "--quiet")
    assert call(command, *given, "--save-processor")[0] == 0
    files = hub.files("ann/processor")
    base = json.loads(hub.files(BASE)["preprocessor_config.json"].content)
    shared = json.loads(files["processor_config.json"].content)["image_processor"]
    assert shared["image_mean"] == base["image_mean"] and "tokenizer.json" in files
    assert call(command, *given)[0] == 0
    assert not {"processor_config.json", "tokenizer.json"} & set(hub.files("ann/processor"))


def test_what_the_owner_wrote_into_the_card_survives_a_second_push(hub, call, pushed):
    repo = "ann/mine"
    call(push, repo)
    card = hub.files(repo)["README.md"].content.decode()
    card = card.replace("license: mit", "license: mit\nlanguage: en").replace("\n# mine", "\n# overwritten")
    own = card.replace("<!-- sep_peft: from", "Hello.\n\n<!-- sep_peft: from", 1) + "\nImages by Ann.\n"
    branch = hub.repos[repo]
    branch.commit("main", hub.files(repo) | {"README.md": File(own.encode(), lfs=False)}, "edited by hand")
    call(push, repo, None)
    after = ModelCard(hub.files(repo)["README.md"].content.decode())
    assert after.text.startswith("\nHello.\n\n<!-- sep_peft: from")
    assert after.text.endswith("<!-- sep_peft: end mark -->\n\nImages by Ann.\n")
    assert after.text.count("# mine") == 1 and "# overwritten" not in after.text
    assert (after.data.language, after.data.license) == ("en", "mit")
    assert after.data.eval_results is None  # scores belong to the weights that they were measured with


def test_base_model_from_a_folder_is_refused_before_anything_is_sent(hub, client, pushed):
    seen, base = len(hub.requests), str(ASSETS / "clip-small")
    error = client(push, "ann/new", CardDetails(), base=base)[1]
    assert error == [
        "ValueError",
        f"The base model was loaded from {base!r}, which is no name on the Hub, so others could not load it. Pass "
        'CardDetails(base_model="user/name").',
    ]
    assert "ann/new" not in hub.repos and not [r for r in hub.requests[seen:] if r.method != "GET"]


def test_base_model_from_a_folder_with_its_name_on_the_hub(hub, call, pushed):
    """No folder of the machine that it was made on is given away."""
    folder = str(shallow_clip(2))
    call(push, "ann/named", CardDetails(base_model=BASE), base=folder)
    assert call(predict, "ann/named") == pushed["prediction"]
    for file in hub.files("ann/named").values():
        assert folder.encode() not in file.content


def test_somebody_elses_name(hub, client, pushed):
    kind, message = client(push, "ann/other", token="hf_bob")[1]
    assert kind == "HfHubHTTPError" and "403 Forbidden: You don't have the rights to create a model" in message
    assert "ann/other" not in hub.repos


# the command


@pytest.fixture(scope="module")
def saved(call, pushed, tmp_path_factory) -> Path:
    """A folder with an adapter and what else may lie in it."""
    folder = tmp_path_factory.mktemp("saved") / "my kitchen"
    call(save, folder, CardDetails(shots=16, confusion=b"PNG", scores=DETAILS.scores))
    (folder / "run").mkdir()
    (folder / "run" / "settings.json").write_text('{"data": "/home/ann"}')
    (folder / "notes.txt").write_text("mine")
    return folder


def test_the_command_shares_what_was_saved(hub, call, pushed, saved):
    before = contents(saved)
    code, out, err = call(command, "push", saved, "ann/kitchen", "--private", "--token", TOKEN, "--json", "--quiet")
    assert (code, err) == (0, "") and contents(saved) == before
    data, repo = json.loads(out), hub.repos["ann/kitchen"]
    assert (data["repo_id"], data["url"]) == ("ann/kitchen", f"{hub.url}/ann/kitchen")
    assert data["commit"] == f"{hub.url}/ann/kitchen/commit/{repo.branches['main']}"
    files = hub.files("ann/kitchen")
    assert sorted(files) == sorted([*FILES, "sep_confusion.png"]) == sorted([".gitattributes", *data["files"]])
    assert repo.private and files["sep_confusion.png"].content == b"PNG"
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.library_name, card.data.base_model) == ("sep_peft", BASE)
    assert "# my kitchen" in card.text and "| Caltech 101, test |  | 61.7 | 36.1 |" in card.text
    assert 'SEPClassifier.from_pretrained("ann/kitchen")\n' in card.text
    assert 'PeftModel.from_pretrained(base, "ann/kitchen")\n' in card.text
    assert call(predict, "ann/kitchen") == pushed["prediction"]


def test_a_second_push_removes_what_is_no_more_and_keeps_the_owner_s_words(hub, call, saved, tmp_path):
    call(command, "push", saved, "ann/again", "--token", TOKEN, "--quiet")
    files = hub.files("ann/again")
    own = files["README.md"].content.decode().replace("<!-- sep_peft: from", "Hello.\n\n<!-- sep_peft: from", 1)
    own = own.replace("library_name:", "language: en\nlibrary_name:", 1)
    changed = files | {"README.md": File(own.encode(), lfs=False), "mine.txt": File(b"mine", lfs=False)}
    hub.repos["ann/again"].commit("main", changed, "edited by hand")
    call(save, tmp_path / "new", names=("crab", "cup"))
    code, out, _ = call(command, "push", tmp_path / "new", "again", "--token", TOKEN, "--quiet")
    assert (code, out) == (0, f"{hub.url}/ann/again\n")  # a name alone is the user's own
    files = hub.files("ann/again")
    assert sorted(files) == sorted([*FILES, "mine.txt"])
    card = ModelCard(files["README.md"].content.decode())
    assert card.text.startswith("\nHello.\n\n<!-- sep_peft: from") and card.data.language == "en"
    assert 'SEPClassifier.from_pretrained("ann/again")\n' in card.text and "`crab`, `cup`" in card.text
    assert {entry["label"] for entry in call(predict, "ann/again")} == {"crab", "cup"}


def test_a_base_model_in_a_folder_is_named(hub, call, pushed, tmp_path):
    base = str(shallow_clip(2))
    call(save, tmp_path / "local", base=base)
    code, _, err = call(command, "push", tmp_path / "local", "ann/local", "--token", TOKEN, "--quiet")
    message = (
        f"The adapter names {base!r} as its base model, which is no name on the Hub, so others could not load it. Pass "
        "its name there: --base-model user/name."
    )
    assert (code, err) == (1, f"sep-peft: error: {message}\n") and "ann/local" not in hub.repos
    arguments = ["push", tmp_path / "local", "ann/local", "--token", TOKEN, "--base-model", BASE, "--quiet"]
    assert call(command, *arguments)[0] == 0
    assert call(predict, "ann/local") == pushed["prediction"]
    for file in hub.files("ann/local").values():
        assert base.encode() not in file.content
    text = hub.files("ann/local")["README.md"].content.decode()
    assert f'base = CLIPModel.from_pretrained("{BASE}")\n' in text and f"an adapter of [{BASE}](https://" in text


def broken(folder: Path, part: str) -> str:
    """Damage a saved adapter; what is said of it."""
    readme, config = folder / "README.md", folder / "adapter_config.json"
    if part == "folder":
        shutil.rmtree(folder)
        return f"There is no folder {folder}. Pass the one that an adapter was saved in."
    if part == "adapter":
        config.unlink()
        return f"{folder} has no adapter_config.json, so it holds no adapter."
    if part == "card":
        readme.unlink()
        return (
            f"{folder} has no model card, README.md. Save the adapter with SEPClassifier.save_pretrained, which writes "
            "one."
        )
    if part == "weights":
        (folder / "adapter_model.safetensors").unlink()
        return f"{folder} holds the configuration of an adapter, but no weights. Save it again."
    if part == "token":
        readme.write_text(readme.read_text() + "my key is hf_" + 30 * "a")
        return f"{readme} holds what looks like a token of the Hub. Take it out."
    if part == "place":
        readme.write_text(readme.read_text() + "Made from /home/ann/images.")
        return f"{readme} names '/home/ann/images.', a place on this machine, which others need not know. Take it out."
    raise AssertionError(part)


@pytest.mark.parametrize("part", ["folder", "adapter", "card", "weights", "token", "place"])
def test_what_is_not_pushed(part, hub, call, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    message, seen = broken(folder, part), len(hub.requests)
    code, out, err = call(command, "push", folder, "ann/none", "--token", TOKEN, "--quiet")
    assert (code, out, err) == (1, "", f"sep-peft: error: {message}\n")
    assert len(hub.requests) == seen


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ann/new",
            [],
            "The Hub does not know who you are. Log in with `hf auth login`, or pass --token with one that may write.",
        ),
        (
            "ann/new",
            ["--token", "hf_wrong"],
            "The Hub does not know who you are. Log in with `hf auth login`, or pass --token with one that may write.",
        ),
        (
            "ann/new",
            ["--token", "hf_bob"],
            "You may not write to ann/new: You don't have the rights to create a model under this namespace.",
        ),
        (
            BASE,
            ["--token", TOKEN],
            f"{BASE} holds another model (config.json, model.safetensors) already. Choose another name.",
        ),
    ],
    ids=["not logged in", "a wrong token", "somebody else's name", "another model"],
)
def test_what_the_hub_does_not_take(name, options, message, hub, call, saved):
    files = {repo: hub.files(repo) for repo in hub.repos}
    code, out, err = call(command, "push", saved, name, "--quiet", *options)
    assert (code, out, err) == (1, "", f"sep-peft: error: {message}\n")
    assert {repo: hub.files(repo) for repo in hub.repos} == files


def test_a_hub_that_cannot_be_reached(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with raises("The Hub at http://127.0.0.1:9 cannot be reached: [Errno 111] Connection refused.", OSError):
        push_folder(saved, "ann/none", token=TOKEN)


def test_a_name_that_the_hub_does_not_take(call, saved):
    code, _, err = call(command, "push", saved, "a/b/c", "--token", TOKEN, "--quiet")
    assert code == 1 and re.fullmatch(
        r"sep-peft: error: 'a/b/c' is no name that the Hub takes \(.*\)\. Pass one such as user/my-task\.\n", err
    )


# downloads


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("with_model", [False, True], ids=["by name alone", "with a model"])
def test_classifier_from_the_hub(with_model, low_cpu_mem_usage, call, pushed):
    options = {"with_model": with_model, "low_cpu_mem_usage": low_cpu_mem_usage}
    assert call(predict, **options) == pushed["prediction"]


def test_second_adapter_from_the_hub(call, pushed):
    found = call(predict_by_a_second_adapter, low_cpu_mem_usage=True)
    assert found == {"prediction": pushed["prediction"], "unchanged": True}


def test_classifier_at_a_commit(hub, call, pushed):
    call(push, "ann/twice")
    first = hub.repos["ann/twice"].branches["main"]
    second = call(push, "ann/twice", names=("crab", "cup"))
    assert call(predict, "ann/twice") == second["prediction"] != pushed["prediction"]
    assert call(predict, "ann/twice", revision=first) == pushed["prediction"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("auto", [False, True], ids=["PeftModel", "AutoPeftModel"])
def test_peft_loads_it(auto, low_cpu_mem_usage, call, pushed):
    assert call(embed_with_peft, auto, low_cpu_mem_usage=low_cpu_mem_usage) == pushed["embedding"]


def test_transformers_loads_it(call, pushed):
    assert call(embed_with_transformers) == pushed["embedding"]


def test_transformers_switches_and_deletes_it(call, pushed, own_adapters):
    seen = call(live_in_transformers)
    assert seen["active"] == [["default"], ["default"]]
    assert seen["back"] == seen["after deletion"] == pushed["embedding"]
    assert seen["second"] != pushed["embedding"]
    assert seen["disabled"] == pushed["base embedding"] != pushed["embedding"]


def test_model_pushed_by_peft_has_no_classes(call, client, pushed):
    call(push_plain, "ann/plain")
    assert client(download, "ann/plain", "sep_classes.json")[1][0] == "RemoteEntryNotFoundError"
    assert client(predict, "ann/plain")[1] == [
        "MissingClassesError",
        "ann/plain/sep_classes.json does not exist, so there are no classes to load. Save with "
        "SEPClassifier.save_pretrained, or load the adapter alone with PeftModel.from_pretrained and name the classes "
        "with SEPClassifier.from_class_names.",
    ]


@pytest.mark.parametrize(
    ("options", "kind", "status"),
    [
        ({"repo": "ann/nothing"}, "RepositoryNotFoundError", 404),
        ({"revision": "nothing"}, "RevisionNotFoundError", 404),
        ({"token": False}, "RepositoryNotFoundError", 401),
        ({"token": "hf_bob"}, "RepositoryNotFoundError", 404),
        ({"token": "hf_wrong"}, "HfHubHTTPError", 401),
    ],
    ids=["no repository", "no revision", "private, no token", "private, another's token", "wrong token"],
)
def test_what_cannot_be_had(options, kind, status, client, pushed, tmp_path):
    """With nothing in the cache, which opens without a token."""
    found, message = client(predict, cache_dir=str(tmp_path), **options)[1]
    assert found == kind and re.search(rf"\b{status}\b", message), message


def test_what_is_there_already_is_not_loaded_again(hub, call, pushed, tmp_path):
    """The ETags tell; a changed file alone comes anew."""
    options = {"with_model": True, "cache_dir": str(tmp_path)}
    start = len(hub.requests)
    assert call(predict, **options) == pushed["prediction"]
    assert len(downloads(hub, start)) == 3
    start = len(hub.requests)
    assert call(predict, **options) == pushed["prediction"]
    assert downloads(hub, start) == []
    classes = hub.files(REPO)["sep_classes.json"].content.decode()
    call(upload, "sep_classes.json", classes.replace('"cup"', '"mug"'))
    start = len(hub.requests)
    labels = {entry["label"] for entry in call(predict, **options)}
    assert labels == {"mug", "lamp", "umbrella"}
    assert len(downloads(hub, start)) == 1 and downloads(hub, start)[0].endswith("/sep_classes.json")
    call(upload, "sep_classes.json", classes)


def test_interrupted_download_goes_on_where_it_stopped(hub, call, pushed, tmp_path):
    weights = hub.files(REPO)["adapter_model.safetensors"]
    address = f"/storage/{weights.etag}"
    hub.cut_next_download(2048)
    start = len(hub.requests)
    assert call(predict_in_small_chunks, with_model=True, cache_dir=str(tmp_path)) == pushed["prediction"]
    fetched = [r for r in hub.requests[start:] if (r.method, r.path) == ("GET", address)]
    assert [(r.status, r.headers.get("Range")) for r in fetched] == [(200, None), (206, "bytes=2048-")]
    assert len(weights.content) > 4096


def test_tokens_stay_with_the_hub(hub, pushed):
    """The storage is another host and needs none."""
    requests = [r for r in hub.requests if r.path.startswith("/storage")]
    assert requests and not any("Authorization" in r.headers for r in requests)


def test_card_runs_as_printed(hub, pushed, tmp_path):
    """Every block of Python in the card, in order, in an interpreter that knows only a token and an image."""
    shutil.copy(IMAGE, tmp_path / "image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].content.decode(), re.DOTALL)
    assert len(blocks) == 2
    parent = Parent(**environment_of(hub, tmp_path / "home"), HF_TOKEN=TOKEN)
    for block, printed in zip(blocks, [f"{pushed['prediction'][:1]}\n", ""], strict=True):
        result = parent.run(block, folder=tmp_path)
        assert (result.returncode, result.stdout) == (0, printed), result.stderr
    parent.close()
